"""The answers of one model to one benchmark: those of an earlier run are taken, the others asked by all processes."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import explain
from pmod_cli.core.memory import PeakMemory
from pmod_cli.evaluation.adapter import PmodModel, Unanswered
from pmod_cli.evaluation.journal import Answer, Journal
from pmod_cli.evaluation.processes import Processes

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from pmod_cli.evaluation.questions import Questions


@dataclass
class Replies:
    """What came of asking. By place of the question in `Questions.requests`.

    Attributes:
        answers: The answers, complete in the process of rank 0.
        unanswered: Why a question could not be put.
        found: Answers of an earlier run.
        peak_mib: Peak memory, as in `PeakMemory`, of the process that took most.
        error: Why a process stopped asking; its traceback is in the log.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    unanswered: dict[int, str] = field(default_factory=dict)
    found: int = 0
    peak_mib: float | None = None
    error: str | None = None


def ask(
    model: PmodModel,
    questions: Questions,
    answerer: str,
    journal: Journal,
    processes: Processes,
    *,
    log: Path,
    on_progress: Callable[[int, int], None] = lambda answered, all_questions: None,
) -> Replies:
    """Ask what the journal does not know yet; each answer is in the journal before the next batch is asked.

    Args:
        answerer: Digest of everything about the model and its settings that an answer depends on.
        on_progress: Called with the numbers of questions that are answered, and of all; the others' share is estimated.

    Raises:
        OSError: an answer cannot be written down, so there is no point in going on.
    """
    keys = questions.keys(answerer)
    known = journal.read() if processes.rank == 0 else {}
    found = {place: known[key] for place, key in enumerate(keys) if key in known}
    taken = set(processes.gather(list(found))[0])
    missing = [place for place in range(len(keys)) if place not in taken]
    mine = missing[processes.rank :: processes.size]
    memory, made = PeakMemory(str(model.device)), Replies()
    model.task_dict.update({name: task.dataset for name, task in questions.tasks.items()})
    batches = model.answers([questions.requests[place] for place in mine])
    on_progress(len(taken), len(keys))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            made.error = one_line(error)
            write_traceback(error, log)
            break
        if batch is None:
            break
        answered = {mine[place]: answer for place, answer in batch if isinstance(answer, Answer)}
        journal.append((keys[place], answer) for place, answer in answered.items())
        made.answers |= answered
        made.unanswered |= {mine[place]: answer.reason for place, answer in batch if isinstance(answer, Unanswered)}
        done = len(made.answers) + len(made.unanswered)
        on_progress(min(len(keys), len(taken) + done * processes.size), len(keys))
    made.peak_mib = memory.mib()
    return _together(found, processes.gather(made))


def one_line(error: BaseException) -> str:
    """What went wrong, for the table. lmms-eval wraps the cause in its retries."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else error
    known = explain(cause)
    return known.what if known else f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def write_traceback(error: BaseException, log: Path) -> None:
    """For who has to find the cause."""
    with log.open("a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)


def _together(found: dict[int, Answer], parts: list[Replies]) -> Replies:
    """One result of what all processes made."""
    whole = Replies(dict(found), found=len(found))
    for part in parts:
        whole.answers |= part.answers
        whole.unanswered |= part.unanswered
        whole.error = whole.error or part.error
    whole.peak_mib = max((part.peak_mib for part in parts if part.peak_mib is not None), default=None)
    return whole


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
        questions: Size of the sample.

    Returns:
        Number of questions, of those whose answer changed, and the largest batch among the answers checked.
    """
    batched = [place for place, answer in sorted(answers.items()) if answer.batch > 1]
    places = sorted(random.Random(f"flips/{seed}").sample(batched, min(questions, len(batched))))
    size, model.batch_size = model.batch_size, 1
    try:
        batches = model.answers([requests[place] for place in places])
        alone = {number: one.text for batch in batches for number, one in batch if isinstance(one, Answer)}
    finally:
        model.batch_size = size
    return {
        "questions": len(places),
        "changed": sum(alone.get(number) != answers[place].text for number, place in enumerate(places)),
        "batch_size": max((answers[place].batch for place in places), default=1),
    }
