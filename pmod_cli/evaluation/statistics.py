"""Intervals of scores and of paired differences, by resampling the questions of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 1000
UNKNOWN = (None, None)
CHUNK = 64  # draws resampled together, to bound memory on benchmarks of ten thousand questions and more


class Sample:
    """What each question adds to a score that is a function of sums: a mean, or the F1 of yes-or-no answers.

    Args:
        columns: Summands, (questions, terms) float64.
        score: From sums (..., terms) and the number of questions to the score (...).
    """

    def __init__(self, columns: np.ndarray, score: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self.columns, self.score = columns, score

    def value(self) -> float:
        """The score over all questions."""
        return float(self.score(self.columns.sum(axis=0), len(self.columns)))

    def resampled(self, seed: int) -> np.ndarray:
        """Scores of `DRAWS` resampled sets of questions, (DRAWS,). Equal seeds and sizes draw equal questions."""
        random = np.random.default_rng(seed)
        questions = len(self.columns)
        sums = []
        for done in range(0, DRAWS, CHUNK):
            shape = (min(CHUNK, DRAWS - done), questions)
            drawn = random.integers(questions, size=shape)
            counts = np.stack([np.bincount(row, minlength=questions) for row in drawn])
            sums.append(counts @ self.columns)
        return self.score(np.concatenate(sums), questions)


def sample_of(metric: str, items: Sequence[Any]) -> Sample | None:
    """The summands behind a benchmark's score, from lmms-eval's per-question items; None where it is no such score."""
    if metric == "pope_f1_score":
        said = np.array([item["prediction"] == "yes" for item in items])
        true = np.array([item["ground_truth"] == "yes" for item in items])
        return Sample(np.stack([said & true, said & ~true, ~said & true], axis=1).astype(np.float64), _f1)
    if items and all(isinstance(item, int | float | np.number) for item in items):
        return Sample(np.array(items, dtype=np.float64)[:, None], lambda sums, questions: sums[..., 0] / questions)
    return None


def interval(draws: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The 95 % percentile interval of resampled scores. Draws that are all equal (no answer right) tell of none."""
    if np.ptp(draws) == 0:
        return UNKNOWN
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _f1(sums: np.ndarray, questions: int) -> np.ndarray:
    """F1 from true positives, false positives and false negatives; 0 where there is none of them, as lmms-eval."""
    hits, false_alarms, misses = np.moveaxis(sums, -1, 0)
    return 2 * hits / np.maximum(2 * hits + false_alarms + misses, 1)
