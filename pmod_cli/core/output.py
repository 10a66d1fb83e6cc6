"""Two streams: stdout carries the result and nothing else, stderr carries progress, notes, hints and errors."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

# Rich looks up sys.stdout and sys.stderr at every print, drops colour in pipes and honours NO_COLOR by itself.
# A path or a name may hold `:b:`, which is no emoji.
stdout = Console(highlight=False, emoji=False)
stderr = Console(stderr=True, highlight=False, emoji=False)

_quiet = False
_progress = True


def set_quiet(quiet: bool) -> None:
    """`--quiet`: no notes and no progress. Errors and warnings are still printed."""
    global _quiet
    _quiet = quiet
    hush_libraries()


def set_progress(shown: bool) -> None:
    """`--no-progress`: no bars, also on a terminal."""
    global _progress
    _progress = shown
    hush_libraries()


def hush_libraries() -> None:
    """Where we draw no bars, huggingface_hub and transformers draw none: they read this when they are imported."""
    if not shows_progress():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def note(message: str, *, style: str | None = None) -> None:
    """One line for the reader of stderr; hidden by --quiet. Plain text: square brackets are not markup."""
    if not _quiet:
        stderr.print(message, style=style, markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """One line that --quiet does not hide."""
    stderr.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


def error(what: str, hint: str | None = None) -> None:
    """The last lines of a failed command."""
    stderr.print(f"error: {what}", style="red", markup=False, soft_wrap=True)
    if hint:
        stderr.print(f"  {hint}", markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on stdout, never coloured or wrapped."""
    stdout.file.write(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=str) + "\n")


def print_line(text: object) -> None:
    """One unwrapped line on stdout, for a path or an id that another program reads."""
    stdout.file.write(f"{text}\n")


def shows_progress() -> bool:
    """True where a bar would be seen: stderr is a terminal and nobody switched bars off."""
    switched_off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1" or os.environ.get("TQDM_DISABLE") == "1"
    return _progress and not _quiet and not switched_off and stderr.is_terminal


def progress(*columns: str | ProgressColumn) -> Progress:
    """A rich progress bar on stderr that draws nothing where `shows_progress()` is false."""
    from rich.progress import Progress  # a fifth of the time that `pmod --help` takes

    return Progress(*(columns or Progress.get_default_columns()), console=stderr, disable=not shows_progress())
