"""A page of matplotlib measured in inches from its top left corner: text keeps its size, and nothing overlaps."""

from __future__ import annotations

import io
import textwrap
import warnings
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import rc_context
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import BboxImage
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D, Bbox, TransformedBbox
from PIL import Image

from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import printable
from pmod_cli.visualization.fonts import families

FORMATS = ("png", "svg")
MARGIN = 0.08  # inches
LINE = 0.125  # inches a line of text
TITLE_PT, TEXT_PT, SMALL_PT = 8.0, 7.0, 6.0
PNG_LEVEL = 3  # of zlib: half the time of the usual 6, and a few hundredths more bytes
MOST_SIDE, MOST_PIXELS = 65_000, 50_000_000  # of a page; what draws it ends at 2^16 a side
MOST_LETTERS = 5_000  # of a text that is broken into lines; five lines hold a few hundred
INK, QUIET, ALERT = "#1a1a1a", "#595959", "#a03800"


class Page:
    """A figure whose places are told in inches, x to the right and y down.

    Raises:
        PmodError: it would have too many pixels to be drawn.
    """

    def __init__(self, width: float, height: float, dpi: int) -> None:
        wide, high = round(width * dpi), round(height * dpi)
        if max(wide, high) > MOST_SIDE or wide * high > MOST_PIXELS:
            raise PmodError(
                f"the picture would have {wide:,} × {high:,} pixels, too many to draw", hint="draw fewer layers"
            )
        self.figure: Figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        self._inches = Affine2D().scale(1 / width, -1 / height).translate(0, 1) + self.figure.transFigure
        self.pictures: list[tuple[float, float, float, float]] = []
        self._backdrop: Backdrop | None = None  # a chart needs none

    def text(self, x: float, y: float, words: str, colour: str = INK, size: float = TEXT_PT, **style: Any) -> None:
        """One line; (x, y) is its top left corner, unless the style aligns it otherwise."""
        # parse_math: an answer of "$5 and $6" is no formula
        drawn: dict[str, Any] = {"color": colour, "fontsize": size, "va": "top", "parse_math": False}
        drawn |= {"fontfamily": families(words)} | style
        self.figure.text(x, y, words, transform=self._inches, **drawn)

    def picture(self, pixels: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        """uint8 (h, w, 3), stretched over the box, whose edges are moved to the nearest pixels of the page."""
        self._backdrop = self._backdrop or Backdrop(self.figure)
        edges = (round(edge * self.figure.dpi) for edge in (x, y, x + width, y + height))
        self._backdrop.paste(pixels, *edges)

    def frame(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        """A rectangle, by default a thin empty one."""
        drawn: dict[str, Any] = {"facecolor": "none", "edgecolor": QUIET, "linewidth": 0.4} | style
        self.figure.add_artist(Rectangle((x, y), width, height, transform=self._inches, **drawn))


class Backdrop(BboxImage):
    """The pixels of a whole figure, white at first.

    An image artist for each of a sheet's panels, each resampled by matplotlib, takes ten times as long.

    Attributes:
        boxes: (left, top, right, bottom) of each pasted picture, in pixels of the figure.
    """

    def __init__(self, figure: Figure) -> None:
        super().__init__(TransformedBbox(Bbox.unit(), figure.transFigure), interpolation="none")
        width, height = figure.canvas.get_width_height()
        self.set_data(np.broadcast_to(np.uint8(255), (height, width, 4)))
        self._pixels = cast(np.ndarray, self.get_array())  # set_data's copy; filled in place
        self.boxes: list[tuple[int, int, int, int]] = []
        figure.add_artist(self)

    def paste(self, picture: np.ndarray, left: int, top: int, right: int, bottom: int) -> None:
        """uint8 (h, w, 3), stretched over the box, whose lines and columns are those nearest in the picture."""
        lines = np.arange(bottom - top) * picture.shape[0] // max(bottom - top, 1)
        columns = np.arange(right - left) * picture.shape[1] // max(right - left, 1)
        self._pixels[top:bottom, left:right, :3] = picture[lines[:, None], columns]
        self.boxes.append((left, top, right, bottom))

    def make_image(self, renderer: RendererBase, magnification: float = 1.0, unsampled: bool = False) -> Any:
        """The pixels as they are, where the figure is drawn whole and at its own resolution.

        Elsewhere, as in a notebook or with `bbox_inches="tight"`, matplotlib moves and scales them.
        """
        x0, y0, x1, y1 = np.asarray(self.get_window_extent(renderer).extents) * magnification
        if (x0, y0, int(y1), int(x1)) == (0, 0, *self._pixels.shape[:2]):
            return self._pixels[::-1], 0, 0, None  # the lowest line first
        return super().make_image(renderer, magnification, unsampled)


def wrap(text: str, width: float, colour: str, most: int = 5) -> list[tuple[str, str]]:
    """At most `most` lines and their colour, none wider than `width` inches as the font draws it."""
    text = printable(" ".join(text[:MOST_LETTERS].split()))  # control characters have no place in an SVG
    letters = int(width / 0.03)  # as many as would fit of the narrowest; fewer until the widest line fits
    while True:
        lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …")
        excess = max(measure(line) for line in lines) / width
        if excess <= 1:
            return [(line, colour) for line in lines]
        letters = min(letters - 1, int(letters / excess) + 4)


@cache
def measure(line: str, size: float = TEXT_PT) -> float:
    """Width in inches of a line of text."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        font = FontProperties(family=families(line), size=size)
        points, _, _ = text_to_path.get_text_width_height_descent(line, font, ismath=False)
    return points / 72


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG or SVG, by the path's ending; an existing file is replaced at once or not at all.

    Raises:
        PmodError: another ending.
    """
    write_bytes(path, encode(figure, check_format(path)))


def encode(figure: Figure, kind: str) -> bytes:
    """The figure as a file of one of FORMATS."""
    buffer = io.BytesIO()
    # Hinting fits letters to the pixels of a screen; at the resolution of print it only takes time. With the salt and
    # without a date, the same figure gives the same SVG.
    with warnings.catch_warnings(), rc_context({"text.hinting": "no_hinting", "svg.hashsalt": "pmod"}):
        # Letters that no font has are drawn as boxes, and the command says so once; matplotlib would for each.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        if kind == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        else:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
            drawn.save(buffer, "PNG", compress_level=PNG_LEVEL, dpi=(figure.dpi, figure.dpi))
    return buffer.getvalue()


def check_format(path: Path) -> str:
    """One of FORMATS, from the path's ending. Raises PmodError for any other."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise PmodError(f"{path}: pictures are written as .png or .svg", hint=f"`out={path.with_suffix('.png')}`")
    return kind
