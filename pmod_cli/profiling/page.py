"""A report as one HTML page: no script, no other file, no network; opened from the file system."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rich.table import Table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #888; --paper: #fff; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0.2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 0.4rem; }
p.lead, ul.notes { color: var(--quiet); }
figure { margin: 1.5rem 0; background: var(--paper); border-radius: 6px; padding: 0.5rem; }
figure svg { width: 100%; height: auto; display: block; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.2rem 0.7rem 0.2rem 0; text-align: right; white-space: nowrap; }
tr { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--quiet); }
"""


def to_html(
    title: str, lead: str, figures: Sequence[tuple[str, str]], tables: Sequence[Table], notes: list[str]
) -> str:
    """The page's text.

    Args:
        title: The model.
        lead: What was profiled.
        figures: (what it shows in words, SVG element) pairs.
        tables: As in the terminal.
        notes: What the words mean.
    """
    drawn = "".join(f'<figure role="img" aria-label="{html.escape(words)}">{svg}</figure>' for words, svg in figures)
    shown = "".join(_table(table) for table in tables)
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{drawn}{shown}'
        f'<h2>How it was counted</h2><ul class="notes">{said}</ul></body></html>\n'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<h2>{html.escape(str(table.title))}</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
