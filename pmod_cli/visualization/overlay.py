"""One panel: the image, and over it what a layer keeps or how much it weighs each patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pmod_cli.families.geometry import Part, TokenLayout

KEPT = np.array([213, 94, 0], dtype=np.uint8)  # vermillion of the Okabe-Ito palette, told from grey by every eye
SKIPPED = np.array([205, 205, 205], dtype=np.uint8)
GHOST = 0.22  # how much of a skipped patch shines through
INK = 0.3  # how much of the image shines through a heat map
OUTLINE_PX = 2  # at most a quarter of a cell, else the outlines of small patches cover them
INNER_LINE_FROM = 5  # pixels of a patch
HATCH_PX, HATCH_LINE_PX = 7, 2  # from line to line over patches that are skipped, and the width of one


@dataclass(frozen=True)
class Panel:
    """Parts of the image as they are drawn over each other: the picture, and each drawn pixel's tokens.

    Attributes:
        clear, greyed: uint8 (height, width, 3).
        cells: int64 (P, height, width), for each of P parts the index into the V vision tokens; -1 where none looks.
        newline: int64 (height,), the token that ends each drawn line's row; empty where the part has none.
        outline_px: width of the line around kept patches.
        has_inner_line: whether they are large enough for a second line.
    """

    clear: np.ndarray
    greyed: np.ndarray
    cells: np.ndarray
    newline: np.ndarray
    outline_px: int
    has_inner_line: bool

    def draw_kept(self, kept: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 3): kept tokens, bool (V,), clear and framed; of two parts, half clear for one."""
        share = self._over_parts(kept)
        drawn = np.where((share == 1)[..., None], self.clear, self.greyed)
        partly = (share > 0) & (share < 1)
        drawn[partly] = _blend(self.clear[partly], self.greyed[partly], share[partly][:, None])
        return self._outlined(drawn, share > 0)

    def draw_heat(self, colours: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
        """uint8 (height, width, 3): each token's colour, uint8 (V, 3), over a trace of the image.

        Args:
            kept: bool (V,). Kept patches are framed and all others hatched, so that the sides of a frame differ.
        """
        seen = self.cells >= 0  # (P, height, width)
        heat = (colours[self.cells].astype(np.float32) * seen[..., None]).sum(0) / seen.sum(0).clip(1)[..., None]
        ink = self.clear.mean(-1, dtype=np.float32, keepdims=True) / 255
        drawn = (heat * (1 - INK + INK * ink)).round().astype(np.uint8)  # light paper leaves the colour as it is
        nowhere = ~seen.any(0)
        drawn[nowhere] = self.greyed[nowhere]
        if kept is None:
            return drawn
        shown = self._over_parts(kept) > 0
        y, x = np.ogrid[: shown.shape[0], : shown.shape[1]]
        hatched = ((x + y) % HATCH_PX < HATCH_LINE_PX) & ~shown & ~nowhere
        lines = np.where(drawn[hatched].mean(-1, keepdims=True) < 128, 255, 0)
        drawn[hatched] = _blend(lines, drawn[hatched], 0.6)
        return self._outlined(drawn, shown)

    def draw_strip(self, colours: np.ndarray) -> np.ndarray:
        """uint8 (height, 1, 3): the strip of `image_newline` tokens at the rows' ends, in their colours, (V, 3)."""
        strip = colours[self.newline]
        strip[self.newline < 0] = 255
        return strip[:, None]

    def _over_parts(self, values: np.ndarray) -> np.ndarray:
        """float32 (height, width): the mean of the values, (V,), of the tokens that look at each pixel; else 0."""
        seen = self.cells >= 0
        if len(self.cells) == 1:
            return (values[self.cells[0]] * seen[0]).astype(np.float32)
        return (values[self.cells] * seen).sum(0, dtype=np.float32) / seen.sum(0, dtype=np.float32).clip(1)

    def _outlined(self, drawn: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """Draw the frame outside kept patches, and a white line inside it: one of both is seen on every picture."""
        if self.has_inner_line:
            seen = (self.cells >= 0).any(0)
            drawn[_grow(~shown & seen, 1) & shown] = 255
        drawn[_grow(shown, self.outline_px) & ~shown] = KEPT
        return drawn


def canvas(layout: TokenLayout) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in image pixels: the whole image and all that any token looks at, padding included."""
    x0, y0, x1, y1 = 0.0, 0.0, float(layout.width), float(layout.height)
    if layout.tile_grid is None:  # anyres never shows more padding than a part of one patch
        boxes = layout.boxes(clip=False)
        x0, y0 = np.minimum((x0, y0), boxes[:, :2].min(axis=0))
        x1, y1 = np.maximum((x1, y1), boxes[:, 2:].max(axis=0))
    return float(x0), float(y0), float(x1), float(y1)


def hides(layout: TokenLayout, parts: Sequence[Part]) -> bool:
    """Whether a panel of these parts shows a strip of the picture that none of their tokens looks at."""
    x0, y0, x1, y1 = canvas(layout)
    for (low, high), spans in (
        ((x0, x1), [part.column_spans for part in parts]),
        ((y0, y1), [part.row_spans for part in parts]),
    ):
        least = (high - low) / 1000  # less than a drawn pixel
        spans = [span for span in spans if span.size]  # tiles of a picture narrower than a patch have no column
        if (
            not spans
            or min(span.min() for span in spans) - low > least
            or high - max(span.max() for span in spans) > least
        ):
            return True
    return False


def prepare(image: Image.Image, layout: TokenLayout, parts: Sequence[Part], width: int, height: int) -> Panel:
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
    grey = np.asarray(page.convert("L"))[..., None]
    greyed = _blend(grey, SKIPPED, GHOST)

    xs, ys = x0 + (np.arange(width) + 0.5) / scale_x, y0 + (np.arange(height) + 0.5) / scale_y
    cells, newline, smallest = [], np.array([], dtype=int), np.inf
    for part in parts:
        rows, columns = _which(part.row_spans, ys), _which(part.column_spans, xs)
        tokens = np.pad(part.tokens, ((0, 1), (0, 1)), constant_values=-1)  # index -1, no cell, is the padded one
        cells.append(tokens[np.ix_(rows, columns)])
        if part.newlines.size:
            newline = np.append(part.newlines, -1)[rows]
        smallest = min(smallest, width / max(len(part.column_spans), 1), height / max(len(part.row_spans), 1))
    cells = np.stack(cells)
    nowhere = (cells < 0).all(0)
    greyed[nowhere] = _stripes(height, width)[nowhere]
    outline_px = max(1, min(OUTLINE_PX, int(smallest / 4)))
    return Panel(clear, greyed, cells, newline, outline_px, has_inner_line=smallest >= INNER_LINE_FROM)


def _blend(front: np.ndarray, back: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """uint8: `share` of the front and the rest of the back."""
    return (share * front.astype(np.float32) + (1 - share) * back.astype(np.float32)).astype(np.uint8)


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
