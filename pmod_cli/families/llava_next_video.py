"""LLaVA-NeXT-Video: LLaVA-NeXT for images; of a video one tile a frame, pooled to a quarter of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pmod_cli.families import llava_next
from pmod_cli.families.record import Family, ImageTokens, PixelInputs

DEFAULTS = {
    **llava_next.LLAVA_NEXT.defaults,
    "image_token_index": 32001,
    "video_token_index": 32000,
    "spatial_pool_mode": "average",
    "spatial_pool_stride": 2,
}


def video_tokens(sizes: Any, size: tuple[int, int, int]) -> ImageTokens:
    """A quarter of the patches of each frame; frames are resized and cropped to one tile."""
    tower, frames = sizes.tower, size[0]
    pooled = (tower.tile // tower.patch // 2) ** 2
    return ImageTokens(tower.tile, tower.tile, frames, frames * pooled, 0, pooled, frames=frames, video=True)


def video_inputs(config: Any, videos: Sequence[tuple[int, int, int]]) -> PixelInputs:
    """One tile a frame, `(videos, frames, 3, tile, tile)`; all videos have as many frames."""
    tile, frames = config.vision_config.image_size, videos[0][0]
    return (len(videos), frames, 3, tile, tile), {}


LLAVA_NEXT_VIDEO = Family(
    name="llava_next_video",
    title="LLaVA-NeXT-Video",
    classes="LlavaNextVideo",
    defaults=DEFAULTS,
    image_tokens=llava_next.image_tokens,
    pixel_inputs=llava_next.pixel_inputs,
    video_tokens=video_tokens,
    video_inputs=video_inputs,
    place_tokens=llava_next.place_tokens,
    image_processor=llava_next.image_processor,
    vision_tokens=("image_token_id", "video_token_id"),
    small_config={**llava_next.LLAVA_NEXT.small_config, "video_token_index": 10},
    small_pixels=llava_next.LLAVA_NEXT.small_pixels,
    small_inputs=llava_next.LLAVA_NEXT.small_inputs,
    more_shapes=llava_next.LLAVA_NEXT.more_shapes,
    high_resolution=True,
)
