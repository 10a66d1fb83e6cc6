"""What was found, in each form: rows and columns as a table for the terminal, as Markdown, as CSV and as HTML pages.

Pages come from Jinja2 templates: one style with a dark mode, no network, no other file; they open from a folder. JSON
is written by `core`: `output.print_json` and `atomic.write_json`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table

if TYPE_CHECKING:
    from jinja2 import Environment

LABEL = 14  # columns of the terminal that a label has, if its words take no more


class WholeTable(Table):
    """A table that cuts no number: columns that do not fit the terminal follow below, under the same labels.

    Args:
        labels: How many columns at the left are labels, whose words may be broken over lines.
    """

    def __init__(self, *headings: str, labels: int = 1, **style: Any) -> None:
        super().__init__(*headings, **style)
        self.labels = labels

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, part in enumerate(self.parts(console, options)):
            if number:
                yield Segment.line()
            yield from Table.__rich_console__(part, console, options)

    def parts(self, console: Console, options: ConsoleOptions) -> Iterator[WholeTable]:
        """This table as tables of at most `options.max_width`, each with the labels and with some of the columns."""
        endless = options.update(width=10_000)

        def needs(places: list[int]) -> int:
            part = self._with(places)
            for column in part.columns[: self.labels]:
                alone = self._with([], labels=[column])
                words = Measurement.get(console, endless, alone).minimum
                column.width = max(words, min(LABEL, Measurement.get(console, endless, alone).maximum))
            return Measurement.get(console, endless, part).maximum

        groups: list[list[int]] = [[]]
        for place in range(self.labels, len(self.columns)):
            if groups[-1] and needs([*groups[-1], place]) > options.max_width:
                groups.append([])
            groups[-1].append(place)
        for number, places in enumerate(groups):
            part = self._with(places)
            part.title = None if number else self.title
            yield part

    def _with(self, places: list[int], labels: Sequence[Column] | None = None) -> WholeTable:
        chosen = [*(self.columns[: self.labels] if labels is None else labels), *(self.columns[at] for at in places)]
        part = copy(self)
        part.columns = [replace(column, _index=index) for index, column in enumerate(chosen)]
        return part


def plain_table(title: str, *headings: str, space: int = 2) -> Table:
    """A table without lines: the first column to the left, numbers to the right.

    Args:
        headings: One a column.
        space: Blanks between two columns.
    """
    table = WholeTable(
        title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False
    )
    table.padding = (0, space, 0, 0)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
    return table


def cells_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a table that holds plain strings."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [str(column.header) for column in table.columns], [[str(cell) for cell in row] for row in rows]


def to_markdown(headline: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """A report as Markdown: what it is about, its tables, and what the words mean."""
    parts = [f"**{escaped(headline)}**"]
    parts += [f"{escaped(str(table.title))}\n\n{markdown_table(*cells_of(table))}" for table in tables]
    parts.append("\n".join(f"- {escaped(note)}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """One table as Markdown.

    Args:
        rows: As many cells each.
        words: How many columns at the left are set to the left; numbers are set to the right.
    """
    ruler = ["---"] * words + ["---:"] * (len(headings) - words)
    lines = [[escaped(heading) for heading in headings], ruler, *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """The text without what Markdown would read as a column, an emphasis or a tag, and on one line."""
    for mark in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def to_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """One line a row: numbers unrounded, nothing where there is none; lists and objects are left out.

    Args:
        columns: In this order; those of the rows if None.
    """
    plain = [{key: value for key, value in row.items() if not isinstance(value, list | dict)} for row in rows]
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in plain for key in row)) if columns is None else columns
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return out.getvalue()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("pmod_cli.reporting")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    # `tojson` also escapes what would end a script element.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    return environment


def render(template: str, **values: object) -> str:
    """The text of a page.

    Args:
        template: File name in `templates/`.
        values: What it shows; text is escaped.
    """
    return _environment().get_template(template).render(values) + "\n"


def report_page(
    title: str, lead: str, figures: Sequence[tuple[str, str]], tables: Sequence[Table], notes: Sequence[str]
) -> str:
    """A report as a page without scripts.

    Args:
        title: The model.
        lead: What was profiled.
        figures: (what it shows in words, SVG element) pairs.
        tables: As in the terminal.
        notes: What the words mean.
    """
    shown = [(str(table.title), *cells_of(table)) for table in tables]
    return render("report.html", title=title, lead=lead, figures=figures, tables=shown, notes=notes)
