"""The report as Markdown for a pull request or a paper's repository, and as CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from pmod_cli.evaluation import tables


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables of the terminal as Markdown, with what is above and below them."""
    listed = tables.rows(results)
    asked = [row for row in listed if row["task"] is not None]
    parts = [
        "\n".join(f"**{_escaped(line)}**  " for line in tables.warnings(results)),
        _table(listed, tables.score_columns(results, listed)),
        _table(asked, tables.answer_columns(asked)),
        "\n".join(f"- {_escaped(line)}" for line in tables.notes(results)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(results: Mapping[str, Any]) -> str:
    """One line per benchmark and model, and per average and model: numbers unrounded, nothing where there is none."""
    listed = tables.rows(results)
    out = io.StringIO()
    writer = csv.DictWriter(out, tables.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return out.getvalue()


def _table(listed: list[tables.Row], columns: tables.Columns) -> str:
    head = [list(columns), ["---", "---", *["---:"] * (len(columns) - 2)]]
    body = [[_escaped(cell(row)) for cell in columns.values()] for row in listed]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *body])


def _escaped(text: str) -> str:
    """What Markdown would read as a column, an emphasis or a tag."""
    for mark in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
