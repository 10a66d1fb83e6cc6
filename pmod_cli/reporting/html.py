"""HTML pages from Jinja2 templates: one style with a dark mode, no network, no other file; they open from a folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from rich.table import Table

from pmod_cli.reporting.tables import cells_of

if TYPE_CHECKING:
    from jinja2 import Environment


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
