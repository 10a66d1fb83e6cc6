"""The report of a run: a plain dictionary for `results.json`, and a table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from pmod_cli.evaluation.scoring import Scored
from pmod_cli.evaluation.statistics import UNKNOWN, interval
from pmod_cli.evaluation.suite import Benchmark

SCHEMA_VERSION = 1


def build(
    benchmarks: Sequence[Benchmark],
    models: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Scored]],
    *,
    seed: int,
) -> dict[str, Any]:
    """Everything that was measured so far.

    Scores are in the paper's units (points of 100; MME in its own), with 95 % intervals over the questions. A
    difference is the first model minus the other one, paired by question.

    Args:
        models: What each model is, by the label of its column; the first is the one that is evaluated.
        scores: By benchmark name and label.
        seed: Of the resampling.
    """
    first = next(iter(models), None)
    tasks = []
    for benchmark in benchmarks:
        outcomes = scores[benchmark.name]
        tasks.append(
            {
                "name": benchmark.name,
                "title": benchmark.title,
                "task": benchmark.task,
                "metric": benchmark.metric,
                "scores": {label: _score(benchmark, scored, seed) for label, scored in outcomes.items()},
                "differences": {
                    label: _difference(benchmark, outcomes[first], scored, seed)
                    for label, scored in outcomes.items()
                    if label != first and scored.error is None and outcomes[first].error is None
                },
            }
        )
    return {
        "models": dict(models),
        "tasks": tasks,
        "failed": [
            f"{label}: {benchmark.title}: {scored.error}"
            for benchmark in benchmarks
            for label, scored in scores[benchmark.name].items()
            if scored.error is not None
        ],
    }


def _score(benchmark: Benchmark, scored: Scored, seed: int) -> dict[str, Any]:
    if scored.error is not None:
        return {"score": None, "error": scored.error, "seconds": round(scored.seconds, 2)}
    tally = scored.tally
    low, high = interval(scored.resampled(benchmark.scale, seed)) if scored.parts else UNKNOWN
    return {
        "score": scored.score,
        "low": low,
        "high": high,
        "questions": len(scored.samples),
        "questions_available": scored.available,
        "limited": scored.limited,
        "empty_answers": tally.empty,
        "cut_answers": tally.cut,
        "seconds": round(scored.seconds, 2),
        "generate_seconds": round(tally.generate_seconds, 2),
        "generated_tokens": tally.tokens,
        "tokens_per_second": round(tally.tokens / tally.generate_seconds, 2) if tally.generate_seconds else None,
        "prompt": tally.prompt,
        "metrics": scored.metrics,
        "task_versions": scored.versions,
    }


def _difference(benchmark: Benchmark, first: Scored, other: Scored, seed: int) -> dict[str, Any]:
    """First minus other over the same questions. Equal seeds resample equal questions, so the draws are paired."""
    low, high = UNKNOWN
    if first.parts and other.parts:
        low, high = interval(first.resampled(benchmark.scale, seed) - other.resampled(benchmark.scale, seed))
    changed = sum(a["answer"] != b["answer"] for a, b in zip(first.samples, other.samples, strict=True))
    return {"difference": first.score - other.score, "low": low, "high": high, "changed_answers": changed}


def table(results: Mapping[str, Any]) -> Table:
    """Rows are tasks, columns are models; under the score of each other model the difference of the first one to it."""
    labels = list(results["models"])
    shown = Table(show_lines=True)
    shown.add_column("task")
    shown.add_column("questions", justify="right", no_wrap=True)
    for label in labels:
        shown.add_column(label, justify="right", overflow="fold")
    for task in results["tasks"]:
        cells = [_cell(task["scores"].get(label), task["differences"].get(label)) for label in labels]
        shown.add_row(f"{task['title']}\n{task['metric'] or ''}".rstrip(), _questions(task), *cells)
    return shown


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers: lines for above the table."""
    lines = []
    if untrained := [label for label, model in results["models"].items() if model["routers"] == "untrained"]:
        lines.append(f"{', '.join(untrained)}: untrained routers; every token ties, so what is kept means nothing")
    if any(score.get("limited") for task in results["tasks"] for score in task["scores"].values()):
        lines.append("limited run: these are not the scores of the benchmarks")
    return lines


def notes(results: Mapping[str, Any]) -> list[str]:
    """How to read the table, and what went wrong: lines for below it."""
    labels = list(results["models"])
    lines = ["±: half of the 95 % interval over the questions"]
    if len(labels) > 1:
        lines.append(f"second line: {labels[0]} minus this model, paired by question")
    for label in labels:
        scores = [task["scores"][label] for task in results["tasks"] if label in task["scores"]]
        empty, cut = (sum(score.get(f"{kind}_answers", 0) for score in scores) for kind in ("empty", "cut"))
        if empty or cut:
            asked = sum(score.get("questions", 0) for score in scores)
            lines.append(f"{label}: {empty} empty answers and {cut} cut by length, of {asked}")
    return lines + list(results["failed"])


def _questions(task: Mapping[str, Any]) -> str:
    score = next((score for score in task["scores"].values() if score["score"] is not None), None)
    if score is None:
        return "–"
    return f"{score['questions']}\nof {score['questions_available']}" if score["limited"] else str(score["questions"])


def _cell(score: Mapping[str, Any] | None, difference: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    if score["score"] is None:
        return "failed"
    lines = [f"{score['score']:.1f}{_half(score)}"]
    if difference is not None:
        lines.append(f"({difference['difference']:+.1f}{_half(difference)})")
    return "\n".join(lines)


def _half(measured: Mapping[str, Any]) -> str:
    return "" if measured["low"] is None else f" ± {(measured['high'] - measured['low']) / 2:.1f}"
