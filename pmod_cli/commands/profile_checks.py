"""What is wrong with a call of `pmod profile` whatever the model is: said before anything heavy is imported."""

from __future__ import annotations

import os
import re
from pathlib import Path
from shlex import quote

import typer

from pmod_cli.commands.common import check_name, refuse_ignored
from pmod_cli.core.errors import PmodError
from pmod_cli.model.registry import SELECTIONS

REPORTS = ("flops", "kv", "memory", "latency", "depth", "all")
MEASURED = ("latency", "depth")
PICTURES = (".png", ".svg", ".pdf")
FORMATS = ("table", "markdown", "csv", "json")
PHASES = ("prefill", "first-token", "decode", "train", "train-checkpointed")
OVERRIDES = (
    *("schedule", "shift", "target_retention", "max_ratio", "min_ratio", "target_tokens", "quota"),
    *("selection", "select_at", "method", "before"),
)
COMPARED = ("stock", *SELECTIONS)


def image_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """`672x672,1280x720` as (width, height) in pixels."""
    sizes = []
    for size in text.split(",") if text else ():
        found = re.fullmatch(r"\s*([0-9]{1,9})x([0-9]{1,9})\s*", size, re.IGNORECASE)
        if found is None:
            raise typer.BadParameter(f"{size!r} is not WIDTHxHEIGHT in pixels, as in 672x672")
        sizes.append((int(found[1]), int(found[2])))
    return tuple(sizes)


def videos_of(texts: list[str] | None) -> tuple[tuple[tuple[int, int, int], ...], float]:
    """`64x480x360@2` as (frames, width, height), and the frames a second of all of them (2 unless told)."""
    videos, rates = [], set()
    for text in texts or ():
        found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})(?:@([0-9]{1,4}(?:\.[0-9]{1,3})?))?", text.strip())
        if found is None or float(found[4] or 1) == 0:
            raise typer.BadParameter(f"{text!r} is not FRAMESxWIDTHxHEIGHT, or the same @FPS, as in 64x480x360@2")
        videos.append((int(found[1]), int(found[2]), int(found[3])))
        rates.add(float(found[4] or 2))
    if len(rates) > 1:
        raise typer.BadParameter("the videos of a row have one number of frames a second")
    return tuple(videos), rates.pop() if rates else 2.0


def some_of(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """`prefill,decode` as names, each once; all of them have to be known."""
    return tuple(dict.fromkeys(check_name(name.strip(), known, what) for name in text.split(",")))


def known_tasks(text: str) -> str:
    """The tasks of --tasks, if all of them are bundled ones."""
    from pmod_cli.calibration.samples import ALL_TASKS, tiny_tasks

    if not tiny_tasks(text):
        raise typer.BadParameter(
            f"--tasks {text!r}: expected tiny, or some of {', '.join(ALL_TASKS)}; --data takes others"
        )
    return text


# What an option is for: given elsewhere, it would be ignored.
_USES = {
    "--report latency": (
        ("random_weights", "phases", "against", "repeats", "warmup", "threads", "attention", "gpu"),
        lambda report, data, sweep: report == "latency",
    ),
    "--report latency or depth": (("device",), lambda report, data, sweep: report in MEASURED),
    "--report depth": (("tasks", "data", "samples"), lambda report, data, sweep: report == "depth"),
    "--report memory": (("gpu_memory",), lambda report, data, sweep: report in ("memory", "all") and not data | sweep),
    "--from-data": (("limit",), lambda report, data, sweep: data),
    "--from-data or --report depth": (("images_root",), lambda report, data, sweep: data or report == "depth"),
    "--sweep": (("runs",), lambda report, data, sweep: sweep),
    "a report of one batch": (
        ("image_size", "images", "video", "new_tokens", "batch_size", "sweep"),
        lambda report, data, sweep: not data and report != "depth",
    ),
    "another report": (
        ("text_tokens", *OVERRIDES, "hidden_size", "layers"),
        lambda report, data, sweep: report != "depth",
    ),
    "--sweep, or a report of layers": (
        ("plot",),
        lambda report, data, sweep: sweep or (not data and report not in ("latency", "memory")),
    ),
    "--report flops or all": (("macs",), lambda report, data, sweep: report in ("flops", "all") and not data | sweep),
}


def check_used(context: typer.Context, report: str, data: bool, swept: str | None) -> None:
    """Raises PmodError at an option that this call would ignore.

    Args:
        data: Whether rows of a file are counted.
        swept: What --sweep sweeps.
    """
    sweep = swept is not None
    for place, (names, applies) in _USES.items():
        if not applies(report, data, sweep):
            refuse_ignored(context, names, place, "profile")
    if swept is not None:
        refuse_ignored(context, [swept.replace("-", "_")], f"a call that does not sweep {swept}", "profile")


def check_files(plot: Path | None, html: Path | None) -> None:
    """Raises PmodError at a kind of picture that is not drawn, or where no such file can be written."""
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise PmodError(f"--plot {plot}: the name ends in none of {', '.join(PICTURES)}", hint="--plot cost.png")
    for file, flag, example in ((plot, "--plot", "cost.png"), (html, "--html", "cost.html")):
        if file is not None and not file.absolute().parent.is_dir():
            raise PmodError(
                f"{flag} {file}: there is no folder {file.parent}", hint=f"mkdir -p {quote(str(file.parent))}"
            )
        if file is not None and file.is_dir():
            raise PmodError(f"{flag} {file} is a folder: expected a file", hint=f"{flag} {example}")
        if file is not None and not os.access(file.absolute().parent, os.W_OK | os.X_OK):
            raise PmodError(f"{flag} {file}: nothing can be written into {file.parent}", hint=f"{flag} {example}")
