"""FLOPs of a whole model, counted on the meta device: real modules, real shapes, no weights.

fvcore cannot trace a whole LLaVA on the meta device (its host syncs and its convolution stop the tracer), so each part
is traced by itself: every decoder layer at its own number of tokens, lm_head, the projector and the vision encoder.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from fvcore.nn.jit_handles import conv_flop_count
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes with the Auto classes
from pmod_cli.errors import PmodError
from pmod_cli.model import Routing, kept_tokens
from pmod_cli.profiling.operators import Count, count
from pmod_cli.profiling.workload import ImageTokens, tower_tokens

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one decoder layer on one prompt.

    Args:
        layer: 0-based index.
        retention: Retention ratio r; 1.0 is a plain layer.
        vision_tokens: Vision tokens that the layer processes, K.
        tokens: All tokens that the layer processes, K and the text.
        router_tokens: Tokens that the router scores: all of the prompt, 0 in a plain layer.
        attention: Matrix products of attention without the next.
        attention_products: QKᵀ and attention weights times V, over the full rectangle.
        mlp: The MLP.
        router: The router; 0 in a plain layer.
    """

    layer: int
    retention: float
    vision_tokens: int
    tokens: int
    router_tokens: int
    attention: int
    attention_products: int
    mlp: int
    router: int

    @property
    def matrix(self) -> int:
        """Every matrix product but the attention products: what the paper counted."""
        return self.attention + self.mlp + self.router

    @property
    def total(self) -> int:
        return self.matrix + self.attention_products


@dataclass(frozen=True)
class DecoderCost:
    """FLOPs of the decoder's prefill, and what a decode step needs.

    Args:
        layers: One entry per layer, length L.
        lm_head: lm_head on every position of the prompt.
        step_matrix: Matrix products of one decoded token: all layers, and lm_head on that token.
        step_products: Attention products of one decoded token in one layer, for each key that it attends to.
        unknown_operators: Operators that nobody counted, with how often they were met.
    """

    layers: list[LayerCost]
    lm_head: int
    step_matrix: int
    step_products: int
    unknown_operators: Counter[str]

    @property
    def matrix(self) -> int:
        return sum(layer.matrix for layer in self.layers)

    @property
    def attention_products(self) -> int:
        return sum(layer.attention_products for layer in self.layers)

    @property
    def total(self) -> int:
        """Decoder layers with attention products, and lm_head."""
        return self.matrix + self.attention_products + self.lm_head

    def decode(self, step: int) -> int:
        """FLOPs of the `step`-th decoded token (1 is the first): in each layer it attends to that layer's cache and
        to the tokens decoded so far, itself included."""
        keys = sum(layer.tokens + step for layer in self.layers)
        return self.step_matrix + self.step_products * keys


@dataclass(frozen=True)
class VisionCost:
    """FLOPs before the decoder, the same for stock and p-MoD.

    Args:
        tower: The vision tower over all tiles, attention products included. The layers above the one whose features
            are taken are computed by the stock model, so they are counted.
        projector: The projector over all tiles, before unpadding.
        unknown_operators: As in `DecoderCost`.
    """

    tower: int
    projector: int
    unknown_operators: Counter[str]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The real model on the meta device: shapes without weights, about 0.1 s for any size."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            copy.deepcopy(config),  # which would keep the dtype and the attention that only the trace uses
            attn_implementation="sdpa",
            dtype=torch.bfloat16,
        )
    return model.eval()


def decoder_cost(
    model: PreTrainedModel, image: ImageTokens, text_tokens: int, routable: int, retention: list[float]
) -> DecoderCost:
    """Count the prefill of one prompt, each decoder layer at its own number of tokens, and one decode step.

    Args:
        model: A LLaVA on the meta device, stock or p-MoD.
        image: How the image is cut.
        text_tokens: Text tokens of the prompt.
        routable: Vision tokens that routed layers choose from: all, or those of the high-resolution tiles.
        retention: Retention ratio of each layer, length L; 1.0 everywhere for a stock model.
    """
    decoder = model.model.language_model
    positions = image.tokens + text_tokens
    kept = [image.tokens - routable + kept_tokens(routable, ratio) for ratio in retention]
    routing = prompt_routing(positions, routable)
    counts: dict[tuple[int, bool], Count] = {}  # layers of one model differ only in these two
    layers = []
    for index, layer in enumerate(decoder.layers):
        routed = getattr(layer, "router", None) is not None
        if (kept[index], routed) not in counts:
            counts[kept[index], routed] = _count_layer(decoder, index, positions, routing if routed else None)
        counted = counts[kept[index], routed]
        mlp, router = counted.by_module["mlp"], counted.by_module.get("router", 0)
        layers.append(
            LayerCost(
                layer=index,
                retention=retention[index],
                vision_tokens=kept[index],
                tokens=kept[index] + text_tokens,
                router_tokens=positions if routed else 0,
                attention=FLOPS_PER_MAC * (counted.linear - mlp - router),
                attention_products=FLOPS_PER_MAC * counted.attention_products,
                mlp=FLOPS_PER_MAC * mlp,
                router=FLOPS_PER_MAC * router,
            )
        )
    head, step_head = (count(model.lm_head, _meta(1, n, decoder.config.hidden_size)) for n in (positions, 1))
    step = _count_layer(decoder, 0, 1, None)  # without images every layer is a plain one
    return DecoderCost(
        layers=layers,
        lm_head=FLOPS_PER_MAC * head.linear,
        step_matrix=FLOPS_PER_MAC * (len(layers) * step.linear + step_head.linear),
        step_products=FLOPS_PER_MAC * step.attention_products,
        unknown_operators=sum((Counter(counted.unknown_operators) for counted in counts.values()), Counter()),
    )


def _count_layer(decoder: PreTrainedModel, index: int, tokens: int, routing: Routing | None) -> Count:
    """One decoder layer on `tokens` tokens without cache; routed if `routing` is given."""
    states = _meta(1, tokens, decoder.config.hidden_size)
    positions = torch.arange(tokens, device="meta")[None]
    arguments = {"position_embeddings": decoder.rotary_emb(states, positions), "position_ids": positions}
    if routing is not None:
        arguments["routing"] = routing
    return count(decoder.layers[index], states, **arguments)


def prompt_routing(positions: int, routable: int) -> Routing:
    """The routing of one unpadded prompt, from its counts alone: a meta tensor has no values to read them from."""
    return Routing(
        target=torch.empty(1, positions, dtype=torch.bool, device="meta"),
        counts=[(routable, positions - routable, 0)],
        padded=False,
        rank_base=torch.empty(1, positions, device="meta"),
    )


def vision_cost(model: PreTrainedModel, image: ImageTokens) -> VisionCost:
    """Count the vision tower and the projector for one image.

    Args:
        model: A LLaVA on the meta device.
        image: How the image is cut.

    Raises:
        PmodError: a vision tower that is no CLIP or SigLIP.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    config = model.config.vision_config
    if not hasattr(tower, "encoder") or getattr(tower, "head", None) is not None:
        raise PmodError(
            f"the vision tower {config.model_type} is unknown: expected clip_vision_model, or siglip_vision_model with "
            "vision_use_head false",
            hint="profile counts LLaVA models with a CLIP or SigLIP tower",
        )
    embed = tower.embeddings.patch_embedding  # the tracer fails on a meta convolution: fvcore's formula instead
    grid = config.image_size // config.patch_size
    convolution = conv_flop_count([1], list(embed.weight.shape), [1, config.hidden_size, grid, grid])
    layers = tower.encoder.layers  # alike, so one is traced
    layer = count(layers[0], _meta(1, tower_tokens(model.config), config.hidden_size), attention_mask=None)
    projection = count(projector, _meta(image.tiles, image.patches_per_tile, projector.linear_1.in_features))
    macs = image.tiles * (convolution + len(layers) * (layer.linear + layer.attention_products))
    unknown = Counter(layer.unknown_operators) + Counter(projection.unknown_operators)
    return VisionCost(FLOPS_PER_MAC * macs, FLOPS_PER_MAC * projection.linear, unknown)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)
