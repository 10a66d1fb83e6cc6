"""One setting over a range of values: what each would cost, by formulas, and the scores of evaluated models at them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from pmod_cli.checkpoints.files import read_json
from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import GIGA, MIB, TERA, percent
from pmod_cli.model.settings import PmodSettings
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.formulas import Prefill
from pmod_cli.profiling.count.memory import kv_bytes
from pmod_cli.profiling.count.workload import Routed, Workload
from pmod_cli.profiling.subject import find_config, subject_of
from pmod_cli.reporting import plain_table

NUMBERS = ("shift", "target-retention", "max-ratio", "min-ratio")
KEYS = {"target-retention": "mean", "max-ratio": "max_ratio", "min-ratio": "min_ratio"}  # as `PmodSettings` names them
NAMES = (*NUMBERS, "schedule", "image-size")
MOST = 1000  # values


@dataclass(frozen=True)
class Axis:
    """What is swept.

    Args:
        name: One of `NAMES`.
        values: Numbers; schedule kinds; or image sizes as `WxH`.
    """

    name: str
    values: tuple[float | str, ...]


@dataclass(frozen=True)
class SweepPoint:
    """The cost at one value, of the stock model and of p-MoD.

    Args:
        value: The swept setting's.
        retention: Retention ratio of each layer, length L.
        mean_retention: Share of the routed vision tokens that a layer processes, mean over the layers.
        vision_tokens: V of the longest row.
        stock, pmod: FLOPs of the prefill.
        stock_kv, pmod_kv: Bytes of the KV cache.
    """

    value: float | str
    retention: tuple[float, ...]
    mean_retention: float
    vision_tokens: int
    stock: Prefill
    pmod: Prefill
    stock_kv: int
    pmod_kv: int


def parse_axis(text: str) -> Axis:
    """`shift=0.3:0.7:0.05` (first:last:step, the last included), or `schedule=cosine,linear`.

    Raises:
        PmodError: An unknown setting, no value, or a range that has no end.
    """
    name, _, values = text.partition("=")
    name = name.strip().replace("_", "-")
    example = "`sweep=shift=0.3:0.7:0.05`, `sweep=schedule=cosine,linear` or `sweep=image-size=336x336,672x672`"
    if name not in NAMES:
        raise PmodError(f"`sweep={text}`: {name!r} cannot be swept. Known: {', '.join(NAMES)}", hint=example)
    listed = [value.strip() for value in values.split(",") if value.strip()]
    if not listed:
        raise PmodError(f"`sweep={text}` has no values", hint=example)
    if name not in NUMBERS:
        return Axis(name, tuple(dict.fromkeys(listed)))
    try:
        if ":" not in values:
            return Axis(name, tuple(float(value) for value in listed))
        first, last, step = (float(part) for part in values.split(":"))
    except ValueError:
        raise PmodError(
            f"`sweep={text}`: expected first:last:step, or numbers with commas between them", hint=example
        ) from None
    if not all(map(math.isfinite, (first, last, step))) or step <= 0 or last < first or (last - first) / step > MOST:
        raise PmodError(f"`sweep={text}`: the range has no end, or more than {MOST} steps", hint=example)
    number = math.floor((last - first) / step + 1e-9) + 1
    return Axis(name, tuple(round(first + index * step, 9) for index in range(number)))


def sweep(
    name: str, axis: Axis, workload: Workload, overrides: dict | None = None, dtype: str = "bfloat16", **source: Any
) -> list[SweepPoint]:
    """Count every value of an axis.

    Args:
        name: The model, as `load_subject` takes it.
        workload: The batch; its image sizes give way where these are swept.
        overrides: Other settings, as `load_subject` takes them.
        source: More for `find_config`, such as `revision`.

    Raises:
        PmodError: A value that the schedule cannot have, or an image size that is none.
    """
    points, found = [], find_config(name, **source)
    for value in axis.values:
        settings, batch = dict(overrides or {}), workload
        if axis.name == "image-size":
            batch = replace(workload, image_sizes=(_size(str(value)),))
        else:
            settings[KEYS.get(axis.name, axis.name)] = value
        subject = subject_of(found, settings)
        sizes = subject.sizes
        rows, stock, pmod = batch.rows(sizes), Routed.stock(sizes.decoder.layers), Routed.of(subject.pmod)
        points.append(
            SweepPoint(
                value,
                tuple(pmod.retention),
                pmod.mean_retention,
                max(row.vision_tokens for row in rows),
                stock=formulas.prefill(sizes, rows, stock),
                pmod=formulas.prefill(sizes, rows, pmod),
                stock_kv=kv_bytes(sizes, rows, dtype, batch.new_tokens, stock),
                pmod_kv=kv_bytes(sizes, rows, dtype, batch.new_tokens, pmod),
            )
        )
    return points


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.lower().partition("x")
    if not (by and all(side.isascii() and side.isdigit() and len(side) < 10 for side in (width, height))):
        raise PmodError(
            f"`sweep=image-size`: {text!r} is not WIDTHxHEIGHT in pixels", hint="image-size=336x336,672x672"
        )
    return int(width), int(height)


RESULTS = "results.json"


@dataclass(frozen=True)
class Scores:
    """What runs of `pmod eval` say about the points of a sweep.

    Args:
        tasks: Tasks that every matched model was asked; a mean over unlike tasks would compare nothing. Those where
            lower scores are better are not among them.
        at: Mean score over them for each point, None where no run has the point's schedule.
    """

    tasks: tuple[str, ...]
    at: tuple[float | None, ...]


def read_scores(
    runs: Sequence[Path], axis: Axis, points: Sequence[SweepPoint], weights: Mapping[str, float] | None = None
) -> Scores:
    """Find the points' schedules among the p-MoD models of runs, and take their mean scores.

    Args:
        runs: Folders that `pmod eval` wrote, or their results.json.
        weights: Of the score of a task in the mean, by its name; 1 unless told. MME has 2,000 points, not 100.

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
                    if (entry := task["scores"].get(label, {})).get("score") is not None
                    and not entry.get("lower_is_better")
                },
            )
    asked = [set(scores) for _, scores in found.values()]
    tasks = tuple(sorted(set.intersection(*asked))) if asked else ()
    if not tasks:
        raise PmodError("`runs`: no p-MoD model, or no task that all of them were asked", hint="pmod eval --tasks tiny")
    weight = {task: (weights or {}).get(task, 1.0) for task in tasks}
    means = {
        index: sum(weight[task] * scores[task] for task in tasks) / len(tasks) for index, (_, scores) in found.items()
    }
    return Scores(tasks, tuple(means.get(index) for index in range(len(points))))


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-6 for a, b in zip(one, other, strict=True))


def sweep_table(axis: Axis, points: list[SweepPoint], scores: Scores | None = None) -> Table:
    """One row a value."""
    small = max(point.stock.full for point in points) < TERA
    unit, name = (GIGA, "GFLOPs") if small else (TERA, "TFLOPs")
    table = plain_table(
        f"Prefill in {name} (full convention), KV cache in MiB",
        axis.name,
        "retention",
        "V",
        "stock",
        "p-MoD",
        "of stock",
        "KV stock",
        "p-MoD",
        "of stock",
        *(["score"] if scores else []),
        space=1 if scores else 2,
    )
    for index, point in enumerate(points):
        score = scores.at[index] if scores else None
        table.add_row(
            str(point.value) if isinstance(point.value, str) else f"{point.value:g}",
            f"{round(point.mean_retention, 6):.4f}",
            f"{point.vision_tokens}",
            f"{point.stock.full / unit:.2f}",
            f"{point.pmod.full / unit:.2f}",
            f"{percent(point.pmod.full, point.stock.full):.1f} %",
            f"{point.stock_kv / MIB:,.1f}",
            f"{point.pmod_kv / MIB:,.1f}",
            f"{percent(point.pmod_kv, point.stock_kv):.1f} %",
            *(["-" if score is None else f"{score:.1f}"] if scores else []),
        )
    return table


def sweep_rows(axis: Axis, points: list[SweepPoint], scores: Scores | None = None) -> list[dict[str, Any]]:
    """The same, unrounded, units in the keys."""
    return [
        {
            axis.name.replace("-", "_"): point.value,
            "mean_retention_ratio": point.mean_retention,
            "vision_tokens": point.vision_tokens,
            "stock_tflops": point.stock.full / TERA,
            "pmod_tflops": point.pmod.full / TERA,
            "stock_paper_tflops": point.stock.paper / TERA,
            "pmod_paper_tflops": point.pmod.paper / TERA,
            "stock_kv_cache_mib": point.stock_kv / MIB,
            "pmod_kv_cache_mib": point.pmod_kv / MIB,
            **({"mean_score": scores.at[index]} if scores else {}),
        }
        for index, point in enumerate(points)
    ]
