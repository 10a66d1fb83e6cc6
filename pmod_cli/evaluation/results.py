"""What was measured, as one plain dictionary: scores with intervals, paired differences, the paper's averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from pmod_cli import paper
from pmod_cli.evaluation.benchmarks import Benchmark, groups
from pmod_cli.evaluation.intervals import UNKNOWN, Record, interval, summands
from pmod_cli.evaluation.paired import Difference, difference, makes_up

SCHEMA_VERSION = 2
AVERAGED = ("general", "text-rich")  # the groups that the paper averages


class Report:
    """Takes one outcome after the other; `results` is what `results.json` holds, at any moment.

    Scores are in the paper's units (points of 100; MME in its own). A difference is the first model minus another one.

    Args:
        benchmarks: The rows, in the order of the table.
        seed: Of the resampling.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], *, seed: int) -> None:
        self.benchmarks, self.seed = list(benchmarks), seed
        self.models: dict[str, dict[str, Any]] = {}
        self.entries: dict[str, dict[str, dict[str, Any]]] = {benchmark.name: {} for benchmark in benchmarks}
        self.differences: dict[str, dict[str, Difference]] = {benchmark.name: {} for benchmark in benchmarks}
        self._draws: dict[tuple[str, str], np.ndarray] = {}
        self._records: dict[str, Sequence[Record]] = {}  # of the first model

    def add_model(self, label: str, description: Mapping[str, Any]) -> None:
        """A column; the first one is the model that is evaluated."""
        self.models[label] = dict(description)

    def add(self, benchmark: Benchmark, label: str, entry: Mapping[str, Any], records: Sequence[Record]) -> None:
        """The outcome of one benchmark for one model.

        Args:
            entry: What is known of it; `score` is None and `error` says why where it failed.
            records: One per question: `task`, `doc_id`, `question`, `target`, `answer` and lmms-eval's `item`.
        """
        entry = dict(entry) | {"paper": _beside_paper(entry["score"], benchmark.name, self.models[label])}
        self.entries[benchmark.name][label] = entry
        if entry["score"] is None:
            return
        seed = [self.seed, crc32(benchmark.name.encode())]
        metric = benchmark.metric or entry["metric"]
        entry["low"], entry["high"] = UNKNOWN
        part = summands(metric, records)
        if part is not None and makes_up(benchmark.scale * part.value(), entry["score"], benchmark.scale):
            draws = benchmark.scale * part.resampled(seed)
            entry["low"], entry["high"] = interval(draws)
            entry["units"] = len(part.units)
            self._draws[benchmark.name, label] = draws
        first = next(iter(self.models))
        if label == first:
            self._records[benchmark.name] = records
        elif benchmark.name in self._records:
            self.differences[benchmark.name][label] = difference(
                self._records[benchmark.name],
                records,
                (self.entries[benchmark.name][first]["score"], entry["score"]),
                metric=metric,
                scale=benchmark.scale,
                seed=seed,
            )

    def results(self) -> dict[str, Any]:
        """Everything so far."""
        return {
            "models": self.models,
            "tasks": [self._task(benchmark) for benchmark in self.benchmarks],
            "averages": [average for group in AVERAGED if (average := self._average(group)) is not None],
            "failed": [
                f"{label}: {benchmark.title}: {entry['error']}"
                for benchmark in self.benchmarks
                for label, entry in self.entries[benchmark.name].items()
                if entry["score"] is None
            ],
        }

    def _task(self, benchmark: Benchmark) -> dict[str, Any]:
        return {
            "name": benchmark.name,
            "title": benchmark.title,
            "group": benchmark.group,
            "task": benchmark.task,
            "metric": benchmark.metric,
            "filter": benchmark.filter,
            "scale": benchmark.scale,
            "rows": benchmark.rows,
            "scores": self.entries[benchmark.name],
            "differences": {label: found.as_dict() for label, found in self.differences[benchmark.name].items()},
        }

    def _average(self, group: str) -> dict[str, Any] | None:
        """The paper's average of a group, for the models that have all its scores; None where some were not asked."""
        members = [benchmark for benchmark in groups()[group] if benchmark.name in paper.BENCHMARKS]
        names = [benchmark.name for benchmark in members]
        if not set(names) <= self.entries.keys():
            return None
        weights = {benchmark.name: benchmark.weight for benchmark in members}
        scores, differences, missing = {}, {}, {}
        for label, model in self.models.items():
            entries = {name: self.entries[name].get(label) for name in names}
            lacking = [name for name, entry in entries.items() if entry is None or entry["score"] is None]
            if lacking:
                missing[label] = lacking
                continue
            score = _mean(weights[name] * entry["score"] for name, entry in entries.items())
            low, high = self._interval_of_mean({name: self._draws.get((name, label)) for name in names}, weights)
            scores[label] = {
                "score": score,
                "low": low,
                "high": high,
                "limited": any(entry["limited"] for entry in entries.values()),
                "paper": _beside_paper(score, group, model),
            }
            apart = {name: self.differences[name].get(label) for name in names}
            if all(found is not None and found.points is not None for found in apart.values()):
                low, high = self._interval_of_mean({name: found.draws for name, found in apart.items()}, weights)
                points = _mean(weights[name] * found.points for name, found in apart.items())
                differences[label] = {"difference": points, "low": low, "high": high}
        return {
            "group": group,
            "tasks": names,
            "scores": scores,
            "differences": differences,
            "missing": missing,
        }

    def _interval_of_mean(
        self, draws: Mapping[str, np.ndarray | None], weights: Mapping[str, float]
    ) -> tuple[float, float] | tuple[None, None]:
        """Benchmarks are drawn independently of each other; without the draws of one there is no interval."""
        if any(drawn is None for drawn in draws.values()):
            return UNKNOWN
        return interval(np.mean([weights[name] * drawn for name, drawn in draws.items()], axis=0))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _beside_paper(score: float | None, name: str, model: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's two numbers for a benchmark or a group, and how far a measured one is from its own; None without.

    A p-MoD is compared with the paper's p-MoD, a stock model with the paper's stock model.
    """
    of_paper = paper.MODELS.get(str(model.get("model_type", "")).removeprefix("pmod_"))
    printed = of_paper.score_of(name) if of_paper is not None else None
    if printed is None:
        return None
    own = printed.stock if model.get("routers") == "stock" else printed.pmod
    return {"baseline": printed.stock, "pmod": printed.pmod, "difference": None if score is None else score - own}
