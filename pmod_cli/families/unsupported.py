"""Model families that people ask for and that are not routed, each with the reason."""

from __future__ import annotations

_BOTH_WAYS = "tokens of an image see each other in both directions, and routing relies on causality"
_RECURRENT = "most of its layers are recurrent, and a recurrent layer cannot skip a token"
_POST_NORM = "norms stand behind attention and MLP, and routing adds up a pre-norm layer"
_EXPERTS = "its MLPs are mixtures of experts, which nobody has tried with routing"

REASONS = {
    "gemma3": f"{_BOTH_WAYS}; sliding windows count tokens that it drops",
    "gemma3n": f"{_BOTH_WAYS}; sliding windows count tokens that it drops",
    "gemma4": f"{_BOTH_WAYS}; sliding windows count tokens that it drops",
    "glm46v": _POST_NORM,
    "glm4v": _POST_NORM,
    "glm4v_moe": f"{_POST_NORM}; {_EXPERTS}",
    "idefics3": "its decoder has another place in the model (`text_model`), and its tower is not written down here",
    "internvl": "its tower and its pixel shuffle are not written down here",
    "mistral3": "its tower (Pixtral) is not written down here",
    "mllama": "its images go into cross-attention, so the decoder has no vision tokens to skip",
    "molmo2": f"{_BOTH_WAYS}; {_POST_NORM}",
    "paligemma": _BOTH_WAYS,
    "perception_lm": "its tower is not written down here",
    "qwen2_vl": "its tower is not written down here; Qwen2.5-VL is supported",
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": f"{_RECURRENT}; {_EXPERTS}",
    "qwen3_vl_moe": _EXPERTS,
    "smolvlm": "its decoder has another place in the model (`text_model`), and its tower is not written down here",
}


def why_not(model_type: object) -> str | None:
    """Why a family is not supported, as a sentence; None where nothing is known of it.

    Args:
        model_type: Of a whole configuration.
    """
    reason = REASONS.get(model_type) if isinstance(model_type, str) else None
    return None if reason is None else f"{model_type} models are not supported: {reason}"
