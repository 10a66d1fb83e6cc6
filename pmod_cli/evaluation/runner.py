"""Every benchmark for every model, one at a time, each result on the disk before the next one starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.evaluation import provenance, questions
from pmod_cli.evaluation.adapter import PmodModel, device_of_rank
from pmod_cli.evaluation.asking import ask, changed_answers, one_line, write_traceback
from pmod_cli.evaluation.benchmarks import Benchmark
from pmod_cli.evaluation.eval_models import EvalModel
from pmod_cli.evaluation.eval_plan import EvalSettings, answerer, run_identity, sources_of
from pmod_cli.evaluation.journal import Journal
from pmod_cli.evaluation.loaded import Loaded, load
from pmod_cli.evaluation.outcome import Outcome
from pmod_cli.evaluation.processes import ALONE, Processes
from pmod_cli.evaluation.results import pareto, tables
from pmod_cli.evaluation.results.folder import MEASURED, RESULTS, ResultsFolder, write_tables
from pmod_cli.evaluation.results.report import Report
from pmod_cli.evaluation.results.stored import SCHEMA_VERSION
from pmod_cli.evaluation.scoring import score

Progress = Callable[[str, str, int, int], None]  # model, task, questions answered, questions of the task


def evaluate(
    benchmarks: Sequence[Benchmark],
    eval_models: Sequence[EvalModel],
    settings: EvalSettings,
    out: Path,
    *,
    overwrite: bool = False,
    processes: Processes = ALONE,
    on_progress: Progress = lambda model, task, answered, asked: None,
) -> dict[str, Any]:
    """Score every model on every benchmark and return the report, as `results.json` in `out` holds it.

    Answers that an earlier run of the same models and settings left in `out` are not asked again.

    Args:
        out: Folder of the run; what is in it is described in docs/eval.md.
        overwrite: Replace what another run left there, when this one is whole. Until then, and where a task fails, its
            results are in the folder that `core.folders.staging_of(out)` names.
        processes: This process among those that answer together. All call this; the report is that of rank 0, and
            empty in the others.
        on_progress: Called in each process.

    Raises:
        PmodError: `out` holds a run of something else, or one that is still going on, or is not to be replaced; a model
            cannot be loaded. A task that fails is in the report instead.
        OSError: answers or results cannot be written.
    """
    with ResultsFolder(out, processes, overwrite=overwrite) as folder:
        identity = run_identity(eval_models, settings) if processes.first else {}  # reads weights, so once
        folder.prepare(identity, benchmarks, sources_of(eval_models, settings))
        results = _evaluate(benchmarks, eval_models, settings, folder, processes, on_progress)
        folder.finish(whole=not results.get("failed"))
        return results


def _evaluate(
    benchmarks: Sequence[Benchmark],
    eval_models: Sequence[EvalModel],
    settings: EvalSettings,
    folder: ResultsFolder,
    processes: Processes,
    on_progress: Progress,
) -> dict[str, Any]:
    header = {
        "schema_version": SCHEMA_VERSION,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"data_root": settings.data_root and str(settings.data_root)},
        "identity": folder.identity,
        "software": provenance.software(),
        "machine": provenance.machine(settings.device) | {"processes": processes.size},
    }
    report, measured = Report(benchmarks, seed=settings.seed), folder.measured() if processes.first else {}
    loaded: Loaded | None = None
    results: dict[str, Any] = {}
    for eval_model in eval_models:
        if loaded is None or not loaded.serves(eval_model):
            loaded = None  # the model before is freed first
            on_progress(eval_model.label, "loading", 0, 1)
            device = device_of_rank(settings.device)
            loaded = load(eval_model, dtype=settings.dtype, device=device, attention=settings.attention)
        loaded.take_method(eval_model)
        described = loaded.describe(eval_model) if processes.first else {}
        by = processes.gather(answerer(described, settings) if described else None)[0]
        report.add_model(eval_model.label, described)
        asked = PmodModel(
            str(eval_model.path),
            settings.batch_size,
            selection=eval_model.selection,
            seed=settings.seed,
            halve=settings.halve,
            model=loaded.model,
            processor=loaded.processor,
            budget=loaded.budget(eval_model),
        )
        for benchmark in benchmarks:
            on_progress(eval_model.label, benchmark.title, 0, 1)
            journal = Journal(folder.journal(eval_model.label), benchmark.name, processes.rank)
            show = partial(on_progress, eval_model.label, benchmark.title)
            outcome = _outcome(asked, benchmark, settings, by, journal, processes, folder.log(processes.rank), show)
            if not processes.first:
                continue
            whole = report.of_first(benchmark)
            entry = outcome.entry() | loaded.cost_of_prompts(eval_model, outcome.samples, whole)
            if outcome.samples and outcome.found == len(outcome.samples):  # reading answers is no measurement
                entry |= measured.get((eval_model.label, benchmark.name), dict.fromkeys(MEASURED))
            report.add(benchmark, eval_model.label, entry, outcome.samples)
            _write_lines(folder.answers(eval_model.label, benchmark.name), outcome.samples)
            if eval_model.label in report.differences[benchmark.name]:
                changed = report.differences[benchmark.name][eval_model.label].changed
                _write_lines(folder.changed(eval_model.label, benchmark.name), changed)
            results = header | report.results()
            results["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
            write_tables(results, folder.path)
            write_json(folder.path / RESULTS, results)
    if results and tables.has_methods(results):
        pareto.write(results, folder.path)
    return results


def _outcome(
    model: PmodModel,
    benchmark: Benchmark,
    settings: EvalSettings,
    by: str,
    journal: Journal,
    processes: Processes,
    log: Path,
    on_progress: Callable[[int, int], None],
) -> Outcome:
    """The outcome of one benchmark: the same decision in every process, the score in that of rank 0."""
    started = time.perf_counter()

    def failed(why: str) -> Outcome:
        return Outcome(error=why, seconds=time.perf_counter() - started)

    opened, error = None, None
    try:
        opened = questions.load(
            benchmark, limit=settings.limit, seed=settings.seed, data_root=settings.data_root, log=log
        )
    except Exception as cause:
        error = one_line(cause)
        write_traceback(cause, log)
    errors = [other for other in processes.gather(error) if other is not None]
    if opened is None or errors:
        return failed(errors[0])
    asked = ask(model, opened, by, journal, processes, log=log, on_progress=on_progress)
    if asked.error is not None:
        return failed(asked.error)
    if asked.unanswered:
        place, reason = min(asked.unanswered.items())
        row = opened.row_of(opened.requests[place])
        of = f"{len(asked.unanswered)} of {len(opened.requests)} questions could not be asked"
        return failed(f"{of}; row {row} of {opened.requests[place].task_name}: {reason}")
    if not processes.first:
        return Outcome()
    try:
        outcome = score(benchmark, opened, asked.answers, seed=settings.seed, log=log)
        if settings.check_batching:
            outcome.batching = changed_answers(model, opened.requests, asked.answers, seed=settings.seed)
    except Exception as cause:
        write_traceback(cause, log)
        return failed(one_line(cause))
    outcome.seconds = time.perf_counter() - started
    outcome.data = provenance.data(benchmark.data, settings.data_root)
    outcome.peak_mib, outcome.found, outcome.processes = asked.peak_mib, asked.found, processes.size
    return outcome


def _write_lines(path: Path, records: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
    write_text(path, "".join(f"{line}\n" for line in lines))
