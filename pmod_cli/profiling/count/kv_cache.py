"""Bytes of the KV cache of one batch, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from pmod_cli.profiling.sizes import Decoder

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KvCost:
    """Bytes of K and V that one layer holds.

    Args:
        vision: Of the vision tokens that the layer kept, and of the padding of rows that kept fewer.
        text: Of the text tokens, generated ones included.
    """

    vision: int
    text: int

    @property
    def total(self) -> int:
        return self.vision + self.text


def bytes_per_token(decoder: Decoder, dtype: str) -> int:
    """Bytes that one token takes in one layer: K and V over the key/value heads, fewer than query heads under GQA.

    Args:
        decoder: Its sizes.
        dtype: One of `DTYPE_BYTES`.
    """
    return 2 * decoder.kv_heads * decoder.head_size * DTYPE_BYTES[dtype]


def kv_cache(decoder: Decoder, dtype: str, tokens: list[int], text: int, new: int, batch: int) -> list[KvCost]:
    """KV cache per layer. A skipped token has no K and V in that layer.

    Args:
        decoder: Its sizes.
        dtype: Dtype of the cache, one of `DTYPE_BYTES`.
        tokens: Tokens of a row that each layer holds after the prefill, M, length L.
        text: Text tokens of a row among them.
        new: Tokens decoded after the prefill; every layer keeps them.
        batch: Rows, B.
    """
    size = batch * bytes_per_token(decoder, dtype)
    return [KvCost((held - text) * size, (text + new) * size) for held in tokens]
