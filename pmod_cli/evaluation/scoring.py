"""One benchmark through lmms-eval: run it, and believe nothing but its results."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pmod_cli.errors import RUN_FAILED, PmodError, explain
from pmod_cli.evaluation.adapter import PmodModel, Tally
from pmod_cli.evaluation.fallbacks import Guesses, counting
from pmod_cli.evaluation.memory import PeakMemory
from pmod_cli.evaluation.suite import Benchmark, folders


@dataclass
class Scored:
    """The outcome of one benchmark for one model.

    Attributes:
        score: Headline number, as the paper prints it; None where the run failed.
        error: Why it failed, one line.
        metric: lmms-eval's name of the headline number.
        metrics: Every number of lmms-eval, `{task: {"metric,filter": value}}`.
        samples: One record per question: task, doc_id, question, target, answer, item (lmms-eval's per-question score).
        seconds: Wall time of the whole benchmark.
        peak_mib: Peak memory meanwhile, in MiB; None where it cannot be measured.
        guesses: Answers that could not be read.
    """

    score: float | None = None
    error: str | None = None
    metric: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    available: int = 0
    seconds: float = 0.0
    peak_mib: float | None = None
    tally: Tally = field(default_factory=Tally)
    guesses: Guesses = field(default_factory=Guesses)

    @property
    def limited(self) -> bool:
        """Fewer questions were asked than the benchmark has."""
        return len(self.samples) < self.available

    def entry(self) -> dict[str, Any]:
        """For the report: everything but the single answers."""
        if self.error is not None:
            return {"score": None, "error": self.error, "seconds": round(self.seconds, 2)}
        tally = self.tally
        return {
            "score": self.score,
            "questions": len(self.samples),
            "questions_available": self.available,
            "limited": self.limited,
            "metric": self.metric,
            "empty_answers": tally.empty,
            "cut_answers": tally.cut,
            "random_answers": self.guesses.drawn,
            "unread_answers": self.guesses.unread,
            "seconds": round(self.seconds, 2),
            "generate_seconds": round(tally.generate_seconds, 2),
            "generated_tokens": tally.tokens,
            "tokens_per_second": round(tally.tokens / tally.generate_seconds, 2) if tally.generate_seconds else None,
            "peak_memory_mib": self.peak_mib and round(self.peak_mib, 1),
            "prompt": tally.prompt,
            "metrics": self.metrics,
            "task_versions": self.versions,
        }


def score(
    model: PmodModel,
    benchmark: Benchmark,
    *,
    limit: float | None,
    seed: int,
    log: Path,
    data_root: Path | None = None,
) -> Scored:
    """Ask `model` the questions of a benchmark. A failure is returned as `Scored.error`, its traceback logged.

    Args:
        limit: Number of questions, or a fraction below 1; the first ones, so that every model gets the same.
        seed: Of Python, NumPy and torch.
        log: File that takes what lmms-eval prints and logs.
        data_root: A mirror of the data sets; None: the Hugging Face cache or the hub.
    """
    started = time.perf_counter()
    model.take_tally()
    memory = PeakMemory(str(model.device))
    try:
        with counting() as guesses:
            scored = _read(benchmark, _run_lmms_eval(model, benchmark, limit, seed, log, data_root))
        scored.guesses = guesses
    except Exception as error:
        scored = Scored(error=_one_line(error))
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    scored.seconds = time.perf_counter() - started
    scored.peak_mib = memory.mib()
    scored.tally = model.take_tally()
    return scored


def _run_lmms_eval(
    model: PmodModel, benchmark: Benchmark, limit: float | None, seed: int, log: Path, data_root: Path | None
) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    from pmod_cli.evaluation.loading import Tasks

    # lmms-eval and its tasks print and log on stdout, which is ours for the result.
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        _silence_lmms_eval(file)
        return simple_evaluate(
            model,
            tasks=[benchmark.task],
            task_manager=Tasks(folders(benchmark), data_root),
            limit=limit,
            bootstrap_iters=0,  # the interval is ours, over the questions, for every metric alike
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            # Tasks that write files put them here. Scoring reads no image, so none is decoded a second time.
            cli_args=Namespace(output_path=str(log.parent), process_with_media=False),
        )


def _silence_lmms_eval(file: Any) -> None:
    """Its log goes to the file; its progress bars go, since the adapter reports progress."""
    import datasets
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from loguru import logger

    logger.remove()
    logger.add(file, level="INFO")
    datasets.disable_progress_bars()
    lmms_eval.evaluator.tqdm = lmms_eval.api.task.tqdm = _no_bar


def _no_bar(*given: Any, **named: Any) -> Any:
    from tqdm import tqdm

    return tqdm(*given, **named | {"disable": True})


def _read(benchmark: Benchmark, results: dict[str, Any]) -> Scored:
    """The headline number and the records of a finished call, which returns normally also where it went wrong.

    Raises:
        PmodError: a question without an answer, or no finite headline number.
    """
    scored, values = Scored(), []
    for task, samples in results["samples"].items():
        expected = results["n-samples"][task]
        if len(samples) != expected["effective"]:
            raise _incomplete(f"{task}: {len(samples)} of {expected['effective']} questions were scored")
        metric, key = _headline(benchmark, task, results)
        value = results["results"][task].get(key)
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            raise _incomplete(f"{task}: lmms-eval gave no number for {key}, but {value!r}")
        values.append(float(value))
        scored.metric = metric
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        scored.metrics[task] = _numbers(results["results"][task])
        scored.versions[task] = results["versions"].get(task)
        scored.available += expected["original"]
        scored.samples += [_record(task, sample, metric) for sample in samples]
    if not values:
        raise _incomplete(f"{benchmark.task}: lmms-eval returned no task")
    scored.score = benchmark.scale * sum(values) / len(values)
    return scored


def _headline(benchmark: Benchmark, task: str, results: dict[str, Any]) -> tuple[str, str]:
    """The metric and its key in lmms-eval's results; of a task that was passed through, its first."""
    if benchmark.metric is not None:
        return benchmark.metric, f"{benchmark.metric},{benchmark.filter}"
    metric = results["configs"][task]["metric_list"][0]["metric"]
    return metric, next((key for key in results["results"][task] if key.startswith(f"{metric},")), f"{metric},none")


def _record(task: str, sample: dict[str, Any], metric: str) -> dict[str, Any]:
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "question": sample["arguments"][0],
        "target": sample["target"],
        "answer": sample["filtered_resps"][0],
        "item": sample.get(metric),
        "tokens": sample["token_counts"][0],
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


def _one_line(error: BaseException) -> str:
    """What went wrong, for the table. lmms-eval wraps the cause in its retries."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else error
    known = explain(cause)
    return known.what if known else f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
