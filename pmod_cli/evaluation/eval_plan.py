"""A run before it starts: its settings, what makes it the same as another run, and what it would ask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.evaluation import provenance
from pmod_cli.evaluation.benchmarks import Benchmark, asked_of
from pmod_cli.evaluation.data import listing
from pmod_cli.evaluation.eval_models import EvalModel
from pmod_cli.evaluation.results.folder import RESULTS, ResultsFolder

# Another place of the same weights, or another GPU of the same machine, does not change an answer.
NOT_OF_AN_ANSWER = ("path", "commit", "device", "cost", "control")
PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy")


@dataclass(frozen=True)
class EvalSettings:
    """How the questions are asked.

    Attributes:
        limit: Questions per task: a count, or a fraction below 1; drawn by the seed. None: all of them.
        batch_size: Rows per `generate` call.
        device: A torch device.
        dtype: `auto` (as stored), `bfloat16`, `float16` or `float32`.
        attention: `sdpa`, `eager` or `flash_attention_2`.
        seed: Of the limited questions, the random selection, the resampling, and tasks that sample their answers.
        data_root: A mirror of the data sets; None: the Hugging Face cache or the hub.
        halve: Out of memory, halve the batch size and go on.
        check_batching: Ask some questions again, one at a time, and count the answers that change.
    """

    limit: float | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    attention: str = "sdpa"
    seed: int = 0
    data_root: Path | None = None
    halve: bool = False
    check_batching: bool = False


def run_identity(eval_models: Sequence[EvalModel], settings: EvalSettings) -> dict[str, Any]:
    """What a run is about: models by their files, and settings. Not where things lie, nor how many are asked."""
    return {
        "models": {
            eval_model.label: {
                **{name: value for name, value in _checkpoint(eval_model.path).items() if name not in NOT_OF_AN_ANSWER},
                "selection": eval_model.selection,
                "tokens_left": eval_model.tokens_left,
                **({"method": eval_model.method.to_dict()} if eval_model.method is not None else {}),
                **({"budget": eval_model.share} if isinstance(eval_model.share, float) else {}),
            }
            for eval_model in eval_models
        },
        "limit": settings.limit,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "attention": settings.attention,
        "device": settings.device.partition(":")[0],
    }


def sources_of(eval_models: Iterable[EvalModel], settings: EvalSettings) -> list[Path]:
    """The folders that a run reads."""
    return [*(eval_model.path for eval_model in eval_models), *([settings.data_root] if settings.data_root else [])]


def answerer(described: Mapping[str, Any], settings: EvalSettings) -> str:
    """Digest of a loaded model and of what is around it; the batch size is no part of it.

    Args:
        described: As `loaded.Loaded.describe` gives it.
    """
    parts = {name: value for name, value in described.items() if name not in NOT_OF_AN_ANSWER}
    around = {"device": settings.device.partition(":")[0], "seed": settings.seed, "packages": _versions()}
    return _digest({**parts, **around})


def default_folder(eval_models: Sequence[EvalModel], benchmarks: Iterable[Benchmark], settings: EvalSettings) -> Path:
    """`./runs/eval-<model>-<eight digits>`: the same command goes on in the same folder, another one gets another."""
    parts = [run_identity(eval_models, settings), [benchmark.task for benchmark in benchmarks]]
    return Path("runs", f"eval-{eval_models[0].path.resolve().name}-{_digest(parts)[:8]}")


@cache
def _checkpoint(path: Path) -> dict[str, Any]:
    return provenance.checkpoint(path, None)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"pmod": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


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
    """Questions of a benchmark under a limit, which holds for each of its tasks.

    Where they come in units, such as the pairs of MME, a run asks the whole of the last one: a few more.
    """
    return sum(asked_of(rows, limit) for rows in benchmark.rows_of_tasks) or None
