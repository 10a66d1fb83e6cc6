"""What may stand in a stock config beside its sizes, held to before anything is written: loading comes much later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from pmod_cli.core.errors import PmodError
from pmod_cli.families import TOWERS, family_of
from pmod_cli.families.llava_next import is_pinpoint

_ROPES = {  # and what each of them cannot do without
    "default": (),
    "mrope": ("mrope_section",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "tanh")


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _token(value: object) -> bool:
    return value is None or (_whole(value) and -1 <= value < 2**31)


def _pinpoints(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(is_pinpoint(pair) and max(pair) <= 10**6 for pair in value)


_POSITIVE = (lambda value: _number(value) and 0 < value < 1e12, "a number above 0")
_POSITIVES = (lambda value: isinstance(value, list) and all(map(_POSITIVE[0], value)), "numbers above 0")
_SMALL = (lambda value: isinstance(value, float) and 0 < value < 1e12, "a number above 0 such as 1e-5")
_SHARE = (lambda value: _number(value) and 0 <= value <= 1, "a number in 0 ... 1")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_ACTIVATION = (lambda value: isinstance(value, str) and value in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}")
_TOKEN = (_token, "a token id")
_TOKENS = (
    lambda value: _token(value) or (isinstance(value, list) and all(map(_token, value))),
    "a token id or several",
)
_OBJECT = (lambda value: isinstance(value, dict), "an object")
_COUNT = (lambda value: _whole(value) and 0 < value < 2**31, "a whole number above 0")

_NULLABLE = (
    "dtype",
    "head_dim",
    "image_token_id",
    "max_window_layers",
    "rope_parameters",
    "rope_scaling",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

Check = tuple[Callable[[object], bool], str]
TEXT: dict[str, Check] = {
    "rms_norm_eps": _SMALL,
    "rope_theta": _POSITIVE,
    "initializer_range": _SMALL,
    "attention_dropout": _SHARE,
    "hidden_act": _ACTIVATION,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "use_cache": _FLAG,
    "use_sliding_window": _FLAG,
    "tie_word_embeddings": _FLAG,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "max_position_embeddings": _COUNT,
    "max_window_layers": (lambda value: _whole(value) and value >= 0, "a whole number"),
    "pretraining_tp": _COUNT,
    "head_dim": _COUNT,
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": _TOKENS,
}
VISION: dict[str, Check] = {
    "layer_norm_eps": _SMALL,
    "initializer_range": _SMALL,
    "initializer_factor": _SMALL,
    "attention_dropout": _SHARE,
    "hidden_act": _ACTIVATION,
    "num_attention_heads": _COUNT,
    "projection_dim": (lambda value: _whole(value) and value >= 0, "a whole number"),
    "vision_use_head": _FLAG,
}
TOP: dict[str, Check] = {
    "image_grid_pinpoints": (_pinpoints, "pairs of height and width in pixels"),
    "image_seq_length": _COUNT,
    "image_token_index": _TOKEN,
    "image_token_id": _TOKEN,
    "multimodal_projector_bias": _FLAG,
    "projector_hidden_act": _ACTIVATION,
    "tie_word_embeddings": _FLAG,
    "use_image_newline_parameter": _FLAG,
    "vision_feature_layer": (
        lambda value: _whole(value) or (isinstance(value, list) and len(value) > 0 and all(map(_whole, value))),
        "the number of a layer, or several",
    ),
    "vision_feature_select_strategy": (lambda value: value in ("default", "full"), "default or full"),
    "dtype": (lambda value: value in ("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
    "torch_dtype": (lambda value: value in ("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
}
_ROPE: dict[str, Check] = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), _POSITIVE),
    **dict.fromkeys(("original_max_position_embeddings", "beta_fast", "beta_slow"), _POSITIVE),
    **dict.fromkeys(("short_factor", "long_factor"), _POSITIVES),
}


def check_values(config: Mapping[str, Any], where: object) -> None:
    """Hold every known value of a stock config to its kind.

    Args:
        config: Stock config in the Hugging Face layout, with its two parts.
        where: Its file, for messages.

    Raises:
        PmodError: a value that cannot be, or two that do not go together.
    """
    text, vision = config["text_config"], config["vision_config"]
    family = family_of(config.get("model_type"))
    tiled = family is None or family.tiled
    if tiled and (tower := vision.get("model_type")) not in TOWERS and "model_type" in vision:
        raise PmodError(
            f"{where}: vision_config.model_type is {str(tower)[:60]!r}, expected one of {', '.join(TOWERS)}"
        )
    for values, checks, part in ((config, TOP, ""), (text, TEXT, "text_config."), (vision, VISION, "vision_config.")):
        for key, (fits, expected) in checks.items():
            value = values.get(key)
            silent = key not in values or (value is None and key in _NULLABLE)
            if not silent and not fits(value):
                raise PmodError(f"{where}: {part}{key} is {str(value)[:60]!r}, expected {expected}")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(_ROPES):
        raise PmodError(f"{where}: the rotary embedding is {str(kind)[:60]!r}, expected one of {', '.join(_ROPES)}")
    if absent := [key for key in _ROPES[kind] if rope.get(key) is None]:
        raise PmodError(f"{where}: the rotary embedding {kind} lacks {', '.join(absent)}")
    for key, (fits, expected) in _ROPE.items():
        if rope.get(key) is not None and not fits(rope[key]):
            raise PmodError(f"{where}: {key} of the rotary embedding is {str(rope[key])[:60]!r}, expected {expected}")
