"""Qwen3-VL: as Qwen2.5-VL, with whole frames in the tower, DeepStack and timestamps.

The tower attends to whole frames, and features of its middle blocks are added to the residual stream behind the first
decoder layers (DeepStack). Timestamps stand between the frames of a video.

DeepStack adds to all N tokens in the text model, where skipped tokens have stayed in their places.
"""

from __future__ import annotations

from typing import Any

from pmod_cli.families import grid, qwen2_5_vl
from pmod_cli.families.decoders import QKVO
from pmod_cli.families.record import DecoderKind, Family

DECODER = DecoderKind(
    "qwen3_vl_text",
    "Qwen3VLText",
    {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 128000,
    },
    biases={"attention_bias": QKVO},
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    family="qwen3_vl",
)
VISION = {
    "model_type": "qwen3_vl_vision",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
TEMPORAL = 2  # frames that become one


def tower(config: Any) -> grid.GridTower:
    """Its sizes: a plain MLP, no windows, a table of positions, and a merger for each DeepStack feature."""
    get = grid.reader(config, VISION)
    deepstack = get("deepstack_visual_indexes", sequence=True)
    blocks = range(get("depth"))  # the list may name more of them than there are
    return grid.tower(
        get,
        gated=False,
        window=None,
        whole=len(blocks),
        deepstack=len(deepstack),
        mergers=1 + len({*deepstack} & {*blocks}),
        positions=get("num_position_embeddings"),
        pixels=(256 * 256, 4096 * 4096),
        clip=(4096, 25_165_824),
        per_frame=False,
    )


def tower_shapes(tower: grid.GridTower) -> dict[str, tuple[int, ...]]:
    """All norms and maps have a bias."""
    hidden, inner, cell = tower.hidden, tower.inner, tower.cell_width
    maps = {"attn.qkv": (3 * hidden, hidden), "attn.proj": (hidden, hidden), "norm1": (hidden,), "norm2": (hidden,)}
    block = maps | {"mlp.linear_fc1": (inner, hidden), "mlp.linear_fc2": (hidden, inner)}
    merger = {"linear_fc1": (cell, cell), "linear_fc2": (tower.out, cell)}
    named = {
        "patch_embed.proj": (hidden, tower.channels, tower.temporal, tower.patch, tower.patch),
        **{f"blocks.{layer}.{name}": shape for layer in range(tower.layers) for name, shape in block.items()},
        **{f"merger.{name}": shape for name, shape in {"norm": (hidden,), **merger}.items()},
    }
    for number in range(tower.deepstack):
        named |= {
            f"deepstack_merger_list.{number}.{name}": shape for name, shape in {"norm": (cell,), **merger}.items()
        }
    return {"pos_embed.weight": (tower.positions, hidden), **grid.with_biases(named)}


def frame_text(frames: int, per_second: float) -> int:
    """A timestamp such as `<12.5 seconds>`, one token a digit, and the marks around the frame's tokens."""
    pairs = ((first, min(first + TEMPORAL, frames) - 1) for first in range(0, frames, TEMPORAL))
    times = ((first / per_second + last / per_second) / 2 for first, last in pairs)
    return sum(len(f"{seconds:.1f}") + 5 for seconds in times)


QWEN3_VL = Family(
    name="qwen3_vl",
    title="Qwen3-VL",
    classes="Qwen3VL",
    defaults={**qwen2_5_vl.DEFAULTS, "text_config": {"model_type": DECODER.name}, "vision_config": VISION},
    image_tokens=grid.image_tokens,
    pixel_inputs=grid.pixel_inputs,
    video_tokens=grid.video_tokens,
    video_inputs=grid.video_inputs,
    frames_apart=True,
    frame_text=frame_text,
    place_tokens=qwen2_5_vl.place_tokens,
    image_processor=qwen2_5_vl.image_processor,
    projector=("visual.merger", "visual.deepstack_merger_list"),
    tower=tower,
    tower_shapes=tower_shapes,
    asked_as="You are a helpful assistant.",
    asked_pixels=(4 * 32 * 32, 16384 * 32 * 32),
    vision_tokens=("image_token_id", "video_token_id"),
    small_config={
        **qwen2_5_vl.QWEN2_5_VL.small_config,
        "text_config": {
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 2,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": 16,
        },
    },
    small_pixels=(32, 24),
    small_inputs={"image_grid_thw": [[1, 4, 8]]},
)
