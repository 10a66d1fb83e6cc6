"""LLaVA-OneVision (and LLaVA-Video): anyres as LLaVA-NeXT's with up to 36 tiles, pooled beyond nine unless told.

That is of one image of a row; of several images, and of the frames of a video, there is one tile each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families import llava_next
from pmod_cli.families.llava_next_video import video_inputs
from pmod_cli.families.record import Family, ImageTokens, PixelInputs
from pmod_cli.families.towers import SIGLIP

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

    from pmod_cli.families.geometry import TokenLayout

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
"""(height, width) in pixels."""
DEFAULTS = {
    "text_config": {"model_type": "qwen2"},
    "vision_config": {
        "model_type": SIGLIP.name,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 384,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "vision_use_head": False,
    },
    "image_token_index": 151646,
    "video_token_index": 151647,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_9",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "image_grid_pinpoints": PINPOINTS,
}


def pooling(aspect_ratio: object, rows: int, columns: int, side: int) -> float:
    """By how much a grid of patches is too long on each side; up to 1.1 it is not pooled.

    Args:
        aspect_ratio: `vision_aspect_ratio`, such as `anyres_max_9`: as many patches as nine tiles have are left.
        rows: Of the grid.
        columns: Of the grid.
        side: Patches along the side of a tile.

    Raises:
        PmodError: It names no number of tiles; the stock code takes no image alone in its row then.
    """
    # The stock code strips the letters of `anyres_max_` from both ends, and reads what is left.
    found = re.fullmatch(r"[anyresmx_]*(\d{1,6})[anyresmx_]*", aspect_ratio) if isinstance(aspect_ratio, str) else None
    if found is None or not (tiles := int(found[1])):
        raise PmodError(
            f"vision_aspect_ratio is {aspect_ratio!r:.60}: expected anyres_max_N, N a whole number of tiles",
            hint=f"the published models have {DEFAULTS['vision_aspect_ratio']}",
        )
    return sqrt(rows * columns / (tiles * side**2))


def image_tokens(sizes: Any, image_size: tuple[int, int] | None = None, images: int = 1) -> ImageTokens:
    """Of one image as LLaVA-NeXT, its tiles pooled where they are many; of several one tile and a newline each."""
    tower = sizes.tower
    side, patches = tower.tile // tower.patch, tower.tokens - tower.dropped
    width, height = image_size or (2 * tower.tile,) * 2
    if images > 1:
        return ImageTokens(width, height, 1, patches, 1, patches)
    whole = llava_next.image_tokens(sizes, (width, height))
    high, wide = llava_next.best_resolution(width, height, sizes.pinpoints)
    rows, columns = llava_next.unpadded(width, height, high // tower.tile * side, wide // tower.tile * side)
    ratio = pooling(sizes.aspect_ratio, rows, columns, side)
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return ImageTokens(width, height, whole.tiles, patches, rows * (columns + 1), patches)


def pixel_inputs(config: Any, images: Sequence[tuple[int, int]], rows: Sequence[int] = ()) -> PixelInputs:
    """As LLaVA-NeXT's, and how many each row has: of several in a row only the base image is read."""
    shape, others = llava_next.pixel_inputs(config, images)
    return shape, {**others, "batch_num_images": list(rows) or [1] * len(images)}


def video_tokens(sizes: Any, size: tuple[int, int, int]) -> ImageTokens:
    """A quarter of the patches of each frame, rounded up a side, and one newline at the end."""
    tower, frames = sizes.tower, size[0]
    pooled = ceil(tower.tile // tower.patch / 2) ** 2
    patches = tower.tokens - tower.dropped
    return ImageTokens(tower.tile, tower.tile, frames, frames * pooled + 1, 0, patches, frames=frames, video=True)


def place_tokens(processor: ProcessorMixin, patch_size: int, height: int, width: int) -> TokenLayout:
    """As LLaVA-NeXT's, with larger cells where tiles are pooled."""
    import numpy as np

    from pmod_cli.families import geometry

    layout = llava_next.place_tokens(processor, patch_size, height, width)
    base, tiles = layout.parts
    rows, columns, side = len(tiles.row_spans), len(tiles.column_spans), len(base.row_spans)
    ratio = pooling(processor.vision_aspect_ratio, rows, columns, side)
    if ratio <= 1.1:
        return layout

    def pooled(spans: np.ndarray) -> np.ndarray:
        count = int(len(spans) // ratio)
        edges = np.linspace(spans[0, 0], spans[-1, 1], count + 1)
        return np.stack([edges[:-1], edges[1:]], axis=1)

    tiles = geometry.numbered(
        "tiles", pooled(tiles.row_spans), pooled(tiles.column_spans), first=base.size, newline=True
    )
    return geometry.TokenLayout(width, height, (base, tiles), layout.tile_grid)


def image_processor(config: Mapping[str, Any], options: dict[str, Any], pad_to_square: bool) -> BaseImageProcessor:
    """The stock one; nothing is padded to a square."""
    from transformers import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(image_grid_pinpoints=config["image_grid_pinpoints"], **options)


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    title="LLaVA-OneVision",
    classes="LlavaOnevision",
    defaults=DEFAULTS,
    image_tokens=image_tokens,
    pixel_inputs=pixel_inputs,
    video_tokens=video_tokens,
    video_inputs=video_inputs,
    place_tokens=place_tokens,
    image_processor=image_processor,
    vision_tokens=("image_token_id", "video_token_id"),
    small_config={
        "image_grid_pinpoints": [[8, 16]],
        "video_token_index": 10,
        "vision_config": {"model_type": SIGLIP.name, "vision_use_head": False},
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    small_pixels=(1, 3, 3, 8, 8),
    small_inputs={"image_sizes": [[8, 16]]},
    more_shapes=llava_next.LLAVA_NEXT.more_shapes,
    high_resolution=True,
)
