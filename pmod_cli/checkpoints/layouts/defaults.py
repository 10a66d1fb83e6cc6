"""What a config.json leaves out: the defaults of transformers' own configuration classes, held to them by a test.

Written down here, since converting and counting by formula import no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pmod_cli.checkpoints.aliases import CLIP_L_336, PINPOINTS

MOST_LAYERS = 1000  # of a decoder or a tower: the largest models have an eighth of it, and a number is quickly typed

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    },
}
"""By `model_type`. None follows from others: as many key/value heads as query heads, hidden size over query heads."""

TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
    },
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
    },
}

LLAVA: dict[str, Any] = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model", **CLIP_L_336},
    "image_grid_pinpoints": PINPOINTS,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def filled(part: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a config with the defaults of what it leaves out; a null stands for a default that is None."""
    said = {key: value for key, value in part.items() if not (value is None and defaults.get(key, 0) is None)}
    return {**defaults, **said}


def left_out(config: Mapping[str, Any]) -> list[str]:
    """Sizes of decoder and tower that a config does not say, as `text_config.hidden_size 4096`.

    Args:
        config: A LLaVA's, stock or p-MoD.
    """
    found = []
    for part, kinds in (("text_config", DECODERS), ("vision_config", TOWERS)):
        said = config.get(part) or {}
        known = kinds.get(said.get("model_type") or next(iter(kinds)), {})
        if not said:
            found.append(part)
            continue
        found += [
            f"{part}.{key} {default}" for key, default in known.items() if isinstance(default, int) and key not in said
        ]
    return found
