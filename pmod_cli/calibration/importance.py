"""How much each vision token matters in each layer of the stock model: the targets that routers are regressed on.

    attention  attention that a token receives from any later token, in the most attentive head
    text       the same from text tokens alone: what the answer reads, not what the image reads of itself
    fisher     squared gradient of the answers' log-likelihood in a gate on the token's value and on its update: the
               diagonal of the Fisher information, from a few backward passes with random signs

All are `(L, B, N)`: importance in layer l. A choice that is held up to layer m serves the layers up to m, so its target
is the sum over them. Of `fisher` the order alone is a target: a few tokens have a thousand times the value of the
others, and a regression would see nothing but these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pmod_cli.calibration.replay import Replay, Stream
from pmod_cli.model import kept_tokens

WATCHED = "pmod_watched"
CHUNK = 256  # queries at a time: attention is never held as a whole square
DRAWS = 4  # backward passes with random signs


def received_attention(replay: Replay, stream: Stream) -> dict[str, Tensor]:
    """`attention` and `text` of a stream in front of layer 0, `(L, B, N)` float32; the stream stays as it is."""
    assert stream.routing is not None  # a sample has an image
    valid = stream.routing.rank_base != float("-inf")
    text = valid & ~stream.routing.target
    found: dict[str, list[Tensor]] = {"attention": [], "text": []}

    def watch(query: Tensor, key: Tensor, scaling: float) -> None:
        found["attention"].append(_received(query, key, scaling, valid))
        found["text"].append(_received(query, key, scaling, text))

    _watched(replay, stream.fork(), watch)
    return {name: torch.stack(layers) for name, layers in found.items()}


def fisher_information(replay: Replay, stream: Stream, *, seed: int = 0) -> Tensor:
    """`fisher` of a stream in front of layer 0, `(L, B, N)` float32; the stream stays as it is.

    The backward pass goes layer by layer over stored inputs, so memory holds the graph of one layer at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    run, inputs = stream.fork(), []
    with torch.no_grad():
        for _ in range(len(replay)):
            inputs.append(run.hidden)
            replay.advance(run)
    with torch.enable_grad():
        last = run.hidden.detach().requires_grad_()
        logits = replay.model.lm_head(replay.decoder.norm(last[stream.predicts]))
        likelihood = logits.float().log_softmax(-1).gather(-1, stream.targets[:, None])[:, 0]
        signs = torch.randint(0, 2, (DRAWS, len(likelihood)), generator=generator).to(likelihood) * 2 - 1
        gradients = [torch.autograd.grad(likelihood, last, sign, retain_graph=True)[0] for sign in signs]
    layers: list[Tensor] = []
    for index in reversed(range(len(replay))):
        values: list[Tensor] = []
        with torch.enable_grad():
            hidden = inputs[index].detach().requires_grad_()
            output = _watched_layer(replay, stream, index, hidden, values.append)
        update, total = (output - hidden).detach(), 0.0
        for draw, gradient in enumerate(gradients):
            back, of_value = torch.autograd.grad(output, (hidden, values[0]), gradient, retain_graph=True)
            of_gates = (gradient * update).sum(-1).float() ** 2
            of_gates = of_gates + (of_value * values[0].detach()).sum(dim=(1, 3)).float() ** 2
            total, gradients[draw] = total + of_gates, back
        layers.append(total / DRAWS)
    return torch.stack(layers[::-1])


def target_of(name: str, importance: Tensor, ratio: float) -> Tensor:
    """What a router is regressed on, from the importance of one picture's tokens in the layers that it chooses for.

    Args:
        name: Of the importance.
        importance: `(V,)`, summed over these layers.
        ratio: What they keep, in the mean.

    Returns:
        `(V,)` float32. `fisher`: 2 for the half of the K tokens that matter most, 1 for the other half, 0 for the rest.
    """
    if name != "fisher":
        return importance
    most = importance.argsort(descending=True, stable=True)
    kept = kept_tokens(len(importance), ratio)
    found = torch.zeros_like(importance)
    found[most[:kept]] += 1
    found[most[: (kept + 1) // 2]] += 1
    return found


def _received(query: Tensor, key: Tensor, scaling: float, asking: Tensor) -> Tensor:
    """`(B, N)` float32: the largest share of attention that any `asking` query behind a token gives it in any head.

    Args:
        query: `(B, heads, N, d)`.
        key: The same, key-value heads repeated.
        scaling: Of the products.
        asking: `(B, N)` bool, the queries that count.
    """
    positions = torch.arange(query.shape[2], device=query.device)
    places = asking.any(dim=0).nonzero()[:, 0]
    received = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    for part in places.split(CHUNK):
        scores = (query[:, :, part] @ key.transpose(2, 3)).float() * scaling
        scores = scores.masked_fill(positions > part[:, None], float("-inf")).softmax(-1)
        scores = scores * (asking[:, part, None] & (positions != part[:, None]))[:, None]
        received = torch.maximum(received, scores.amax(dim=(1, 2)))
    return received


def _watched(replay: Replay, stream: Stream, watch: Callable[[Tensor, Tensor, float], None]) -> None:
    """Runs a stream to the end; `watch` gets query, key and scaling of each layer."""
    for index in range(len(replay)):
        stream.hidden = stream.behind(index, _watched_layer(replay, stream, index, stream.hidden, None, watch))


def _watched_layer(
    replay: Replay,
    stream: Stream,
    index: int,
    hidden: Tensor,
    on_value: Callable[[Tensor], None] | None = None,
    on_query: Callable[[Tensor, Tensor, float], None] | None = None,
) -> Tensor:
    """One layer that keeps every token. What its attention computes with is handed over."""
    config = replay.decoder.config
    before, config._attn_implementation = config._attn_implementation, WATCHED
    try:
        return replay.layers[index](
            hidden,
            attention_mask=None,
            position_embeddings=stream.tables,
            routing=None,
            use_cache=False,
            on_value=on_value,
            on_query=on_query,
        )
    finally:
        config._attn_implementation = before


def _watched_attention(module, query, key, value, attention_mask, on_value=None, on_query=None, **kwargs):
    """SDPA, which tells what it was given. Every decoder calls it behind its norms and rotary embedding."""
    if on_value is not None:
        on_value(value)
    if on_query is not None:
        keys = repeat_kv(key, module.num_key_value_groups)
        on_query(query, keys, kwargs["scaling"] if kwargs.get("scaling") is not None else query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(WATCHED, _watched_attention)
