"""The report as a reader sees it: rows of one benchmark and one model, as tables for 100 columns, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from pmod_cli import paper
from pmod_cli.evaluation.intervals import rate_interval
from pmod_cli.reporting import escaped, markdown_table
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
    paper, gain = entry.get("paper") or {}, entry.get("over_random") or {}
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
        "flops": (model.get("cost") or {}).get("flops"),
        "first_layer_tokens": (model.get("cost") or {}).get("first_layer"),
        "kv_bytes": (model.get("cost") or {}).get("kv_bytes"),
        "selector_flops": (model.get("cost") or {}).get("selector"),
        "over_random": gain.get("difference"),
        "over_random_low": gain.get("low"),
        "over_random_high": gain.get("high"),
        "error": entry.get("error"),
    }


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


def cost_table(results: Mapping[str, Any]) -> Table:
    """What each model costs under the four conventions, beside the time that all its answers took."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    headings, lines = cost_rows(results)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def cost_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of that table; a model without settings of its own is the stock one."""
    headings = ["cost, share of stock", "FLOPs", "ranking", "layer 0", "mean of layers", "KV bytes", "seconds"]
    stock = {"flops": 1.0, "selector": 0.0, "first_layer": 1.0, "mean_tokens": 1.0, "kv_bytes": 1.0}
    lines = []
    for label, model in results["models"].items():
        cost = model.get("cost") or stock
        seconds = [task["scores"].get(label, {}).get("seconds") for task in results["tasks"]]
        shares = [_percent(cost[name]) for name in ("flops", "selector", "first_layer", "mean_tokens", "kv_bytes")]
        lines.append([label, *shares, _decimal(sum(number or 0.0 for number in seconds))])
    return headings, lines


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables of the terminal as Markdown, for a pull request, with what is above and below them."""
    listed = rows(results)
    asked = [row for row in listed if row["task"] is not None]
    parts = ["\n".join(f"**{escaped(line)}**  " for line in warnings(results))]
    for shown, columns in ((listed, score_columns(results, listed)), (asked, answer_columns(asked))):
        parts.append(
            markdown_table(list(columns), ([cell(row) for cell in columns.values()] for row in shown), words=2)
        )
    if has_methods(results):
        parts.append(markdown_table(*cost_rows(results)))
    parts.append("\n".join(f"- {escaped(line)}" for line in notes(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


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
        **{heading: (lambda row, kind=kind: _count(row[kind])) for kind, heading in shown.items()},
        "seconds": lambda row: _decimal(row["seconds"]),
        "tok/s": lambda row: _decimal(row["tokens_per_second"]),
        "MiB": lambda row: _count(row["peak_memory_mib"]),
        "kept": _kept,
    }
    return columns


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers: lines for above the table."""
    lines = []
    untrained = [
        label
        for label, model in results["models"].items()
        if (model.get("routers"), model.get("selection", "router")) == ("untrained", "router")
    ]
    if untrained:
        lines.append(f"{', '.join(untrained)}: untrained routers; every token ties, so what is kept means nothing")
    if any(score.get("limited") for task in results["tasks"] for score in task["scores"].values()):
        lines.append("limited run: scores marked * are not the scores of the benchmarks")
    return lines + _other_data(results)


def _other_data(results: Mapping[str, Any]) -> list[str]:
    """A mirror may hold a part of a benchmark, or another version of it."""
    lines = []
    for task in results["tasks"]:
        here = {entry["questions_available"] for entry in task["scores"].values() if entry["score"] is not None}
        if task["rows"] is not None and here - {task["rows"]}:
            counts = " and ".join(f"{count:,}" for count in sorted(here))
            lines.append(f"{task['title']}: the data has {counts} questions, the benchmark {task['rows']:,}")
    return lines


def notes(results: Mapping[str, Any]) -> list[str]:
    """How to read the tables, and what went wrong: lines for below them."""
    listed, labels = rows(results), list(results["models"])
    metrics = {row["benchmark"]: row["metric"] for row in listed if row["metric"]}
    lines = ["metrics: " + ", ".join(f"{title} {metric}" for title, metric in metrics.items())] if metrics else []
    lines += [
        "±: half of the 95 % interval, questions resampled; none where all questions score alike or it is unknown"
    ]
    if len(labels) > 1:
        lines.append(f"first − this: {labels[0]} minus the row's model, same questions; changed: answers that differ")
    if has_methods(results):
        lines.append("FLOPs: of the decoder's prefill on the paper's prompt; of them ranking: what chooses the tokens")
        lines.append("layer 0, mean of layers: vision tokens that are processed; KV bytes: after the prefill")
    if any(row["over_random"] is not None for row in listed):
        lines += _no_better_than_random(listed)
    if any(row["paper_baseline"] is not None for row in listed):
        lines += _about_the_paper(results)
    lines += [f"{label}: {sentence}" for label in labels if (sentence := _batching(results, label))]
    for average in results["averages"]:
        for label, lacking in average["missing"].items():
            lines.append(f"{label}: no average of {average['group']}, which lacks {', '.join(lacking)}")
    explained = {
        "random_answers": "random: no option found in the answer, so lmms-eval drew one",
        "unread_answers": "unread: no option found in the answer, so it counts as wrong",
        "cut_answers": "cut: the answer reached the task's length limit",
        "too_long_prompts": "too long: the prompt exceeds the model's context, so the question was not put",
    }
    lines += [text for kind, text in explained.items() if any(row[kind] for row in listed)]
    return lines + list(results["failed"])


def _no_better_than_random(listed: Sequence[Row]) -> list[str]:
    """Which methods do not beat random dropping at the same budget: the interval of the difference is not above 0."""
    lines = []
    for title in dict.fromkeys(row["benchmark"] for row in listed):
        mine = [row for row in listed if row["benchmark"] == title and row["over_random"] is not None]
        failed = [row["model"] for row in mine if row["over_random_low"] is None or row["over_random_low"] <= 0]
        if mine:
            lines.append(f"{title}: do not beat random at the same FLOPs: {', '.join(failed) or 'none of them'}")
    return lines


def _about_the_paper(results: Mapping[str, Any]) -> list[str]:
    families = {str(model.get("model_type", "")).removeprefix("pmod_") for model in results["models"].values()}
    names = " and ".join(paper.MODELS[family].name for family in sorted(families) if family in paper.MODELS)
    lines = [f"paper, its p-MoD: published scores of {names} and of its p-MoD; to paper: the score minus its kind's"]
    others = [label for label, model in results["models"].items() if not _has_size_of_paper(model)]
    if others:
        lines.append(f"{', '.join(others)}: not of the paper's size and decoder, so the paper's numbers only orient")
    return lines


def _has_size_of_paper(model: Mapping[str, Any]) -> bool:
    """Whether a model has the size and the decoder of the paper's."""
    found = (model.get("layers"), model.get("hidden_size"), model.get("decoder"))
    return found == tuple(paper.VICUNA_7B[key] for key in ("num_hidden_layers", "hidden_size", "model_type"))


def _batching(results: Mapping[str, Any], label: str) -> str | None:
    """Of `--check-batching`: the measured rate over all tasks, and what it can be at most."""
    entries = [task["scores"].get(label, {}) for task in results["tasks"]]
    checks = [entry["batching"] for entry in entries if entry.get("batching")]
    questions, changed = (sum(check[key] for check in checks) for key in ("questions", "changed"))
    if not questions:
        return "no answer came from a batch of several rows, so batching was not checked" if checks else None
    size = max(check["batch_size"] for check in checks)
    most = 100 * rate_interval(changed, questions)[1]
    dtype = results["models"][label].get("dtype")
    return (
        f"{changed} of {questions} answers change when asked one at a time instead of up to {size} together, "
        f"in {dtype} ({100 * changed / questions:.1f} %, at most {most:.1f} %)"
    )


def _table(listed: list[Row], columns: Columns) -> Table:
    """Rows of one benchmark follow each other and name it once; averages come last, under a line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
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
    """Mean retention in percent. Rounded twice, so that a mean of 0.5375 less a float's last bit is still 53.8 %."""
    return "" if row["mean_retention"] is None else f"{round(100 * row['mean_retention'], 6):.1f} %"


def _difference(row: Row) -> str:
    if row["difference"] is None:
        return ""
    return f"{_signed(row['difference'])}{_half(row['difference_low'], row['difference_high'])}"


def _over_random(row: Row) -> str:
    if row["over_random"] is None:
        return ""
    return f"{_signed(row['over_random'])}{_half(row['over_random_low'], row['over_random_high'])}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _asked(row: Row) -> str:
    if row["questions"] is None:
        return ""
    asked = f"{row['questions']:,}"
    return f"{asked}/{row['questions_available']:,}" if row["limited"] else asked


def _half(low: float | None, high: float | None) -> str:
    return "" if low is None else f" ± {(high - low) / 2:.1f}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}".replace("-", "−")


COLUMNS = tuple(_row("", "", {"score": None}, {}, {}))  # of the CSV file, in order
