"""The pictures: what `draw` shows in each of its modes."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pmod_cli.core.errors import PmodError
from pmod_cli.families.geometry import Part, TokenLayout
from pmod_cli.model import SELECTIONS
from pmod_cli.visualization.charts import schedule_chart
from pmod_cli.visualization.image_selection import ImageSelection
from pmod_cli.visualization.overlay import KEPT, SKIPPED, Panel, canvas, hides, prepare
from pmod_cli.visualization.page import ALERT, INK, QUIET
from pmod_cli.visualization.sheet import REGION, ColourBar, Notes, Sheet
from pmod_cli.visualization.statistics import in_common

MODES = ("kept", "weights", "depth", "schedule", "compare", "grid")
ALL_LAYERS = ("depth", "schedule")  # modes that show every layer
PARTS = ("separate", "merged", "base", "tiles")
PART_NAMES = {"image": "", "base": "whole image", "tiles": "{}×{} tiles"}
COLOUR_MAP = "cividis"  # the same order for every eye; light where there is much, so that print stays readable
BLIND = "The image stands before both questions, so no layer knew them: both selections are the same by construction."


def draw(
    record: ImageSelection,
    layers: Sequence[int],
    mode: str = "kept",
    *,
    against: ImageSelection | None = None,
    parts: str = "separate",
    answer_only: bool = False,
) -> Figure:
    """A matplotlib figure of one record.

    Args:
        record: from `select` or `load_npz`.
        layers: indices to draw, in this order; at least one. `depth` and `schedule` show all layers.
        mode: one of MODES: kept patches; router weights; how many layers keep a patch; planned and real retention;
            this record above another; kept patches of many layers as a contact sheet.
        parts: of LLaVA-NeXT's two parts, each in its own panel, both in one, or one alone.
        answer_only: the caption is the answer, without question, model and legend.

    Raises:
        PmodError: `compare` without two records of the same tokens, or a part that the image does not have.
    """
    if mode == "schedule":
        return schedule_chart(record, _caption(record, answer_only))
    groups = part_groups(record.layout, parts)
    if mode == "depth":
        return _draw_depth(record, groups, answer_only)
    if mode == "compare":
        return _draw_compare(record, against, layers, groups, answer_only)
    return _draw_layers(record, layers, groups, answer_only, mode)


def part_groups(layout: TokenLayout, parts: str) -> list[list[Part]]:
    """The parts that each row of panels draws over each other.

    Raises:
        PmodError: `base` or `tiles` of an image that has no such part.
    """
    present = [part for part in layout.parts if part.size]
    if parts == "merged" or (len(present) == 1 and parts == "separate"):
        return [present]
    if parts == "separate":
        return [[part] for part in present]
    chosen = [part for part in present if part.name == parts]
    if not chosen:
        raise PmodError(
            f"`parts={parts}`: this image has only {' and '.join(part.name for part in present)}",
            hint="`parts=separate`",
        )
    return [chosen]


def _draw_layers(
    record: ImageSelection, layers: Sequence[int], groups: list[list[Part]], answer_only: bool, mode: str
) -> Figure:
    """One column a layer: kept patches, or router weights, or the contact sheet of kept patches."""
    weights, small = mode == "weights", mode == "grid"
    colours, bar = _weight_colours(record, layers) if weights else ({}, None)
    notes = Notes(_legend(record, groups, mode, answer_only), _caption(record, answer_only), bar)
    headings = [_heading(record, layer, short=small) for layer in layers]
    sheet = Sheet(record.layout, headings, _row_labels(record.layout, groups), notes, strip=_ends(groups), small=small)
    panels = [prepare(record.image, record.layout, group, *sheet.pixels) for group in groups]
    for column, layer in enumerate(layers):
        for row, panel in enumerate(panels):
            if weights and record.weighted[layer]:
                painted = panel.draw_heat(colours[layer], record.kept[layer])
                strip = panel.draw_strip(colours[layer]) if panel.newline.size else None
            else:
                painted, strip = _paint_kept(panel, record.kept[layer])
            under = _count(groups[row], record.kept[layer]) if len(groups) > 1 else ""
            sheet.panel(column, row, painted, strip, under, record.regions)
    return sheet.figure


def _draw_depth(record: ImageSelection, groups: list[list[Part]], answer_only: bool) -> Figure:
    """The image, and in how many layers each patch is kept."""
    low, high = int(record.depth.min()), record.num_layers
    bar = ColourBar(_gradient(), str(low), str(high), f"kept in so many of {high} layers")
    labels = [" + ".join(_name(record.layout, part) or "kept in" for part in group) for group in groups]
    means = [record.depth[_tokens(group)].mean() for group in groups]
    headings = [
        ("Picture", f"{record.layout.size} tokens"),
        *((label[0].upper() + label[1:], f"mean {mean:.1f} layers") for label, mean in zip(labels, means, strict=True)),
    ]
    notes = Notes(_legend(record, groups, "depth", answer_only), _caption(record, answer_only), bar)
    sheet = Sheet(record.layout, headings, [""], notes, strip=_ends(groups))
    colours = _colours(record.depth, low, high)
    sheet.panel(0, 0, prepare(record.image, record.layout, groups[0], *sheet.pixels).clear, regions=record.regions)
    for column, group in enumerate(groups, start=1):
        panel = prepare(record.image, record.layout, group, *sheet.pixels)
        strip = panel.draw_strip(colours) if panel.newline.size else None
        sheet.panel(column, 0, panel.draw_heat(colours), strip, regions=record.regions)
    return sheet.figure


def _draw_compare(
    record: ImageSelection,
    against: ImageSelection | None,
    layers: Sequence[int],
    groups: list[list[Part]],
    answer_only: bool,
) -> Figure:
    """The rows of one record above those of another, and what they have in common."""
    if against is None:
        raise PmodError("compare needs something to compare with", hint="`against=MODEL` or `against_question=TEXT`")
    common, chance = in_common(record, against)
    total = record.layout.size
    headings = []
    for layer in layers:
        here, there = int(record.kept[layer].sum()), int(against.kept[layer].sum())
        counts = f"{here} of {total} kept" if here == there else f"{here} and {there} of {total}"
        told = (f"{common[layer]:.0%} in common", f"by chance {chance[layer]:.0%}") if min(here, there) else ()
        headings.append((f"Layer {layer}", counts, *told))
    labels = _row_labels(record.layout, groups)
    rows = [f"{letter}: {label}" if label else letter for letter in "AB" for label in labels]
    caption = [] if answer_only else _questions(record, against)
    for letter, own in (("A", record), ("B", against)):
        caption += [(f"{letter}: {text}", colour) for text, colour in _about(own, answer_only)]
    notes = Notes(_legend(record, groups, "compare", answer_only), caption)
    sheet = Sheet(record.layout, headings, rows, notes, strip=_ends(groups))
    panels = [prepare(record.image, record.layout, group, *sheet.pixels) for group in groups]
    for column, layer in enumerate(layers):
        for half, own in enumerate((record, against)):
            for row, panel in enumerate(panels):
                painted, strip = _paint_kept(panel, own.kept[layer])
                under = _count(groups[row], own.kept[layer])
                sheet.panel(column, half * len(groups) + row, painted, strip, under, record.regions)
    return sheet.figure


def _heading(record: ImageSelection, layer: int, *, short: bool) -> list[str]:
    """Which layer, how many tokens it keeps, at which ratio."""
    total = record.layout.size
    if not record.routed[layer]:
        return [f"Layer {layer}", "plain" if short else "plain layer:", f"all {total}" + ("" if short else " tokens")]
    counts = f"{record.kept[layer].sum()} of {total}"
    return [
        f"Layer {layer}",
        counts + ("" if short else " kept"),
        f"{'' if short else 'retention '}{record.retention[layer]:.2f}",
    ]


def _row_labels(layout: TokenLayout, groups: list[list[Part]]) -> list[str]:
    return [_name(layout, group[0]) for group in groups] if len(groups) > 1 else [""]


def _name(layout: TokenLayout, part: Part) -> str:
    return PART_NAMES[part.name].format(*layout.tile_grid or ())


def _tokens(group: list[Part]) -> np.ndarray:
    return np.concatenate([np.append(part.tokens.ravel(), part.newlines) for part in group])


def _count(group: list[Part], kept: np.ndarray) -> str:
    return f"{kept[_tokens(group)].sum()} of {sum(part.size for part in group)}"


def _ends(groups: list[list[Part]]) -> bool:
    return any(part.newlines.size for group in groups for part in group)


def _paint_kept(panel: Panel, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    strip = panel.draw_strip(np.where(kept[:, None], KEPT, SKIPPED)) if panel.newline.size else None
    return panel.draw_kept(kept), strip


def _weight_colours(record: ImageSelection, layers: Sequence[int]) -> tuple[dict[int, np.ndarray], ColourBar | None]:
    """Colours of each weighted layer's tokens on one scale, and its bar; None where no layer weighs any."""
    weighted = [layer for layer in layers if record.weighted[layer]]
    if not weighted:
        return {}, None
    low, high = float(record.weight[weighted].min()), float(record.weight[weighted].max())
    bar = ColourBar(_gradient(), f"{low:.3f}", f"{high:.3f}", "router weight, one scale for all layers")
    return {layer: _colours(record.weight[layer], low, high) for layer in weighted}, bar


def _colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 (V, 3) for values (V,)."""
    return matplotlib.colormaps[COLOUR_MAP]((values - low) / max(high - low, 1e-9), bytes=True)[:, :3]


def _gradient() -> np.ndarray:
    return _colours(np.linspace(0, 1, 256), 0, 1)


def _legend(record: ImageSelection, groups: list[list[Part]], mode: str, answer_only: bool) -> list[tuple[dict, str]]:
    if answer_only:
        return []
    kept, skipped = (f"#{bytes(colour).hex()}" for colour in (KEPT, SKIPPED))
    legend: list[tuple[dict, str]] = []
    if mode == "weights":
        merged = " in the whole image or in the tiles" if len(groups[0]) > 1 else ""
        hatch = {"facecolor": "#123570", "edgecolor": "white", "hatch": "////////", "linewidth": 0}
        legend.append(({"facecolor": "white", "edgecolor": kept}, f"framed: patch kept by the layer{merged}"))
        legend.append((hatch, "hatched: patch skipped"))
    elif mode != "depth":
        legend.append(({"facecolor": "white", "edgecolor": kept}, "patch kept by the layer"))
        legend.append(({"facecolor": skipped, "edgecolor": skipped}, "patch skipped"))
        if len(groups[0]) > 1:
            legend[0] = (legend[0][0], "kept in the whole image and in the tiles; half clear: in one of them")
    if _ends(groups):
        in_strip = ({"facecolor": kept, "edgecolor": kept}, "in the strip: end-of-row token kept")
        coloured = ({"facecolor": "white", "edgecolor": QUIET}, "strip at the right: end-of-row tokens")
        legend.append(coloured if mode in ("weights", "depth") else in_strip)
    if record.regions:
        legend.append(({"edgecolor": REGION, "linestyle": (0, (2, 1))}, "box given with the picture"))
    layout = record.layout
    if canvas(layout) != (0, 0, layout.width, layout.height):
        legend.append(({"facecolor": "white", "edgecolor": INK}, "outside the dark frame: padding"))
    if any(hides(layout, group) for group in groups):
        style = {"facecolor": "white", "edgecolor": skipped, "hatch": "//////"}
        legend.append((style, "grey stripes: cut off, never seen by the model"))
    return legend


def _questions(record: ImageSelection, against: ImageSelection) -> list[tuple[str, str]]:
    if record.question == against.question:
        return [(f"Q: {record.question}", INK)]
    asked = [(f"{letter} is asked: {own.question}", INK) for letter, own in (("A", record), ("B", against))]
    return [*asked, (BLIND, ALERT)] if asked_blindly(record, against) else asked


def asked_blindly(record: ImageSelection, against: ImageSelection) -> bool:
    """Whether two questions were put to one model so that they could not change what it keeps."""
    other = record.question != against.question and record.model == against.model
    blind = other and record.image_first and against.image_first and np.array_equal(record.kept, against.kept)
    return blind and against.chosen_by != "attention" and not SELECTIONS[against.chosen_by].looks_ahead


def _caption(record: ImageSelection, answer_only: bool) -> list[tuple[str, str]]:
    """Texts and their colours: question, answer, model."""
    caption = [] if answer_only else [(f"Q: {record.question}", INK)]
    if record.answer is not None:
        caption.append((("" if answer_only else "A: ") + (record.answer or "(nothing)"), INK))
    return caption + _about(record, answer_only, answer=False)


def _about(record: ImageSelection, answer_only: bool, *, answer: bool = True) -> list[tuple[str, str]]:
    """One model: its name, what chose the tokens, its answer. That routers are untrained is never left out."""
    texts = [record.answer or "(nothing)"] if answer and answer_only and record.answer is not None else []
    if not answer_only:
        known = {
            "router": f"{record.router_state} routers",
            "attention": "the tokens that the prompt's last token attends to most, mean of all heads",
        }
        chosen = known.get(record.chosen_by, f"tokens chosen by the selection {record.chosen_by}")
        answered = [f"answers: {record.answer or '(nothing)'}"] if answer and record.answer is not None else []
        texts.append("; ".join([f"{record.model}, {chosen}", *answered, *record.all_notes]))
    about = [(text, QUIET) for text in texts]
    if record.router_state == "untrained" and record.chosen_by == "router":
        words = "Untrained routers, which have learnt nothing yet. This is no choice of the model."
        about.append((words, ALERT))
    return about
