"""Bytes of the KV cache of one prompt, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class KvCost:
    """Bytes of K and V that one layer keeps.

    Args:
        vision: Of the vision tokens that the layer kept.
        text: Of the text tokens, generated ones included.
    """

    vision: int
    text: int

    @property
    def total(self) -> int:
        return self.vision + self.text


def bytes_per_token(text_config: object, dtype: str) -> int:
    """Bytes that one token takes in one layer: K and V over the key/value heads, fewer than query heads under GQA.

    Args:
        text_config: The decoder's configuration.
        dtype: One of `DTYPE_BYTES`.
    """
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return 2 * text_config.num_key_value_heads * head_size * DTYPE_BYTES[dtype]


def kv_cache(text_config: object, dtype: str, vision_tokens: list[int], text_tokens: int) -> list[KvCost]:
    """KV cache per layer. A skipped token has no K and V in that layer.

    Args:
        text_config: The decoder's configuration.
        dtype: Dtype of the cache, one of `DTYPE_BYTES`.
        vision_tokens: Vision tokens that each layer keeps, length L.
        text_tokens: Text and generated tokens, kept by every layer.
    """
    size = bytes_per_token(text_config, dtype)
    return [KvCost(kept * size, text_tokens * size) for kept in vision_tokens]
