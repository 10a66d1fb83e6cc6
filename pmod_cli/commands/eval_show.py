"""What `pmod eval` shows: the benchmarks, a plan, progress, results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from pmod_cli.core import output
from pmod_cli.reporting import WholeTable, cells_of, markdown_table, to_csv

if TYPE_CHECKING:
    from pmod_cli.evaluation.benchmarks import Benchmark


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


class Bars:
    """One bar per model and task on a terminal; elsewhere one line when a task ends."""

    def __init__(self) -> None:
        self.bars = output.progress()
        self.known: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def show(self, model: str, task: str, answered: int, questions: int) -> None:
        """`questions` is 1 until the task is loaded and their number known."""
        if (model, task) not in self.known:
            self.known[model, task] = self.bars.add_task(f"{model} · {task}", total=None)
        if questions > 1 or answered:
            self.bars.update(self.known[model, task], completed=answered, total=questions)
        if answered == questions and not output.shows_progress():
            output.note(f"{model} · {task}: {answered:,} answers")


def show_results(results: dict[str, Any], shown_as: str) -> None:
    """The results of a run or of a comparison, in one of the forms of --format."""
    from pmod_cli.evaluation.results import markdown, tables

    if shown_as == "json":
        output.print_json(results)
    elif shown_as in ("markdown", "csv"):
        output.print_line({"markdown": markdown.to_markdown, "csv": tables.to_csv}[shown_as](results).rstrip())
    else:
        for line in markdown.warnings(results):
            output.print_line(line)
        width = output.stdout.width
        if not output.stdout.is_terminal:  # a file or a pipe has no width
            output.stdout.width = max(width, tables.WIDTH)
        output.stdout.print(tables.score_table(results), tables.answer_table(results))
        if tables.has_kinds(results):
            output.stdout.print(tables.kind_table(results))
        if tables.has_methods(results):
            output.stdout.print(tables.cost_table(results))
        output.stdout.width = width
        for line in markdown.notes(results):
            output.print_line(line)
        for name in ("pareto.png", "results.json", "comparison.json"):
            if "folder" in results and Path(results["folder"], name).exists():
                output.print_line(Path(results["folder"], name))


def show_suite(groups: dict[str, tuple[Benchmark, ...]], data_root: Path | None, shown_as: str) -> None:
    """Every benchmark with its data in one of the forms of --format; under the table also the groups."""
    from pmod_cli.evaluation import data

    rows = data.listing(data_root=data_root)
    if shown_as == "json":
        output.print_json({"schema_version": 1, "benchmarks": rows})
        return
    if shown_as == "csv":
        joined = [row | {key: " ".join(row[key]) for key in ("data", "split")} for row in rows]
        output.print_line(to_csv(joined).rstrip())
        return
    table = WholeTable(box=box.SIMPLE, padding=0)
    for title in ("name", "lmms-eval task", "data set and split", "rows", "metric", "here"):
        table.add_column(title, justify="right" if title == "rows" else "left", no_wrap=title != "data set and split")
    for row in rows:
        repositories = ", ".join(name.rpartition("/")[2] for name in row["data"])
        own = "drawn here" if row["here"] else "fetched by lmms-eval"
        data_set = f"{repositories} {', '.join(row['split'])}" if repositories else own
        here = {True: "yes", False: "no"}.get(row["here"], "?")
        rows_of = f"{row['rows']:,}" if row["rows"] else "not known"
        table.add_row(row["name"], row["task"], data_set, rows_of, row["metric"] or "the first", here)
    if shown_as == "markdown":
        output.print_line(markdown_table(*cells_of(table)))
        return
    output.stdout.print(table)
    for name, group in groups.items():
        output.print_line(f"{name}: {', '.join(benchmark.name for benchmark in group)}")
    output.print_line("any other lmms-eval task: by its name there")
