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
from pmod_cli.families import FAMILIES
from pmod_cli.families.llava_onevision import LLAVA_ONEVISION
from pmod_cli.families.qwen2_5_vl import VISION as QWEN2_5_VL_VISION
from pmod_cli.families.qwen3_vl import VISION as QWEN3_VL_VISION
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
        repo: Repository on the hub, or None for a model that is part of this package.
        kind: Name of its family.
        decoder: Name of its decoder.
        text: Sizes of the decoder, as its config names them.
        image_token: Id of the image token of a LLaVA.
        vision: Sizes of the tower.
        whole: What else its config says.
        bundled: Folder of a model that is part of this package.
    """

    repo: str | None
    kind: str
    decoder: str = "llama"
    text: dict[str, Any] = field(default_factory=_sizes)
    image_token: int = 32000
    vision: dict[str, Any] = field(default_factory=CLIP_L_336.copy)
    whole: dict[str, Any] = field(default_factory=dict)
    bundled: str = ""

    @property
    def layers(self) -> int:
        """Decoder layers, L."""
        return self.text["num_hidden_layers"]

    @property
    def parameters(self) -> int:
        """Numbers in all weights of the stock model."""
        from pmod_cli.checkpoints.layouts.shapes import expected_shapes

        if self.repo is None:
            config = json.loads((bundled_path(self.bundled) / "config.json").read_text(encoding="utf-8"))
        else:
            text = self.text | {"model_type": self.decoder}
            config = {"model_type": self.kind, "text_config": text, "vision_config": self.vision, **self.whole}
        return sum(prod(shape) for shape in expected_shapes(config, "the alias").values())


_VICUNA_13B = _sizes(5120, 13824, layers=40, heads=40, kv_heads=40)
_MISTRAL_7B = _sizes(inner=14336, kv_heads=8, positions=32768, rope_theta=1_000_000.0, sliding_window=None)
_LLAMA3_8B = _sizes(inner=14336, kv_heads=8, rows=128320, positions=8192, rope_theta=500_000.0)
_YI_34B = _sizes(7168, 20480, layers=60, heads=56, kv_heads=8, rows=64064, rope_theta=5_000_000.0)
_QWEN: dict[str, Any] = {"layers": 80, "heads": 64, "rows": 152064, "positions": 32768, "rope_theta": 1_000_000.0}
_QWEN_72B = _sizes(8192, 24576, kv_heads=64, **_QWEN)
_QWEN_110B = _sizes(8192, 49152, kv_heads=8, **_QWEN)


def _qwen(hidden: int, inner: int, *, theta: float, section: list[int], positions: int, **more: Any) -> dict[str, Any]:
    """Sizes of a Qwen-VL's decoder, whose rotary embedding has three parts."""
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": section}
    sizes = _sizes(hidden, inner, positions=positions, rope_parameters=rope, **more)
    return sizes | {"rms_norm_eps": 1e-6}


def _qwen2_5_vl(name: str, text: dict[str, Any], inner: int = 3420, tied: bool = False) -> Alias:
    vision = {"hidden_size": 1280, "intermediate_size": inner, "out_hidden_size": text["hidden_size"]}
    return Alias(
        f"Qwen/Qwen2.5-VL-{name}-Instruct",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        text,
        vision={**QWEN2_5_VL_VISION, **vision},
        whole={"tie_word_embeddings": tied},
    )


def _qwen3_vl(name: str, text: dict[str, Any], tied: bool, small: bool) -> Alias:
    vision: dict[str, Any] = {"out_hidden_size": text["hidden_size"]}
    if small:
        deepstack = {"deepstack_visual_indexes": [5, 11, 17]}
        vision |= {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, **deepstack}
    return Alias(
        f"Qwen/Qwen3-VL-{name}-Instruct",
        "qwen3_vl",
        "qwen3_vl_text",
        text,
        vision={**QWEN3_VL_VISION, **vision},
        whole={"tie_word_embeddings": tied},
    )


def _onevision(name: str, text: dict[str, Any]) -> Alias:
    return Alias(
        f"llava-hf/llava-onevision-qwen2-{name}-ov-hf",
        "llava_onevision",
        "qwen2",
        text | {"rms_norm_eps": 1e-6},
        151646,
        vision=LLAVA_ONEVISION.defaults["vision_config"],
        whole={"video_token_index": 151647},
    )


_25: dict[str, Any] = {"theta": 1e6, "section": [16, 24, 24], "positions": 128000}
_3: dict[str, Any] = {"theta": 5e6, "section": [24, 20, 20], "positions": 262144, "rows": 151936, "head_dim": 128}
_OV: dict[str, Any] = {"positions": 32768, "rope_theta": 1_000_000.0}
_QWEN2_5_3B = _qwen(2048, 11008, layers=36, heads=16, kv_heads=2, rows=151936, **_25)
_QWEN2_5_7B = _qwen(3584, 18944, layers=28, heads=28, kv_heads=4, rows=152064, **_25)
_QWEN2_5_32B = _qwen(5120, 27648, layers=64, heads=40, kv_heads=8, rows=152064, **_25)
_QWEN2_5_72B = _qwen(8192, 29568, layers=80, heads=64, kv_heads=8, rows=152064, **_25)
_QWEN3_2B = _qwen(2048, 6144, layers=28, heads=16, kv_heads=8, **_3)
_QWEN3_4B = _qwen(2560, 9728, layers=36, heads=32, kv_heads=8, **_3)
_QWEN3_8B = _qwen(4096, 12288, layers=36, heads=32, kv_heads=8, **_3)
_QWEN3_32B = _qwen(5120, 25600, layers=64, heads=64, kv_heads=8, **_3)
_OV_HALF_B = _sizes(896, 4864, layers=24, heads=14, kv_heads=2, rows=152000, tie_word_embeddings=True, **_OV)
_OV_7B = _sizes(3584, 18944, layers=28, heads=28, kv_heads=4, rows=152128, **_OV)
_OV_72B = _sizes(8192, 29568, layers=80, heads=64, kv_heads=8, rows=152128, **_OV)

ALIASES = {
    "tiny-llava-next": Alias(None, "llava_next", bundled="tiny-llava-next"),
    "tiny-qwen3-vl": Alias(None, "qwen3_vl", "qwen3_vl_text", _sizes(layers=12), bundled="tiny-qwen3-vl"),
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf", "llava"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf", "llava", text=_VICUNA_13B),
    "llava-next-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", "llava_next"),
    "llava-next-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", "llava_next", text=_VICUNA_13B),
    "llava-next-mistral-7b": Alias("llava-hf/llava-v1.6-mistral-7b-hf", "llava_next", "mistral", _MISTRAL_7B),
    "llava-next-llama3-8b": Alias("llava-hf/llama3-llava-next-8b-hf", "llava_next", "llama", _LLAMA3_8B, 128256),
    "llava-next-34b": Alias("llava-hf/llava-v1.6-34b-hf", "llava_next", "llama", _YI_34B, 64000),
    "llava-next-72b": Alias("llava-hf/llava-next-72b-hf", "llava_next", "qwen2", _QWEN_72B, 151646),
    "llava-next-110b": Alias("llava-hf/llava-next-110b-hf", "llava_next", "qwen2", _QWEN_110B, 151646),
    "llava-next-video-7b": Alias("llava-hf/LLaVA-NeXT-Video-7B-hf", "llava_next_video", image_token=32001),
    "llava-onevision-0.5b": _onevision("0.5b", _OV_HALF_B),
    "llava-onevision-7b": _onevision("7b", _OV_7B),
    "llava-onevision-72b": _onevision("72b", _OV_72B),
    "qwen2.5-vl-3b": _qwen2_5_vl("3B", _QWEN2_5_3B, tied=True),
    "qwen2.5-vl-7b": _qwen2_5_vl("7B", _QWEN2_5_7B),
    "qwen2.5-vl-32b": _qwen2_5_vl("32B", _QWEN2_5_32B, inner=3456),
    "qwen2.5-vl-72b": _qwen2_5_vl("72B", _QWEN2_5_72B, inner=3456),
    "qwen3-vl-2b": _qwen3_vl("2B", _QWEN3_2B, tied=True, small=True),
    "qwen3-vl-4b": _qwen3_vl("4B", _QWEN3_4B, tied=True, small=True),
    "qwen3-vl-8b": _qwen3_vl("8B", _QWEN3_8B, tied=False, small=False),
    "qwen3-vl-32b": _qwen3_vl("32B", _QWEN3_32B, tied=False, small=False),
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
    from transformers import AutoConfig

    if name not in ALIASES:
        raise PmodError(f"no built-in configuration is called {name!r}; there is: {', '.join(ALIASES)}")
    alias = ALIASES[name]
    if alias.repo is None:
        return AutoConfig.from_pretrained(bundled_path(name))
    family = FAMILIES[alias.kind]
    text = {**alias.text, "model_type": alias.decoder}
    given = {
        **family.defaults,
        "text_config": text,
        "vision_config": {**family.defaults["vision_config"], **alias.vision},
    }
    if family.tiled:
        given |= {"image_token_index": alias.image_token}
    if family.name in ("llava", "llava_next", "llava_next_video"):
        given |= {"image_seq_length": 576}
    return getattr(transformers, f"{family.classes}Config")(**{**given, **alias.whole})
