"""The picture: one column a layer, one row a part of the image, a legend and the question and answer below.

Everything is placed in inches on one page, so that text keeps its size and nothing can overlap.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pmod_cli.errors import PmodError
from pmod_cli.visualization.overlay import KEPT, SKIPPED, Panel, canvas, prepare
from pmod_cli.visualization.record import SelectionRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
DPI, SHEET_DPI = 300, 200  # of one row of panels, as print wants it, and of several
MAX_COLUMNS = 8
PANEL_AREA = 0.85  # square inches: three square panels fill a paper column of 3.4 inches
PANEL_MIN, PANEL_MAX = 0.92, 2.2  # inches; the narrowest panel still carries its heading
GAP = 0.1
MARGIN = 0.08
ROW_LABEL, ROW_MIN = 0.2, 0.55  # inches; a row of panels is at least as high as its label is long
STRIP, STRIP_GAP = 0.05, 0.025  # the newline tokens beside the tiles
LINE = 0.125  # inches a line of text
TITLE_PT, TEXT_PT, SMALL_PT = 8.0, 7.0, 6.0
INK, QUIET, ALERT = "#1a1a1a", "#595959", "#a03800"
PART_NAMES = {"image": "", "base": "whole image", "tiles": "{}×{} tiles"}


def draw(record: SelectionRecord, layers: Sequence[int], notes: Sequence[str] = ()) -> Figure:
    """A matplotlib figure of the tokens kept by `layers`, one panel a layer and part of the image.

    Args:
        record: from `select`.
        layers: indices to draw, in this order; at least one.
        notes: remarks on the image for the caption.
    """
    from matplotlib.figure import Figure

    parts = [part for part in record.layout.parts if part.size]
    panel_w, panel_h = _panel_size(record)
    pitch = max(panel_w + (STRIP + STRIP_GAP if len(parts) > 1 else 0), PANEL_MIN) + GAP
    columns = min(len(layers), MAX_COLUMNS)
    row_label = ROW_LABEL if len(parts) > 1 else 0
    counts = LINE if len(parts) > 1 else 0  # "12 of 36 tokens" below each panel
    row_h = max(panel_h, ROW_MIN if row_label else 0) + counts + GAP / 2
    block_h = 3.3 * LINE + len(parts) * row_h
    blocks = -(-len(layers) // columns)
    width = max(2 * MARGIN + row_label + columns * pitch - GAP, 2.6)
    caption = _caption(record, notes, width - 2 * MARGIN)
    height = 2 * MARGIN + blocks * (block_h + GAP) + LINE * (len(_legend(record)) + 0.5 + len(caption))

    dpi = DPI if blocks == 1 else SHEET_DPI
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    page.axis("off")
    pixels = max(1, round(panel_w * dpi)), max(1, round(panel_h * dpi))
    panels = [prepare(record.image, record.layout, part, *pixels) for part in parts]

    for place, layer in enumerate(layers):
        block, column = divmod(place, columns)
        left = MARGIN + row_label + column * pitch
        top = MARGIN + block * (block_h + GAP)
        _heading(page, record, layer, left + panel_w / 2, top)
        top += 3.3 * LINE
        for part, panel in zip(parts, panels, strict=True):
            _panel(page, panel, record.kept[layer], left, top, panel_w, panel_h)
            _image_frame(page, record, left, top, panel_w)
            if row_label and column == 0:
                name = PART_NAMES[part.name].format(*record.layout.tile_grid or ())
                _text(page, left - 0.06, top + panel_h / 2, name, QUIET, SMALL_PT, rotation=90, ha="right", va="center")
            if counts:
                own = np.concatenate([part.tokens.ravel(), part.newlines])
                count = f"{record.kept[layer, own].sum()} of {part.size}"
                _text(page, left + panel_w / 2, top + panel_h + 0.02, count, QUIET, size=SMALL_PT, ha="center")
            top += row_h

    top = MARGIN + blocks * (block_h + GAP)
    for swatch, words in _legend(record):
        page.add_patch(_swatch(MARGIN, top, **swatch))
        _text(page, MARGIN + 0.16, top + LINE / 2, words, QUIET, size=SMALL_PT, va="center_baseline")
        top += LINE
    top += LINE / 2
    for words, colour in caption:
        _text(page, MARGIN, top, words, colour)
        top += LINE
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG or SVG, by the path's ending; an existing file is replaced at once or not at all.

    Raises:
        PmodError: another ending.
    """
    from pmod_cli.checkpoints.atomic import write_bytes

    kind, buffer = check_format(path), io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes; a line of log for each of them helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind)
    write_bytes(path, buffer.getvalue())


def check_format(path: Path) -> str:
    """ "png" or "svg", from the path's ending. Raises PmodError for any other."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise PmodError(f"{path}: pictures are written as .png or .svg", hint=f"-o {path.with_suffix('.png')}")
    return kind


def _panel_size(record: SelectionRecord) -> tuple[float, float]:
    """Width and height in inches: about the same area for every aspect ratio, within the page's limits."""
    x0, y0, x1, y1 = canvas(record.layout)
    aspect = (x1 - x0) / (y1 - y0)
    width = min((PANEL_AREA * aspect) ** 0.5, PANEL_MAX, PANEL_MAX * aspect)
    return width, width / aspect


def _heading(page: Axes, record: SelectionRecord, layer: int, centre: float, top: float) -> None:
    """Three lines: which layer, how many it keeps, at which ratio."""
    total = record.layout.size
    if record.routed[layer]:
        lines = [f"{record.kept[layer].sum()} of {total} kept", f"retention {record.retention[layer]:.2f}"]
    else:
        lines = ["plain layer:", f"all {total} tokens"]
    _text(page, centre, top, f"Layer {layer}", size=TITLE_PT, ha="center", weight="bold")
    for number, line in enumerate(lines, start=1):
        _text(page, centre, top + (number + 0.1) * LINE, line, ha="center")


def _panel(page: Axes, panel: Panel, kept: np.ndarray, x: float, y: float, width: float, height: float) -> None:
    from matplotlib.image import AxesImage

    def place(pixels: np.ndarray, left: float, wide: float) -> None:
        image = AxesImage(page, extent=(left, left + wide, y + height, y), interpolation="none")
        image.set_data(pixels)
        page.add_artist(image)  # unlike imshow, this leaves the limits of the page alone

    place(panel.draw(kept), x, width)
    page.add_patch(_frame(x, y, width, height))
    if panel.newline.size:
        place(panel.draw_newlines(kept), x + width + STRIP_GAP, STRIP)


def _image_frame(page: Axes, record: SelectionRecord, left: float, top: float, width: float) -> None:
    """Where padding is drawn too: a line around what is image."""
    layout = record.layout
    x0, y0, x1, y1 = canvas(layout)
    if (x0, y0, x1, y1) != (0, 0, layout.width, layout.height):
        inches = width / (x1 - x0)
        place = left - x0 * inches, top - y0 * inches, layout.width * inches, layout.height * inches
        page.add_patch(_frame(*place, colour=INK, linewidth=0.8))


def _legend(record: SelectionRecord) -> list[tuple[dict, str]]:
    kept, skipped = (f"#{bytes(colour).hex()}" for colour in (KEPT, SKIPPED))
    legend = [
        ({"facecolor": "white", "edgecolor": kept}, "patch kept by the layer"),
        ({"facecolor": skipped, "edgecolor": skipped}, "patch skipped"),
    ]
    if any(part.newlines.size for part in record.layout.parts):
        legend.append(({"facecolor": kept, "edgecolor": kept}, "in the strip: end-of-row token kept"))
    layout, seen = record.layout, record.layout.boxes()
    if canvas(layout) != (0, 0, layout.width, layout.height):
        legend.append(({"facecolor": "white", "edgecolor": INK}, "outside the dark frame: padding"))
    unseen = *np.nanmin(seen[:, :2], axis=0), *(layout.width, layout.height) - np.nanmax(seen[:, 2:], axis=0)
    if max(unseen) >= 1:
        legend.append(({"facecolor": "white", "edgecolor": skipped, "hatch": "//////"}, "cut off, never seen"))
    return legend


def _caption(record: SelectionRecord, notes: Sequence[str], width: float) -> list[tuple[str, str]]:
    """Lines of text and their colours."""
    lines = _wrap(f"Q: {record.question}", width, INK)
    if record.answer is not None:
        lines += _wrap(f"A: {record.answer or '(nothing)'}", width, INK)
    if record.router_state == "untrained":
        lines += _wrap(
            "Untrained routers: all weights tie and the first tokens win. This is no choice of the model.", width, ALERT
        )
    lines += _wrap("; ".join([f"{record.model}, {record.router_state} routers", *notes]), width, QUIET)
    return lines


def _wrap(text: str, width: float, colour: str, most: int = 5) -> list[tuple[str, str]]:
    """At most `most` lines, none wider than `width` inches as the font draws it."""
    text = " ".join(text.split())
    letters = int(width / 0.03)  # as many as would fit of the narrowest; fewer until the widest line fits
    while True:
        lines = textwrap.wrap(text, letters, max_lines=most, placeholder=" …")
        excess = max(_measure(line) for line in lines) / width
        if excess <= 1:
            return [(line, colour) for line in lines]
        letters = min(letters - 1, int(letters / excess) + 4)


def _measure(line: str) -> float:
    """Width in inches of a line of the caption."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        points, _, _ = text_to_path.get_text_width_height_descent(line, FontProperties(size=TEXT_PT), ismath=False)
    return points / 72


def _text(page: Axes, x: float, y: float, words: str, colour: str = INK, size: float = TEXT_PT, **style) -> None:
    # parse_math: an answer of "$5 and $6" is no formula
    page.text(x, y, words, **{"color": colour, "fontsize": size, "va": "top", "parse_math": False, **style})


def _frame(x: float, y: float, width: float, height: float, colour: str = QUIET, linewidth: float = 0.4):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=linewidth)


def _swatch(x: float, y: float, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x + 0.01, y + 0.02), 0.09, 0.09, linewidth=0.8, **style)
