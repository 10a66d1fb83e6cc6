"""Intervals of scores, and of paired differences of two models, by resampling what a benchmark scores together.

A headline number is a function of sums over *units*: single questions, or both questions about a picture (MME). Units
are drawn with replacement within their stratum (MME's categories, POPE's splits), as often as there are units in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 1000
CHUNK = 64  # draws made at once, to bound memory on benchmarks of ten thousand questions and more

Interval = tuple[float, float] | tuple[None, None]
UNKNOWN: Interval = (None, None)

Record = Mapping[str, Any]  # one answered question: `task`, `doc_id` and lmms-eval's `item`
Sums = Callable[[Sequence[Record]], "Summands"]  # a benchmark's; `score_sums` has those of the paper


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

    def resampled(self, seed: int | Sequence[int]) -> np.ndarray:
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


def interval(draws: np.ndarray) -> Interval:
    """The 95 % percentile interval of resampled scores; `UNKNOWN` where it has no width, as if no answer is right."""
    # An F1 of 1 is 0 in the few draws without a yes. No rounding error may decide that a difference is above 0.
    low, high = (round(float(bound), 9) for bound in np.percentile(draws, [2.5, 97.5]))
    return (low, high) if low < high else UNKNOWN


def is_gain(low: float | None, high: float | None, *, lower_is_better: bool = False) -> bool:
    """Whether the interval of a difference is on the good side of 0."""
    return low is not None and high is not None and (high < 0 if lower_is_better else low > 0)


def rate_interval(changed: int, questions: int) -> tuple[float, float]:
    """The 95 % interval of a rate by Wilson's formula, which also holds where nothing or everything changed."""
    z2 = 1.959964**2
    middle = (changed + z2 / 2) / (questions + z2)
    half = math.sqrt(z2 * (changed * (questions - changed) / questions + z2 / 4)) / (questions + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def summands(records: Sequence[Record], sums: Sums) -> Summands | None:
    """The summands behind a benchmark's headline number; None where its items are not what `sums` takes.

    Args:
        records: The answered questions. Those whose `item` is None are not part of the headline (SEED's videos).
        sums: The benchmark's, as `benchmarks.sums_of` finds them.
    """
    counted = [record for record in records if record["item"] is not None]
    if not counted:
        return None
    try:
        found = sums(counted)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None  # a task that was passed through, with items of its own
    return found if np.isfinite(found.columns).all() else None


@dataclass(frozen=True)
class Difference:
    """The first model minus the other one, over the questions that both answered.

    Attributes:
        points: Difference of the scores, in the paper's units; None where the common questions cannot be scored alone.
        low, high: Its 95 % interval, units drawn alike for both models; None where it is not known.
        questions: Number of common questions.
        prompts: Common questions that the two models read in other words, as their chat templates have them.
        changed: The questions with different answers: task, doc_id, question, target, both answers and their scores.
        draws: Resampled differences, (DRAWS,); None where the interval is not known.
    """

    points: float | None
    low: float | None
    high: float | None
    questions: int
    prompts: int
    changed: list[dict[str, Any]]
    draws: np.ndarray | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "difference": self.points,
            "low": self.low,
            "high": self.high,
            "questions": self.questions,
            "changed_answers": len(self.changed),
        }


def difference(
    first: Sequence[Record],
    other: Sequence[Record],
    scores: tuple[float, float],
    *,
    sums: Sums,
    scale: float,
    seed: int | Sequence[int],
) -> Difference:
    """Compare the records of one benchmark.

    Args:
        first: Records (`task`, `doc_id`, `question`, `prompt`, `target`, `answer`, `item`) of the first model.
        other: Those of the other one. Where they hold other questions, only the common ones are compared.
        scores: The headline numbers over all records of each, in the paper's units.
    """
    mine, theirs = ({_name(record): record for record in records} for records in (first, other))
    common = [name for name in mine if name in theirs]
    pairs = [(mine[name], theirs[name]) for name in common]
    changed = [_changed(a, b) for a, b in pairs if a["answer"] != b["answer"]]
    prompts = sum(a.get("prompt") != b.get("prompt") for a, b in pairs)
    left, right = (summands([pair[side] for pair in pairs], sums) for side in (0, 1))
    everything = len(common) == len(mine) == len(theirs)
    if everything:
        points = scores[0] - scores[1]
    elif left is not None and right is not None:
        points = scale * (left.value() - right.value())
    else:
        points = None
    draws, (low, high) = None, UNKNOWN
    # Summands that do not make up lmms-eval's own score are not those of this benchmark.
    if (
        left is not None
        and right is not None
        and left.units == right.units
        and (
            not everything
            or all(makes_up(part.value() * scale, own, scale) for part, own in zip((left, right), scores, strict=True))
        )
    ):
        draws = scale * (left.resampled(seed) - right.resampled(seed))
        low, high = interval(draws)
    return Difference(points, low, high, len(common), prompts, changed, draws)


def makes_up(value: float, score: float, scale: float) -> bool:
    """Is a score from summands lmms-eval's own? MMMU rounds its fraction to five digits."""
    return bool(np.isclose(value, score, rtol=1e-9, atol=1e-5 * scale))


def _name(record: Record) -> tuple[Any, ...]:
    """A question is the same where its text and its place in the data set are."""
    return record["task"], record["doc_id"], record["question"]


def _changed(first: Record, other: Record) -> dict[str, Any]:
    return {
        **{key: first[key] for key in ("task", "doc_id", "question", "target")},
        "answer": first["answer"],
        "other_answer": other["answer"],
        "item": first["item"],
        "other_item": other["item"],
    }
