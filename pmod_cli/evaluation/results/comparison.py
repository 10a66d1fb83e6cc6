"""Finished runs side by side, read back into one report, and what else than the models differs between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.benchmarks import BENCHMARKS, Benchmark
from pmod_cli.evaluation.results.report import Report
from pmod_cli.evaluation.results.stored import SCHEMA_VERSION, read_records, read_run

OF_MODEL = ("dtype", "attention", "image_processor", "image_backend", "batch_size", "device")  # each changes answers
OF_TASK = ("task_versions",)
PACKAGES = ("lmms_eval", "torch", "transformers", "tokenizers", "pillow", "numpy", "datasets")


def compare(runs: Sequence[Path], *, seed: int = 0) -> dict[str, Any]:
    """The report over the models of all runs; the first model of the first run is the one compared with.

    Args:
        runs: Folders of finished runs, or their `results.json`.

    Returns:
        As `Report.results`, with `runs` (folder by label) and `unequal` (sentences: what else differs).

    Raises:
        PmodError: a folder holds no whole run of this version, or there are fewer than two models.
    """
    opened = [read_run(run) for run in runs]
    columns = list(_columns(opened))
    if len(columns) < 2:
        raise PmodError("one model alone compares with nothing", hint="pmod eval --compare RUN RUN")
    benchmarks: dict[str, Benchmark] = {}
    for _, results in opened:
        for task in results["tasks"]:
            said = {field: task[field] for field in ("name", "title", "task", "metric", "group", "filter", "scale")}
            known = BENCHMARKS.get(task["name"])  # has what a result file does not say, such as the weight in a mean
            benchmarks.setdefault(task["name"], Benchmark(**said) if known is None else replace(known, **said))
    report, labels = (
        Report(list(benchmarks.values()), seed=seed),
        {(at, inner): label for label, at, inner, _ in columns},
    )
    for label, folder, inner, results in columns:
        described = results["models"][inner]
        report.add_model(label, described | {"control": labels.get((folder, str(described.get("control"))))})
    for label, folder, inner, results in columns:
        for task in results["tasks"]:
            if (entry := task["scores"].get(inner)) is not None:
                scored = entry["score"] is not None
                records = read_records(folder, inner, task["name"], entry["questions"]) if scored else []
                report.add(benchmarks[task["name"]], label, entry, records)
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": {label: str(folder) for label, folder, *_ in columns},
        "unequal": [*_unequal_settings(columns), *_unequal_questions(report)],
        **report.results(),
    }


def _columns(opened: Sequence[tuple[Path, dict[str, Any]]]) -> Iterator[tuple[str, Path, str, dict[str, Any]]]:
    """(label, folder, label in its run, results) of every model.

    The run names a model where it has one alone, and stands before the names that several runs have.
    """
    taken: set[str] = set()
    runs_with = Counter(inner for _, results in opened for inner in results["models"])
    for folder, results in opened:
        name = folder.resolve().name
        for inner in results["models"]:
            prefix = f"{name}: " if runs_with[inner] > 1 else ""
            label = base = name if len(results["models"]) == 1 else f"{prefix}{inner}"
            count = 1
            while label in taken:
                count += 1
                label = f"{base} ({count})"
            taken.add(label)
            yield label, folder, inner, results


def _unequal_settings(columns: Sequence[tuple[str, Path, str, dict[str, Any]]]) -> Iterator[str]:
    """One sentence for each setting in which the models were not asked alike."""
    first = {}
    for label, _, inner, results in columns:
        model, settings = results["models"][inner], results["settings"]
        packages = results["software"]["packages"]
        lowered = {name.lower().replace("-", "_"): version for name, version in packages.items()}
        first[label] = {
            **{key: model.get(key, settings.get(key)) for key in OF_MODEL},
            **{key: settings.get(key) for key in ("seed", "limit")},
            **{package: lowered.get(package) for package in PACKAGES},
        }
    for key in next(iter(first.values())):
        values = {label: found[key] for label, found in first.items()}
        if len(set(map(str, values.values()))) > 1:
            yield f"{key}: {_listed(values)}"
    for task in {task["name"]: task for *_, results in columns for task in results["tasks"]}.values():
        for key in OF_TASK:
            values = {
                label: found["scores"][inner].get(key)
                for label, _, inner, results in columns
                for found in results["tasks"]
                if found["name"] == task["name"]
                and inner in found["scores"]
                and found["scores"][inner]["score"] is not None
            }
            if len(set(map(str, values.values()))) > 1:
                yield f"{task['title']}: {key.replace('_', ' ')} differs: {_listed(values)}"


def _unequal_questions(report: Report) -> Iterator[str]:
    for benchmark in report.benchmarks:
        entries = report.entries[benchmark.name]
        for label, found in report.differences[benchmark.name].items():
            first = next(iter(report.models))
            asked = {entries[first]["questions"], entries[label]["questions"]}
            if asked != {found.questions}:
                yield (
                    f"{benchmark.title}: {first} answered {entries[first]['questions']} questions, {label} "
                    f"{entries[label]['questions']}; the difference is over the {found.questions} in common"
                )
            if found.prompts:
                share = f"{found.prompts} of {found.questions} prompts"
                yield f"{benchmark.title}: {share} differ between {first} and {label}"


def _listed(values: Mapping[str, Any]) -> str:
    """`float32 (a, b); bfloat16 (c)`."""
    labels: dict[str, list[str]] = {}
    for label, value in values.items():
        labels.setdefault(str(value), []).append(label)
    return "; ".join(f"{value} ({', '.join(of)})" for value, of in labels.items())
