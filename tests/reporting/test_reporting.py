"""One table in every form: what is written is read back by a parser of that form."""

import csv
import io
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from rich.console import Console

from pmod_cli.reporting import cells_of, plain_table, render, report_page, to_csv, to_markdown

HOSTILE = 'a|b *c* <script>alert(1)</script> `d` _e_ \\ & "f"'


def table():
    made = plain_table("Title <1>", "name", "count")
    made.add_row("plain", "1.5")
    made.add_row(HOSTILE, "-")
    return made


class Cells(HTMLParser):
    """Texts by tag, and every tag that was opened."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.attributes = [], {}, []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        if self.tags and data.strip():
            self.texts.setdefault(self.tags[-1], []).append(data)


def parsed(text):
    cells = Cells()
    cells.feed(text)
    return cells


def test_cells_are_the_tables():
    assert cells_of(table()) == (["name", "count"], [["plain", "1.5"], [HOSTILE, "-"]])


def test_markdown_is_read_back():
    text = to_markdown("head *line*", [table()], ["note | one"])
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    words = [token.content for token in tokens if token.type == "inline"]
    assert words[0] == r"**head \*line\***"
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert parsed(shown).texts["td"] == ["plain", "1.5", HOSTILE, "-"]
    assert "script" not in parsed(shown).tags
    assert 'style="text-align:right"' in shown


@pytest.mark.parametrize("width", [24, 40, 60, 200])
def test_no_terminal_is_too_narrow_for_a_number(width):
    made = plain_table("Title of some words", "layer of words", *(f"column {number}" for number in range(6)))
    numbers = [f"{7 * 10**number:,}" for number in range(6)]
    made.add_row("one label", *numbers)
    made.add_row("another", *reversed(numbers))
    console = Console(file=io.StringIO(), width=width)
    console.print(made)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert sorted(word for word in shown.split() if word[0] == "7") == sorted(2 * numbers)
    assert "…" not in shown
    blocks = shown.count("layer of")  # each has the labels
    assert shown.count("another") == blocks
    assert (blocks == 1) == (width == 200)


def test_csv_is_read_back():
    rows = [{"a": HOSTILE, "b": 1 / 3, "c": [1]}, {"a": "x,\ny", "d": None}]
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert read == [{"a": HOSTILE, "b": repr(1 / 3), "d": ""}, {"a": "x,\ny", "b": "", "d": ""}]
    assert to_csv([{"a": 1, "b": 2}], ("b", "a")) == "b,a\n2,1\n"


def test_page_escapes_text_and_keeps_pictures():
    page = report_page("name", HOSTILE, [(HOSTILE, "<svg></svg>")], [table()], [HOSTILE])
    read = parsed(page)
    assert read.texts["td"] == ["plain", "1.5", HOSTILE, "-"]
    assert read.texts["p"] == read.texts["li"] == [HOSTILE]
    assert ("aria-label", HOSTILE) in read.attributes
    assert read.tags.count("svg") == 1
    assert "script" not in read.tags
    assert not {"link", "img", "iframe"} & set(read.tags)
    assert not {"src", "href"} & {name for name, _ in read.attributes}
    assert "prefers-color-scheme: dark" in page


def test_a_value_that_a_template_lacks_is_an_error():
    with pytest.raises(UndefinedError, match="lead"):
        render("report.html", title="x")
