"""From a vision token to its pixels: where each token of an image lies in the original picture.

The stock image processors resize, pad, crop and tile. Each family's `place_tokens` repeats its steps on coordinates,
with the stock functions where they exist. All of them treat rows and columns alone, so a grid of tokens needs only the
pixel span of each of its rows and columns.

Coordinates are float pixels of the original image, x to the right and y down, (0, 0) its top left corner. Spans may
reach beyond the image: a patch may look at padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import MOST_PIXELS

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class Part:
    """One grid of vision tokens laid over the image.

    Attributes:
        name: "image" (LLaVA-1.5), "base" or "tiles" (the two parts of LLaVA-NeXT's anyres).
        tokens: int64 (R, C), each cell's index among the image's V vision tokens.
        row_spans: float64 (R, 2), first and last y of each row of cells.
        column_spans: float64 (C, 2), first and last x of each column of cells.
        newlines: int64 (R,) index of the `image_newline` token that ends each row, or (0,) where the part has none.
    """

    name: str
    tokens: np.ndarray
    row_spans: np.ndarray
    column_spans: np.ndarray
    newlines: np.ndarray

    @property
    def size(self) -> int:
        """Vision tokens of this part, newlines included."""
        return self.tokens.size + self.newlines.size


@dataclass(frozen=True)
class TokenLayout:
    """The vision tokens of one image, in the model's order.

    Attributes:
        width, height: size of the original image in pixels.
        parts: one grid for LLaVA-1.5; the base image, then the tiles, for LLaVA-NeXT.
        tile_grid: rows and columns of anyres tiles, None for LLaVA-1.5.
        frames: of a film, whose frames stand side by side.
    """

    width: int
    height: int
    parts: tuple[Part, ...]
    tile_grid: tuple[int, int] | None = None
    frames: int = 1

    @property
    def size(self) -> int:
        """V, the number of vision tokens."""
        return sum(part.size for part in self.parts)

    def boxes(self, clip: bool = True) -> np.ndarray:
        """The pixel box of every vision token.

        Args:
            clip: cut the boxes at the image's border; a token that saw only padding then gets NaN.

        Returns:
            float64 (V, 4): x0, y0, x1, y1; NaN for `image_newline` tokens, which have no place in the image.
        """
        boxes = np.full((self.size, 4), np.nan)
        for part in self.parts:
            boxes[part.tokens, 0::2] = part.column_spans[None, :]
            boxes[part.tokens, 1::2] = part.row_spans[:, None]
        if clip:
            boxes = boxes.clip(0, [self.width, self.height, self.width, self.height])
            boxes[(boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])] = np.nan
        return boxes


def numbered(name: str, rows: np.ndarray, columns: np.ndarray, *, first: int, newline: bool = False) -> Part:
    """Number the cells row by row from `first`; with `newline` each row is one token longer than its cells."""
    indices: np.ndarray = first + np.arange(len(rows) * (len(columns) + newline)).reshape(
        len(rows), len(columns) + newline
    )
    tokens, newlines = np.split(indices, [len(columns)], axis=1)
    return Part(name, tokens, rows, columns, newlines.ravel())


def patch_spans(
    image_processor: BaseImageProcessor, patch_size: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Spans of the patch grid's rows (R, 2) and columns (C, 2) in a picture given to resize and centre crop."""
    shown_h, shown_w = _resized(image_processor, height, width) if image_processor.do_resize else (height, width)
    top = left = 0
    view_h, view_w = shown_h, shown_w
    if image_processor.do_center_crop:
        view_h, view_w = image_processor.crop_size.height, image_processor.crop_size.width
        top, left = (shown_h - view_h) // 2, (shown_w - view_w) // 2  # below 0 where the crop pads a small picture
    rows: np.ndarray = _spans(view_h // patch_size, patch_size) + top
    columns: np.ndarray = _spans(view_w // patch_size, patch_size) + left
    return rows * (height / shown_h), columns * (width / shown_w)


def _spans(count: int, step: int) -> np.ndarray:
    """(count, 2): [0, step], [step, 2 step], ..."""
    return np.arange(count)[:, None] * float(step) + np.array([0.0, step])


def _resized(image_processor: BaseImageProcessor, height: int, width: int) -> tuple[int, int]:
    """Height and width after the processor's resize."""
    from transformers.image_transforms import get_resize_output_image_size
    from transformers.image_utils import ChannelDimension

    size = image_processor.size
    if size.shortest_edge and not size.longest_edge:
        longest = size.shortest_edge * max(height, width) / min(height, width)
        if longest * size.shortest_edge > MOST_PIXELS:
            raise PmodError(
                f"the image processor would make {longest:,.0f} × {size.shortest_edge} pixels of this image before it "
                f"crops it, at most {MOST_PIXELS / 1e6:.0f} megapixels are made",
                hint="crop the image, or set do_pad in its preprocessor_config.json, as LLaVA-1.5 was trained",
            )
        return get_resize_output_image_size(
            _blank(height, width),
            size=size.shortest_edge,
            default_to_square=False,
            input_data_format=ChannelDimension.FIRST,
        )
    if size.height and size.width:
        return size.height, size.width
    raise PmodError(
        f"the image processor resizes by {dict(size)}, which gives no fixed patch grid",
        hint="expected `size` with shortest_edge, or with height and width, in preprocessor_config.json",
    )


def square(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width to which LLaVA-NeXT squashes the base image."""
    size = image_processor.size
    return (size.height, size.width) if size.height and size.width else (size.shortest_edge, size.shortest_edge)


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the image scaled to fit the anyres canvas."""
    from transformers.image_processing_utils import get_patch_output_size
    from transformers.image_utils import ChannelDimension

    return get_patch_output_size(_blank(*size), canvas, input_data_format=ChannelDimension.FIRST)


def _blank(height: int, width: int) -> np.ndarray:
    """A (3, height, width) array that takes no memory: the stock size functions only read its shape."""
    return np.broadcast_to(np.uint8(0), (3, height, width))
