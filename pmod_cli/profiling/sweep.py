"""One setting over a range of values: what each would cost, by formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pmod_cli.core.errors import PmodError
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.kv_cache import kv_cache
from pmod_cli.profiling.count.workload import Workload, layer_tokens
from pmod_cli.profiling.sizes import Sizes
from pmod_cli.profiling.subject import find_config, subject_of

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
class Point:
    """The cost at one value, of the stock model and of p-MoD.

    Args:
        value: The swept setting's.
        retention: Retention ratio of each layer, length L.
        vision_tokens: V of the longest row.
        stock_flops: Prefill, convention `full`.
        pmod_flops: The same.
        stock_paper_flops: Prefill, convention `paper`.
        pmod_paper_flops: The same.
        stock_kv: Bytes of the KV cache.
        pmod_kv: The same.
    """

    value: float | str
    retention: tuple[float, ...]
    vision_tokens: int
    stock_flops: int
    pmod_flops: int
    stock_paper_flops: int
    pmod_paper_flops: int
    stock_kv: int
    pmod_kv: int

    @property
    def mean_retention(self) -> float:
        return sum(self.retention) / len(self.retention)


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
    name: str, axis: Axis, workload: Workload, overrides: dict | None = None, dtype: str = "bfloat16", **source: object
) -> list[Point]:
    """Count every value of an axis.

    Args:
        name: The model, as `load_subject` takes it.
        axis: What is swept.
        workload: The batch; its image sizes give way where these are swept.
        overrides: Other settings, as `load_subject` takes them.
        dtype: Of the KV cache.
        source: More for `find_config`, such as `revision`.

    Raises:
        PmodError: A value that the schedule cannot have, or an image size that is none.
    """
    points, found = [], find_config(name, **source)
    for value in axis.values:
        settings, batch = dict(overrides or {}), workload
        if axis.name == "image-size":
            batch = Workload(
                (_size(str(value)),),
                workload.images,
                workload.text_tokens,
                workload.new_tokens,
                workload.batch_size,
            )
        else:
            settings[KEYS.get(axis.name, axis.name)] = value
        subject = subject_of(found, settings)
        pmod, sizes = subject.pmod, Sizes.of(subject.stock)
        rows, target = batch.rows(sizes), pmod.settings.target_tokens
        stock = formulas.prefill(sizes, rows)
        routed = formulas.prefill(sizes, rows, pmod.retention, target, all_routed=pmod.settings.max_ratio > 1)
        held = []
        for ratios in ([1.0] * sizes.decoder.layers, pmod.retention):
            tokens = [tokens for _, tokens in layer_tokens(rows, ratios, target)]
            layers = kv_cache(sizes.decoder, dtype, tokens, batch.text_tokens, batch.new_tokens, len(rows))
            held.append(sum(layer.total for layer in layers))
        points.append(
            Point(
                value=value,
                retention=tuple(pmod.retention),
                vision_tokens=max(row.vision_tokens for row in rows),
                stock_flops=stock.full,
                pmod_flops=routed.full,
                stock_paper_flops=stock.paper,
                pmod_paper_flops=routed.paper,
                stock_kv=held[0],
                pmod_kv=held[1],
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
