"""How many answers could not be read, so that lmms-eval drew an option at random or counted none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Guesses:
    """What happened while lmms-eval scored.

    Attributes:
        drawn: Answers for which an option was drawn at random: MMMU, and MMBench with a judge that failed.
        unread: Multiple-choice answers in which no option was found; they count as wrong: static MMBench, RealWorldQA.
    """

    drawn: int = 0
    unread: int = 0


@contextmanager
def counting() -> Iterator[Guesses]:
    """Count the guesses of lmms-eval's scoring inside the block.

    Its parsers say nothing of a guess. So what they call to guess is watched: `random.choice` in MMMU's, `randint` in
    MMBench's, the empty letter of `extract_mcq_answer`.
    """
    from lmms_eval.tasks._task_utils import mcq_extract, mmmu_mcq_utils
    from lmms_eval.tasks.mmbench import mmbench_evals

    guesses = Guesses()
    choices, judge, extract = mmmu_mcq_utils.random, mmbench_evals.rd, mcq_extract.extract_mcq_answer

    def extract_and_count(*given: Any, **named: Any) -> str:
        letter = extract(*given, **named)
        guesses.unread += not letter
        return letter

    mmmu_mcq_utils.random = _Watched(choices, "choice", guesses)
    mmbench_evals.rd = _Watched(judge, "randint", guesses)
    mcq_extract.extract_mcq_answer = extract_and_count
    try:
        yield guesses
    finally:
        mmmu_mcq_utils.random, mmbench_evals.rd, mcq_extract.extract_mcq_answer = choices, judge, extract


class _Watched:
    """The module `random` whose function `watched` counts its calls."""

    def __init__(self, module: Any, watched: str, guesses: Guesses) -> None:
        self._module, self._watched, self._guesses = module, watched, guesses

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name != self._watched:
            return function

        def counted(*given: Any, **named: Any) -> Any:
            self._guesses.drawn += 1
            return function(*given, **named)

        return counted
