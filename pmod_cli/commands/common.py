"""What more than one command takes: options, each named, described and defaulted once, and the current model.

The current model is the one thing that commands share between runs: the checkpoint that was written last in this
directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pmod_cli.core import folders, output
from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.errors import PmodError
from pmod_cli.core.hardware import find_accelerator, require_device
from pmod_cli.core.paths import expanded

DTYPES = {name: name for name in ("auto", "bfloat16", "float16", "float32")}
DTYPES |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CURRENT = Path(".pmod", "current")


def _offline(offline: bool) -> bool:
    """Set before any heavy import and inherited by child processes: every library of the family reads these."""
    if offline:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[variable] = "1"
    return offline


def set_quiet(quiet: bool) -> bool:
    """The callback of --quiet."""
    output.set_quiet(quiet)
    return quiet


def _progress(shown: bool) -> bool:
    output.set_progress(shown)
    return shown


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise typer.BadParameter(f"{seed} is not in the range from 0 to {2**32 - 1}")
    return seed


def _device(name: str) -> str:
    if not re.fullmatch(r"(auto|cpu|cuda|mps)(:[0-9]{0,3})?", name):
        raise typer.BadParameter(f"{name!r} is not a device. Known: auto, cpu, cuda, cuda:N, mps")
    return name


def check_name(name: str, known: Iterable[str], what: str) -> str:
    """The name, if it is one of those that are known.

    Raises:
        typer.BadParameter: it is not a `what`; the known names are listed.
    """
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not a {what}. Known: {', '.join(known)}")
    return name


def one_of_these(known: Iterable[str], what: str) -> Callable[[str | None], str | None]:
    """The callback of an option that takes these names alone; an option that was not given stays None."""
    return lambda name: name if name is None else check_name(name, known, what)


def option_under(panel: str) -> partial:
    """What declares the options of one panel of a help page: `typer.Option` with the panel filled in."""
    return partial(typer.Option, rich_help_panel=panel)


ModelOpt = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="Folder, alias or hub id. (default: $PMOD_MODEL, else what convert or finetune wrote last here)",
        show_default=False,
    ),
]
RevisionOpt = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub; also NAME@REV.")
]
OfflineOpt = Annotated[
    bool,
    typer.Option("--offline", callback=_offline, is_eager=True, help="Never use the network, as HF_HUB_OFFLINE=1."),
]
CacheDirOpt = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="DIR", help="Hugging Face cache. (default: as set by HF_HOME)")
]
DeviceOpt = Annotated[
    str, typer.Option("--device", callback=_device, metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")
]
DtypeOpt = Annotated[
    str,
    typer.Option(
        "--dtype",
        callback=lambda name: DTYPES[check_name(name, DTYPES, "dtype")],
        metavar="DTYPE",
        help="auto, bfloat16, float16 or float32.",
    ),
]
SeedOpt = Annotated[
    int, typer.Option("--seed", callback=_seed, metavar="N", help="Seed of everything that is drawn, below 2**32.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
QuietOpt = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=set_quiet, is_eager=True, help="Print only the path or id of the result."),
]
ProgressOpt = Annotated[
    bool,
    typer.Option("--progress/--no-progress", callback=_progress, is_eager=True, help="Progress bars on a terminal."),
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, check it, write nothing.")]


def model_or_default(model: str | None) -> str:
    """--model, or the default with its origin named on stderr.

    Raises:
        PmodError: there is neither.
    """
    if model:
        return model
    path = default_model()
    if path is None:
        raise PmodError(
            "no model: --model was not given, and nothing was converted or trained in this directory yet",
            hint="pmod convert tiny-llava-next",
        )
    output.note(f"model: {path} ({'$PMOD_MODEL' if os.environ.get('PMOD_MODEL') else CURRENT})")
    return str(path)


def pick_device(device: str) -> str:
    """`auto` becomes the accelerator that is there, else cpu, and is named on stderr.

    Raises:
        PmodError: another device was asked for than there is.
    """
    if device != "auto":
        require_device(device)
        return device
    found = find_accelerator()
    output.note(f"device: {found or 'cpu'} ({'found' if found else 'no accelerator found'})")
    return found or "cpu"


def warn_of_ties(models: Iterable[tuple[str, str | None]]) -> None:
    """Warns where untrained routers decide what is kept.

    Args:
        models: The router state of each model, and what chooses its tokens.
    """
    if ("untrained", "router") in models:
        output.warn("the routers are untrained, and the patches that are kept mean nothing yet")


def refuse_ignored(context: typer.Context, names: Iterable[str], place: str, command: str) -> None:
    """Raises PmodError at an option of the command line that belongs to another call.

    Args:
        names: Parameters that this call would ignore.
        place: What they belong to.
        command: Of pmod, whose help says more.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given = next(each for each in context.command.params if each.name == name)
            typed = given.secondary_opts if context.params.get(name) is False and given.secondary_opts else given.opts
            called = typed[0] if typed[0].startswith("-") else getattr(given, "metavar", None) or name
            raise PmodError(
                f"{called} belongs to {place}: here it would change nothing",
                hint=f"leave it out, or see pmod {command} --help",
            )


def given_settings(*, select_at: str | None, **settings: Any) -> dict[str, Any]:
    """The fields of `PmodSettings` that were typed, `8,14` of --select-at as a list.

    Raises:
        PmodError: --select-at is no list of layers.
    """
    if select_at is not None:
        if not re.fullmatch(r"\s*[0-9]{1,5}\s*(,\s*[0-9]{1,5}\s*)*", select_at):
            raise PmodError(f"--select-at {select_at!r:.60}: expected layers separated by commas, such as 8,14")
        settings["select_at"] = [int(part) for part in select_at.split(",")]
    return {name: value for name, value in settings.items() if value is not None}


def default_model() -> Path | None:
    """$PMOD_MODEL, else the checkpoint named in ./.pmod/current, else None.

    Raises:
        PmodError: the checkpoint that one of them names is gone. Taking another instead would be a surprise.
    """
    for source, name in (("$PMOD_MODEL", os.environ.get("PMOD_MODEL")), (str(CURRENT), _read_current())):
        if not name:
            continue
        path = expanded(name)
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
    absolute = expanded(path).resolve()
    here = Path.cwd().resolve()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
