"""Short names of the stock models, each with its repository and its real sizes.

The sizes let `pmod profile` count a model of which not a byte is on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.errors import PmodError

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaNextConfig

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Alias:
    """A stock model under a short name.

    Attributes:
        repo: Repository on the hub, or None for the model that is part of this package.
        kind: `llava` or `llava_next`.
        decoder: `llama` or `mistral`.
        text: Sizes of the decoder, as its config names them, where they differ from those of a 7B Vicuna.
        image_token: Id of the image token.
    """

    repo: str | None
    kind: str
    decoder: str = "llama"
    text: dict = field(default_factory=dict)
    image_token: int = 32000


_VICUNA_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_VICUNA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_MISTRAL_7B = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
}
_LLAMA3_8B = {
    "vocab_size": 128320,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
_YI_34B = {
    "vocab_size": 64064,
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "rope_theta": 5_000_000.0,
}
_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width) in pixels

ALIASES = {
    "tiny-llava-next": Alias(None, "llava_next"),
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", "llava"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", "llava", text=_VICUNA_13B),
    "llava-next-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next"),
    "llava-next-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", "llava_next", text=_VICUNA_13B),
    "llava-next-mistral-7b": Alias("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", "mistral", _MISTRAL_7B),
    "llava-next-llama3-8b": Alias("llava-hf/llama3-llava-next-8b-hf", "llava_next", "llama", _LLAMA3_8B, 128256),
    "llava-next-34b": Alias("llava-hf/llava-v1.6-34b-hf", "llava_next", "llama", _YI_34B, 64000),
}


def bundled_path(name: str = "tiny-llava-next") -> Path:
    """The folder of a model that is part of this package.

    Raises:
        PmodError: the installation lacks it.
    """
    path = BUNDLED / name
    if not (path / "config.json").is_file():
        raise PmodError(f"this installation lacks the bundled model {name}", hint="install the package again")
    return path


def builtin_config(name: str) -> LlavaConfig | LlavaNextConfig:
    """The stock configuration behind an alias at its real sizes, without network or weights.

    Raises:
        PmodError: `name` is no alias.
    """
    from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig

    if name not in ALIASES:
        raise PmodError(f"no built-in configuration is called {name!r}; there is: {', '.join(ALIASES)}")
    alias = ALIASES[name]
    if alias.repo is None:
        return AutoConfig.from_pretrained(bundled_path(name))
    decoder = MistralConfig if alias.decoder == "mistral" else LlamaConfig
    common = {
        "text_config": decoder(**_VICUNA_7B | alias.text),
        "vision_config": CLIPVisionConfig(**_CLIP_L_336),
        "image_token_index": alias.image_token,
        "image_seq_length": 576,
        "tie_word_embeddings": False,
    }
    return (
        LlavaConfig(**common) if alias.kind == "llava" else LlavaNextConfig(image_grid_pinpoints=_PINPOINTS, **common)
    )
