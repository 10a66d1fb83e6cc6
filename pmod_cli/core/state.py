"""The one thing that commands share between runs: the checkpoint that was written last in this directory."""

from __future__ import annotations

import os
from pathlib import Path

from pmod_cli.core import folders, output
from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.errors import PmodError

CURRENT = Path(".pmod", "current")


def default_model() -> Path | None:
    """$PMOD_MODEL, else the checkpoint named in ./.pmod/current, else None.

    Raises:
        PmodError: the checkpoint that one of them names is gone. Taking another instead would be a surprise.
    """
    for source, name in (("$PMOD_MODEL", os.environ.get("PMOD_MODEL")), (str(CURRENT), _read_current())):
        if not name:
            continue
        path = Path(name).expanduser()
        folders.heal(path)
        if not path.is_dir():
            raise PmodError(
                f"{source} names the checkpoint {name}, and there is no such folder",
                hint="name another with `model`, or write one: pmod convert tiny-llava-next",
            )
        return path
    return None


def record_current(path: Path) -> None:
    """Make `path` the default of --model in this directory.

    A directory that cannot be written gives a warning only: what was made is made, wherever the command was called.
    """
    try:
        CURRENT.parent.mkdir(exist_ok=True)
        write_bytes(CURRENT, os.fsencode(f"{_relative_to_here(path)}\n"))
    except OSError as error:
        output.warn(f"{CURRENT} cannot be written here ({error.strerror}): name the model yourself: {path}")


def _read_current() -> str | None:
    try:
        return os.fsdecode(CURRENT.read_bytes()).strip("\n")
    except FileNotFoundError:
        return None


def _relative_to_here(path: Path) -> Path:
    """Relative where possible, so that a directory that is moved keeps its state."""
    absolute = path.expanduser().resolve()
    here = Path.cwd().resolve()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
