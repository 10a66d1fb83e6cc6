"""The sizes of a LLaVA that its costs follow from, read from a configuration or a plain config.json. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, TOWERS, Family, ImageTokens
from pmod_cli.families.configs import MOST_LAYERS, decoder_kind, get, known_family, tower_kind
from pmod_cli.families.llava_next import is_pinpoint


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder.

    Args:
        layers: L.
        hidden: D.
        inner: Width of the MLP.
        heads: Query heads.
        kv_heads: Key/value heads, fewer than query heads under GQA.
        head_size: Width of a head.
        vocabulary: Rows of lm_head.
        context: Positions, at most.
        tied: Whether lm_head is the embedding table.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer, norms and router left out."""
        return 2 * self.hidden * self.head_size * (self.heads + self.kv_heads) + 3 * self.hidden * self.inner


@dataclass(frozen=True)
class Tower:
    """Sizes of a CLIP or SigLIP vision tower and of the two-layer projector behind it.

    Args:
        layers: Encoder layers; all are computed, also those above the one whose features are taken.
        hidden: Width.
        inner: Width of the MLP.
        heads: Attention heads.
        tile: Side of the square input in pixels.
        patch: Side of a patch in pixels.
        class_token: 1 for a CLIP, whose sequence has one CLS token; 0 for a SigLIP.
        features: Layers whose features are joined for the projector.
        dropped: Tokens of a tile that the projector does not see: 1 for CLS under the strategy `default`.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    tile: int
    patch: int
    class_token: int
    features: int
    dropped: int

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.tile // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of a tile inside the tower."""
        return self.patches + self.class_token


@dataclass(frozen=True)
class Sizes:
    """A whole LLaVA.

    Args:
        decoder: The language model.
        tower: Vision tower and projector: a `Tower`, or a `GridTower` of families that read grids.
        pinpoints: The (height, width) in pixels that an image may be fitted to. None where images are not cut.
        family: How an image is cut.
        aspect_ratio: LLaVA-OneVision's `vision_aspect_ratio`: how many patches of an image are left. None of others.
    """

    decoder: Decoder
    tower: Any
    pinpoints: tuple[tuple[int, int], ...] | None
    family: Family
    aspect_ratio: Any = None

    @classmethod
    def of(cls, config: Mapping[str, Any] | object) -> Sizes:
        """Read a configuration.

        Args:
            config: A stock or p-MoD LLaVA configuration, or the dict of its config.json.

        Raises:
            PmodError: A decoder or a vision tower of which nothing is known here.
        """
        family = known_family(config)
        text = get(config, "text_config") or family.defaults["text_config"]
        if (kind := get(text, "model_type")) is not None and kind not in DECODERS:
            raise PmodError(
                f"the decoder {kind!s:.60} is unknown: expected one of {', '.join(DECODERS)}",
                hint="pmod profile --model llava-next-7b",
            )

        defaults = decoder_kind(text, family).defaults

        def size(key: str, follows: int | None = None) -> int:
            default = defaults[key]
            return _positive(f"text_config.{key}", get(text, key), follows if default is None else default)

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise PmodError(
                f"text_config.num_key_value_heads is {kv_heads}, which does not divide the {heads} query heads",
                hint="name a LLaVA's config.json",
            )
        tied = get(config, "tie_word_embeddings")
        decoder = Decoder(
            layers=size("num_hidden_layers"),
            hidden=hidden,
            inner=size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=size("head_dim", hidden // heads),
            vocabulary=size("vocab_size"),
            context=size("max_position_embeddings"),
            tied=bool(get(text, "tie_word_embeddings") if tied is None else tied),
        )
        tower = family.tower(config) if family.tower else _tower(config, family)
        anyres = "image_grid_pinpoints" in family.defaults
        pinpoints = _pinpoints(config, tower.tile, family) if anyres else None
        ratio = get(config, "vision_aspect_ratio")
        return cls(
            decoder, tower, pinpoints, family, family.defaults.get("vision_aspect_ratio") if ratio is None else ratio
        )


def image_tokens(sizes: Sizes, image_size: tuple[int, int] | None = None, images: int = 1) -> ImageTokens:
    """Cut an image as the stock model does.

    Args:
        sizes: The model.
        image_size: Width and height in pixels; None is a square of two by two tiles.
        images: Images of the row, since some families do not tile several.
    """
    return sizes.family.image_tokens(sizes, image_size, images)


def video_tokens(sizes: Sizes, size: tuple[int, int, int]) -> ImageTokens:
    """Cut a video as the stock model does.

    Args:
        sizes: The model.
        size: Frames, and width and height of each in pixels.

    Raises:
        PmodError: The family takes no videos.
    """
    if sizes.family.video_tokens is None:
        raise PmodError(f"{sizes.family.title} takes no videos", hint="pmod profile --model qwen2.5-vl-7b")
    return sizes.family.video_tokens(sizes, size)


def _pinpoints(config: Mapping[str, Any] | object, tile: int, family: Family) -> tuple[tuple[int, int], ...]:
    found = get(config, "image_grid_pinpoints") or family.defaults["image_grid_pinpoints"]
    if not isinstance(found, list | tuple) or not all(map(is_pinpoint, found)):
        raise PmodError(
            f"image_grid_pinpoints is {found!r:.60}: expected a list of [height, width] in pixels",
            hint="name a LLaVA-NeXT's config.json",
        )
    key = "image_grid_pinpoints"
    points = tuple((_positive(key, height, None), _positive(key, width, None)) for height, width in found)
    if small := [list(pair) for pair in points if min(pair) < tile]:
        raise PmodError(
            f"image_grid_pinpoints has {small[0]}, which is less than one tile of {tile} x {tile} pixels",
            hint="name a LLaVA-NeXT's config.json",
        )
    return points


def _tower(config: Mapping[str, Any] | object, family: Family) -> Tower:
    vision = get(config, "vision_config") or family.defaults["vision_config"]
    if (name := get(vision, "model_type")) is not None and name not in TOWERS:
        raise PmodError(
            f"the vision tower {name!s:.60} is unknown: expected {' or '.join(TOWERS)}",
            hint="profile counts LLaVA models with a CLIP or SigLIP tower",
        )
    kind = tower_kind(vision, family)
    default = kind.defaults
    size = {key: _positive(f"vision_config.{key}", get(vision, key), default[key]) for key in default}
    if size["image_size"] < size["patch_size"]:
        raise PmodError(
            f"vision_config.image_size is {size['image_size']}, less than one patch of {size['patch_size']} pixels",
            hint="name a LLaVA's config.json",
        )
    layer = get(config, "vision_feature_layer") or family.defaults["vision_feature_layer"]
    return Tower(
        layers=size["num_hidden_layers"],
        hidden=size["hidden_size"],
        inner=size["intermediate_size"],
        heads=size["num_attention_heads"],
        tile=size["image_size"],
        patch=size["patch_size"],
        class_token=int(kind.class_token),
        features=len(layer) if isinstance(layer, Sequence) else 1,
        dropped=int(
            (get(config, "vision_feature_select_strategy") or family.defaults["vision_feature_select_strategy"])
            == "default"
        ),
    )


def _positive(key: str, value: Any, default: int | None) -> int:
    """A whole number of 1 or more; the class's default where the configuration leaves it out."""
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PmodError(
            f"{key} is {value!r:.60}: expected a whole number of 1 or more", hint="name a LLaVA's config.json"
        )
    if key.endswith("num_hidden_layers") and value > MOST_LAYERS:
        raise PmodError(f"{key} is more than {MOST_LAYERS:,}, which no model has", hint="name a LLaVA's config.json")
    return value
