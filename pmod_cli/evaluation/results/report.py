"""What was measured, as one plain dictionary: scores, intervals, differences, costs and means, as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from pmod_cli import paper
from pmod_cli.evaluation.benchmarks import KINDS, Benchmark, groups, scale_of, sums_of
from pmod_cli.evaluation.intervals import (
    UNKNOWN,
    Difference,
    Interval,
    Record,
    Sums,
    difference,
    interval,
    makes_up,
    summands,
)

ALL_TASKS = "mean of tasks"  # what all benchmarks of a run have in common, as a kind of its own
AVERAGED = ("general", "text-rich")  # the groups that the paper averages
OF_SIZE = ("layers", "hidden_size", "decoder")  # a model beside random dropping of another one says nothing
SAME_COST = 0.05  # a p-MoD model is beside random dropping whose FLOPs on the same prompts are within this share of its


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
        self.scales = {benchmark.name: benchmark.scale for benchmark in benchmarks}
        self.entries: dict[str, dict[str, dict[str, Any]]] = {benchmark.name: {} for benchmark in benchmarks}
        self.differences: dict[str, dict[str, Difference]] = {benchmark.name: {} for benchmark in benchmarks}
        self._draws: dict[tuple[str, str], np.ndarray] = {}
        self._records: dict[str, Sequence[Record]] = {}  # of the first model
        self._gains: dict[tuple[str, str], Difference] = {}  # over random dropping
        self._controls: dict[tuple[str, str], str] = {}  # which random dropping that is
        self._asked: dict[tuple[str, str], Sequence[Record]] = {}  # of every model that has a score

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
        self._add_costs(label)
        seed = [self.seed, crc32(benchmark.name.encode())]
        metric = benchmark.metric or entry["metric"]
        sums, scale = sums_of(benchmark, metric), scale_of(benchmark, metric)
        self.scales[benchmark.name] = scale
        entry["low"], entry["high"] = UNKNOWN
        part = summands(records, sums)
        if part is not None and makes_up(scale * part.value(), entry["score"], scale):
            draws = scale * part.resampled(seed)
            entry["low"], entry["high"] = interval(draws)
            entry["units"] = len(part.units)
            self._draws[benchmark.name, label] = draws
        self._asked[benchmark.name, label] = records
        for known in self.models:
            self._add_gain(benchmark, known, sums, scale, seed)
        first = next(iter(self.models))
        if label == first:
            self._records[benchmark.name] = records
        elif benchmark.name in self._records:
            self.differences[benchmark.name][label] = difference(
                self._records[benchmark.name],
                records,
                (self.entries[benchmark.name][first]["score"], entry["score"]),
                sums=sums,
                scale=scale,
                seed=seed,
            )

    def of_first(self, benchmark: Benchmark) -> Sequence[Record]:
        """The records of the first model; none where it has no score yet."""
        return self._records.get(benchmark.name, ())

    def _add_gain(self, benchmark: Benchmark, label: str, sums: Sums, scale: float, seed: list[int]) -> None:
        """The difference to random dropping at the same cost, once both are there, in whichever order they came.

        A p-MoD model's is taken anew where random dropping comes that is nearer to its cost.
        """
        key, control = (benchmark.name, label), self._control(benchmark.name, label)
        if control is None or self._controls.get(key) == control:
            return
        self._controls[key] = control
        entry, beside = (self.entries[benchmark.name][each] for each in (label, control))
        asked, other = (self._asked[benchmark.name, each] for each in (label, control))
        scores = (entry["score"], beside["score"])
        gain = self._gains[key] = difference(asked, other, scores, sums=sums, scale=scale, seed=seed)
        entry["over_random"] = {key: gain.as_dict()[key] for key in ("difference", "low", "high")}

    def _control(self, benchmark: str, label: str) -> str | None:
        """Random dropping that a model has to beat: of its budget, or, of a p-MoD model, of about its own FLOPs."""
        model, entries = self.models[label], self.entries[benchmark]
        if (benchmark, label) not in self._asked:
            return None
        if model.get("control") is not None:
            return model["control"] if (benchmark, model["control"]) in self._asked else None
        own = (entries[label].get("cost") or {}).get("flops")
        if own is None or model.get("method") or model.get("selection", "router") != "router":
            return None
        away = {
            other: abs(entries[other]["cost"]["flops"] / own - 1)
            for other, described in self.models.items()
            if described.get("method") == "random" and all(described.get(key) == model.get(key) for key in OF_SIZE)
            if (benchmark, other) in self._asked and entries[other].get("cost")
        }
        nearest = min(away, key=lambda other: away[other], default=None)
        return nearest if nearest is not None and away[nearest] <= SAME_COST else None

    def _add_costs(self, label: str) -> None:
        """What the model costs on the prompts of all benchmarks so far; None where it is not known of them all."""
        model, entries = self.models[label], self._scored(self.entries, label).values()
        if not all(entry.get("cost") for entry in entries):
            model["cost"] = None
            return
        questions = [entry["questions"] for entry in entries]
        names = next(iter(entries))["cost"]
        means = {name: np.average([entry["cost"][name] for entry in entries], weights=questions) for name in names}
        model["cost"] = {name: float(mean) for name, mean in means.items()}
        if model.get("downsampled") is None and "mean_tokens" in means:
            model["mean_retention"] = model["cost"]["mean_tokens"]

    def results(self) -> dict[str, Any]:
        """Everything so far."""
        return {
            "models": self.models,
            "tasks": [self._task(benchmark) for benchmark in self.benchmarks],
            "averages": [average for group in AVERAGED if (average := self._average(group)) is not None],
            "kinds": self._kinds(),
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
            "kind": benchmark.kind,
            "task": benchmark.task,
            "metric": benchmark.metric,
            "filter": benchmark.filter,
            "scale": self.scales[benchmark.name],
            "lower_is_better": self._lower_is_better(benchmark),
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
            entries = self._scored(names, label)
            if len(entries) < len(names):
                missing[label] = [name for name in names if name not in entries]
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
            apart = self._mean_difference({name: self.differences[name].get(label) for name in names}, weights)
            if apart is not None:
                differences[label] = apart
        return {
            "group": group,
            "tasks": names,
            "scores": scores,
            "differences": differences,
            "missing": missing,
        }

    def _kinds(self) -> list[dict[str, Any]]:
        """The means of each kind that was asked; of several kinds also, last, the mean of all tasks.

        A score that is better where it is lower is in none of them.
        """
        asked = [each for each in self.benchmarks if not self._lower_is_better(each)]
        of_kind = {kind: [each for each in asked if each.kind == kind] for kind in KINDS}
        means = [self._means(kind, members) for kind, members in of_kind.items() if members]
        return means if len(means) < 2 else [*means, self._means(ALL_TASKS, asked)]

    def _lower_is_better(self, benchmark: Benchmark) -> bool:
        return any(entry.get("lower_is_better") for entry in self.entries[benchmark.name].values())

    def _means(self, title: str, members: Sequence[Benchmark]) -> dict[str, Any]:
        """Means over benchmarks, for the models that have all their scores."""
        weights = {benchmark.name: benchmark.weight for benchmark in members}
        scores: dict[str, dict[str, Any]] = {}
        for label in self.models:
            entries = self._scored(weights, label)
            if len(entries) < len(weights):
                continue
            low, high = self._interval_of_mean({name: self._draws.get((name, label)) for name in weights}, weights)
            scores[label] = {
                "score": _mean(weights[name] * entry["score"] for name, entry in entries.items()),
                "low": low,
                "high": high,
                "limited": any(entry["limited"] for entry in entries.values()),
                "questions": sum(entry["questions"] for entry in entries.values()),
                "generate_seconds": sum(entry.get("generate_seconds") or 0.0 for entry in entries.values()),
            }
            gain = self._mean_difference({name: self._gains.get((name, label)) for name in weights}, weights)
            if gain is not None:
                scores[label]["over_random"] = gain
        return {"title": title, "tasks": list(weights), "scores": scores}

    def _scored(self, names: Iterable[str], label: str) -> dict[str, dict[str, Any]]:
        """A model's entries of those of the benchmarks that have a score."""
        found = ((name, self.entries[name].get(label)) for name in names)
        return {name: entry for name, entry in found if entry is not None and entry["score"] is not None}

    def _mean_difference(
        self, found: Mapping[str, Difference | None], weights: Mapping[str, float]
    ) -> dict[str, float | None] | None:
        """The mean of differences and its interval; None where one of them is not known."""
        known = {name: one for name, one in found.items() if one is not None}
        points = [weights[name] * one.points for name, one in known.items() if one.points is not None]
        if len(points) < len(found):
            return None
        low, high = self._interval_of_mean({name: one.draws for name, one in known.items()}, weights)
        return {"difference": _mean(points), "low": low, "high": high}

    def _interval_of_mean(self, draws: Mapping[str, np.ndarray | None], weights: Mapping[str, float]) -> Interval:
        """Benchmarks are drawn independently of each other; without the draws of one there is no interval."""
        known = [weights[name] * drawn for name, drawn in draws.items() if drawn is not None]
        return interval(np.mean(known, axis=0)) if len(known) == len(draws) else UNKNOWN


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
