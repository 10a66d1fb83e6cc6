"""The decoder's FLOPs as a formula, written down apart from the trace so that each checks the other.

Same convention as the trace: two FLOPs a multiply-add, matrix products only, attention over the full rectangle.
"""

from __future__ import annotations


def layer_flops(text_config: object, tokens: int, router_tokens: int = 0) -> int:
    """FLOPs of one decoder layer.

    Args:
        text_config: The decoder's configuration: Llama, Mistral or Qwen2.
        tokens: Tokens that pass attention and MLP: the kept vision tokens and all text.
        router_tokens: Tokens that the router scores; 0 in a plain layer.
    """
    hidden, inner = text_config.hidden_size, text_config.intermediate_size
    heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    head_size = getattr(text_config, "head_dim", None) or hidden // heads
    projections = 2 * hidden * heads * head_size + 2 * hidden * kv_heads * head_size  # q, o and k, v
    products = 2 * tokens * heads * head_size  # QKᵀ and weights times V, for one query
    mlp = 3 * hidden * inner  # gate, up, down
    return 2 * (tokens * (projections + products + mlp) + router_tokens * hidden)


def decoder_flops(text_config: object, tokens: list[int], router_tokens: list[int], positions: int) -> int:
    """FLOPs of all decoder layers and of lm_head.

    Args:
        text_config: The decoder's configuration.
        tokens: Tokens that pass each layer, length L.
        router_tokens: Tokens that each layer's router scores, length L; 0 in a plain layer.
        positions: Positions that lm_head is computed on.
    """
    layers = sum(layer_flops(text_config, n, scored) for n, scored in zip(tokens, router_tokens, strict=True))
    return layers + 2 * positions * text_config.hidden_size * text_config.vocab_size
