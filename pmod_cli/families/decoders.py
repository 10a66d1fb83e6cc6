"""The table of decoders. Their defaults are those of transformers' configuration classes, held to them by a test.

Written down here, since converting and counting by formula import no transformers.
"""

from pmod_cli.families.record import DecoderKind

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKVO = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

LLAMA = DecoderKind(
    "llama",
    "Llama",
    {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    biases={"attention_bias": QKVO, "mlp_bias": _MLP},
    original=("llava_llama", "llava"),
)
MISTRAL = DecoderKind(
    "mistral",
    "Mistral",
    {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    sliding_window=4096,
    window_key="sliding_window",
    original=("llava_mistral",),
    template="mistral",
)
QWEN2 = DecoderKind(
    "qwen2",
    "Qwen2",
    {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    biases={"": _QKV},
    sliding_window=4096,
    window_key="use_sliding_window",
    original=("llava_qwen",),
)
BUNDLED = (LLAMA, MISTRAL, QWEN2)
