"""The report around the tables of scores: what a reader must know before them, how to read them, all as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pmod_cli import paper
from pmod_cli.evaluation.intervals import is_gain, rate_interval
from pmod_cli.evaluation.results.tables import (
    Row,
    answer_columns,
    cost_of,
    cost_rows,
    has_kinds,
    has_methods,
    kind_rows,
    rows,
    score_columns,
)
from pmod_cli.reporting import escaped, markdown_table


def to_markdown(results: Mapping[str, Any]) -> str:
    """The tables of the terminal as Markdown, for a pull request, with what is above and below them."""
    listed = rows(results)
    asked = [row for row in listed if row["task"] is not None]
    parts = ["\n".join(f"**{escaped(line)}**  " for line in warnings(results))]
    for shown, columns in ((listed, score_columns(results, listed)), (asked, answer_columns(asked))):
        parts.append(
            markdown_table(list(columns), ([cell(row) for cell in columns.values()] for row in shown), words=2)
        )
    if has_kinds(results):
        parts.append(markdown_table(*kind_rows(results)))
    if has_methods(results):
        parts.append(markdown_table(*cost_rows(results)))
    parts.append("\n".join(f"- {escaped(line)}" for line in notes(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers: lines for above the table."""
    lines = []
    untrained = [
        label
        for label, model in results["models"].items()
        if (model.get("routers"), model.get("selection", "router")) == ("untrained", "router")
    ]
    if untrained:
        lines.append(f"{', '.join(untrained)}: untrained routers, so what is kept means nothing yet")
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
    lower = list(dict.fromkeys(row["benchmark"] for row in listed if row["lower_is_better"]))
    if lower:
        means = "; they are in no mean" if has_kinds(results) else ""
        lines.append(f"lower scores are better: {', '.join(lower)}{means}")
    lines += [
        "±: half of the 95 % interval, questions resampled; none where all questions score alike or it is unknown"
    ]
    if len(labels) > 1:
        lines.append(f"first − this: {labels[0]} minus the row's model, same questions; changed: answers that differ")
    if has_methods(results):
        lines.append("FLOPs: of the decoder's prefill, mean over the prompts; of them ranking: what chooses the tokens")
        lines.append("layer 0, mean of layers: vision tokens that are processed; KV bytes: after the prefill")
        lines += [
            f"{label}: no cost, which depends on how its pictures are cut, and answers to several do not tell that"
            for label, model in results["models"].items()
            if model.get("pmod") and not cost_of(model)
        ]
        lines += _off_budget(results)
    if any(row["over_random"] is not None for row in listed):
        lines += _no_better_than_random(listed)
        lines += _no_better_by_kind(results["kinds"])
    if has_kinds(results):
        beside = "; in brackets: this − random" if has_methods(results) else ""
        lines.append(f"by kind of task: means over the tasks that were asked{beside}")
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


def _off_budget(results: Mapping[str, Any]) -> list[str]:
    """On how many prompts a budget is not met to a percent: short ones have few tokens, and text cannot be dropped."""
    lines = []
    for label in results["models"]:
        entries = [task["scores"].get(label, {}) for task in results["tasks"]]
        missed, asked = (sum(entry.get(key) or 0 for entry in entries) for key in ("off_budget", "questions"))
        if missed:
            lines.append(f"{label}: on {missed:,} of {asked:,} prompts its cost is not within 1 % of the budget")
    return lines


def _no_better_than_random(listed: Sequence[Row]) -> list[str]:
    """Which methods do not beat random dropping at the same budget: its interval has 0 or is worse."""
    lines = []
    for title in dict.fromkeys(row["benchmark"] for row in listed):
        mine = [row for row in listed if row["benchmark"] == title and row["over_random"] is not None]
        failed = [row["model"] for row in mine if not _beats_random(row)]
        if mine:
            lines.append(f"{title}: do not beat random at the same FLOPs: {', '.join(failed) or 'none of them'}")
    return lines


def _beats_random(row: Row) -> bool:
    low, high = row["over_random_low"], row["over_random_high"]
    return is_gain(low, high, lower_is_better=bool(row["lower_is_better"]))


def _no_better_by_kind(kinds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same of means over several tasks."""
    lines = []
    for kind in kinds:
        gains = {label: entry["over_random"] for label, entry in kind["scores"].items() if "over_random" in entry}
        if gains and len(kind["tasks"]) > 1:
            failed = [label for label, gain in gains.items() if not is_gain(gain["low"], gain["high"])]
            lines.append(
                f"{kind['title']}: do not beat random at the same FLOPs: {', '.join(failed) or 'none of them'}"
            )
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
