"""The sums that make up the paper's headline numbers: one function a kind of score, from its answered questions.

`benchmarks.py` names the function of each benchmark; `intervals.py` resamples what it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pmod_cli.evaluation.intervals import Record, Summands

MOST_TASKS = 100  # of one benchmark; POPE has three


def means(records: Sequence[Record], right: Callable[[Any], float] = float) -> Summands:
    """The mean over questions, in each of lmms-eval's tasks, of what `right` makes of an item."""
    return per_task(records, [(right(record["item"]), 1.0) for record in records], _mean)


def f1(records: Sequence[Record]) -> Summands:
    """POPE: the F1 of the answer yes."""
    return per_task(records, [_yes_or_no(record["item"]) for record in records], _f1)


def seed(records: Sequence[Record]) -> Summands:
    """SEED-Bench: the share of the right letters."""
    return means(records, lambda item: float(item["pred"].lower().strip() == item["answer"].lower().strip()))


def options(records: Sequence[Record]) -> Summands:
    """MuirBench, BLINK and EgoSchema: the share of the right options, as each task notes it."""
    return means(records, _is_right)


def videomme(records: Sequence[Record]) -> Summands:
    """Video-MME: the same in percent."""
    return means(records, lambda item: 100 * _is_right(item))


def mvbench(records: Sequence[Record]) -> Summands:
    """MVBench: the same in percent, of the answers that are not empty; lmms-eval leaves the others out."""
    terms = [(100 * _is_right(record["item"]), float(record["item"]["pred_answer"] != "")) for record in records]
    return per_task(records, terms, lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1))


def _is_right(item: Any) -> float:
    for verdict in ("is_correct", "score"):
        if verdict in item:
            return float(item[verdict])
    said, meant = str(item["pred"]), str(item["answer"] if "answer" in item else item["ground_truth"])
    return float(said.lower().strip() == meant.lower().strip())


def mmmu(records: Sequence[Record]) -> Summands:
    """MMMU: the share of the right answers, as lmms-eval judges each."""
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

    return means(records, lambda item: float(evaluate_mmmu([item])[1]["acc"]))


def per_task(
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


def mme(records: Sequence[Record]) -> Summands:
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


def mmbench(records: Sequence[Record]) -> Summands:
    """Units are questions, 100 points or none, as lmms-eval's static scoring has it.

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
    return means(
        [
            {**group[0], "item": 100.0 * all(right(record["item"]) for record in group)}
            for group in turned.values()
            if any(record["item"]["index"] < 1_000_000 for record in group)  # others are not counted by lmms-eval
        ]
    )
