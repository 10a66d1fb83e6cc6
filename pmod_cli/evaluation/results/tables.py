"""The report as a reader sees it: rows of one benchmark and one model, as tables for 100 columns, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from pmod_cli.reporting import WholeTable
from pmod_cli.reporting import to_csv as csv_of

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]  # heading -> from a row to its cell
TRUST = {  # what a reader of a score should know of its answers, and the head of its column
    "empty_answers": "empty",
    "cut_answers": "cut",
    "too_long_prompts": "too long",
    "random_answers": "random",
    "unread_answers": "unread",
}
NAMES: Columns = {"benchmark": itemgetter("benchmark"), "model": itemgetter("model")}
WIDTH = 100  # columns that the tables need at most
MODEL_WIDTH = 12  # names of models are folded, but not beyond this
AVERAGE = "AVG {group}"
STOCK_COST = {"flops": 1.0, "selector": 0.0, "first_layer": 1.0, "mean_tokens": 1.0, "kv_bytes": 1.0}


def rows(results: Mapping[str, Any]) -> list[Row]:
    """One row per benchmark and model, then one per average and model; a value that is not known is None.

    The keys are the columns of the CSV file. `difference` is the first model minus this one.
    """
    listed = []
    for task in results["tasks"]:
        for label, entry in task["scores"].items():
            found = task["differences"].get(label, {})
            listed.append(_row(task["title"], label, entry, found, results["models"][label], task=task))
    for average in results["averages"]:
        title = AVERAGE.format(group=average["group"])
        for label, entry in average["scores"].items():
            found = average["differences"].get(label, {})
            listed.append(_row(title, label, entry, found, results["models"][label]))
    return listed


def _row(
    title: str,
    label: str,
    entry: Mapping[str, Any],
    found: Mapping[str, Any],
    model: Mapping[str, Any],
    task: Mapping[str, Any] | None = None,
) -> Row:
    paper, gain, cost = entry.get("paper") or {}, entry.get("over_random") or {}, cost_of(model)
    return {
        "benchmark": title,
        "task": task and task["task"],
        "metric": task and (task["metric"] or entry.get("metric")),
        "model": label,
        "score": entry["score"],
        "score_low": entry.get("low"),
        "score_high": entry.get("high"),
        "limited": entry.get("limited"),
        "questions": entry.get("questions"),
        "questions_available": entry.get("questions_available"),
        "paper_baseline": paper.get("baseline"),
        "paper_pmod": paper.get("pmod"),
        "paper_difference": paper.get("difference"),
        "difference": found.get("difference"),
        "difference_low": found.get("low"),
        "difference_high": found.get("high"),
        "changed_answers": found.get("changed_answers"),
        **{kind: entry.get(kind) for kind in TRUST},
        "seconds": entry.get("seconds"),
        "tokens_per_second": entry.get("tokens_per_second"),
        "peak_memory_mib": entry.get("peak_memory_mib"),
        "mean_retention": model.get("mean_retention"),
        "flops": cost.get("flops"),
        "first_layer_tokens": cost.get("first_layer"),
        "kv_bytes": cost.get("kv_bytes"),
        "selector_flops": cost.get("selector"),
        "over_random": gain.get("difference"),
        "over_random_low": gain.get("low"),
        "over_random_high": gain.get("high"),
        "lower_is_better": entry.get("lower_is_better"),
        "error": entry.get("error"),
    }


def cost_of(model: Mapping[str, Any]) -> Mapping[str, float]:
    """What a model costs, as shares of the stock one; empty where it is not known of one that keeps a part."""
    return model.get("cost") or (STOCK_COST if model.get("mean_retention") in (None, 1.0) else {})


def score_table(results: Mapping[str, Any]) -> Table:
    """Scores with intervals, the paper's numbers where it has some, and differences where models are compared."""
    listed = rows(results)
    return _table(listed, score_columns(results, listed))


def answer_table(results: Mapping[str, Any]) -> Table:
    """How many questions were asked, which answers need care, and what the answers cost."""
    listed = [row for row in rows(results) if row["task"] is not None]
    return _table(listed, answer_columns(listed))


def has_methods(results: Mapping[str, Any]) -> bool:
    """Whether methods are compared, so that what they cost belongs to the report."""
    return any(model.get("method") for model in results["models"].values())


def has_kinds(results: Mapping[str, Any]) -> bool:
    """Whether questions of several kinds were asked, so that their means differ from the scores."""
    return len(results["kinds"]) > 1


def kind_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the means by kind of task; in brackets the difference to random dropping."""

    def cell(entry: Mapping[str, Any]) -> str:
        row = _row("", "", entry, {}, {})
        gain = _over_random(row)
        return _score(row) + (f" ({gain})" if gain else "")

    lines = [
        [label, *(cell(kind["scores"][label]) if label in kind["scores"] else "" for kind in results["kinds"])]
        for label in results["models"]
    ]
    return ["by kind of task", *(kind["title"] for kind in results["kinds"])], lines


def kind_table(results: Mapping[str, Any]) -> Table:
    """The means by kind of task."""
    return _numbers(*kind_rows(results))


def cost_table(results: Mapping[str, Any]) -> Table:
    """What each model costs under the four conventions, beside the time that all its answers took."""
    return _numbers(*cost_rows(results))


def _numbers(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A name, and numbers beside it."""
    table = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def cost_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of that table."""
    headings = ["cost, share of stock", "FLOPs", "ranking", "layer 0", "mean of layers", "KV bytes", "seconds"]
    lines = []
    for label, model in results["models"].items():
        cost = cost_of(model)
        seconds = [task["scores"][label].get("seconds") for task in results["tasks"] if label in task["scores"]]
        shares = [_percent(cost.get(name)) for name in ("flops", "selector", "first_layer", "mean_tokens", "kv_bytes")]
        lines.append([label, *shares, _decimal(None if None in seconds else sum(seconds))])
    return headings, lines


def to_csv(results: Mapping[str, Any]) -> str:
    """One line per benchmark and model, and per average and model: numbers unrounded, nothing where there is none."""
    return csv_of(rows(results), COLUMNS)


def score_columns(results: Mapping[str, Any], listed: list[Row]) -> Columns:
    """Headings of the first table, each with the function from a row to its cell."""
    columns = {**NAMES, "score": _score}
    if any(row["paper_baseline"] is not None for row in listed):
        columns |= {
            "paper": lambda row: _decimal(row["paper_baseline"]),
            "its p-MoD": lambda row: _decimal(row["paper_pmod"]),
            "to paper": _to_paper,
        }
    if len(results["models"]) > 1:
        columns["first − this"] = _difference
        columns["changed"] = lambda row: _count(row["changed_answers"])
    if any(row["over_random"] is not None for row in listed):
        columns["this − random"] = _over_random
    return columns


def answer_columns(listed: list[Row]) -> Columns:
    """Headings of the second table, each with the function from a row to its cell."""
    always = ("empty_answers", "cut_answers")
    shown = {kind: heading for kind, heading in TRUST.items() if kind in always or any(row[kind] for row in listed)}
    columns = {
        **NAMES,
        "asked": _asked,
        **{heading: _counted(kind) for kind, heading in shown.items()},
        "seconds": lambda row: _decimal(row["seconds"]),
        "tok/s": lambda row: _decimal(row["tokens_per_second"]),
        "MiB": lambda row: _count(row["peak_memory_mib"]),
        "kept": _kept,
    }
    return columns


def _counted(kind: str) -> Callable[[Row], str]:
    return lambda row: _count(row[kind])


def _table(listed: list[Row], columns: Columns) -> Table:
    """Rows of one benchmark follow each other and name it once; averages come last, under a line."""
    table = WholeTable(labels=2, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for place, heading in enumerate(columns):
        name = {"min_width": MODEL_WIDTH, "overflow": "fold"} if place == 1 else {"no_wrap": True}
        table.add_column(heading, justify="left" if place < 2 else "right", **name)
    before = None
    for row in listed:
        if row["task"] is None and before is not None and before["task"] is not None:
            table.add_section()
        cells = [cell(row) for cell in columns.values()]
        if before is not None and before["benchmark"] == row["benchmark"]:
            cells[0] = ""
        table.add_row(*map(escape, cells))
        before = row
    return table


def _score(row: Row) -> str:
    if row["score"] is None:
        return "failed"
    mark = "*" if row["limited"] else ""
    return f"{row['score']:.1f}{mark}{_half(row['score_low'], row['score_high'])}"


def _to_paper(row: Row) -> str:
    return _signed(row["paper_difference"]) + ("*" if row["limited"] and row["paper_difference"] is not None else "")


def _kept(row: Row) -> str:
    return _percent(row["mean_retention"])


def _difference(row: Row) -> str:
    if row["difference"] is None:
        return ""
    return f"{_signed(row['difference'])}{_half(row['difference_low'], row['difference_high'])}"


def _over_random(row: Row) -> str:
    if row["over_random"] is None:
        return ""
    return f"{_signed(row['over_random'])}{_half(row['over_random_low'], row['over_random_high'])}"


def _percent(share: float | None) -> str:
    """Rounded twice, so that a mean retention of 0.5375 less a float's last bit is still 53.8 %."""
    return "" if share is None else f"{round(100 * share, 6):.1f} %"


def _asked(row: Row) -> str:
    if row["questions"] is None:
        return ""
    asked = f"{row['questions']:,}"
    return f"{asked}/{row['questions_available']:,}" if row["limited"] else asked


def _half(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ± {(high - low) / 2:.1f}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}".replace("-", "−")


COLUMNS = tuple(_row("", "", {"score": None}, {}, {}))  # of the CSV file, in order
