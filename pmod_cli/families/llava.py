"""LLaVA-1.5: one square tile an image."""

from pmod_cli.families.record import Family
from pmod_cli.families.towers import CLIP, CLIP_L_336

DEFAULTS = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": CLIP.name, **CLIP_L_336},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}

LLAVA = Family(
    name="llava",
    title="LLaVA-1.5",
    classes="Llava",
    defaults=DEFAULTS,
    small_pixels=(1, 3, 8, 8),
)
