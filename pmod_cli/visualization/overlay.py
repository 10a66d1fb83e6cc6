"""One panel: the image with the kept patches clear and the skipped ones greyed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pmod_cli.visualization.geometry import Layout, Part

KEPT = np.array([213, 94, 0], dtype=np.uint8)  # vermillion of the Okabe-Ito palette, told from grey by every eye
SKIPPED = np.array([205, 205, 205], dtype=np.uint8)
GHOST = 0.22  # how much of a skipped patch shines through
OUTLINE_PX = 2  # at most a quarter of a cell, else the outlines of small patches cover them


@dataclass(frozen=True)
class Panel:
    """A part of the image as it is drawn: the picture, clear and greyed, and each drawn pixel's token.

    Attributes:
        clear, greyed: uint8 (height, width, 3).
        cell: int64 (height, width), index into the V vision tokens; -1 where no token looks.
        newline: int64 (height,), the token that ends each drawn line's row; empty where the part has none.
        outline_px: width of the line around kept patches.
    """

    clear: np.ndarray
    greyed: np.ndarray
    cell: np.ndarray
    newline: np.ndarray
    outline_px: int

    def draw(self, kept: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 3) for one layer's kept tokens, bool (V,)."""
        shown = kept[self.cell] & (self.cell >= 0)
        drawn = np.where(shown[..., None], self.clear, self.greyed)
        drawn[_grow(shown, self.outline_px) & ~shown] = KEPT
        return drawn

    def draw_newlines(self, kept: np.ndarray) -> np.ndarray:
        """uint8 (height, 1, 3): the strip of `image_newline` tokens at the rows' ends, coloured where kept."""
        shown = kept[self.newline] & (self.newline >= 0)
        strip = np.where(shown[:, None], KEPT, SKIPPED)
        strip[self.newline < 0] = 255
        return strip[:, None]


def canvas(layout: Layout) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in image pixels: the whole image and all that any token looks at, padding included."""
    x0, y0, x1, y1 = 0.0, 0.0, float(layout.width), float(layout.height)
    if layout.tile_grid is None:  # anyres never shows more padding than a part of one patch
        boxes = layout.boxes(clip=False)
        x0, y0 = np.minimum((x0, y0), boxes[:, :2].min(axis=0))
        x1, y1 = np.maximum((x1, y1), boxes[:, 2:].max(axis=0))
    return float(x0), float(y0), float(x1), float(y1)


def prepare(image: Image.Image, layout: Layout, part: Part, width: int, height: int) -> Panel:
    """Draw what is the same for every layer, once.

    Args:
        image: RGB, the original picture.
        width, height: of the panel, in drawn pixels.
    """
    x0, y0, x1, y1 = canvas(layout)
    scale_x, scale_y = width / (x1 - x0), height / (y1 - y0)
    # BOX averages where the picture shrinks and keeps pixels crisp where it grows.
    size = max(1, round(layout.width * scale_x)), max(1, round(layout.height * scale_y))
    page = Image.new("RGB", (width, height), "white")
    page.paste(image.resize(size, Image.Resampling.BOX), (round(-x0 * scale_x), round(-y0 * scale_y)))
    clear = np.asarray(page)
    grey = np.asarray(page.convert("L"), dtype=np.float32)[..., None]
    greyed = np.broadcast_to(GHOST * grey + (1 - GHOST) * SKIPPED, clear.shape).astype(np.uint8)

    rows = _which(part.row_spans, y0 + (np.arange(height) + 0.5) / scale_y)
    columns = _which(part.column_spans, x0 + (np.arange(width) + 0.5) / scale_x)
    tokens = np.pad(part.tokens, ((0, 1), (0, 1)), constant_values=-1)  # index -1, no cell, is the padded one
    cell = tokens[np.ix_(rows, columns)]
    greyed[cell < 0] = _stripes(height, width)[cell < 0]
    newline = np.append(part.newlines, -1)[rows] if part.newlines.size else part.newlines
    smallest = min(width / max(len(part.column_spans), 1), height / max(len(part.row_spans), 1))
    return Panel(clear, greyed, cell, newline, max(1, min(OUTLINE_PX, int(smallest / 4))))


def _which(spans: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Index of the span that each position lies in, -1 for none. Spans are sorted and do not overlap."""
    index = np.searchsorted(spans[:, 0], positions, side="right") - 1
    inside = (index >= 0) & (positions < np.append(spans[:, 1], -np.inf)[index])
    return np.where(inside, index, -1)


def _grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and its neighbourhood of `pixels` in each of eight directions."""
    for axis in (0, 1):
        padded = np.pad(mask, [(pixels, pixels) if axis == own else (0, 0) for own in (0, 1)])
        length = mask.shape[axis]
        mask = np.any([padded.take(range(by, by + length), axis) for by in range(2 * pixels + 1)], axis=0)
    return mask


def _stripes(height: int, width: int) -> np.ndarray:
    """Diagonal stripes: the parts of the picture that the model is never shown."""
    y, x = np.ogrid[:height, :width]
    return np.where(((x + y) // 5 % 2 == 0)[..., None], np.uint8(255), SKIPPED)
