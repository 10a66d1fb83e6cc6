"""The table of vision towers. Their defaults are those of transformers' configuration classes: a test holds them."""

from pmod_cli.families.record import TowerKind

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
"""The tower of LLaVA-1.5 and LLaVA-NeXT, openai/clip-vit-large-patch14-336."""

CLIP = TowerKind(
    "clip_vision_model",
    {"patch_size": 32},
    class_token=True,
    norms=("pre_layrnorm", "post_layernorm"),
    patch_bias=False,
)
SIGLIP = TowerKind(
    "siglip_vision_model",
    {"patch_size": 16},
    class_token=False,
    norms=("post_layernorm",),
    patch_bias=True,
)
BUNDLED = (CLIP, SIGLIP)
