"""Memory of inference from sizes alone: the KV cache of each layer, what a prompt needs, how many or how long ones fit.

Needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pmod_cli.core.text import GIB
from pmod_cli.families.sizes import Decoder, Sizes
from pmod_cli.profiling.count.formulas import parameters
from pmod_cli.profiling.count.workload import Routed, Row, cached_tokens, layer_tokens

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KvCost:
    """Bytes of K and V that one layer holds.

    Args:
        vision: Of the vision tokens that it holds, and of the padding of rows that hold fewer.
        text: Of the text tokens, generated ones included.
    """

    vision: int
    text: int

    @property
    def total(self) -> int:
        """Of all tokens."""
        return self.vision + self.text


def bytes_per_token(decoder: Decoder, dtype: str) -> int:
    """Bytes that one token takes in one layer: K and V over the key/value heads, fewer than query heads under GQA.

    Args:
        dtype: One of `DTYPE_BYTES`.
    """
    return 2 * decoder.kv_heads * decoder.head_size * DTYPE_BYTES[dtype]


def kv_cache(decoder: Decoder, dtype: str, tokens: list[int], text: int, new: int, batch: int) -> list[KvCost]:
    """KV cache per layer.

    Args:
        dtype: Dtype of the cache, one of `DTYPE_BYTES`.
        tokens: Tokens of a row that each layer holds after the prefill, length L; see `cached_tokens`.
        text: Text tokens of a row among them.
        new: Tokens decoded after the prefill; every layer keeps them.
        batch: Rows, B.
    """
    size = batch * bytes_per_token(decoder, dtype)
    return [KvCost((held - text) * size, (text + new) * size) for held in tokens]


def kv_bytes(sizes: Sizes, rows: Sequence[Row], dtype: str, new_tokens: int = 0, routed: Routed | None = None) -> int:
    """Bytes of the whole KV cache of a batch, padding included, after the prefill and `new_tokens` more.

    Args:
        dtype: One of `DTYPE_BYTES`.
    """
    routed = routed or Routed.stock(sizes.decoder.layers)
    held = sum(tokens + new_tokens for tokens in cached_tokens(rows, routed))
    return len(rows) * held * bytes_per_token(sizes.decoder, dtype)


RESERVE = GIB  # of a GPU's memory: the CUDA context, kernels' work space and fragmentation


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes at the peak of a batch's prefill and decoding.

    Args:
        weights: All weights.
        cache: K and V of every layer after the last new token.
        work: What the prefill needs at its peak beyond that: hidden states and the MLP's inner ones of one layer, while
            the caches of the layers above are not there yet.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.weights + self.cache + self.work


@dataclass(frozen=True)
class Fit:
    """What fits a GPU.

    Args:
        batch: Rows of the workload's prompt, as long as its longest; 0 where not even one fits.
        context: Tokens of one row with the workload's images, text and new ones included; 0 where none fits.
        limited_by: `memory`, or `context` where the model's own context ends first.
    """

    batch: int
    context: int
    limited_by: str


def inference_memory(
    sizes: Sizes,
    rows: Sequence[Row],
    dtype: str,
    *,
    new_tokens: int = 0,
    routed: Routed | None = None,
) -> InferenceMemory:
    """Bytes that a batch needs.

    Args:
        rows: The batch; shorter rows are padded.
        dtype: Of weights and cache, one of `DTYPE_BYTES`.
        new_tokens: Tokens decoded after the prefill.
        routed: What p-MoD changes; None is the stock model.
    """
    decoder, size = sizes.decoder, DTYPE_BYTES[dtype]
    routed = routed or Routed.stock(decoder.layers)
    gathered = [tokens for _, tokens in layer_tokens(rows, routed)]
    longest = max(row.tokens for row in rows)
    token = bytes_per_token(decoder, dtype)
    cache = kv_bytes(sizes, rows, dtype, new_tokens, routed)
    so_far = itertools.accumulate(cached_tokens(rows, routed))
    peaks = [
        token * held + size * (5 * longest * decoder.hidden + 3 * tokens * decoder.inner)
        for held, tokens in zip(so_far, gathered, strict=True)
    ]
    return InferenceMemory(
        weights=parameters(sizes, sum(routed.has_router)).total * size,
        cache=cache,
        work=max(0, len(rows) * max(peaks) - cache),
    )


def fit(
    sizes: Sizes,
    row: Row,
    dtype: str,
    memory: int,
    *,
    new_tokens: int = 0,
    routed: Routed | None = None,
) -> Fit:
    """The largest batch of a prompt, and the longest text beside its images, that a device holds.

    Args:
        memory: Bytes of the device; all but `RESERVE` is used.
    """
    room = memory - RESERVE

    def needed(text_tokens: int) -> InferenceMemory:
        return inference_memory(sizes, [Row(row.images, text_tokens)], dtype, new_tokens=new_tokens, routed=routed)

    one = needed(row.text_tokens)
    batch = max(0, (room - one.weights) // (one.cache + one.work))
    low, high = -1, sizes.decoder.context - row.vision_tokens - new_tokens
    if needed(high).total <= room:
        return Fit(batch, sizes.decoder.context, "context")
    while high - low > 1:  # `low` fits or is -1, `high` does not
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle).total <= room else (low, middle)
    return Fit(batch, row.vision_tokens + low + new_tokens if low >= 0 else 0, "memory")
