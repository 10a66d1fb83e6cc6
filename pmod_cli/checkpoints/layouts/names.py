"""Tensor names of the three layouts. Hugging Face names are written as transformers writes them to disk."""

from __future__ import annotations

import re

# The original code's names (LLaVA, and p-MoD upon it) on the left; the first match counts, from the top.
_ORIGINAL = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# Names that transformers also reads: of the modules themselves, and of files from version 4.52 on.
_VARIANTS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
)
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")
# Buffers of old versions, which are computed today.
OBSOLETE = re.compile(r".*(\.rotary_emb\.inv_freq|\.embeddings\.position_ids)")


def canonical(name: str) -> str:
    """A name in the Hugging Face layout, in the one spelling that configs are compared with."""
    for old, new in _VARIANTS:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def from_original(name: str) -> str:
    """Name in the Hugging Face layout of a tensor of the original or the published layout."""
    for old, new in _ORIGINAL:
        if name.startswith(old):
            renamed = new + name.removeprefix(old)
            return renamed.replace(".decoder_layer.", ".").replace(".router.router.", ".router.")
    return name


def to_original(name: str, routed_layers: list[int]) -> str:
    """Name in the published layout of a tensor of the Hugging Face layout; layers with a router wrap the stock one."""
    name = canonical(name)
    if name.startswith("vision_tower."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    for old, new in _ORIGINAL:
        if name.startswith(new):
            name = old + name.removeprefix(new)
            break
    match = _LAYER.fullmatch(name)
    if match and int(match[1].split(".")[2]) in routed_layers:
        inner = match[2]
        return match[1] + (f"router.{inner}" if inner.startswith("router.") else f"decoder_layer.{inner}")
    return name
