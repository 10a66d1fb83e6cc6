"""FLOPs of a whole model, counted on the meta device: real modules, real shapes, no weights.

fvcore cannot trace a whole LLaVA on the meta device (its host syncs and its convolution stop the tracer), so each part
is traced by itself: every decoder layer at its own number of tokens, lm_head, the projector and the vision encoder.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fvcore.nn.jit_handles import conv_flop_count
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

import pmod_cli.model.modeling  # noqa: F401 - registers the p-MoD classes with the Auto classes
from pmod_cli.core.errors import PmodError
from pmod_cli.families.grid import GridTower
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import Routing, kept_tokens
from pmod_cli.model.routing import EVERYTHING
from pmod_cli.profiling.count.operators import Count, count
from pmod_cli.profiling.count.workload import Routed, Row, cached_tokens, layer_tokens, pictures, selector_flops

FLOPS_PER_MAC = 2


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one decoder layer on one batch, padding included.

    Args:
        layer: 0-based index.
        retention: Retention ratio r; 1.0 is a plain layer.
        vision_tokens: Vision tokens that the layer processes, K, in the row where they are most.
        tokens: All tokens of a row that the layer processes, M: K and the text, after padding to the longest row.
        cached: Tokens of a row whose keys and values it holds after the prefill: M, or all N where skipped ones keep
            theirs.
        router_tokens: Tokens of a row that the router scores: all after padding, 0 in a plain layer.
        attention: Matrix products of attention without the next.
        attention_products: QKᵀ and attention weights times V, over the full rectangle.
        mlp: The MLP.
        router: The router; 0 in a plain layer.
        selector: What ranks the tokens by no router, by its own formula.
    """

    layer: int
    retention: float
    vision_tokens: int
    tokens: int
    cached: int
    router_tokens: int
    attention: int
    attention_products: int
    mlp: int
    router: int
    selector: int = 0

    @property
    def matrix(self) -> int:
        """Every matrix product but the attention products: what the paper counted."""
        return self.attention + self.mlp + self.router

    @property
    def total(self) -> int:
        """Of the layer."""
        return self.matrix + self.attention_products + self.selector


@dataclass(frozen=True)
class DecoderCost:
    """FLOPs of the decoder's prefill of one batch, and what a decode step needs.

    Args:
        layers: One entry per layer, length L.
        lm_head: lm_head on every position of the batch.
        batch: Rows, B.
        step_matrix: Matrix products of one decoded token: all layers, and lm_head on that token.
        step_products: Attention products of one decoded token in one layer, for each key that it attends to.
        unknown_operators: Operators that nobody counted, with how often they were met.
        selector_before: What drops tokens in front of the decoder.
    """

    layers: list[LayerCost]
    lm_head: int
    batch: int
    step_matrix: int
    step_products: int
    unknown_operators: Counter[str]
    selector_before: int = 0

    @property
    def selector(self) -> int:
        """Of all that ranks tokens by no router."""
        return self.selector_before + sum(layer.selector for layer in self.layers)

    @property
    def matrix(self) -> int:
        """Every matrix product of the layers but the attention products."""
        return sum(layer.matrix for layer in self.layers)

    @property
    def attention_products(self) -> int:
        """Of all layers."""
        return sum(layer.attention_products for layer in self.layers)

    @property
    def total(self) -> int:
        """Decoder layers with attention products and selection, and lm_head."""
        return self.matrix + self.attention_products + self.lm_head + self.selector

    def decode(self, step: int) -> int:
        """FLOPs of the `step`-th decoded token of each row; 1 is the first.

        In each layer it attends to that layer's cache and to the tokens decoded so far, itself included.
        """
        keys = sum(layer.cached + step for layer in self.layers)
        return self.batch * (self.step_matrix + self.step_products * keys)


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

    @property
    def total(self) -> int:
        """Of tower and projector."""
        return self.tower + self.projector


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The real model on the meta device: shapes without weights, about 0.1 s for any size."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            copy.deepcopy(config),  # which would keep the dtype and the attention that only the trace uses
            attn_implementation="sdpa",
            dtype=torch.bfloat16,
        )
    return model.eval()


def decoder_cost(model: PreTrainedModel, rows: Sequence[Row], routed: Routed) -> DecoderCost:
    """Count the prefill of one batch, each decoder layer at its own number of tokens, and one decode step.

    Args:
        model: A LLaVA on the meta device, stock or p-MoD.
        routed: What its layers keep; a stock model's keep everything.
    """
    decoder = model.model.language_model
    longest = max(row.tokens for row in rows)
    if routed.cost is not None:  # a selection has its own formula: a loop over tokens would be traced for minutes
        decoder.set_selection("uniform")
    counts: dict[tuple, Count] = {}  # layers of one model differ only in ratio, router, and whether they choose
    layers = []
    held = zip(layer_tokens(rows, routed), cached_tokens(rows, routed), strict=True)
    for index, (layer, ratio, ((vision, tokens), cached)) in enumerate(
        zip(decoder.layers, routed.retention, held, strict=True)
    ):
        has_router, chosen_at = getattr(layer, "router", None) is not None, getattr(layer, "chosen_at", None)
        alike = (ratio, has_router, chosen_at == index)
        if alike not in counts:
            layer.drop = None  # what came before is no part of what the layer costs
            thins = has_router or chosen_at is not None or routed.before < 1
            routing = batch_routing(rows, routed.target_tokens, routed.before) if thins else None
            if routing is not None and chosen_at not in (None, index):
                routing.hold(chosen_at, torch.empty(len(rows), longest, dtype=torch.int64, device="meta"))
            counts[alike] = _count_layer(decoder, index, len(rows), longest, routing)
        counted = counts[alike]
        mlp, router = counted.by_module["mlp"], counted.by_module.get("router", 0)
        layers.append(
            LayerCost(
                layer=index,
                retention=ratio,
                vision_tokens=vision,
                tokens=tokens,
                cached=cached,
                router_tokens=longest if has_router else 0,
                attention=FLOPS_PER_MAC * (counted.linear - mlp - router),
                attention_products=FLOPS_PER_MAC * counted.attention_products,
                mlp=FLOPS_PER_MAC * mlp,
                router=FLOPS_PER_MAC * router,
                selector=len(rows) * selector_flops(Sizes.of(model.config), rows, routed, index),
            )
        )
    head = count(model.lm_head, _meta(1, 1, decoder.config.hidden_size))  # of one position
    step = _count_layer(decoder, 0, 1, 1, None)  # without images every layer is a plain one
    return DecoderCost(
        layers=layers,
        lm_head=FLOPS_PER_MAC * len(rows) * longest * head.linear,
        batch=len(rows),
        step_matrix=FLOPS_PER_MAC * (len(layers) * step.linear + head.linear),
        step_products=FLOPS_PER_MAC * step.attention_products,
        unknown_operators=sum((Counter(counted.unknown_operators) for counted in counts.values()), Counter()),
        selector_before=len(rows) * selector_flops(Sizes.of(model.config), rows, routed, None),
    )


def _count_layer(decoder: PreTrainedModel, index: int, batch: int, tokens: int, routing: Routing | None) -> Count:
    """One decoder layer on `(batch, tokens)` without cache; routed if `routing` is given."""
    states = _meta(batch, tokens, decoder.config.hidden_size)
    positions = torch.arange(tokens, device="meta")[None]
    arguments = {"position_embeddings": decoder.rotary_emb(states, positions), "position_ids": positions}
    if routing is not None:
        arguments["routing"] = routing
    return count(decoder.layers[index], states, **arguments)


def batch_routing(rows: Sequence[Row], target_tokens: str, before: float = 1.0) -> Routing:
    """The routing of one batch, from its counts alone: a meta tensor has no values to read them from."""
    longest = max(row.tokens for row in rows)
    routable = [row.routable(target_tokens) for row in rows]
    left = [kept_tokens(number, before) for number in routable]
    routing = Routing(
        target=torch.empty(len(rows), longest, dtype=torch.bool, device="meta"),
        plain=torch.empty(len(rows), longest, dtype=torch.bool, device="meta"),
        counts=[(some, row.tokens - number, 0) for some, number, row in zip(left, routable, rows, strict=True)],
        padded=any(row.tokens < longest for row in rows),
        rank_base=torch.empty(len(rows), longest, device="meta"),
    )
    if before < 1:
        routing.thinned = routing.target
        routing.hold(EVERYTHING, torch.empty(len(rows), longest, dtype=torch.int64, device="meta"))
    return routing


def vision_cost(model: PreTrainedModel, rows: Sequence[Row]) -> VisionCost:
    """Count the vision tower and the projector for all images of a batch.

    Raises:
        PmodError: a vision tower that is no CLIP or SigLIP.
    """
    if not (sizes := Sizes.of(model.config)).family.tiled:
        return _grid_cost(model.model.visual, sizes.tower, rows)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    config = model.config.vision_config
    if not hasattr(tower, "encoder") or getattr(tower, "head", None) is not None:
        raise PmodError(
            f"the vision tower {config.model_type} is unknown: expected clip_vision_model, or siglip_vision_model with "
            "vision_use_head false",
            hint="profile counts LLaVA models with a CLIP or SigLIP tower",
        )
    tiles = sum(row.tiles for row in rows)
    embed = tower.embeddings.patch_embedding  # the tracer fails on a meta convolution: fvcore's formula instead
    grid = config.image_size // config.patch_size
    convolution = conv_flop_count([1], list(embed.weight.shape), [1, config.hidden_size, grid, grid])
    layers = tower.encoder.layers  # alike, so one is traced
    layer = count(layers[0], _meta(1, sizes.tower.tokens, config.hidden_size), attention_mask=None)
    patches = sum(row.patches for row in rows)
    projection = count(projector, _meta(1, patches, projector.linear_1.in_features))
    encoded = convolution + len(layers) * (layer.linear + layer.attention_products)
    return VisionCost(
        tower=FLOPS_PER_MAC * tiles * encoded,
        projector=FLOPS_PER_MAC * projection.linear,
        unknown_operators=Counter(layer.unknown_operators) + Counter(projection.unknown_operators),
    )


def _grid_cost(visual: PreTrainedModel, tower: GridTower, rows: Sequence[Row]) -> VisionCost:
    """A tower that reads grids: one block is traced on a window of each size that the blocks attend to."""
    embed = visual.patch_embed.proj.weight  # as above; one patch is one place of the convolution
    convolution = conv_flop_count([1], list(embed.shape), [1, embed.shape[0], 1, 1, 1])
    block, width = visual.blocks[0], tower.hidden
    tables = (_meta(1, width // visual.config.num_heads),) * 2
    one = count(block, _meta(1, width), cu_seqlens=torch.tensor([0, 1]), position_embeddings=tables)
    cell = _meta(tower.merge**2, width)
    run = [visual.merger, *getattr(visual, "deepstack_merger_list", ())][: tower.mergers]  # DeepStack's are alike
    mergers = [count(each, cell) for each in run]
    patches = sum(times * tower.patches(image) for image, times in pictures(rows).items())
    pairs = sum(times * tower.pairs(image) for image, times in pictures(rows).items())
    # Of one patch that sees itself: with the pairs of the real grid that is every window, whatever its size.
    encoded = patches * (convolution + tower.layers * one.linear) + pairs * one.attention_products
    merged = patches // tower.merge**2 * sum(each.linear for each in mergers)
    unknown = sum((Counter(each.unknown_operators) for each in (one, *mergers)), Counter())
    return VisionCost(FLOPS_PER_MAC * encoded, FLOPS_PER_MAC * merged, unknown)


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)
