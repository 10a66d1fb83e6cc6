"""How many answers depend on the batch size, measured: questions of the run are put again, one at a time.

In float32 none should. In bfloat16 the order of sums differs with the shape of a batch, and two next tokens that are
nearly as likely can change places.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from pmod_cli.evaluation.adapter import PmodModel
    from pmod_cli.evaluation.journal import Answer

QUESTIONS = 64  # per task and model


def changed_answers(
    model: PmodModel,
    requests: Sequence[Instance],
    answers: Mapping[int, Answer],
    *,
    seed: int,
    questions: int = QUESTIONS,
) -> dict[str, Any]:
    """Ask a sample of the questions again at batch size 1.

    Args:
        model: The one that answered, as it is.
        requests: The questions of a task.
        answers: Their answers from the run, by place. Only those from a batch of several rows are checked.
        seed: Of the sample.
        questions: Size of the sample.

    Returns:
        Number of questions, of those whose answer changed, and the largest batch among the answers checked.
    """
    batched = [place for place, answer in sorted(answers.items()) if answer.batch > 1]
    places = sorted(random.Random(f"flips/{seed}").sample(batched, min(questions, len(batched))))
    size, model.batch_size = model.batch_size, 1
    try:
        alone = dict(pair for batch in model.answers([requests[place] for place in places]) for pair in batch)
    finally:
        model.batch_size = size
    return {
        "questions": len(places),
        "changed": sum(alone[number].text != answers[place].text for number, place in enumerate(places)),
        "batch_size": max((answers[place].batch for place in places), default=1),
    }
