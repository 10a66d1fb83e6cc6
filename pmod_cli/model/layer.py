"""One decoder layer of a p-MoD model: what it adds to a pre-norm decoder layer of transformers.

The layer (paper, Section 3.2; PMOD.md, "The method"), with x the residual stream and w the router's weight:

    text token           y = h + MLP(LN h)        with h = x + Attn(LN x)
    kept vision token    y = h + w * MLP(LN h)
    skipped vision token y = w * x                (STRing; without it y = x)

A layer that holds the choice of an earlier one has no router: w = 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .attention_rows import attention_function, heads
from .cache import CACHE_NAME, hides_the_future, routed_cache_layer, store_all, take_cache
from .methods import METHODS
from .routing import EVERYTHING, Gathered, Routing, token_weights
from .settings import PmodSettings
from .stock import Stock


class Router(nn.Module):
    """One linear map D -> 1 with bias, on the un-normalised residual stream. Starts at zero: all weights are equal.

    It is no `nn.Linear`, so that what quantises linear layers leaves it: which tokens are kept hangs on its last bits.
    """

    def __init__(self, hidden_size: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, **options))
        self.bias = nn.Parameter(torch.empty(1, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Logits `(..., 1)` of states `(..., D)`."""
        return F.linear(states, self.weight, self.bias)


class RoutedLayer(Stock):
    """Mixin in front of a stock decoder layer. Without vision tokens in the step, the layer is the stock one."""

    def add_router(self, routed: bool) -> None:
        """Gives a stock layer, if it is routed, a zero-initialised router."""
        like = self.input_layernorm.weight
        router = Router(like.shape[0], device=like.device, dtype=like.dtype) if routed else None
        self.register_module("router", router)

    def apply_settings(
        self, settings: PmodSettings, ratio: float, chosen_at: int | None, *, held: bool, drop: tuple[int, float] | None
    ) -> None:
        """Says what the layer keeps, and by whose choice.

        Args:
            settings: Norm, STRing, positions, and what becomes of skipped tokens.
            ratio: Retention ratio of this layer.
            chosen_at: Index of the layer that chooses for this one; its own where it chooses. None: it keeps all.
            held: Whether later layers hold the choice of this one.
            drop: Where dropped tokens do not return: by whose choice, and at which ratio, the layer before has dropped.
        """
        self.ratio = ratio
        self.selects = ratio < 1  # at ratio 1 a router only weighs: the layer's tokens stay as they stand
        self.weight_norm, self.string = settings.weight_norm, settings.string
        self.thins = settings.before is not None
        self.keep_keys, self.renumbers = settings.keep_keys, settings.positions == "renumbered"
        self.chosen_at, self.held, self.drop = chosen_at, held, drop
        # Without a choice of its own a layer is a stock one on fewer tokens; at ratio 1 a router may still weigh.
        weighs = METHODS[settings.method].routers and self.router is not None
        self.weighs = weighs and chosen_at in (None, self.self_attn.layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        routing: Routing | None = None,
        step_valid: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`.

        Args:
            routing: Of this prefill, or None in a step without vision tokens.
            step_valid: `(B, N)` bool, real tokens of a step without routing that has padding; else None.
            kwargs: The cache, as `cache` or `past_key_values`, and what the stock layer takes besides.

        Raises:
            ValueError: The step is to be cached, but no cache has come this far.
        """
        cache = take_cache(kwargs)
        if use_cache and cache is None:
            raise ValueError("this step is to be cached, and the layer got no cache: later steps would be wrong")
        if routing is not None and (self.weighs or self.selects or self.held or routing.thinned is not None):
            assert position_embeddings is not None  # every stock decoder makes them
            return self._routed_forward(hidden_states, routing, attention_mask, position_embeddings, cache, **kwargs)
        if self.training and torch.is_grad_enabled() and self.router is not None:
            # Text-only step: the router takes part with weight zero, or distributed training would wait for it. Here,
            # since FSDP2 has a layer's weights at hand only while the layer runs.
            hidden_states = hidden_states + 0.0 * self.router(hidden_states[:, :1])
        if (self.selects or self.thins) and cache is not None and not self.keep_keys:
            cache_layer = routed_cache_layer(cache, self.self_attn.layer_idx)
            if cache_layer.shift is not None and position_embeddings is not None:
                position_embeddings = moved(position_embeddings, cache_layer.shift)
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
        **kwargs: Any,
    ) -> Tensor:
        layer_idx = self.self_attn.layer_idx
        weights = logits = scale = None
        if self.weighs:
            logits = self.router(hidden_states).squeeze(-1)  # (B, N)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            weights = token_weights(logits, routing.plain, self.weight_norm)  # (B, N)
            scale = weights.to(hidden_states.dtype).unsqueeze(-1)  # (B, N, 1)
        gathered = self._choose(hidden_states, routing, weights, position_embeddings)
        if routing.recorder is not None:
            routing.recorder.add(layer_idx, routing, gathered, weights, logits)
        if gathered is None:
            return self._process(hidden_states, scale, attention_mask, position_embeddings, cache, **kwargs)
        index, valid = gathered.index.unsqueeze(-1), gathered.valid  # (B, M, 1)
        rows = index.expand(-1, -1, hidden_states.shape[-1])
        x, x_scale = hidden_states.gather(1, rows), None if scale is None else scale.gather(1, index)
        if self.keep_keys:
            kept = self._frozen(hidden_states, x, gathered.index, attention_mask, position_embeddings, cache, **kwargs)
            kept = kept if valid is None else torch.where(valid.unsqueeze(-1), kept, x)
            return hidden_states.scatter(1, rows, kept)
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
            if self.renumbers:
                cache_layer.shift = self._shift(routing, gathered, position_embeddings)
        places = routing.renumbered(gathered_real(routing, gathered)).unsqueeze(-1) if self.renumbers else index
        tables = routing.rotary_tables(position_embeddings, places)
        kept = self._process(x, x_scale, mask, tables, cache, **kwargs)
        scales = self.string and scale is not None
        if valid is not None:  # fillers are skipped tokens
            kept = torch.where(valid.unsqueeze(-1), kept, x * x_scale if scales else x)
        skipped = hidden_states * scale if scales else hidden_states.clone()
        return skipped.scatter_(1, rows, kept)

    def _choose(
        self, hidden_states: Tensor, routing: Routing, weights: Tensor | None, tables: tuple[Tensor, Tensor]
    ) -> Gathered | None:
        """The tokens that the layer processes; None for all, as they stand."""
        layer_idx = self.self_attn.layer_idx
        if self.chosen_at == layer_idx and (self.selects or self.held):
            routing.weights = None if weights is None else weights.detach()
            self._stand(routing, tables)
            order = self.selection.order(hidden_states, routing, self)
            if self.held:
                routing.hold(layer_idx, order)
            elif self.selects:
                return routing.gather_plan(order, self.ratio)
        if self.selects:
            assert self.chosen_at is not None  # a layer that keeps less is told by whose choice
            return routing.held_plan(self.chosen_at, self.ratio)
        return None if routing.thinned is None else routing.held_plan(EVERYTHING, 1.0)

    def _stand(self, routing: Routing, tables: tuple[Tensor, Tensor]) -> None:
        """Says which tokens the layer may choose from, and at which positions they stand."""
        routing.position_embeddings, routing.standing = tables, None
        if self.drop is not None:
            routing.stand(*self.drop)
            if self.renumbers:
                places = routing.renumbered(routing.alive).unsqueeze(-1)
                routing.position_embeddings = routing.rotary_tables(tables, places)

    def _process(
        self,
        x: Tensor,  # (B, M, D)
        scale: Tensor | None,  # (B, M, 1); None where every weight is 1
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None,
        **kwargs: Any,
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

    def _frozen(
        self,
        hidden_states: Tensor,  # (B, N, D)
        x: Tensor,  # (B, M, D)
        index: Tensor,  # (B, M)
        attention_mask: Tensor | None,
        tables: tuple[Tensor, Tensor],
        cache: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """The layer on M tokens, which see the keys and values of all N, `(B, M, D)`.

        Raises:
            ValueError: The attention implementation takes no mask of its own for each query.
        """
        attention, normed = self.self_attn, self.input_layernorm(hidden_states)
        kind = attention.config._attn_implementation
        if "flash" in kind:
            raise ValueError(f"skipped tokens whose keys are seen need attention sdpa or eager, found {kind}")
        keys, values = heads(attention, normed, "k", tables), heads(attention, normed, "v")
        if cache is not None:
            keys, values = store_all(cache, keys, values, attention.layer_idx)
        rows, past = index.unsqueeze(-1), keys.shape[-2] - hidden_states.shape[1]
        asked = [table.expand(len(x), -1, -1).gather(1, rows.expand(-1, -1, table.shape[-1])) for table in tables]
        queries = heads(attention, normed.gather(1, rows.expand_as(x)), "q", asked)
        if attention_mask is None:
            mask = torch.arange(keys.shape[-2], device=x.device) <= past + rows  # (B, M, P + N)
            mask = mask.unsqueeze(1)
            if kind == "eager":
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, torch.finfo(x.dtype).min)
        else:
            mask = attention_mask.expand(len(x), -1, -1, -1)
            mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
        mixed, _ = attention_function(attention)(
            attention, queries, keys, values, mask, scaling=attention.scaling, dropout=0.0, **kwargs
        )
        h = x + attention.o_proj(mixed.reshape(*x.shape[:-1], -1))
        return h + self.mlp(self.post_attention_layernorm(h))

    def _shift(self, routing: Routing, gathered: Gathered, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What turns the rotary tables of later tokens back by the tokens that this layer dropped, `(B, 1, d)` each."""
        real = (routing.rank_base > -torch.inf).sum(dim=1, keepdim=True)
        dropped = real - gathered_real(routing, gathered).sum(dim=1, keepdim=True)
        places = routing.real_places
        cosines, sines = routing.rotary_tables(tables, places.gather(1, dropped).unsqueeze(-1))
        scale = routing.rotary_tables(tables, places[:, :1].unsqueeze(-1))[0]  # of position 0: how tables are scaled
        return cosines / scale, sines / scale


def gathered_real(routing: Routing, gathered: Gathered) -> Tensor:
    """`(B, M)` bool: which gathered tokens are neither padding nor fillers."""
    real = routing.rank_base.gather(1, gathered.index) > -torch.inf
    return real if gathered.valid is None else real & gathered.valid


def moved(tables: tuple[Tensor, Tensor], shift: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotary tables of positions that lie before those of `tables` by an angle, each `(B, T, d)`."""
    (cosines, sines), (cosine, sine) = tables, shift
    return cosines * cosine + sines * sine, sines * cosine - cosines * sine
