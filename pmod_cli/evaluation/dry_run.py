"""What an evaluation would ask, of whom and how: nothing is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pmod_cli.evaluation.benchmarks import Benchmark
from pmod_cli.evaluation.data import listing
from pmod_cli.evaluation.eval_models import EvalModel
from pmod_cli.evaluation.identity import EvalSettings, run_identity, sources_of
from pmod_cli.evaluation.results_folder import RESULTS, ResultsFolder


def plan(
    benchmarks: Sequence[Benchmark],
    eval_models: Sequence[EvalModel],
    settings: EvalSettings,
    out: Path,
    *,
    processes: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The plan of an evaluation, as it is printed.

    Args:
        out: Folder of the run.
        processes: That share the questions.
        overwrite: As `runner.evaluate` takes it.

    Returns:
        Folder, models, tasks with the number of their questions (None where only lmms-eval knows it), and settings.

    Raises:
        PmodError: the folder is not for this run.
    """
    identity = run_identity(eval_models, settings) if (out / RESULTS).exists() and not overwrite else {}
    ResultsFolder(out, overwrite=overwrite).check(identity, benchmarks, sources_of(eval_models, settings))
    tasks = []
    for benchmark, row in zip(benchmarks, listing(benchmarks, settings.data_root), strict=True):
        shown = {key: row[key] for key in ("name", "task", "data", "metric", "here")}
        tasks.append({**shown, "questions": _questions(benchmark, settings.limit)})
    known = [task["questions"] for task in tasks]
    return {
        "schema_version": 1,
        "dry_run": True,
        "folder": str(out),
        "models": [
            {"label": one.label, "path": str(one.path), "routers": one.routers, "selection": one.selection}
            for one in eval_models
        ],
        "tasks": tasks,
        "questions": None if None in known else sum(known) * len(eval_models),
        "settings": asdict(settings) | {"data_root": settings.data_root and str(settings.data_root)},
        "processes": processes,
    }


def _questions(benchmark: Benchmark, limit: float | None) -> int | None:
    """Questions of a benchmark under a limit, which holds for each of its tasks. Where they come in units, such as the
    pairs of MME, a run asks the whole of the last one: a few more."""
    asked = [split.rows for split in benchmark.data if not split.pictures_of] or [benchmark.rows]
    if None in asked:
        return None
    if limit is None:
        return sum(asked)
    return sum(math.ceil(rows * limit) if limit < 1 else min(int(limit), rows) for rows in asked)
