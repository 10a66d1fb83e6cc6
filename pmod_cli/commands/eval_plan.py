"""What `pmod eval --dry-run` shows."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from pmod_cli.core import output


def show_plan(plan: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    """The tasks, how many questions each asks, and whether its data is on this machine."""
    if as_json:
        output.print_json(plan)
        return
    if quiet:
        output.print_line(plan["folder"])
        return
    table = Table("task", "lmms-eval task", "questions", "metric", "data here")
    for task in plan["tasks"]:
        here = "yes" if task["here"] else "no: fetched from the hub"
        table.add_row(task["name"], task["task"], _count(task["questions"]), task["metric"] or "its own", here)
    output.stdout.print(table)
    models = len(plan["models"])
    output.print_line(f"{_count(plan['questions'])} questions in all to {models} model{'s' * (models > 1)}")


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"
