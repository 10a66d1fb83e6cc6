"""p-MoD settings from what was typed: wanted means and FLOPs become a shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from pmod_cli.checkpoints import Source
    from pmod_cli.model import PmodSettings

ALPHA_NORMS = ("tanh", "shifted_softmax")


def choose_settings(
    wanted: Mapping[str, Any], target_flops: float | None, source: Source | None
) -> PmodSettings | None:
    """The settings, or None where nothing was asked for.

    Args:
        wanted: Fields of `PmodSettings` that were typed.
        source: The model; None only checks what is wrong for every model.

    Raises:
        PmodError: a value out of range, two that exclude each other, or a target that no schedule of the kind reaches.
    """
    from pmod_cli.model import PmodSettings, solve_shift, takes_shift

    if target_flops is not None and ("shift" in wanted or "mean" in wanted or "values" in wanted):
        raise PmodError(
            "--target-flops is solved for the shift: give no --shift, --target-retention or --ratios with it"
        )
    if target_flops is not None and not 0 < target_flops <= 1:
        raise PmodError(f"--target-flops {target_flops}: expected a share above 0 and at most 1, such as 0.55")
    if "alpha" in wanted and wanted.get("norm", "tanh") not in ALPHA_NORMS:
        raise PmodError(
            f"--alpha is the range of the norms {' and '.join(ALPHA_NORMS)}: --norm {wanted['norm']} has none",
            hint="leave --alpha out, or give scale and bias in the norm's name, as in --norm sigmoid_0.5_1",
        )
    if not wanted and target_flops is None:
        return None
    try:
        settings = PmodSettings(**wanted)
        if source is None:
            return settings
        layers = source.num_layers
        if target_flops is not None:
            return _solve(settings, target_flops, _prefill_share(source))
        if settings.mean is not None and takes_shift(settings.schedule):
            limits = {"max_ratio": settings.max_ratio, "min_ratio": settings.min_ratio}
            shift = solve_shift(settings.schedule, layers, settings.mean, **limits)
            return PmodSettings(**{**wanted, "mean": None, "shift": shift})
        return settings
    except ValueError as error:
        raise PmodError(str(error), hint="pmod convert --help") from None


def _prefill_share(source: Source) -> Callable[[PmodSettings], float]:
    """Decoder FLOPs beside stock, with attention: an image of 672 x 672 pixels and 58 text tokens."""
    from pmod_cli.checkpoints.processor_limits import with_limits
    from pmod_cli.families.sizes import Sizes
    from pmod_cli.profiling.budgets import cost_of

    sizes = with_limits(Sizes.of(source.config), source.folder)
    return lambda settings: cost_of(sizes, settings).flops


def _solve(settings: PmodSettings, target: float, share: Callable[[PmodSettings], float]) -> PmodSettings:
    """The shift (or, for schedules without one, the mean) whose FLOPs are nearest to the target.

    FLOPs grow with either, in small steps: a layer keeps whole tokens, and jumps where it becomes plain.
    """
    from dataclasses import replace

    from pmod_cli.model import takes_shift

    field, low, high = ("shift", -1.5, 2.5) if takes_shift(settings.schedule) else ("mean", *_reachable_means(settings))
    bounds = [share(replace(settings, **{field: end})) for end in (low, high)]
    if not bounds[0] <= target <= bounds[1]:
        raise PmodError(
            f"--target-flops {target} is outside what this schedule reaches: {bounds[0]:.3f} ... {bounds[1]:.3f}"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if share(replace(settings, **{field: middle})) < target else (low, middle)
    ends = [replace(settings, **{field: round(end, 9)}) for end in (low, high)]
    return min(ends, key=lambda end: abs(share(end) - target))


def _reachable_means(settings: PmodSettings) -> tuple[float, float]:
    from dataclasses import replace

    low, high = 0.0, 1.0  # which means a schedule reaches depends on the number of layers; 32 stand for all
    for _ in range(40):
        middle = (low + high) / 2
        try:
            replace(settings, mean=middle)
            high = middle
        except ValueError:
            low = middle
    return high, 1.0
