"""Short names of the stock models, each with its repository and its real sizes.

The sizes let `pmod profile` count a model of which not a byte is on this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES
from pmod_cli.families.towers import CLIP_L_336

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Alias:
    """A stock model under a short name.

    Attributes:
        repo: Repository on the hub, or None for the model that is part of this package.
        kind: Name of its family.
        decoder: Name of its decoder.
        text: Sizes of the decoder, as its config names them, where they differ from those of a 7B Vicuna.
        image_token: Id of the image token.
    """

    repo: str | None
    kind: str
    decoder: str = "llama"
    text: dict = field(default_factory=dict)
    image_token: int = 32000

    @property
    def layers(self) -> int:
        """Decoder layers, L."""
        return 32 if self.repo is None else (_VICUNA_7B | self.text)["num_hidden_layers"]

    @property
    def parameters(self) -> int:
        """Numbers in all weights of the stock model."""
        from pmod_cli.checkpoints.layouts.shapes import expected_shapes

        if self.repo is None:
            config = json.loads((bundled_path() / "config.json").read_text(encoding="utf-8"))
        else:
            text = _VICUNA_7B | self.text | {"model_type": self.decoder}
            config = {"model_type": self.kind, "text_config": text, "vision_config": CLIP_L_336}
        return sum(prod(shape) for shape in expected_shapes(config, "the alias").values())


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
_QWEN_72B = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "max_position_embeddings": 32768,
    "rope_theta": 1_000_000.0,
}
_QWEN_110B = _QWEN_72B | {"intermediate_size": 49152, "num_key_value_heads": 8}

ALIASES = {
    "tiny-llava-next": Alias(None, "llava_next"),
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", "llava"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", "llava", text=_VICUNA_13B),
    "llava-next-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next"),
    "llava-next-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", "llava_next", text=_VICUNA_13B),
    "llava-next-mistral-7b": Alias("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", "mistral", _MISTRAL_7B),
    "llava-next-llama3-8b": Alias("llava-hf/llama3-llava-next-8b-hf", "llava_next", "llama", _LLAMA3_8B, 128256),
    "llava-next-34b": Alias("llava-hf/llava-v1.6-34b-hf", "llava_next", "llama", _YI_34B, 64000),
    "llava-next-72b": Alias("llava-hf/llava-next-72b-hf", "llava_next", "qwen2", _QWEN_72B, 151646),
    "llava-next-110b": Alias("llava-hf/llava-next-110b-hf", "llava_next", "qwen2", _QWEN_110B, 151646),
    "p-mod-llava-1.5-7b": Alias("MCG-NJU/p-MoD-LLaVA-v1.5-7B", "llava"),
    "p-mod-llava-next-7b": Alias("MCG-NJU/p-MoD-LLaVA-NeXT-7B", "llava_next"),
}


def alias_of(name: str) -> str:
    """An alias in any case as it is listed; any other name as it is."""
    return name.lower() if name.lower() in ALIASES else name


def bundled_path(name: str = "tiny-llava-next") -> Path:
    """The folder of a model that is part of this package.

    Raises:
        PmodError: the installation lacks it.
    """
    path = BUNDLED / name
    if not (path / "config.json").is_file():
        raise PmodError(f"this installation lacks the bundled model {name}", hint="install the package again")
    return path


def builtin_config(name: str) -> PreTrainedConfig:
    """The stock configuration behind an alias at its real sizes, without network or weights.

    For the published p-MoD checkpoints it is that of the stock model that they were made from.

    Raises:
        PmodError: `name` is no alias.
    """
    import transformers
    from transformers import AutoConfig, CLIPVisionConfig

    if name not in ALIASES:
        raise PmodError(f"no built-in configuration is called {name!r}; there is: {', '.join(ALIASES)}")
    alias = ALIASES[name]
    if alias.repo is None:
        return AutoConfig.from_pretrained(bundled_path(name))
    family, decoder = FAMILIES[alias.kind], getattr(transformers, f"{DECODERS[alias.decoder].classes}Config")
    return getattr(transformers, f"{family.classes}Config")(
        **family.defaults
        | {
            "text_config": decoder(**_VICUNA_7B | alias.text),
            "vision_config": CLIPVisionConfig(**CLIP_L_336),
            "image_token_index": alias.image_token,
            "image_seq_length": 576,
        }
    )
