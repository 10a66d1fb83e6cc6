"""Two streams: stdout carries the result and nothing else, stderr carries progress, notes, hints and errors.

What is printed for people may hold the name of a file that somebody else chose: control characters are escaped on the
way to either stream, in one place. What programs read, JSON and bare paths in a pipe, is left as it is.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from pmod_cli.core.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


class _Printable(RenderHook):
    """Renders everything with its text made printable; rich's own colours and cursor moves are no text."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._renderable, options):
            yield Segment(text if control else printable(text), style, control)


# Rich looks up sys.stdout and sys.stderr at every print, drops colour in pipes and honours NO_COLOR by itself.
# A path or a name may hold `:b:`, which is no emoji.
stdout = Console(highlight=False, emoji=False)
stderr = Console(stderr=True, highlight=False, emoji=False)
for _stream in (stdout, stderr):
    _stream.push_render_hook(_Printable())

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
    """Where we draw no bars, huggingface_hub, transformers and datasets draw none: they read this when imported."""
    if not shows_progress():
        for library in ("HUB", "DATASETS"):
            os.environ[f"HF_{library}_DISABLE_PROGRESS_BARS"] = "1"


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
    """One JSON object on stdout, never coloured or wrapped. Bytes that are no UTF-8 are half surrogates."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=str)
    stdout.file.write(text.encode(errors="backslashreplace").decode() + "\n")


def print_line(text: object) -> None:
    """One unwrapped line on stdout, for a path or an id that another program reads. Only a terminal gets it escaped."""
    if stdout.is_terminal:
        stdout.file.write(f"{printable(str(text))}\n")
        return
    line = f"{text}\n"
    try:
        line.encode()
    except UnicodeEncodeError:  # a path that is no UTF-8
        stdout.file.flush()
        cast(TextIO, stdout.file).buffer.write(os.fsencode(line))
    else:
        stdout.file.write(line)


def shows_progress() -> bool:
    """True where a bar would be seen: stderr is a terminal and nobody switched bars off."""
    switched_off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1" or os.environ.get("TQDM_DISABLE") == "1"
    return _progress and not _quiet and not switched_off and stderr.is_terminal


def progress(*columns: str | ProgressColumn) -> Progress:
    """A rich progress bar on stderr that draws nothing where `shows_progress()` is false."""
    from rich.progress import Progress  # a fifth of the time that `pmod --help` takes

    return Progress(*(columns or Progress.get_default_columns()), console=stderr, disable=not shows_progress())
