"""Reading a config.json with what it leaves out: the defaults of transformers' own configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES, TOWERS, DecoderKind, Family, TowerKind, family_of
from pmod_cli.families.llava import LLAVA

MOST_LAYERS = 1000  # of a decoder or a tower: the largest models have an eighth of it, and a number is quickly typed


def get(config: Mapping[str, Any] | object, key: str) -> Any:
    """A value of a configuration or of the dict of a config.json; None where it is silent."""
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def known_family(config: Mapping[str, Any] | object) -> Family:
    """The family of a whole configuration, stock or p-MoD.

    Raises:
        PmodError: No family has this `model_type`.
    """
    model_type = get(config, "model_type")
    if (family := family_of(model_type)) is None:
        raise PmodError(
            f"the model family {model_type!s:.60} is unknown: expected one of {', '.join(FAMILIES)}",
            hint="name a LLaVA's config.json",
        )
    return family


def decoder_kind(text: Mapping[str, Any] | object, family: Family = LLAVA) -> DecoderKind:
    """The decoder of a `text_config`; one that names none has the family's default.

    Raises:
        PmodError: It is unknown.
    """
    name = get(text, "model_type")
    return DECODERS[family.defaults["text_config"]["model_type"] if name is None else name]


def tower_kind(vision: Mapping[str, Any] | object, family: Family = LLAVA) -> TowerKind:
    """The vision tower of a `vision_config`; one that names none has the family's default.

    Raises:
        PmodError: It is unknown.
    """
    name = get(vision, "model_type")
    return TOWERS[family.defaults["vision_config"]["model_type"] if name is None else name]


def filled(part: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a config with the defaults of what it leaves out; a null stands for a default that is None."""
    said = {key: value for key, value in part.items() if not (value is None and defaults.get(key, 0) is None)}
    return {**defaults, **said}


def vision_token_ids(config: object) -> list[int]:
    """Ids of the tokens of images, and of videos where the family takes them.

    Args:
        config: A whole configuration of transformers.
    """
    return [getattr(config, key) for key in known_family(config).vision_tokens]


def context_of(config: Any) -> int | None:
    """Tokens of prompt and answer that the decoder was made for; None where its configuration does not say.

    Args:
        config: A whole configuration of transformers.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def small_side(config: object) -> int:
    """Side in pixels of a square image that costs little: one tile, or four cells of a tower that reads grids.

    Args:
        config: A whole configuration.
    """
    vision = get(config, "vision_config")
    if known_family(config).tiled:
        return get(vision, "image_size")
    return 2 * get(vision, "patch_size") * get(vision, "spatial_merge_size")


def left_out(config: Mapping[str, Any]) -> list[str]:
    """Sizes of decoder and tower that a config does not say, as `text_config.hidden_size 4096`.

    Args:
        config: A whole one, stock or p-MoD.
    """
    family, found = known_family(config), []
    parts = (("text_config", decoder_kind), ("vision_config", tower_kind))
    for part, kind in parts if family.tiled else parts[:1]:
        if not (said := config.get(part)):
            found.append(part)
            continue
        record: DecoderKind | TowerKind = kind(said, family)
        found += [
            f"{part}.{key} {default}"
            for key, default in record.defaults.items()
            if isinstance(default, int) and key not in said
        ]
    return found
