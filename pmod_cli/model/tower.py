"""Selections that work inside the vision tower: what they see there, and how their ranks reach the decoder."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TowerLayer:
    """What the layer of the tower that the projector reads has computed, for T tiles of P patches.

    Attributes:
        states: `(T, 1 + P, D)`, its output, the class token first.
        queries: `(T, 1 + P, H * d)`, of its attention.
        keys: `(T, 1 + P, H * d)`.
        heads: H.
        scale: What products of queries and keys are multiplied by.
    """

    states: Tensor
    queries: Tensor
    keys: Tensor
    heads: int
    scale: float


def working_in_tower(model: nn.Module) -> tuple[Any, float] | None:
    """The selection that works in the tower of a model without its head, and the share that it leaves at most.

    Raises:
        ValueError: The model has a tower in which it cannot.
    """
    decoder = model.language_model
    selection, share = decoder.selection, max((layer.ratio for layer in decoder.layers if layer.selects), default=1.0)
    if decoder.before is not None and decoder.before[0].in_tower is not None:
        selection, share = decoder.before[0], decoder.before[1].ratio
    if selection.in_tower is None or share == 1:
        return None
    config, name = model.config, type(selection).__name__.removesuffix("Selection")
    vision = config.vision_config
    if not model.family.tiled or vision.model_type != "clip_vision_model":
        raise ValueError(f"{name} ranks by the class token of a CLIP tower, and {vision.model_type} has none")
    if hasattr(model, "get_video_features"):
        raise ValueError(f"{name} ranks patches, and {model.family.title} pools those of video frames")
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise ValueError(f"{name} needs vision_feature_select_strategy default and one vision_feature_layer")
    if model.spares_base_image:
        raise ValueError(f"{name} ranks all tiles of an image alike, and target_tokens vision_hr spares the first")
    if decoder.layers[0].renumbers and hasattr(model, "pack_image_features"):
        raise ValueError(f"{name} puts its tokens in front with positions renumbered, which tiles of anyres cannot")
    return selection, share


def with_ranks(stock: Callable) -> Callable:
    """`get_image_features` of a stock model, whose output has `ranks` too where a selection works in the tower.

    `ranks` is a dict: by the id of the features of an image, `(V,)` float32 for its V tokens.
    """

    @wraps(stock)  # `generate` reads the signature
    def get_image_features(self, pixel_values, *args, **kwargs):
        if not self.ranks_in_tower:  # a plain attribute: a traced graph cannot take settings apart
            return stock(self, pixel_values, *args, **kwargs)
        working, config = working_in_tower(self), self.config
        assert working is not None  # as `ranks_in_tower` says
        selection, share = working
        seen: dict[str, Tensor] = {}
        place = config.vision_feature_layer
        layers = next(module.layers for module in self.vision_tower.modules() if hasattr(module, "layers"))
        attention = layers[place if place < 0 else place - 1].self_attn

        def rewrite(tower: nn.Module, args: tuple, outputs: Any) -> None:
            states = list(outputs.hidden_states)
            layer = TowerLayer(states[place], seen["q"], seen["k"], attention.num_heads, attention.scale)
            patches, seen["ranks"] = selection.in_tower(layer, share, self.language_model.layers[0].renumbers)
            states[place] = torch.cat([states[place][:, :1], patches], dim=1)
            outputs.hidden_states = tuple(states)

        with ExitStack() as hooks:
            for name in ("q", "k"):
                projection = getattr(attention, f"{name}_proj")
                keep = projection.register_forward_hook(lambda _, __, made, name=name: seen.update({name: made}))
                hooks.callback(keep.remove)
            hooks.callback(self.vision_tower.register_forward_hook(rewrite).remove)
            outputs = stock(self, pixel_values, *args, **kwargs)
        ranks = _packed(self, seen["ranks"], kwargs.get("image_sizes"))
        outputs.ranks = {id(features): own for features, own in zip(outputs.pooler_output, ranks, strict=True)}
        return outputs

    return get_image_features


def _packed(model: nn.Module, ranks: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
    """Ranks of patches, `(T, P)`, as each image's tokens stand; an `image_newline` ranks last, at -1."""
    if not hasattr(model, "pack_image_features"):
        return list(ranks)
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    assert image_sizes is not None  # what packs tiles needs them
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in image_sizes
    ]
    strategy, newline = config.vision_feature_select_strategy, ranks.new_full((1,), -1.0)
    packed, _ = model.pack_image_features(
        ranks.unsqueeze(-1).split(tiles), image_sizes, vision_feature_select_strategy=strategy, image_newline=newline
    )
    return [each.squeeze(-1) for each in packed]
