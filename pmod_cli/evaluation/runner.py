"""Every benchmark for every model, one at a time, each result on the disk before the next one starts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.atomic import write_json, write_text
from pmod_cli.errors import PmodError
from pmod_cli.evaluation import formats, provenance
from pmod_cli.evaluation.adapter import PmodModel
from pmod_cli.evaluation.report import SCHEMA_VERSION, Report
from pmod_cli.evaluation.scoring import score
from pmod_cli.evaluation.subjects import Loaded, Subject, load
from pmod_cli.evaluation.suite import Benchmark

RESULTS = "results.json"


@dataclass(frozen=True)
class EvalSettings:
    """How the questions are asked.

    Attributes:
        limit: Questions per task: a count, or a fraction below 1. None: all of them.
        batch_size: Rows per `generate` call.
        device: A torch device.
        dtype: `auto` (as stored), `bfloat16`, `float16` or `float32`.
        attention: `sdpa`, `eager` or `flash_attention_2`.
        seed: Of the random selection, the resampling, Python, NumPy and torch.
        data_root: A mirror of the data sets; None: the Hugging Face cache or the hub.
    """

    limit: float | None = None
    batch_size: int = 8
    device: str = "cpu"
    dtype: str = "auto"
    attention: str = "sdpa"
    seed: int = 0
    data_root: Path | None = None


def evaluate(
    benchmarks: Sequence[Benchmark],
    subjects: Sequence[Subject],
    settings: EvalSettings,
    out: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[str, str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Score every subject on every benchmark and return the report, as `results.json` in `out` holds it.

    Args:
        out: Folder of the run: `results.json`, the answers of each task as JSON lines, lmms-eval's log.
        overwrite: Use a folder that holds another run's results.
        on_progress: Called with model, task, questions answered and questions of the task.

    Raises:
        PmodError: `out` holds another run, or a model cannot be loaded. A task that fails is in the report instead.
    """
    if (out / RESULTS).exists() and not overwrite:
        raise PmodError(
            f"{out} holds another run", hint="replace it with --overwrite, or choose another folder with -o"
        )
    out.mkdir(parents=True, exist_ok=True)
    on_progress = on_progress or (lambda model, task, answered, questions: None)
    header = {
        "schema_version": SCHEMA_VERSION,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"data_root": settings.data_root and str(settings.data_root)},
        "software": provenance.software(),
        "machine": provenance.machine(settings.device),
    }
    report = Report(benchmarks, seed=settings.seed)
    loaded: Loaded | None = None
    results: dict[str, Any] = {}
    for subject in subjects:
        if loaded is None or not loaded.serves(subject):
            loaded = None  # the model before is freed first
            on_progress(subject.label, "loading", 0, 1)
            loaded = load(subject, dtype=settings.dtype, device=settings.device, attention=settings.attention)
        report.add_model(subject.label, loaded.describe(subject))
        asked = PmodModel(
            str(subject.path),
            settings.batch_size,
            selection=subject.selection,
            seed=settings.seed,
            model=loaded.model,
            processor=loaded.processor,
        )
        for benchmark in benchmarks:
            asked.progress = _named(on_progress, subject.label, benchmark.title)
            on_progress(subject.label, benchmark.title, 0, 1)
            scored = score(
                asked,
                benchmark,
                limit=settings.limit,
                seed=settings.seed,
                log=out / "lmms-eval.log",
                data_root=settings.data_root,
            )
            report.add(benchmark, subject.label, scored.entry(), scored.samples)
            _write_lines(out / "answers" / subject.label / f"{benchmark.name}.jsonl", scored.samples)
            if subject.label in report.differences[benchmark.name]:
                changed = report.differences[benchmark.name][subject.label].changed
                _write_lines(out / "changed" / subject.label / f"{benchmark.name}.jsonl", changed)
            results = header | report.results()
            results["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(out / RESULTS, results)
            write_text(out / "results.md", formats.to_markdown(results))
            write_text(out / "results.csv", formats.to_csv(results))
    return results


def default_folder(model: Path) -> Path:
    """`./runs/eval-<model>-<time>`."""
    return Path("runs", f"eval-{model.resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _named(on_progress: Callable[[str, str, int, int], None], label: str, title: str) -> Callable[[int, int], None]:
    return lambda answered, questions: on_progress(label, title, answered, questions)


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
    write_text(path, "".join(f"{line}\n" for line in lines))
