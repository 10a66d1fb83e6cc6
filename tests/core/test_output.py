"""What is printed for people moves no cursor; what programs read is left as it is."""

import io
import json
import os
import sys

import pytest
from rich.console import Console
from rich.table import Table

from pmod_cli.core import output
from pmod_cli.core.text import printable

HOSTILE = "a\x1b]0;owned\x07\x1b[2J\rb\x9b31m\udcff\u202e.png"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\x0db\x9b31m\xff\u202e.png"


def test_printable_text_stays_as_it_is():
    for text in ("plain.png", "naïve 日本語 👍🏽.png", "two\nlines\tand a tab", "[not] :markup:", "שלום\u200f"):
        assert printable(text) == text
    assert printable(HOSTILE) == SHOWN
    assert printable("\ud800") == r"\ud800"


def test_notes_warnings_errors_and_tables_escape(capsys):
    table = Table()
    table.add_column("file")
    table.add_row(HOSTILE)
    output.note(HOSTILE)
    output.warn(HOSTILE)
    output.error(HOSTILE, HOSTILE)
    output.stdout.print(HOSTILE, markup=False, soft_wrap=True)
    output.stdout.print(table)
    with output.progress() as bar:
        bar.add_task("drawing", total=1)
    written = capsys.readouterr()
    shown = SHOWN.replace(r"\x07", "").replace(r"\x0d", "")  # rich drops these itself
    assert written.err.splitlines() == [shown, f"warning: {shown}", f"error: {shown}", f"  {shown}"]
    assert written.out.splitlines()[0] == shown
    assert shown in written.out.split("file", 1)[1]
    assert "\x1b" not in written.out + written.err


def test_colours_of_our_own_stay(monkeypatch):
    """On a terminal the same consoles still colour and move: only text is escaped."""
    terminal = io.StringIO()
    console = Console(
        file=terminal, force_terminal=True, color_system="standard", no_color=False, highlight=False, width=80
    )
    console.push_render_hook(output._Printable())
    console.print("error: \x1b[31mx", style="red", markup=False)
    assert terminal.getvalue() == "\x1b[31merror: \\x1b[31mx\x1b[0m\n"


@pytest.mark.parametrize("name", [HOSTILE.replace("\x9b", ""), "\udcff.png", "plain.png"])
def test_programs_read_the_bytes_of_a_path(monkeypatch, name):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
    output.print_line("first")
    output.print_line(name)
    sys.stdout.flush()
    assert written.getvalue() == b"first\n" + os.fsencode(name) + b"\n"


def test_json_can_hold_any_path(capsys):
    output.print_json({"file": HOSTILE})
    text = capsys.readouterr().out
    text.encode()
    assert json.loads(text) == {"file": HOSTILE}


def test_quiet_hides_notes_but_not_warnings(capsys):
    output.set_quiet(True)
    output.note("a note")
    output.warn("a warning")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: a warning\n")


def test_json_goes_to_stdout_whole(capsys):
    output.print_json({"long": "x" * 500, "mark": "[bold]é"})
    out = capsys.readouterr().out
    assert '"mark": "[bold]é"' in out
    assert "x" * 500 in out
