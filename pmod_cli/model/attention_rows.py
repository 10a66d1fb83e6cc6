"""The few rows of a layer's attention that a selection needs, computed ahead of the layer: never the whole square."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .routing import Routing


def attention_rows(hidden_states: Tensor, routing: Routing, layer: nn.Module, queries: Tensor) -> Tensor:
    """Attention of some tokens in a layer, softmax over all that they see, averaged over heads.

    The kernel of the layer itself stays what it is. What was dropped for good, padding, and the tokens of an earlier
    step in the cache are not seen.

    Args:
        hidden_states: `(B, N, D)`, the residual stream in front of the layer.
        routing: Of the prefill.
        layer: The decoder layer.
        queries: `(B, Q)` int64, places of the tokens that attend.

    Returns:
        `(B, Q, N)`, float32 or more.
    """
    attention, tables = layer.self_attn, routing.position_embeddings
    assert tables is not None  # the layer that is about to choose has given them
    normed, rows = layer.input_layernorm(hidden_states), queries.unsqueeze(-1)
    keys = heads(attention, normed, "k", tables)  # (B, G, N, d)
    asked = [table.expand(len(normed), -1, -1).gather(1, rows.expand(-1, -1, table.shape[-1])) for table in tables]
    asking = heads(attention, normed.gather(1, rows.expand(-1, -1, normed.shape[-1])), "q", asked)  # (B, H, Q, d)
    batch, num_heads, num_queries, size = asking.shape
    grouped = asking.reshape(batch, keys.shape[1], -1, size)  # query heads of one key head behind each other
    logits = (grouped @ keys.transpose(-1, -2)).view(batch, num_heads, num_queries, -1) * attention.scaling
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen = routing.alive.unsqueeze(1) & (torch.arange(normed.shape[1], device=normed.device) <= rows)  # (B, Q, N)
    return logits.masked_fill_(~seen.unsqueeze(1), torch.finfo(logits.dtype).min).softmax(dim=-1).mean(dim=1)


def heads(attention: nn.Module, states: Tensor, kind: str, tables: Sequence[Tensor] | None = None) -> Tensor:
    """Queries, keys or values of an attention module as it makes them itself, `(B, heads, T, d)`.

    Args:
        attention: The `self_attn` of a layer.
        states: `(B, T, D)`, normed.
        kind: `q`, `k` or `v`.
        tables: Cosines and sines, `(1 or B, T, d)` each; None leaves the positions out.
    """
    projected = getattr(attention, f"{kind}_proj")(states).view(*states.shape[:-1], -1, attention.head_dim)
    if (norm := getattr(attention, f"{kind}_norm", None)) is not None:
        projected = norm(projected)
    projected = projected.transpose(1, 2)
    if tables is None:
        return projected
    cosines, sines = (table.unsqueeze(1) for table in tables)
    turned, half = projected * cosines, projected.shape[-1] // 2
    first, second = projected.split(half, dim=-1)
    turned[..., :half].addcmul_(second, sines[..., :half], value=-1)  # in place: a frozen layer turns the keys of all
    turned[..., half:].addcmul_(first, sines[..., half:])
    return turned


def attention_function(attention: nn.Module) -> Callable[..., Any]:
    """The attention kernel that a module calls; `module, queries, keys, values, mask` to `(B, T, heads, d)`."""
    kind = attention.config._attn_implementation
    if kind != "eager":
        return ALL_ATTENTION_FUNCTIONS[kind]
    return eager_attention


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as matrix products: what `eager` stands for in every decoder."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * scaling + attention_mask
    shares = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (shares @ value).transpose(1, 2), None
