"""The settings of the published p-MoD code: its `mod_*` fields to `PmodSettings`, and back.

Its schedules have 31 for L - 1 written into them, so for another number of layers they are not ours; then, and for the
schedules that are no decay, the ratios themselves are kept, as schedule `list`.
"""

from __future__ import annotations

import re
from decimal import Decimal
from math import cos, isclose, pi

from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings, solve_shift
from pmod_cli.model.schedule import PAPER_MEAN

MODEL_TYPE = "pmod_llava_llama"
ARCHITECTURE = "PmodLlavaLlamaForCausalLM"
_DECAY = re.compile(r"shifted(cos|linear)_decay_(\d+\.\d+)_(\d+\.\d+)")
_PLACES = ("deep_all", "deep_all_include_last", "interleave")
_NORM = re.compile(r"(tanh|softmax|sigmoid|none)_(\d+\.\d+|\d+)_(-?\d+\.\d+|-?\d+)")
_TOKENS = ("vision_all", "vision_hr")


def published_ratios(target_layers: str, factor: float, num_layers: int) -> list[float]:
    """Retention ratio of each layer as the published code computes it; 1.0 is a layer without a router.

    Raises:
        PmodError: an unknown `mod_target_layers`.
    """
    layers = range(num_layers)
    if decay := _DECAY.fullmatch(target_layers):
        top, floor = float(decay[2]), float(decay[3])
        lines = [cos(layer * pi / 31) / 2 if decay[1] == "cos" else -layer / 31 + 0.5 for layer in layers]
        return [max(line + factor, floor) if line + factor <= top else 1.0 for line in lines]
    if target_layers not in _PLACES:
        raise PmodError(
            f"mod_target_layers is {target_layers!r}, expected shiftedcos_decay_MAX_MIN, shiftedlinear_decay_MAX_MIN, "
            f"{' or '.join(_PLACES)}"
        )
    if target_layers == "interleave":
        routed = set(range(1, num_layers, 2))
    else:
        routed = set(range(2, num_layers - (target_layers == "deep_all")))
    return [factor if layer in routed else 1.0 for layer in layers]


def read_settings(config: dict, num_layers: int, where: object) -> PmodSettings:
    """Settings of a checkpoint of the published code.

    Args:
        where: The file, for messages.

    Raises:
        PmodError: a field is absent, unknown, or has no counterpart in ours.
    """
    layers, factor = config.get("mod_target_layers"), config.get("mod_router_factor")
    norm, tokens = config.get("mod_weight_norm"), config.get("mod_target_token_type")
    if not isinstance(layers, str) or isinstance(factor, bool) or not isinstance(factor, int | float):
        raise PmodError(
            f"{where}: mod_target_layers is {layers!r} and mod_router_factor {factor!r}, expected a name and a number"
        )
    if not -1.5 <= factor <= 2.5:
        raise PmodError(f"{where}: mod_router_factor is {factor}, expected a ratio or a shift near 0.5")
    if tokens not in _TOKENS:
        raise PmodError(f"{where}: mod_target_token_type is {tokens!r}, expected {' or '.join(_TOKENS)}")
    try:
        ratios = published_ratios(layers, factor, num_layers)
    except PmodError as error:
        raise PmodError(f"{where}: {error.what}") from error
    decay = _DECAY.fullmatch(layers)
    if decay and num_layers == 32:
        kind = "cosine" if decay[1] == "cos" else "linear"
        limits = {"max_ratio": float(decay[2]), "min_ratio": float(decay[3])}
        schedule = {"schedule": kind, "shift": float(factor), **limits}
    else:
        schedule = {"schedule": "list", "values": tuple(ratios)}
    try:
        settings = PmodSettings(**schedule, **_read_norm(norm), target_tokens=tokens)
        ours = settings.retention(num_layers)
    except ValueError as error:
        raise PmodError(f"{where}: {error}") from error
    if not all(isclose(a, b, abs_tol=1e-12) for a, b in zip(ours, ratios, strict=True)):
        raise PmodError(f"{where}: mod_target_layers {layers!r} has no counterpart among our schedules")
    return settings


def write_settings(settings: PmodSettings, num_layers: int) -> dict:
    """The `mod_*` fields that make the published code do what `settings` say.

    Raises:
        PmodError: it cannot.
    """
    if not settings.string:
        raise _inexpressible("`string=False`: it always scales skipped tokens")
    if settings.before is not None:
        raise _inexpressible("`before`: all vision tokens enter its decoder")
    if settings.select_at is not None or settings.selection != "router":
        raise _inexpressible("`select_at` and `selection`: each routed layer chooses by its own router")
    if settings.quota != "row":
        raise _inexpressible("`quota=per_image`: it takes K of all images of a row together")
    if settings.target_tokens == "vision_video":
        raise _inexpressible("`target_tokens=vision_video`: it takes images alone")
    ratios = settings.retention(num_layers)
    routed = [layer for layer, is_routed in enumerate(settings.routed(num_layers)) if is_routed]
    for name, factor in _candidates(settings, ratios, num_layers):
        theirs = published_ratios(name, factor, num_layers)
        same = all(isclose(a, b, abs_tol=1e-12) for a, b in zip(ratios, theirs, strict=True))
        if same and routed == [layer for layer, ratio in enumerate(theirs) if ratio < 1]:
            break
    else:
        raise _inexpressible(
            f"this schedule over {num_layers} layers: it has shiftedcos_decay and shiftedlinear_decay (made for 32 "
            f"layers), and one ratio in the layers of {', '.join(_PLACES)}"
        )
    if 0 in routed:
        raise _inexpressible("a router in layer 0: it reads the length of the sequence from that layer's cache")
    activation, scale, bias = settings.weight_norm
    if scale < 0:
        raise _inexpressible(f"the norm {settings.norm}: its scale is negative")
    numbers = "_".join(_decimal(number).removesuffix(".0") for number in (scale, bias))
    return {
        "mod_bias_enabled": True,
        "mod_router_factor": factor,
        "mod_special_init": True,
        "mod_target_layer_indices": routed,
        "mod_target_layers": name,
        # Where all vision tokens are of images, those of images are all.
        "mod_target_token_type": "vision_hr" if settings.target_tokens == "vision_hr" else "vision_all",
        "mod_weight_norm": activation if (scale, bias) == (1.0, 1.0) else f"{activation}_{numbers}",
    }


def _candidates(settings: PmodSettings, ratios: list[float], num_layers: int) -> list[tuple[str, float]]:
    found = []
    if settings.schedule in ("cosine", "linear"):
        shift = settings.shift
        if shift is None and settings.schedule == "cosine" and settings.mean is None:
            shift = 0.5
        elif shift is None:
            clamps = {"max_ratio": settings.max_ratio, "min_ratio": settings.min_ratio}
            shift = solve_shift(settings.schedule, num_layers, settings.mean or PAPER_MEAN, **clamps)
        name = "cos" if settings.schedule == "cosine" else "linear"
        limits = "_".join(map(_decimal, (settings.max_ratio, settings.min_ratio)))
        found.append((f"shifted{name}_decay_{limits}", shift))
    if levels := {ratio for ratio in ratios if ratio < 1}:
        found += [(place, min(levels)) for place in _PLACES]
    found += [(f"shifted{kind}_decay_0.85_0.15", 0.5) for kind in ("cos", "linear")]
    return found


def _decimal(number: float) -> str:
    """All its digits, without an exponent, which the published code does not read: `0.85`, `1.0`, `0.00001`."""
    return f"{Decimal(repr(float(number))):f}"


def _read_norm(norm: object) -> dict:
    match = _NORM.fullmatch(norm) if isinstance(norm, str) else None
    if match and match[1] == "tanh" and float(match[3]) == 1 and float(match[2]) > 0:
        return {"norm": "tanh", "alpha": float(match[2])}
    if match:
        return {"norm": norm}
    return {"norm": f"{norm}_1_1"}  # without numbers, scale and bias are 1; an unknown name is refused there


def _inexpressible(what: str) -> PmodError:
    return PmodError(f"the published code has no setting for {what}", hint="`to=pmod` keeps every setting")
