"""The model families, decoders and vision towers that p-MoD knows, and the doors for more of each.

A package from outside adds one by a call (`register_family`, `register_decoder`, `register_tower`), or by an entry
point in the group `pmod_cli.families`, `pmod_cli.decoders` or `pmod_cli.towers` that names the record.
"""

from __future__ import annotations

from pmod_cli.core.plugins import PluginRegistry
from pmod_cli.families import (
    decoders,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    qwen2_5_vl,
    qwen3_vl,
    towers,
)
from pmod_cli.families.record import DecoderKind, Family, ImageTokens, TowerKind

__all__ = [
    "BUNDLED",
    "DECODERS",
    "FAMILIES",
    "TOWERS",
    "DecoderKind",
    "Family",
    "ImageTokens",
    "TowerKind",
    "family_of",
    "high_resolution_titles",
    "model_types",
    "register_decoder",
    "register_family",
    "register_tower",
]

FAMILIES: PluginRegistry[Family] = PluginRegistry("model family", "pmod_cli.families", Family)
DECODERS: PluginRegistry[DecoderKind] = PluginRegistry("decoder", "pmod_cli.decoders", DecoderKind)
TOWERS: PluginRegistry[TowerKind] = PluginRegistry("vision tower", "pmod_cli.towers", TowerKind)

register_family = FAMILIES.add
register_decoder = DECODERS.add
register_tower = TOWERS.add

BUNDLED = (
    llava.LLAVA,
    llava_next.LLAVA_NEXT,
    qwen2_5_vl.QWEN2_5_VL,
    qwen3_vl.QWEN3_VL,
    llava_onevision.LLAVA_ONEVISION,
    llava_next_video.LLAVA_NEXT_VIDEO,
)
"""The families of this package."""

for _family in BUNDLED:
    register_family(_family)
for _decoder in (*decoders.BUNDLED, qwen2_5_vl.DECODER, qwen3_vl.DECODER):
    register_decoder(_decoder)
for _tower in towers.BUNDLED:
    register_tower(_tower)


def family_of(model_type: object) -> Family | None:
    """The family of a stock or p-MoD `model_type`, or None."""
    return FAMILIES.get(model_type.removeprefix("pmod_")) if isinstance(model_type, str) else None


def high_resolution_titles() -> str:
    """The families with anyres images, in words."""
    return " or ".join(family.title for family in FAMILIES.values() if family.high_resolution)


def model_types() -> list[str]:
    """All `model_type` of whole models: the stock ones, then ours."""
    families = FAMILIES.values()
    return [*(family.name for family in families), *(family.routed_name for family in families)]
