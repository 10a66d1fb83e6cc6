"""Scores of evaluated models at the values of a sweep: what a setting gives, beside what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmod_cli.checkpoints.files import read_json
from pmod_cli.core.errors import PmodError
from pmod_cli.model.settings import PmodSettings
from pmod_cli.profiling.sweep import Axis, Point

RESULTS = "results.json"


@dataclass(frozen=True)
class Scores:
    """What runs of `pmod eval` say about the points of a sweep.

    Args:
        tasks: Tasks that every matched model was asked; a mean over unlike tasks would compare nothing.
        at: Mean score over them for each point, None where no run has the point's schedule.
    """

    tasks: tuple[str, ...]
    at: tuple[float | None, ...]


def read_scores(runs: Sequence[Path], axis: Axis, points: Sequence[Point]) -> Scores:
    """Find the points' schedules among the p-MoD models of runs, and take their mean scores.

    Args:
        runs: Folders that `pmod eval` wrote, or their results.json.
        axis: What is swept.
        points: Its values.

    Raises:
        PmodError: No run, a run at none of the values, two runs at one, or no task in common.
    """
    if axis.name == "image-size":
        raise PmodError("`runs`: a run has no single image size", hint="sweep a setting of the schedule")
    found: dict[int, tuple[str, dict[str, float]]] = {}
    for run in runs:
        file = run if run.name == RESULTS else run / RESULTS
        if not file.is_file():
            raise PmodError(f"`runs={run}`: there is no {file}", hint="pmod eval -o DIR makes one")
        results = read_json(file)
        for label, model in results.get("models", {}).items():
            if not model.get("pmod") or model.get("selection") != "router":
                continue  # stock, and controls that select otherwise
            ratios = PmodSettings.from_dict(model["pmod"]).retention(model["layers"])
            index = next((i for i, point in enumerate(points) if _same(ratios, point.retention)), None)
            if index is None:
                raise PmodError(
                    f"`runs={run}`: the schedule of {label} (mean retention {sum(ratios) / len(ratios):.3f}) is at no "
                    f"value of `sweep={axis.name}`",
                    hint="sweep over the values that were evaluated, with the same other settings and number of layers",
                )
            if index in found:
                raise PmodError(f"`runs`: {found[index][0]} and {run} have the same schedule", hint="name one of them")
            found[index] = (
                str(run),
                {
                    task["name"]: task["scores"][label]["score"]
                    for task in results["tasks"]
                    if task["scores"].get(label, {}).get("score") is not None
                },
            )
    asked = [set(scores) for _, scores in found.values()]
    tasks = tuple(sorted(set.intersection(*asked))) if asked else ()
    if not tasks:
        raise PmodError("`runs`: no p-MoD model, or no task that all of them were asked", hint="pmod eval --tasks tiny")
    means = {index: sum(scores[task] for task in tasks) / len(tasks) for index, (_, scores) in found.items()}
    return Scores(tasks, tuple(means.get(index) for index in range(len(points))))


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))
