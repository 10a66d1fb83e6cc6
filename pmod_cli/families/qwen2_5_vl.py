"""Qwen2.5-VL: images and videos at their own resolution, read in windows; a vision token is a cell of 2 x 2 patches.

Its positions have three parts (M-RoPE: time, row, column). They reach a layer as rotary tables of all tokens, so
routing gathers them as any others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families import grid
from pmod_cli.families.record import DecoderKind, Family

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

    from pmod_cli.families.geometry import TokenLayout

DECODER = DecoderKind(
    "qwen2_5_vl_text",
    "Qwen2_5_VLText",
    {
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
    biases={"": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    sliding_window=4096,
    window_key="use_sliding_window",
    layer="Qwen2_5_VLDecoderLayer",
    family="qwen2_5_vl",
)
VISION = {
    "model_type": "qwen2_5_vl_vision",
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
DEFAULTS = {
    "text_config": {"model_type": DECODER.name},
    "vision_config": VISION,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "tie_word_embeddings": False,
}


def tower(config: Any) -> grid.GridTower:
    """Its sizes: a gated MLP, windows in most blocks, no table of positions.

    Raises:
        PmodError: A window has no room for a cell, or as `grid.reader`.
    """
    get = grid.reader(config, VISION)
    blocks = range(get("depth"))  # the list may name more of them than there are
    window, cell = get("window_size"), get("patch_size") * get("spatial_merge_size")
    if window < cell:
        raise PmodError(
            f"vision_config.window_size is {window}: expected {cell} or more, a cell of pixels",
            hint="name a Qwen2.5-VL's config.json",
        )
    return grid.tower(
        get,
        gated=True,
        window=window,
        whole=len({*get("fullatt_block_indexes", sequence=True)} & {*blocks}),
        deepstack=0,
        mergers=1,
        positions=0,
        pixels=(56 * 56, 12_845_056),
        clip=(128 * 28 * 28, 28 * 28 * 768),
        per_frame=True,
    )


def tower_shapes(tower: grid.GridTower) -> dict[str, tuple[int, ...]]:
    """Norms have a weight alone, all maps but the first a bias."""
    hidden, inner, cell = tower.hidden, tower.inner, tower.cell_width
    maps = {"attn.qkv": (3 * hidden, hidden), "attn.proj": (hidden, hidden)}
    maps |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    block = grid.with_biases(maps) | {"norm1.weight": (hidden,), "norm2.weight": (hidden,)}
    return {
        "patch_embed.proj.weight": (hidden, tower.channels, tower.temporal, tower.patch, tower.patch),
        **{f"blocks.{layer}.{name}": shape for layer in range(tower.layers) for name, shape in block.items()},
        "merger.ln_q.weight": (hidden,),
        **grid.with_biases({"merger.mlp.0": (cell, cell), "merger.mlp.2": (tower.out, cell)}),
    }


def place_tokens(processor: ProcessorMixin, patch_size: int, height: int, width: int) -> TokenLayout:
    """One grid of cells over the whole image."""
    size = dict(processor.image_processor.size)
    limits = size["shortest_edge"], size["longest_edge"]
    return grid.cells(height, width, patch_size * processor.image_processor.merge_size, *limits)


def image_processor(config: Mapping[str, Any], options: dict[str, Any], pad_to_square: bool) -> BaseImageProcessor:
    """The stock one."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**options)


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    classes="Qwen2_5_VL",
    defaults=DEFAULTS,
    image_tokens=grid.image_tokens,
    pixel_inputs=grid.pixel_inputs,
    video_tokens=grid.video_tokens,
    video_inputs=grid.video_inputs,
    place_tokens=place_tokens,
    image_processor=image_processor,
    projector=("visual.merger",),
    tower=tower,
    tower_shapes=tower_shapes,
    asked_pixels=(256 * 28 * 28, 2048 * 28 * 28),
    unfold=lambda config: grid.unfold(config, DECODER.name),
    vision_tokens=("image_token_id", "video_token_id"),
    small_config={
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 16,
        },
        "image_token_id": 9,
        "video_token_id": 10,
        "vision_start_token_id": 11,
        "vision_end_token_id": 12,
    },
    small_pixels=(32, 24),
    small_inputs={"image_grid_thw": [[1, 4, 8]]},
)
