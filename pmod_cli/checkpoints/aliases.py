"""Short names of the stock models, each with its repository and its real sizes.

The sizes let `pmod profile` count a model of which not a byte is on this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES
from pmod_cli.families.towers import CLIP_L_336

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUNDLED = Path(__file__).parent / "bundled"


def _sizes(
    hidden: int = 4096,
    inner: int = 11008,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 32,
    rows: int = 32064,
    positions: int = 4096,
    **more: Any,
) -> dict[str, Any]:
    """Sizes of a decoder, as its config names them; by default those of a 7B Vicuna."""
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        **more,
    }


@dataclass(frozen=True)
class Alias:
    """A stock model under a short name.

    Attributes:
        repo: Repository on the hub, or None for the model that is part of this package.
        kind: Name of its family.
        decoder: Name of its decoder.
        text: Sizes of the decoder, as its config names them.
        image_token: Id of the image token.
    """

    repo: str | None
    kind: str
    decoder: str = "llama"
    text: dict[str, Any] = field(default_factory=_sizes)
    image_token: int = 32000

    @property
    def layers(self) -> int:
        """Decoder layers, L."""
        return 32 if self.repo is None else self.text["num_hidden_layers"]

    @property
    def parameters(self) -> int:
        """Numbers in all weights of the stock model."""
        from pmod_cli.checkpoints.layouts.shapes import expected_shapes

        if self.repo is None:
            config = json.loads((bundled_path() / "config.json").read_text(encoding="utf-8"))
        else:
            text = self.text | {"model_type": self.decoder}
            config = {"model_type": self.kind, "text_config": text, "vision_config": CLIP_L_336}
        return sum(prod(shape) for shape in expected_shapes(config, "the alias").values())


_VICUNA_13B = _sizes(5120, 13824, layers=40, heads=40, kv_heads=40)
_MISTRAL_7B = _sizes(inner=14336, kv_heads=8, positions=32768, rope_theta=1_000_000.0, sliding_window=None)
_LLAMA3_8B = _sizes(inner=14336, kv_heads=8, rows=128320, positions=8192, rope_theta=500_000.0)
_YI_34B = _sizes(7168, 20480, layers=60, heads=56, kv_heads=8, rows=64064, rope_theta=5_000_000.0)
_QWEN: dict[str, Any] = {"layers": 80, "heads": 64, "rows": 152064, "positions": 32768, "rope_theta": 1_000_000.0}
_QWEN_72B = _sizes(8192, 24576, kv_heads=64, **_QWEN)
_QWEN_110B = _sizes(8192, 49152, kv_heads=8, **_QWEN)

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
        **{
            **family.defaults,
            "text_config": decoder(**alias.text),
            "vision_config": CLIPVisionConfig(**CLIP_L_336),
            "image_token_index": alias.image_token,
            "image_seq_length": 576,
        }
    )
