"""The score of answers that are all there: lmms-eval's own evaluation, and nothing is believed but its results."""

from __future__ import annotations

import math
import random
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.evaluation.benchmarks import Benchmark, scale_of
from pmod_cli.evaluation.journal import Answer
from pmod_cli.evaluation.outcome import OF_LMMS_EVAL, Guesses, Outcome, Record, digest
from pmod_cli.evaluation.processes import hidden_launcher
from pmod_cli.evaluation.questions import Questions, quiet_lmms_eval


def score(benchmark: Benchmark, questions: Questions, answers: dict[int, Answer], *, seed: int, log: Path) -> Outcome:
    """Let lmms-eval score a benchmark's answers.

    Args:
        answers: By place of the question in `questions.requests`; none may be missing.
        seed: Of the options that lmms-eval draws where it cannot read an answer.
        log: File that takes what lmms-eval prints and logs.

    Raises:
        PmodError: a question without an answer, or no finite headline number.
    """
    if missing := len(questions.requests) - len(answers):
        raise _incomplete(f"{missing} of {len(questions.requests)} questions have no answer")
    by_question = {
        (request.task_name, request.doc_id): answers[place] for place, request in enumerate(questions.requests)
    }
    with counting_guesses() as guesses:
        results = _evaluate(questions, by_question, seed, log)
    outcome = _read(benchmark, questions, by_question, results)
    outcome.guesses = guesses
    outcome.questions_sha256 = digest(questions.digests)
    return outcome


class _Answered(lmms):
    """To lmms-eval a model like any other, whose answers are known before it is asked."""

    def __init__(self, answers: dict[tuple[str, int], Answer]) -> None:
        super().__init__()
        self._answers = answers

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        given = [self._answers[request.task_name, request.doc_id] for request in requests]
        return [GenerationResult(one.text, TokenCounts(one.input_tokens, one.output_tokens)) for one in given]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError

    def clean(self) -> None:
        """There is no model to delete."""


def _evaluate(questions: Questions, answers: dict[tuple[str, int], Answer], seed: int, log: Path) -> dict[str, Any]:
    from lmms_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(seed)
    for task in questions.tasks.values():
        task.build_all_requests = _are_built
    with quiet_lmms_eval(log), hidden_launcher():
        return evaluate(
            lm=_Answered(answers),
            task_dict=questions.tasks,
            bootstrap_iters=0,  # the interval is ours, over the questions, for every metric alike
            log_samples=True,
            distributed_executor_backend="torchrun",  # there is one process here; the other choice starts accelerate
            process_docs_parallel=1,  # in threads, options drawn at random would fall differently each time
            # Tasks that write files put them here. Scoring reads no image, so none is decoded a second time.
            cli_args=Namespace(output_path=str(log.parent / OF_LMMS_EVAL), process_with_media=False),
        )


def _are_built(**_: Any) -> None:
    """`questions.load` has built the requests of the rows that were drawn."""


def _read(
    benchmark: Benchmark, questions: Questions, answers: dict[tuple[str, int], Answer], results: dict[str, Any]
) -> Outcome:
    """The headline number and the records of a finished call, which returns normally also where it went wrong."""
    outcome, values = Outcome(), []
    for task in questions.tasks:
        metric, key = _headline(benchmark, task, results)
        expected, samples = len(questions.rows[task]), _samples(questions, results, task, key)
        if len(samples) != expected:
            raise _incomplete(f"{task}: {len(samples)} of {expected} questions were scored")
        value = results["results"][task].get(key)
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise _incomplete(f"{task}: lmms-eval gave no number for {key}, but {value!r}")
        values.append(float(value))
        outcome.metric = metric
        outcome.lower_is_better |= results["higher_is_better"].get(task, {}).get(metric) is False
        outcome.metrics[task] = _numbers(results["results"][task])
        outcome.versions[task] = results["versions"].get(task)
        outcome.available += questions.available[task]
        outcome.samples += [
            _record(task, questions.rows[task][sample["doc_id"]], sample, metric, answers[task, sample["doc_id"]])
            for sample in samples
        ]
    outcome.score = scale_of(benchmark, outcome.metric) * sum(values) / len(values)
    return outcome


def _headline(benchmark: Benchmark, task: str, results: dict[str, Any]) -> tuple[str, str]:
    """The metric and its key in lmms-eval's results; of a task that was passed through, its first."""
    if benchmark.metric is not None:
        return benchmark.metric, f"{benchmark.metric},{benchmark.filter}"
    metric = results["configs"][task]["metric_list"][0]["metric"]
    return metric, next((key for key in results["results"][task] if key.startswith(f"{metric},")), f"{metric},none")


def _samples(questions: Questions, results: dict[str, Any], task: str, key: str) -> list[dict[str, Any]]:
    """lmms-eval's samples in the order of the data set. It lists all of one filter, then all of the next."""
    filters = list(questions.tasks[task].instances[0].filtered_resps)
    name = key.rpartition(",")[2]
    samples, asked = results["samples"].get(task, []), len(questions.rows[task])
    start = asked * filters.index(name) if name in filters else 0
    return sorted(samples[start : start + asked], key=lambda sample: sample["doc_id"])


def _record(task: str, row: int, sample: dict[str, Any], metric: str, answer: Answer) -> Record:
    return {
        "task": task,
        "doc_id": row,
        "question": sample["arguments"][0],
        "target": sample["target"],
        "answer": answer.text,
        "filtered": sample["filtered_resps"][0],
        "item": sample.get(metric),
        "prompt": answer.prompt,
        "input_tokens": answer.input_tokens,
        "vision_tokens": answer.vision_tokens,
        "output_tokens": answer.output_tokens,
        "cut": answer.cut,
        "too_long": answer.too_long,
        "seconds": answer.seconds,
        "batch": answer.batch,
    }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's numbers without its standard errors."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float | np.number) and "_stderr" not in key and math.isfinite(value)
    }


def _incomplete(what: str) -> PmodError:
    return PmodError(what, code=RUN_FAILED)


@contextmanager
def counting_guesses() -> Iterator[Guesses]:
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
