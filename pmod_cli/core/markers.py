"""The file in each folder that this program writes, which says so, and which names in it are its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pmod_cli import __version__
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError

MARKER = ".pmod.json"
SUCCESSOR = ".pmod-successor"  # in a successor until the exchange: a staging folder without it is the old one
LOCK = ".lock"  # in a folder whose parent takes no new names, as that of a mounted disk; else beside it
WRITERS = {  # by kind
    "checkpoint": "pmod convert",
    "run": "pmod finetune",
    "evaluation": "pmod eval",
    "comparison": "pmod eval --compare",
    "data": "pmod",
}
_IGNORED = {SUCCESSOR, LOCK, ".DS_Store"}


def mark(folder: Path, kind: str, names: Iterable[str] = ()) -> None:
    """Say that this program writes `folder`, and that entries of these names in it are its own too."""
    names = sorted(_names(folder) | set(names))
    write_json(folder / MARKER, {"schema_version": 1, "kind": kind, "made_by": f"pmod {__version__}", "names": names})


def kind_of(folder: Path) -> str | None:
    """The kind that the marker of a folder says; None where there is none."""
    found = _read(folder)
    return found["kind"] if found else None


def is_new(target: Path) -> bool:
    """Whether there is nothing, or an empty folder.

    Raises:
        PmodError: it is a file.
    """
    if target.exists() and not target.is_dir():
        raise PmodError(f"{target} is a file", hint="choose a folder with `out`")
    return not target.is_dir() or all(path.name in _IGNORED for path in target.iterdir())


def require_kind(target: Path, kind: str) -> None:
    """Refuse a folder that another command wrote, or none of ours.

    Raises:
        PmodError: its marker does not say `kind`.
    """
    if (found := kind_of(target)) is None:
        raise PmodError(
            f"{target} was not written by {WRITERS[kind]}: it lacks {MARKER}",
            hint="choose another folder with `out`; if an older pmod wrote it, remove it yourself",
        )
    if found != kind:
        raise PmodError(
            f"{target} was written by {WRITERS.get(found, found)}, not by {WRITERS[kind]}",
            hint="choose another folder with `out`",
        )


def foreign(folder: Path) -> Iterator[str]:
    """Names in a marked folder that this program did not write; folders with a marker of their own are looked into."""
    names = _names(folder) | _IGNORED | {MARKER}
    for path in sorted(folder.iterdir()):
        if path.name in names or is_leftover(path, names):
            continue
        if path.is_dir() and not path.is_symlink() and kind_of(path) is not None:
            yield from (f"{path.name}/{name}" for name in foreign(path))
        else:
            yield path.name


def is_leftover(path: Path, names: Iterable[str] = (MARKER,)) -> bool:
    """Whether this is the temporary name or the lock of one of `names` or of a marked folder, left by a killed run."""
    of, _, ending = path.name[1:].rpartition(".")
    ours = path.name.startswith(".") and ending in ("tmp", "lock")
    return ours and (of in names or kind_of(path.with_name(of)) is not None)


def _read(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return found if isinstance(found["kind"], str) and isinstance(found["names"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _names(folder: Path) -> set[str]:
    found = _read(folder)
    return {name for name in found["names"] if isinstance(name, str)} if found else set()
