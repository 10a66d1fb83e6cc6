"""LLaVA-NeXT: the whole image in one tile, and beside it as many tiles as fit its shape (anyres).

How an image is cut is the arithmetic of the stock code, to which the tests hold it size by size; as plain arithmetic it
needs no torch, and serves whole data sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from pmod_cli.families import llava
from pmod_cli.families.record import Family, ImageTokens, PixelInputs

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

    from pmod_cli.families.geometry import TokenLayout

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""(height, width) in pixels that an image may be fitted to. The original code's list has the same numbers in the same
order, and reads them as (width, height)."""


def image_tokens(sizes: Any, image_size: tuple[int, int] | None = None, images: int = 1) -> ImageTokens:
    """Those of the base image, and those of the tiles without what was padded, with an `image_newline` a row."""
    tower = sizes.tower
    patches, side = tower.tokens - tower.dropped, tower.tile // tower.patch
    width, height = image_size or (2 * tower.tile,) * 2
    fitted_height, fitted_width = best_resolution(width, height, sizes.pinpoints)
    across, down = fitted_width // tower.tile, fitted_height // tower.tile
    rows, columns = unpadded(width, height, down * side, across * side)
    tiles = _tiles(fitted_height, fitted_width, tower.tile)
    return ImageTokens(width, height, tiles, patches, rows * (columns + 1), patches)


def pixel_inputs(config: Any, images: Sequence[tuple[int, int]], rows: Sequence[int] = ()) -> PixelInputs:
    """The base image and the tiles, `(images, most tiles, 3, tile, tile)`, and the sizes of the images."""
    tile = config.vision_config.image_size
    fitted = [best_resolution(width, height, config.image_grid_pinpoints) for height, width in images]
    most = max(_tiles(*size, tile) for size in fitted)
    return (len(images), most, 3, tile, tile), {"image_sizes": [list(size) for size in images]}


def place_tokens(processor: ProcessorMixin, patch_size: int, height: int, width: int) -> TokenLayout:
    """Base image squashed to one square, then the tiles of the resized and padded image, unpadded and row-ended."""
    import numpy as np
    import torch
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    from pmod_cli.families import geometry

    image_processor = processor.image_processor
    # Base: the whole image, its aspect ratio given up, in one square.
    square_h, square_w = geometry.square(image_processor)
    rows, columns = geometry.patch_spans(image_processor, patch_size, square_h, square_w)
    base = geometry.numbered("base", rows * (height / square_h), columns * (width / square_w), first=0)

    # Tiles: aspect ratio kept, centred on a canvas of whole tiles.
    canvas_h, canvas_w = select_best_resolution((height, width), image_processor.image_grid_pinpoints)
    resized_h, resized_w = geometry.fit((height, width), (canvas_h, canvas_w))
    top, left = (canvas_h - resized_h) // 2, (canvas_w - resized_w) // 2
    tile = image_processor.crop_size.height if image_processor.crop_size else square_h
    tile_grid = canvas_h // tile, canvas_w // tile
    rows, columns = geometry.patch_spans(image_processor, patch_size, tile, tile)
    rows = np.concatenate([rows + index * tile for index in range(tile_grid[0])])  # (R, 2) on the canvas
    columns = np.concatenate([columns + index * tile for index in range(tile_grid[1])])  # (C, 2)
    rows = (rows - top) * (height / resized_h)
    columns = (columns - left) * (width / resized_w)

    # The model's own function says how many rows or columns of patches it drops as padding, the same at both ends.
    cells = torch.empty(1, len(rows), len(columns), dtype=torch.bool)
    kept_r, kept_c = unpad_image(cells, (height, width)).shape[1:]
    rows = rows[(len(rows) - kept_r) // 2 :][:kept_r]
    columns = columns[(len(columns) - kept_c) // 2 :][:kept_c]
    tiles = geometry.numbered("tiles", rows, columns, first=base.size, newline=True)
    return geometry.TokenLayout(width, height, (base, tiles), tile_grid)


def image_processor(config: Mapping[str, Any], options: dict[str, Any], pad_to_square: bool) -> BaseImageProcessor:
    """The stock one; nothing is padded to a square."""
    from transformers import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(image_grid_pinpoints=config["image_grid_pinpoints"], **options)


def _tiles(height: int, width: int, tile: int) -> int:
    """Passes through the tower for an image that is fitted to so many pixels, the base image included."""
    return 1 + -(-width // tile) * -(-height // tile)


def is_pinpoint(pair: object) -> TypeGuard[Sequence[int]]:
    """Whether an entry of ``image_grid_pinpoints`` is what it has to be: height and width, whole pixels."""
    return (
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(length) is int and length > 0 for length in pair)
    )


def best_resolution(width: int, height: int, pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (height, width) that shows most pixels of the image and, among those, wastes least."""
    best, most, least_waste = (pinpoints[0][0], pinpoints[0][1]), 0, float("inf")
    for high, wide in pinpoints:
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        waste = wide * high - shown
        if shown > most or (shown == most and waste < least_waste):
            best, most, least_waste = (high, wide), shown, waste
    return best


def unpadded(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """The (rows, columns) of patches that are left when what was padded to the tiles' shape is cut off again."""
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - kept) // 2)


LLAVA_NEXT = Family(
    name="llava_next",
    title="LLaVA-NeXT",
    classes="LlavaNext",
    defaults={**llava.DEFAULTS, "image_grid_pinpoints": PINPOINTS},
    image_tokens=image_tokens,
    pixel_inputs=pixel_inputs,
    place_tokens=place_tokens,
    image_processor=image_processor,
    small_config={"image_grid_pinpoints": [[8, 16]]},
    small_pixels=(1, 3, 3, 8, 8),  # the whole image and two tiles
    small_inputs={"image_sizes": [[8, 16]]},
    more_shapes=lambda hidden, projector_in: {"image_newline": (hidden,)},
    high_resolution=True,
)
