"""Whether a selection that was read from a file can be one: types, ranges, and that its arrays tell the same story."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmod_cli.core.images import MOST_PIXELS
from pmod_cli.families.geometry import Layout, Part, numbered
from pmod_cli.model import SELECTIONS
from pmod_cli.visualization.record import ImageSelection

ROUTER_STATES = ("untrained", "trained", "calibrated", "stock")
STOCK_CHOOSER = "attention"  # of a stock model; all others are selections
MOST_LAYERS = 1000
MOST_REGIONS = 1000
FARTHEST = 1e9  # pixels: no edge of a patch or of a region lies farther away


def expect(holds: Any, fault: str) -> None:
    """Raises ValueError with the fault where it does not hold."""
    if not holds:
        raise ValueError(fault)


def check_words(words: dict[str, Any]) -> dict[str, Any]:
    """The record's texts, `notes` and `regions` as tuples.

    Raises:
        ValueError: one of another type, or a text that is no Unicode.
    """
    texts = [words["question"], words["model"], *([] if words["answer"] is None else [words["answer"]])]
    notes = words["notes"]
    expect(isinstance(notes, list), "`notes` is no list")
    for text in (*texts, *notes):
        expect(isinstance(text, str), f"expected a text, found {text!r:.60}")
        text.encode()  # half a surrogate pair cannot be drawn or written
    expect(words["router_state"] in ROUTER_STATES, f"router state {words['router_state']!r:.60}")
    expect(
        words["chosen_by"] == STOCK_CHOOSER or words["chosen_by"] in SELECTIONS, f"chosen by {words['chosen_by']!r:.60}"
    )
    return {**words, "notes": tuple(notes), "regions": check_regions(words["regions"])}


def check_regions(boxes: Any) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes [x0, y0, x1, y1] in pixels, as tuples of floats.

    Raises:
        ValueError: no such list, an edge that is no finite number, an empty box, or more than MOST_REGIONS.
    """
    expect(isinstance(boxes, list | tuple), f"{type(boxes).__name__}, no list")
    expect(len(boxes) <= MOST_REGIONS, f"{len(boxes):,} boxes, at most {MOST_REGIONS:,} are drawn")
    for box in boxes:
        expect(isinstance(box, list | tuple) and len(box) == 4, f"a box of {box!r:.60}")
        for edge in box:
            number = isinstance(edge, int | float) and not isinstance(edge, bool)
            expect(number and abs(edge) <= FARTHEST, f"a box of {box!r:.60}")  # never true of NaN
        expect(box[0] < box[2] and box[1] < box[3], f"an empty box, {box!r:.60}")
    return tuple(tuple(float(edge) for edge in box) for box in boxes)


def check_selection(record: ImageSelection) -> None:
    """Hold the arrays of a record to each other. Their types and shapes are right already.

    Raises:
        ValueError: what cannot be.
    """
    _check_layout(record.layout)
    kept, weight, routed, retention = record.kept, record.weight, record.routed, record.retention
    expect(1 <= record.num_layers <= MOST_LAYERS, f"{record.num_layers} layers, expected 1 to {MOST_LAYERS}")
    # A byte other than 0 and 1 in a bool array is true for some of NumPy's functions, and itself for others.
    for name, flags in (("kept", kept), ("routed", routed)):
        expect(flags.view(np.uint8).max(initial=0) <= 1, f"`{name}` holds other values than false and true")
    expect(np.isfinite(weight).all(), "`weight` holds values that are no finite numbers")
    expect(((retention >= 0) & (retention <= 1)).all(), "`retention` lies outside 0 … 1")
    expect(kept[~routed].all(), "a plain layer keeps every token, and this one does not")
    if record.chosen_by != STOCK_CHOOSER:
        expect((weight[~routed] == 1).all(), "a plain layer weights no token, and this one does")
    else:
        expect(((weight >= 0) & (weight <= 1)).all(), "a share of attention lies outside 0 … 1")


def _check_layout(layout: Layout) -> None:
    expect(layout.width * layout.height <= MOST_PIXELS, "the image is too large")
    expect(layout.width and layout.height, "the image is empty")
    grid, anyres = layout.tile_grid, len(layout.parts) == 2
    whole = grid is not None and len(grid) == 2 and all(type(count) is int and 0 < count <= 1000 for count in grid)
    expect(whole if anyres else grid is None, f"a tile grid of {grid!r:.60}")
    expect(layout.parts[0].size, "no token in the image")
    first = 0
    for part in layout.parts:
        _check_part(part, first, newline=part.name == "tiles")
        first += part.size


def _check_part(part: Part, first: int, *, newline: bool) -> None:
    for name, spans in (("row", part.row_spans), ("column", part.column_spans)):
        expect(spans.ndim == 2 and spans.shape[1] == 2, f"{name} spans of `{part.name}` of shape {spans.shape}")
        edges = spans.ravel()
        expect((np.abs(edges) <= FARTHEST).all(), f"{name} spans of `{part.name}` are no pixels")
        expect((np.diff(edges)[::2] > 0).all(), f"a {name} of `{part.name}` is empty")
        rounding = 1e-6 * np.abs(edges).max(initial=1)
        expect((np.diff(edges) >= -rounding).all(), f"{name}s of `{part.name}` are out of order")
    as_ours = numbered(part.name, part.row_spans, part.column_spans, first=first, newline=newline)
    same = np.array_equal(part.tokens, as_ours.tokens) and np.array_equal(part.newlines, as_ours.newlines)
    expect(same, f"the tokens of `{part.name}` are not numbered row by row from {first}")
