"""Retention ratios per decoder layer: the paper's PRD schedule and its alternatives (Section 3.3, Table 5).

Nothing here needs torch, so that converting and planning stay fast.
"""

from collections.abc import Callable, Sequence
from math import cos, pi

import numpy as np

SCHEDULES = ("cosine", "linear", "stepped", "interleaved", "constant", "list")
PAPER_MEAN = 0.5375
"""Mean retention ratio of the paper's schedule (cosine, shift 0.5, 32 layers): its 53.8 % of the KV cache."""


def kept_tokens(num_vision: int, ratio: float) -> int:
    """K, the number of vision tokens that a layer keeps: `trunc(float32(V) * float32(r))`.

    The product is taken in float32, as in the published code: in float64 it differs for some V (V = 2365 at layer 10).

    Args:
        num_vision: V, vision tokens of one row over all its images.
        ratio: r, retention ratio in 0 ... 1.
    """
    return int(np.float32(num_vision) * np.float32(ratio))


def retention_schedule(
    kind: str,
    num_layers: int,
    *,
    shift: float | None = None,
    mean: float | None = None,
    max_ratio: float = 0.85,
    min_ratio: float = 0.15,
    values: Sequence[float] | None = None,
) -> list[float]:
    """Retention ratio r_l of each decoder layer; 1.0 is a layer that keeps every token.

    `cosine` is the paper's progressive ratio decay, r_l = cos(pi * l / (L - 1)) / 2 + shift, and `linear` the straight
    line 1 - l / (L - 1) + (shift - 1/2); both send ratios above `max_ratio` to 1 and lift ratios below `min_ratio`.
    The others follow Table 5 at a given mean: `stepped` (four equal groups falling by equal steps from 1),
    `interleaved` (even layers whole, odd layers at one ratio) and `constant`. `list` takes `values` as they are.

    Args:
        kind: One of `SCHEDULES`.
        num_layers: L, decoder layers.
        shift: beta of the decaying schedules; default 0.5 for `cosine`, solved for the paper's mean for `linear`.
        mean: Wanted mean ratio over all layers, instead of a shift; default 0.5375 where no shift is used.
        max_ratio: Decaying schedules: ratios above it become 1.
        min_ratio: Decaying schedules: the floor.
        values: For `list`: one ratio per layer.

    Raises:
        ValueError: An unknown kind, a setting out of range or a mean that the kind cannot reach.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}: expected one of {', '.join(SCHEDULES)}")
    if num_layers < 2:
        raise ValueError(f"a schedule needs at least 2 layers, found {num_layers}")
    if mean is not None and not 0 < mean <= 1:
        raise ValueError(f"mean retention must be above 0 and at most 1, found {mean}")
    if not 0 <= min_ratio <= 1 or max_ratio < min_ratio:
        raise ValueError(f"expected 0 <= min_ratio <= 1 and min_ratio <= max_ratio, found {min_ratio} and {max_ratio}")
    if (values is not None) != (kind == "list"):
        raise ValueError("values (one ratio per layer) belong to schedule 'list', and only to it")
    if shift is not None and (mean is not None or kind not in _DECAYS):
        raise ValueError("a shift belongs to the schedules cosine and linear, and not beside a mean")

    if kind == "list":
        return _checked_list(values, num_layers)
    if kind in _DECAYS:
        decay = _DECAYS[kind]
        if shift is None:
            fixed = 0.5 if kind == "cosine" and mean is None else None
            shift = fixed or solve_shift(kind, num_layers, mean or PAPER_MEAN, max_ratio=max_ratio, min_ratio=min_ratio)
        return [_clamped(r, max_ratio, min_ratio) for r in decay(num_layers, shift)]
    mean = PAPER_MEAN if mean is None else mean
    if kind == "constant":
        return [mean] * num_layers
    if kind == "interleaved":
        odd = num_layers // 2
        return _reachable(
            kind, mean, [1.0, (mean * num_layers - (num_layers - odd)) / odd], num_layers, lambda i: i % 2
        )
    groups = [i * 4 // num_layers for i in range(num_layers)]
    step = (1 - mean) * num_layers / sum(groups)
    return _reachable(kind, mean, [1 - step * group for group in range(4)], num_layers, lambda i: groups[i])


def solve_shift(kind: str, num_layers: int, mean: float, *, max_ratio: float = 0.85, min_ratio: float = 0.15) -> float:
    """The shift at which a decaying schedule has the wanted mean ratio, to 1e-9 where it exists.

    The mean grows with the shift but jumps where a layer passes `max_ratio`; at a jump the nearer side is taken.

    Raises:
        ValueError: The mean lies outside what the clamps allow.
    """
    if kind not in _DECAYS:
        raise ValueError(f"only {' and '.join(_DECAYS)} have a shift, found {kind!r}")

    def mean_at(shift: float) -> float:
        ratios = [_clamped(r, max_ratio, min_ratio) for r in _DECAYS[kind](num_layers, shift)]
        return sum(ratios) / num_layers

    low, high = -1.5, 2.5
    if not mean_at(low) <= mean <= mean_at(high):
        raise ValueError(f"mean retention {mean} is outside {mean_at(low):.3f} ... {mean_at(high):.3f}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    return round(min(low, high, key=lambda shift: abs(mean_at(shift) - mean)), 12)


def _cosine(num_layers: int, shift: float) -> list[float]:
    return [0.5 * cos(pi * i / (num_layers - 1)) + shift for i in range(num_layers)]


def _linear(num_layers: int, shift: float) -> list[float]:
    return [1 - i / (num_layers - 1) + (shift - 0.5) for i in range(num_layers)]


_DECAYS: dict[str, Callable[[int, float], list[float]]] = {"cosine": _cosine, "linear": _linear}


def _clamped(ratio: float, max_ratio: float, min_ratio: float) -> float:
    return 1.0 if ratio > max_ratio else min(max(ratio, min_ratio), 1.0)


def _checked_list(values: Sequence[float], num_layers: int) -> list[float]:
    if len(values) != num_layers:
        raise ValueError(f"schedule 'list' needs one ratio per layer: expected {num_layers}, found {len(values)}")
    for layer, ratio in enumerate(values):
        if not 0 <= ratio <= 1:
            raise ValueError(f"retention ratio of layer {layer} must be within 0 ... 1, found {ratio}")
    return [float(ratio) for ratio in values]


def _reachable(
    kind: str, mean: float, levels: list[float], num_layers: int, level_of: Callable[[int], int]
) -> list[float]:
    if min(levels) < 0:
        raise ValueError(f"schedule {kind!r} cannot have a mean retention as low as {mean}")
    return [levels[level_of(layer)] for layer in range(num_layers)]
