"""A prefill's FLOPs and a model's parameters as formulas, apart from the trace so that each checks the other.

Needs no torch.

Same conventions as the trace: two FLOPs a multiply-add, matrix products and convolutions only, attention over the full
rectangle of queries and keys. This is also what solves for a schedule, sweeps, and counts whole data sets, where a
trace of every case would take hours:

    sizes = Sizes.of(json.load(open("config.json")))
    rows = Workload(image_sizes=((672, 672),), text_tokens=58).rows(sizes)
    prefill(sizes, rows, Routed(PmodSettings(shift=0.45).retention(sizes.decoder.layers))).full
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from pmod_cli.families.grid import GridTower
from pmod_cli.families.sizes import Decoder, ImageTokens, Sizes, Tower
from pmod_cli.profiling.count.workload import Routed, Row, layer_tokens, pictures, selector_flops


@dataclass(frozen=True)
class Prefill:
    """FLOPs of the prefill of one batch by part, padding included.

    Args:
        matrix: Decoder layers without attention products, routers included.
        attention_products: QKᵀ and attention weights times V.
        lm_head: On every position, or on those that were asked for.
        tower: The vision tower on all tiles.
        projector: On all patches of all tiles, before unpadding.
        selector: What ranks the vision tokens, routers left out.
    """

    matrix: int
    attention_products: int
    lm_head: int
    tower: int
    projector: int
    selector: int = 0

    @property
    def paper(self) -> int:
        """What the paper counted: neither attention products nor vision tower."""
        return self.matrix + self.lm_head

    @property
    def layers(self) -> int:
        """Decoder layers with their attention products and selectors."""
        return self.decoder - self.lm_head

    @property
    def decoder(self) -> int:
        """Decoder layers with their attention products and selectors, and lm_head."""
        return self.paper + self.attention_products + self.selector

    @property
    def full(self) -> int:
        """Everything."""
        return self.decoder + self.tower + self.projector


def prefill(
    sizes: Sizes,
    rows: Sequence[Row],
    routed: Routed | None = None,
    *,
    attention: float = 1.0,
    logits: int | None = None,
) -> Prefill:
    """Count the prefill of one batch.

    Args:
        rows: The batch, as `Workload.rows` makes it.
        routed: What p-MoD changes; None is the stock model.
        attention: Share of the rectangle of queries and keys that is counted: 0.5 is what a causal kernel computes.
        logits: Positions of the batch that lm_head sees, as `generate` the last of each row; None is every one.
    """
    decoder, batch = sizes.decoder, len(rows)
    longest = max(row.tokens for row in rows)
    routed = routed or Routed.stock(decoder.layers)
    anything = any(row.routable(routed.target_tokens) for row in rows)  # a batch without images meets no router
    matrix = products = 0
    selector = selector_flops(sizes, rows, routed, None)
    for layer, (router, (_, tokens)) in enumerate(zip(routed.has_router, layer_tokens(rows, routed), strict=True)):
        matrix += layer_matrix(decoder, tokens, longest if router and anything else 0)
        selector += selector_flops(sizes, rows, routed, layer)
        if routed.keep_keys and anything:
            matrix += keys_and_values(decoder, longest - tokens)
        products += attention_products(decoder, tokens, longest if routed.keep_keys and anything else None)
    return Prefill(
        matrix=batch * matrix,
        attention_products=round(attention * batch * products),
        lm_head=lm_head(decoder, batch * longest if logits is None else logits),
        tower=encoder(sizes, rows),
        projector=projector(sizes, rows),
        selector=batch * selector,
    )


def layer_matrix(decoder: Decoder, tokens: int, router_tokens: int = 0) -> int:
    """FLOPs of one decoder layer on one row, without attention products.

    Args:
        tokens: Tokens that pass attention and MLP: the kept vision tokens and all text.
        router_tokens: Tokens that the router scores; 0 in a plain layer.
    """
    return 2 * (tokens * decoder.layer_weights + router_tokens * decoder.hidden)


def keys_and_values(decoder: Decoder, tokens: int) -> int:
    """FLOPs of the keys and values of so many tokens in one layer."""
    return 2 * tokens * decoder.hidden * 2 * decoder.kv_heads * decoder.head_size


def attention_products(decoder: Decoder, queries: int, keys: int | None = None) -> int:
    """FLOPs of QKᵀ and of the weights times V in one layer on one row; as many keys as queries unless told."""
    return 2 * 2 * queries * (queries if keys is None else keys) * decoder.heads * decoder.head_size


def lm_head(decoder: Decoder, positions: int) -> int:
    """FLOPs of lm_head on so many positions."""
    return 2 * positions * decoder.hidden * decoder.vocabulary


def encoder(sizes: Sizes, rows: Sequence[Row]) -> int:
    """FLOPs of the vision tower on all images and frames of a batch."""
    if sizes.family.tiled:
        return sum(row.tiles for row in rows) * tower_tile(sizes.tower)
    return sum(times * grid(sizes.tower, image) for image, times in pictures(rows).items())


def projector(sizes: Sizes, rows: Sequence[Row]) -> int:
    """FLOPs of the projector, or of all mergers, on a batch."""
    patches = sum(row.patches for row in rows)
    if sizes.family.tiled:
        return patches * projector_token(sizes)
    tower: GridTower = sizes.tower
    return 2 * patches * tower.mergers * (tower.cell_width + tower.out) * tower.cell_width


def grid(tower: GridTower, image: ImageTokens) -> int:
    """FLOPs of a tower that reads grids, on one image or video: patch embedding, and all blocks."""
    embedding = tower.channels * tower.temporal * tower.patch**2 * tower.hidden
    weights = 4 * tower.hidden**2 + (3 if tower.gated else 2) * tower.hidden * tower.inner
    products = 2 * tower.pairs(image) * tower.hidden
    return 2 * (tower.patches(image) * (embedding + tower.layers * weights) + products)


def tower_tile(tower: Tower) -> int:
    """FLOPs of the vision tower on one tile: patch embedding, and all encoder layers with attention products."""
    embedding = 3 * tower.patch**2 * tower.hidden * tower.patches
    weights = 4 * tower.hidden**2 + 2 * tower.hidden * tower.inner
    products = 2 * tower.tokens * tower.hidden
    return 2 * (embedding + tower.layers * tower.tokens * (weights + products))


def projector_token(sizes: Sizes) -> int:
    """FLOPs of the two-layer projector on one patch."""
    return 2 * (sizes.tower.features * sizes.tower.hidden + sizes.decoder.hidden) * sizes.decoder.hidden


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights by part.

    Args:
        embedding: The table of token embeddings.
        layer: One decoder layer, norms left out.
        layers: How many there are.
        lm_head: 0 where it is the embedding table.
        projector: With biases and, for LLaVA-NeXT, `image_newline`.
        tower: The vision tower.
        routers: All routers.
        adapter: LoRA's on one decoder layer; 0 without it.
    """

    embedding: int
    layer: int
    layers: int
    lm_head: int
    projector: int
    tower: int
    routers: int
    adapter: int

    @property
    def decoder(self) -> int:
        """Of the language model, without routers and adapters."""
        return self.embedding + self.layer * self.layers + self.lm_head

    @property
    def total(self) -> int:
        """Of the model, without adapters."""
        return self.decoder + self.projector + self.tower + self.routers


def parameters(sizes: Sizes, routed_layers: int = 0, adapter: int = 0) -> Parameters:
    """Count the weights of a model, without the norms of the decoder (less than 0.01 %).

    Args:
        routed_layers: Layers with a router; 0 for the stock model.
        adapter: Weights of LoRA's adapters on one decoder layer.
    """
    decoder, tower = sizes.decoder, sizes.tower
    if sizes.family.tower_shapes is not None:
        shapes = sizes.family.tower_shapes(tower)
        merging = sum(prod(shape) for name, shape in shapes.items() if "merger" in name)
        around = sum(map(prod, shapes.values())) - merging
    else:
        more = sizes.family.more_shapes(decoder.hidden, tower.features * tower.hidden)
        block = 4 * tower.hidden**2 + 2 * tower.hidden * tower.inner + 9 * tower.hidden + tower.inner
        merging = projector_token(sizes) // 2 + 2 * decoder.hidden + sum(map(prod, more.values()))
        around = tower.layers * block + (3 * tower.patch**2 + tower.tokens + 5) * tower.hidden
    return Parameters(
        embedding=decoder.vocabulary * decoder.hidden,
        layer=decoder.layer_weights,
        layers=decoder.layers,
        lm_head=0 if decoder.tied else decoder.vocabulary * decoder.hidden,
        projector=merging,
        tower=around,
        routers=routed_layers * (decoder.hidden + 1),
        adapter=adapter,
    )
