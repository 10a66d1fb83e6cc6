"""Retention ratios per decoder layer: the paper's PRD schedule and its alternatives (Section 3.3, Table 5).

A schedule is one function, registered by name: it takes the number of layers L and one setting, and returns L retention
ratios. The name of its second parameter says which setting that is:

    shift   a decaying schedule: ratios above `max_ratio` become 1, those below `min_ratio` are lifted, and the shift is
            solved for a wanted mean. A default of the parameter is the shift where neither is given
    mean    the mean ratio over all layers
    values  the ratios themselves

Other packages add theirs with `SCHEDULES.register(name)` or an entry point of the group `pmod_cli.schedules`.
Nothing here needs torch, so that converting and planning stay fast.
"""

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from math import cos, pi
from struct import pack, unpack

from .registry import Registry, guarded


def _take_schedule(function: Callable, what: str) -> Callable:
    signature(function)  # of what is no function there is none
    return guarded(function, what, lambda ratios: [float(ratio) for ratio in ratios])


SCHEDULES = Registry("schedule", "pmod_cli.schedules", _take_schedule)
PAPER_MEAN = 0.5375
"""Mean retention ratio of the paper's schedule (cosine, shift 0.5, 32 layers): its 53.8 % of the KV cache."""


def kept_tokens(num_vision: int, ratio: float) -> int:
    """K, the number of vision tokens that a layer keeps: `trunc(float32(V) * float32(r))`.

    The product is taken in float32, as in the published code: in float64 it differs for some V (V = 2365 at layer 10).

    Args:
        num_vision: V, vision tokens of one row over all its images.
        ratio: r, retention ratio in 0 ... 1.
    """
    return int(_float32(_float32(num_vision) * _float32(ratio)))  # exact in float64, then rounded once


def _float32(number: float) -> float:
    return unpack("f", pack("f", number))[0]


def setting_of(kind: str) -> str:
    """Which setting a schedule takes: `shift`, `mean` or `values`.

    Raises:
        ValueError: An unknown schedule, or one whose function takes something else.
    """
    return _setting(kind).name


def takes_shift(kind: str) -> bool:
    """Whether a schedule is a decaying one.

    Raises:
        ValueError: An unknown schedule.
    """
    return setting_of(kind) == "shift"


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
    takes = setting_of(kind)
    if num_layers < 2:
        raise ValueError(f"a schedule needs at least 2 layers, found {num_layers}")
    if mean is not None and not 0 < mean <= 1:
        raise ValueError(f"mean retention must be above 0 and at most 1, found {mean}")
    if not 0 <= min_ratio <= 1 or max_ratio < min_ratio:
        raise ValueError(f"expected 0 <= min_ratio <= 1 and min_ratio <= max_ratio, found {min_ratio} and {max_ratio}")
    if (values is not None) != (takes == "values"):
        raise ValueError("values (one ratio per layer) belong to schedule 'list', and only to it")
    if shift is not None and (mean is not None or takes != "shift"):
        decays = " and ".join(name for name in SCHEDULES if takes_shift(name))
        raise ValueError(f"a shift belongs to the schedules {decays}, and not beside a mean")

    function = SCHEDULES[kind]
    if takes == "values":
        ratios = function(num_layers, values)
    elif takes == "mean":
        ratios = function(num_layers, PAPER_MEAN if mean is None else mean)
        if min(ratios) < 0:
            raise ValueError(f"schedule {kind!r} cannot have a mean retention as low as {mean}")
    else:
        default = _setting(kind).default
        if shift is None and mean is None and default is not Parameter.empty:
            shift = default
        if shift is None:
            shift = solve_shift(kind, num_layers, mean or PAPER_MEAN, max_ratio=max_ratio, min_ratio=min_ratio)
        ratios = [_clamped(ratio, max_ratio, min_ratio) for ratio in function(num_layers, shift)]
    return _checked_ratios(kind, ratios, num_layers)


def solve_shift(kind: str, num_layers: int, mean: float, *, max_ratio: float = 0.85, min_ratio: float = 0.15) -> float:
    """The shift at which a decaying schedule has the wanted mean ratio, to 1e-9 where it exists.

    The mean grows with the shift but jumps where a layer passes `max_ratio`; at a jump the nearer side is taken.

    Raises:
        ValueError: The mean lies outside what the clamps allow.
    """
    if not takes_shift(kind):
        raise ValueError(f"schedule {kind!r} has no shift")

    def mean_at(shift: float) -> float:
        return sum(_clamped(r, max_ratio, min_ratio) for r in SCHEDULES[kind](num_layers, shift)) / num_layers

    low, high = -1.5, 2.5
    if not mean_at(low) <= mean <= mean_at(high):
        raise ValueError(f"mean retention {mean} is outside {mean_at(low):.3f} ... {mean_at(high):.3f}")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    nearest: float = min(low, high, key=lambda shift: abs(mean_at(shift) - mean))
    return round(nearest, 12)


@SCHEDULES.register("cosine")
def cosine(num_layers: int, shift: float = 0.5) -> list[float]:
    """The paper's progressive ratio decay, r_l = cos(pi * l / (L - 1)) / 2 + shift."""
    return [0.5 * cos(pi * i / (num_layers - 1)) + shift for i in range(num_layers)]


@SCHEDULES.register("linear")
def linear(num_layers: int, shift: float) -> list[float]:
    """The straight line 1 - l / (L - 1) + (shift - 1/2)."""
    return [1 - i / (num_layers - 1) + (shift - 0.5) for i in range(num_layers)]


@SCHEDULES.register("stepped")
def stepped(num_layers: int, mean: float) -> list[float]:
    """Four equal groups of layers, falling by equal steps from 1 (Table 5)."""
    groups = [i * 4 // num_layers for i in range(num_layers)]
    step = (1 - mean) * num_layers / sum(groups)
    return [1 - step * group for group in groups]


@SCHEDULES.register("interleaved")
def interleaved(num_layers: int, mean: float) -> list[float]:
    """Even layers keep every token, odd layers share one ratio (Table 5)."""
    odd = num_layers // 2
    ratio = (mean * num_layers - (num_layers - odd)) / odd
    return [ratio if i % 2 else 1.0 for i in range(num_layers)]


@SCHEDULES.register("constant")
def constant(num_layers: int, mean: float) -> list[float]:
    """One ratio for every layer (Table 5)."""
    return [mean] * num_layers


@SCHEDULES.register("late")
def late(num_layers: int, mean: float) -> list[float]:
    """Every token in the first two layers, one ratio in all others (FastV)."""
    whole = min(2, num_layers - 1)
    return [1.0] * whole + [(mean * num_layers - whole) / (num_layers - whole)] * (num_layers - whole)


@SCHEDULES.register("pyramid")
def pyramid(num_layers: int, mean: float) -> list[float]:
    """Four equal groups of layers, each of which keeps the same share of the one before (PyramidDrop)."""
    if mean == 1:  # which halving never reaches
        return [1.0] * num_layers
    groups = [i * 4 // num_layers for i in range(num_layers)]
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        low, high = (share, high) if sum(share**group for group in groups) < mean * num_layers else (low, share)
    if sum(low**group for group in groups) > mean * num_layers + 1e-6:
        return [-1.0] * num_layers  # the first group alone is more
    return [low**group for group in groups]


@SCHEDULES.register("withdrawn")
def withdrawn(num_layers: int, mean: float) -> list[float]:
    """Every token, from some layer on none (VTW, ShortV); the layer between keeps what is left of the mean."""
    return [min(max(mean * num_layers - layer, 0.0), 1.0) for layer in range(num_layers)]


@SCHEDULES.register("list")
def listed(num_layers: int, values: Sequence[float]) -> list[float]:
    """The ratios as they are given, one per layer."""
    return list(values)


def _setting(kind: str) -> Parameter:
    """The second parameter of a schedule's function."""
    function: Callable = SCHEDULES[kind]
    parameters = list(signature(function).parameters.values())
    if len(parameters) != 2 or parameters[1].name not in ("shift", "mean", "values"):
        names = ", ".join(parameter.name for parameter in parameters)
        raise ValueError(
            f"schedule {kind!r}: its function takes ({names}); expected the number of layers and one of shift, mean, "
            "values"
        )
    return parameters[1]


def _clamped(ratio: float, max_ratio: float, min_ratio: float) -> float:
    return 1.0 if ratio > max_ratio else min(max(ratio, min_ratio), 1.0)


def _checked_ratios(kind: str, ratios: Sequence[float], num_layers: int) -> list[float]:
    if len(ratios) != num_layers:
        raise ValueError(f"schedule {kind!r} needs one ratio per layer: expected {num_layers}, found {len(ratios)}")
    for layer, ratio in enumerate(ratios):
        if not 0 <= ratio <= 1:
            raise ValueError(f"retention ratio of layer {layer} must be within 0 ... 1, found {ratio}")
    return [float(ratio) for ratio in ratios]
