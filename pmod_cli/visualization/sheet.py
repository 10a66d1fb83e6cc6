"""A sheet of panels: one column a layer, one row a part of the image; headings above, legend and caption below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pmod_cli.families.geometry import TokenLayout
from pmod_cli.visualization.overlay import canvas
from pmod_cli.visualization.page import INK, LINE, MARGIN, QUIET, SMALL_PT, TEXT_PT, TITLE_PT, Page, measure, wrap

DPI, SHEET_DPI = 300, 200  # of one row of panels, as print wants it, and of several
MAX_COLUMNS = 8
PANEL_AREA, SMALL_AREA = 0.85, 0.5  # square inches: three square panels fill a paper column of 3.4 inches
PANEL_MAX = 2.2  # inches
FILM_MAX = 6.5  # inches: a strip of frames has a line of the page for itself
PAGE_MIN = 2.6  # inches; the caption needs some width
GAP = 0.1
ROW_LABEL, ROW_MIN = 0.2, 0.7  # inches; a row of panels is at least as high as its label is long
COUNT = "8888 of 8888"  # as wide as what stands below a panel
SWATCH = 0.16  # of the legend, with the gap to its words
STRIP, STRIP_GAP = 0.05, 0.025  # the newline tokens beside the tiles
REGION = "#0072b2"  # blue of the Okabe-Ito palette


@dataclass(frozen=True)
class ColourBar:
    """What colours mean: uint8 (n, 3) from low to high, the words at both ends, and a title."""

    colours: np.ndarray
    low: str
    high: str
    title: str


@dataclass(frozen=True)
class Notes:
    """What stands below the panels.

    Attributes:
        legend: a swatch's style, as matplotlib's Rectangle takes it, and its words.
        caption: texts of any length and their colours.
        bar: the colour bar, if colours have an order.
    """

    legend: list[tuple[dict, str]] = field(default_factory=list)
    caption: list[tuple[str, str]] = field(default_factory=list)
    bar: ColourBar | None = None


class Sheet:
    """Empty panels of the right size; `panel` fills one, `figure` is the result.

    Attributes:
        pixels: (width, height) of a panel as it is drawn.
    """

    def __init__(
        self,
        layout: TokenLayout,
        headings: Sequence[Sequence[str]],
        rows: Sequence[str],
        notes: Notes,
        *,
        strip: bool,
        small: bool = False,
    ) -> None:
        """Lay out the sheet.

        Args:
            headings: of each column; the first line is bold. More than eight columns are continued below.
            rows: label of each row of panels; "" for a single one without.
            strip: leave room for end-of-row tokens beside each panel.
            small: panels of a contact sheet.
        """
        self._layout, self._rows = layout, rows
        x0, y0, x1, y1 = canvas(layout)
        aspect = (x1 - x0) / (y1 - y0)
        area = SMALL_AREA if small else PANEL_AREA
        film = layout.frames > 1
        self._width = FILM_MAX if film else min((area * aspect) ** 0.5, PANEL_MAX, PANEL_MAX * aspect)
        self._height = self._width / aspect
        self._scale = self._width / (x1 - x0)  # inches a pixel of the image
        words = max(
            measure(line, TITLE_PT if number == 0 else TEXT_PT) * (1.12 if number == 0 else 1)  # bold is wider
            for heading in headings
            for number, line in enumerate(heading)
        )
        self._pitch = max(self._width + (STRIP + STRIP_GAP) * strip, words) + GAP
        self._columns = 1 if film else min(len(headings), MAX_COLUMNS)
        # Beside a row of flat panels there is no room for an upright label: it stands below, before the counts.
        below = any(rows) and self._height < ROW_MIN <= self._pitch
        below = below and max(measure(f"{row}: {COUNT}", SMALL_PT) for row in rows) < self._pitch
        self._label_below = below
        self._left = MARGIN + (ROW_LABEL if any(rows) and not below else 0)
        self._inset = max(0.0, (words - self._width) / 2)  # a narrow panel stands under the middle of its heading
        self._head = (max(map(len, headings)) + 0.3) * LINE
        self._under = LINE if any(rows) else 0
        self._row = max(self._height, ROW_MIN if any(rows) and not below else 0) + self._under + GAP / 2
        self._block = self._head + len(rows) * self._row + GAP
        blocks = -(-len(headings) // self._columns)

        legend = max((measure(words, SMALL_PT) for _, words in notes.legend), default=0.0)
        width = max(
            self._left + self._columns * self._pitch - GAP + MARGIN, PAGE_MIN, legend + SWATCH + 2 * MARGIN + 0.02
        )
        caption = [line for text, colour in notes.caption for line in wrap(text, width - 2 * MARGIN, colour)]
        lines = len(notes.legend) + len(caption) + 0.5 + (2.3 if notes.bar else 0)
        dpi = DPI if blocks == 1 else SHEET_DPI
        self.page = Page(width, 2 * MARGIN + blocks * self._block + lines * LINE, dpi)
        self.pixels = max(1, round(self._width * dpi)), max(1, round(self._height * dpi))
        for number, heading in enumerate(headings):
            self._heading(number, heading)
        self._below(MARGIN + blocks * self._block, notes, caption)

    @property
    def figure(self):
        """The matplotlib Figure."""
        return self.page.figure

    def panel(
        self,
        column: int,
        row: int,
        pixels: np.ndarray,
        strip: np.ndarray | None = None,
        under: str = "",
        regions: Sequence[tuple[float, float, float, float]] = (),
    ) -> None:
        """Fill one panel.

        Args:
            pixels: uint8 (height, width, 3).
            strip: uint8 (height, 1, 3), the end-of-row tokens beside it.
            regions: boxes in pixels of the image, framed.
        """
        x, y = self._corner(column)
        y += self._head + row * self._row
        if self._label_below:
            under = f"{self._rows[row]}: {under}" if under else self._rows[row]
        elif self._rows[row] and column % self._columns == 0:
            style = {"rotation": 90, "ha": "right", "va": "center"}
            self.page.text(self._left - 0.06, y + self._height / 2, self._rows[row], QUIET, SMALL_PT, **style)
        self.page.picture(pixels, x, y, self._width, self._height)
        self.page.frame(x, y, self._width, self._height)
        if strip is not None:
            self.page.picture(strip, x + self._width + STRIP_GAP, y, STRIP, self._height)
        x0, y0, x1, y1 = canvas(self._layout)
        image = (0, 0, self._layout.width, self._layout.height)
        if (x0, y0, x1, y1) != image:  # padding is drawn too: a line around what is image
            self._box(x, y, image, edgecolor=INK, linewidth=0.8)
        for number in range(self._layout.frames if self._layout.frames > 1 else 0):
            step = self._layout.width / self._layout.frames
            self._box(x, y, (number * step, 0, (number + 1) * step, self._layout.height), edgecolor=INK, linewidth=0.6)
        for region in regions:
            self._box(x, y, region, edgecolor=REGION, linewidth=0.9, linestyle=(0, (2, 1)))
        if under:
            self.page.text(x + self._width / 2, y + self._height + 0.02, under, QUIET, SMALL_PT, ha="center")

    def _corner(self, column: int) -> tuple[float, float]:
        """Left edge of the column's panels, top of its heading."""
        block, place = divmod(column, self._columns)
        return self._left + place * self._pitch + self._inset, MARGIN + block * self._block

    def _box(self, x: float, y: float, box: Sequence[float], **style: Any) -> None:
        x0, y0, _, _ = canvas(self._layout)
        left, top, right, bottom = box
        corner = x + (left - x0) * self._scale, y + (top - y0) * self._scale
        self.page.frame(*corner, (right - left) * self._scale, (bottom - top) * self._scale, **style)

    def _heading(self, column: int, lines: Sequence[str]) -> None:
        x, y = self._corner(column)
        centre = x + self._width / 2
        self.page.text(centre, y, lines[0], size=TITLE_PT, ha="center", weight="bold")
        for number, line in enumerate(lines[1:], start=1):
            self.page.text(centre, y + (number + 0.1) * LINE, line, ha="center")

    def _below(self, top: float, notes: Notes, caption: Sequence[tuple[str, str]]) -> None:
        if notes.bar:
            self._colour_bar(top, notes.bar)
            top += 2.3 * LINE
        for style, words in notes.legend:
            self.page.frame(MARGIN, top + 0.015, 0.09, 0.09, **{"linewidth": 0.8} | style)
            self.page.text(MARGIN + SWATCH, top + LINE / 2, words, QUIET, SMALL_PT, va="center_baseline")
            top += LINE
        top += LINE / 2
        for words, colour in caption:
            self.page.text(MARGIN, top, words, colour)
            top += LINE

    def _colour_bar(self, top: float, bar: ColourBar) -> None:
        self.page.text(MARGIN, top, bar.title, QUIET, SMALL_PT)
        top += LINE
        left = MARGIN + measure(bar.low, SMALL_PT) + 0.05
        self.page.text(MARGIN, top + LINE / 2, bar.low, QUIET, SMALL_PT, va="center_baseline")
        self.page.picture(bar.colours[None], left, top + 0.02, 1.2, 0.085)
        self.page.frame(left, top + 0.02, 1.2, 0.085)
        self.page.text(left + 1.25, top + LINE / 2, bar.high, QUIET, SMALL_PT, va="center_baseline")
