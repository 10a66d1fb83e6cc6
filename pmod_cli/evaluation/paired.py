"""Two models on the same questions: the paired difference of their scores, and the answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmod_cli.evaluation.intervals import UNKNOWN, Record, interval, summands


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
    metric: str,
    scale: float,
    seed: int | Sequence[int],
) -> Difference:
    """Compare the records of one benchmark.

    Args:
        first: Records (`task`, `doc_id`, `question`, `prompt`, `target`, `answer`, `item`) of the first model.
        other: Those of the other one. Where they hold other questions, only the common ones are compared.
        scores: The headline numbers over all records of each, in the paper's units.
        metric: Headline metric.
        scale: From lmms-eval's units to the paper's.
        seed: Of the resampling.
    """
    mine, theirs = ({_name(record): record for record in records} for records in (first, other))
    common = [name for name in mine if name in theirs]
    pairs = [(mine[name], theirs[name]) for name in common]
    changed = [_changed(a, b) for a, b in pairs if a["answer"] != b["answer"]]
    prompts = sum(a.get("prompt") != b.get("prompt") for a, b in pairs)
    parts = [summands(metric, [pair[side] for pair in pairs]) for side in (0, 1)]
    everything = len(common) == len(mine) == len(theirs)
    if everything:
        points = scores[0] - scores[1]
    elif None not in parts:
        points = scale * (parts[0].value() - parts[1].value())
    else:
        points = None
    known = None not in parts and parts[0].units == parts[1].units and points is not None
    if known and everything:  # summands that do not make up lmms-eval's own score are not those of this benchmark
        known = all(makes_up(part.value() * scale, score, scale) for part, score in zip(parts, scores, strict=True))
    if not known:
        return Difference(points, *UNKNOWN, len(common), prompts, changed)
    draws = scale * (parts[0].resampled(seed) - parts[1].resampled(seed))
    return Difference(points, *interval(draws), len(common), prompts, changed, draws)


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
