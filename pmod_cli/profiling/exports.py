"""A report for other programs: Markdown of its tables, CSV of its rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table


def to_markdown(headline: str, tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The tables of the terminal as Markdown, between what was profiled and what the words mean."""
    parts = [f"**{_escaped(headline)}**"]
    for table in tables:
        headings = [_escaped(str(column.header)) for column in table.columns]
        rows = list(zip(*(column.cells for column in table.columns), strict=True))
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
        lines += [[_escaped(str(cell)) for cell in row] for row in rows]
        parts.append(f"{_escaped(str(table.title))}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append("\n".join(f"- {_escaped(note)}" for note in notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row: numbers unrounded, nothing where there is none; lists are left out."""
    plain = [{key: value for key, value in row.items() if not isinstance(value, list | dict)} for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in plain for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return out.getvalue()


def _escaped(text: str) -> str:
    for mark in ("\\", "|", "*", "_", "<", "`"):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
