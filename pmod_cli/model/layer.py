"""One decoder layer of a p-MoD model: what it adds to a pre-norm decoder layer of transformers.

The layer (paper, Section 3.2; PMOD.md, "The method"), with x the residual stream and w the router's weight:

    text token           y = h + MLP(LN h)        with h = x + Attn(LN x)
    kept vision token    y = h + w * MLP(LN h)
    skipped vision token y = w * x                (STRing; without it y = x)

A layer that holds the choice of an earlier one has no router: w = 1.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .cache import CACHE_NAME, hides_the_future, routed_cache_layer, take_cache
from .routing import Gathered, Routing, token_weights
from .settings import PmodSettings


class Router(nn.Linear):
    """One linear map D -> 1 with bias, on the un-normalised residual stream. Starts at zero: all weights are equal."""

    def __init__(self, hidden_size: int, **options):
        super().__init__(hidden_size, 1, **options)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class RoutedLayer:
    """Mixin in front of a stock decoder layer. Without vision tokens in the step, the layer is the stock one."""

    def add_routing(self, settings: PmodSettings, ratio: float, routed: bool) -> None:
        """Gives a stock layer its retention ratio and, if it is routed, a zero-initialised router.

        Which layers choose is said apart, see `choose_at`.

        Args:
            settings: Norm and STRing.
            ratio: Retention ratio of this layer.
            routed: Whether the layer has a router.
        """
        self.ratio = ratio
        self.selects = ratio < 1  # at ratio 1 a router only weighs: the layer's tokens stay as they stand
        self.weight_norm = settings.weight_norm
        self.string = settings.string
        like = self.input_layernorm.weight
        router = Router(like.shape[0], device=like.device, dtype=like.dtype) if routed else None
        self.register_module("router", router)

    def choose_at(self, chosen_at: int | None, held: bool) -> None:
        """Says whose choice the layer keeps tokens by.

        Args:
            chosen_at: Index of the layer that chooses for this one; its own where it chooses. None: it keeps all.
            held: Whether later layers hold the choice of this one.
        """
        self.chosen_at, self.held = chosen_at, held
        # Without a choice of its own a layer is a stock one on fewer tokens; at ratio 1 a router may still weigh.
        self.weighs = self.router is not None and chosen_at in (None, self.self_attn.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        routing: Routing | None = None,
        step_valid: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`.

        Args:
            routing: Of this prefill, or None in a step without vision tokens.
            step_valid: `(B, N)` bool, real tokens of a later step that has padding; else None.
            kwargs: The cache, as `cache` or `past_key_values`, and what the stock layer takes besides.

        Raises:
            ValueError: The step is to be cached, but no cache has come this far.
        """
        cache = take_cache(kwargs)
        if use_cache and cache is None:
            raise ValueError("this step is to be cached, and the layer got no cache: later steps would be wrong")
        if routing is not None and (self.weighs or self.selects or self.held):
            return self._routed_forward(hidden_states, routing, attention_mask, position_embeddings, cache, **kwargs)
        if self.training and torch.is_grad_enabled() and self.router is not None:
            # Text-only step: the router takes part with weight zero, or distributed training would wait for it. Here,
            # since FSDP2 has a layer's weights at hand only while the layer runs.
            hidden_states = hidden_states + 0.0 * self.router(hidden_states[:, :1])
        if self.selects and cache is not None:
            cache_layer = routed_cache_layer(cache, self.self_attn.layer_idx)
            if cache_layer.skipped or cache_layer.valid is not None:
                attention_mask = cache_layer.own_mask(self.self_attn.config, hidden_states, step_valid)
            if step_valid is not None:
                cache_layer.expect(step_valid)
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _routed_forward(
        self,
        hidden_states: Tensor,  # (B, N, D)
        routing: Routing,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None,
        **kwargs,
    ) -> Tensor:
        layer_idx = self.self_attn.layer_idx
        weights = logits = scale = None
        if self.weighs:
            logits = self.router(hidden_states).squeeze(-1)  # (B, N)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            weights = token_weights(logits, routing.plain, self.weight_norm)  # (B, N)
            scale = weights.to(hidden_states.dtype).unsqueeze(-1)  # (B, N, 1)
        routing.position_embeddings = position_embeddings
        gathered = self._choose(hidden_states, routing, weights)
        if routing.recorder is not None:
            routing.recorder.add(layer_idx, routing, gathered, weights, logits)
        if gathered is None:
            return self._process(hidden_states, scale, attention_mask, position_embeddings, cache, **kwargs)
        index, valid = gathered.index.unsqueeze(-1), gathered.valid  # (B, M, 1)
        rows = index.expand(-1, -1, hidden_states.shape[-1])
        x, x_scale = hidden_states.gather(1, rows), None if scale is None else scale.gather(1, index)
        # Causality is all the mask there is: fillers stand last. No position_ids: gaps in them would be read as the
        # borders of packed sequences; the rotary tables carry them.
        config = self.self_attn.config
        if cache is None:
            mask = None if hides_the_future(config) else create_causal_mask(config, x, None, None)
        else:
            cache_layer = routed_cache_layer(cache, layer_idx)
            mask = cache_layer.own_mask(config, x, None)
            croppable = 0 if routing.padded or valid is not None else routing.tail
            cache_layer.expect(valid, hidden_states.shape[1] - x.shape[1], croppable)
        tables = routing.rotary_tables(position_embeddings, index)
        kept = self._process(x, x_scale, mask, tables, cache, **kwargs)
        scales = self.string and scale is not None
        if valid is not None:  # fillers are skipped tokens
            kept = torch.where(valid.unsqueeze(-1), kept, x * x_scale if scales else x)
        skipped = hidden_states * scale if scales else hidden_states.clone()
        return skipped.scatter_(1, rows, kept)

    def _choose(self, hidden_states: Tensor, routing: Routing, weights: Tensor | None) -> Gathered | None:
        """The tokens that the layer processes; None for all, as they stand."""
        layer_idx = self.self_attn.layer_idx
        if self.chosen_at == layer_idx and (self.selects or self.held):
            routing.weights = None if weights is None else weights.detach()
            order = self.selection.order(hidden_states, routing, self)
            if self.held:
                routing.hold(layer_idx, order)
            return routing.gather_plan(order, self.ratio) if self.selects else None
        return routing.held_plan(self.chosen_at, self.ratio) if self.selects else None

    def _process(
        self,
        x: Tensor,  # (B, M, D)
        scale: Tensor | None,  # (B, M, 1); None where every weight is 1
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None,
        **kwargs,
    ) -> Tensor:
        """Attention and the weighted MLP, `(B, M, D)`."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(x),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        h = x + attended
        branch = self.mlp(self.post_attention_layernorm(h))
        return h + (branch if scale is None else scale * branch)
