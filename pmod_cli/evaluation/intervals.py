"""Intervals of scores and of paired differences, by resampling what a benchmark scores together.

A headline number is a function of sums over *units*: single questions, or both questions about a picture (MME). Units
are drawn with replacement within their stratum (MME's categories, POPE's splits), as often as there are units in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 1000
UNKNOWN = (None, None)
MOST_TASKS = 100  # of one benchmark; POPE has three
CHUNK = 64  # draws made at once, to bound memory on benchmarks of ten thousand questions and more

Record = Mapping[str, Any]  # one answered question: `task`, `doc_id` and lmms-eval's `item`


class Summands:
    """What each unit adds to a score that is a function of sums.

    Args:
        units: Names of the U units, each once. Two models are paired where theirs are equal.
        columns: Summands, (U, terms) float64.
        score: From sums (..., terms) to the score (...).
        strata: Stratum of each unit, (U,) int64; None: one stratum.
    """

    def __init__(
        self,
        units: Sequence[Hashable],
        columns: np.ndarray,
        score: Callable[[np.ndarray], np.ndarray],
        strata: np.ndarray | None = None,
    ) -> None:
        self.units, self.columns, self.score = list(units), columns, score
        self.strata = np.zeros(len(columns), dtype=np.int64) if strata is None else strata

    def value(self) -> float:
        """The score over all units, in lmms-eval's units."""
        return float(self.score(self.columns.sum(axis=0)))

    def resampled(self, seed: int) -> np.ndarray:
        """Scores of `DRAWS` resampled sets of units, (DRAWS,). Equal seeds and strata draw equal units."""
        random = np.random.default_rng(seed)
        members = [np.flatnonzero(self.strata == stratum) for stratum in np.unique(self.strata)]
        sums = np.zeros((DRAWS, self.columns.shape[1]))
        for start in range(0, DRAWS, CHUNK):
            draws = min(CHUNK, DRAWS - start)
            for places in members:
                drawn = random.integers(len(places), size=(draws, len(places)))
                counts = np.stack([np.bincount(row, minlength=len(places)) for row in drawn])
                sums[start : start + draws] += counts @ self.columns[places]
        return self.score(sums)


def interval(draws: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The 95 % percentile interval of resampled scores; `UNKNOWN` where all are equal, as if no answer is right."""
    if np.ptp(draws) == 0:
        return UNKNOWN
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def rate_interval(changed: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of a rate by Wilson's formula, which also holds where nothing or everything changed."""
    z2 = 1.959964**2
    middle = (changed + z2 / 2) / (questions + z2)
    half = math.sqrt(z2 * (changed * (questions - changed) / questions + z2 / 4)) / (questions + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def summands(metric: str, records: Sequence[Record]) -> Summands | None:
    """The summands behind a benchmark's headline number; None where it is no function of sums that is known here.

    Args:
        metric: Headline metric.
        records: The answered questions. Those whose `item` is None are not part of the headline (SEED's videos).
    """
    counted = [record for record in records if record["item"] is not None]
    if not counted:
        return None
    try:
        found = _summands(metric, counted)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None  # a task that was passed through, with items of its own
    return found if np.isfinite(found.columns).all() else None


def _summands(metric: str, counted: Sequence[Record]) -> Summands:
    if metric == "mme_perception_score":
        return _mme(counted)
    if metric == "gpt_eval_score":
        counted = _mmbench(counted)
    if metric == "pope_f1_score":
        return _per_task(counted, [_yes_or_no(record["item"]) for record in counted], _f1)
    correct = {"seed_image": _seed, "mmmu_acc": _mmmu}.get(metric, float)
    return _per_task(counted, [(correct(record["item"]), 1.0) for record in counted], _mean)


def _per_task(
    records: Sequence[Record], terms: Sequence[tuple[float, ...]], score: Callable[[np.ndarray], np.ndarray]
) -> Summands:
    """The mean over lmms-eval's tasks of a score of each; units are single questions."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    if not 0 < len(tasks) <= MOST_TASKS:
        raise ValueError(f"expected up to {MOST_TASKS} tasks, found {len(tasks)}")
    strata = np.array([tasks.index(record["task"]) for record in records])
    width = len(terms[0])
    columns = np.zeros((len(records), len(tasks), width))
    columns[np.arange(len(records)), strata] = terms

    def mean_of_tasks(sums: np.ndarray) -> np.ndarray:
        return score(sums.reshape(*sums.shape[:-1], len(tasks), width)).mean(axis=-1)

    units = [(record["task"], record["doc_id"]) for record in records]
    return Summands(units, columns.reshape(len(records), -1), mean_of_tasks, strata)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _f1(sums: np.ndarray) -> np.ndarray:
    """F1 from true positives, false positives and false negatives; 0 where there are none of them, as lmms-eval."""
    hits, false_alarms, misses = np.moveaxis(sums, -1, 0)
    return 2 * hits / np.maximum(2 * hits + false_alarms + misses, 1)


def _yes_or_no(item: Mapping[str, Any]) -> tuple[float, float, float]:
    """True positive, false positive, false negative. For lmms-eval an answer that is neither is no miss."""
    said, true = item["prediction"], item["ground_truth"] == "yes"
    return float(said == "yes" and true), float(said == "yes" and not true), float(said == "no" and true)


def _seed(item: Mapping[str, Any]) -> float:
    return float(item["pred"].lower().strip() == item["answer"].lower().strip())


def _mmmu(item: Mapping[str, Any]) -> float:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return float(evaluate_mmmu([item])[1]["acc"])


def _mme(records: Sequence[Record]) -> Summands:
    """Units are pictures, each with two questions: 50 points for each right one, 100 more where both are.

    The score is the sum over categories of their mean points.
    """
    right: dict[tuple[str, str], list[float]] = {}
    for record in records:
        item = record["item"]
        right.setdefault((item["category"], item["question_id"]), []).append(item["score"])
    if any(len(scores) != 2 for scores in right.values()):
        raise ValueError("a picture of MME has two questions")
    categories = sorted({category for category, _ in right})
    strata = np.array([categories.index(category) for category, _ in right])
    columns = np.zeros((len(right), len(categories), 2))
    columns[np.arange(len(right)), strata] = [
        (50.0 * sum(scores) + 100.0 * (sum(scores) == 2), 1.0) for scores in right.values()
    ]

    def sum_of_categories(sums: np.ndarray) -> np.ndarray:
        return _mean(sums.reshape(*sums.shape[:-1], len(categories), 2)).sum(axis=-1)

    return Summands(list(right), columns.reshape(len(right), -1), sum_of_categories, strata)


def _mmbench(records: Sequence[Record]) -> list[Record]:
    """One record per question, its `item` 100.0 or 0.0 as lmms-eval's static scoring has it.

    MMBench asks a question several times with its options turned (`index` differs by millions); all have to be right.
    """
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    def right(item: Mapping[str, Any]) -> bool:
        item = dict(item) | {"prediction": str(item["prediction"])}
        letter = mmbench_evaluator.prefetch_answer(item) or extract_mcq_answer(
            item["prediction"], choices=sorted(mmbench_evaluator.build_choices(item))
        )
        return letter == item["answer"]

    turned: dict[int, list[Record]] = {}
    for record in records:
        turned.setdefault(record["item"]["index"] % 1_000_000, []).append(record)
    return [
        {**group[0], "item": 100.0 * all(right(record["item"]) for record in group)}
        for group in turned.values()
        if any(record["item"]["index"] < 1_000_000 for record in group)  # others are not counted by lmms-eval
    ]
