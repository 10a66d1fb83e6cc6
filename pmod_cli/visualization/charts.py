"""The schedule as a chart: planned retention, what was kept, and what each part of the image had of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pmod_cli.visualization.image_selection import ImageSelection
from pmod_cli.visualization.page import INK, LINE, MARGIN, QUIET, SMALL_PT, TEXT_PT, Page, wrap

WIDTH, HEIGHT = 3.4, 1.9  # inches: a paper column; of the axes alone, the height
LEFT, BELOW = 0.42, 0.36  # inches for the labels of the axes
COLOURS = {"base": "#0072b2", "tiles": "#009e73", "ends of rows": "#cc79a7"}  # Okabe-Ito
DPI = 300


def schedule_chart(record: ImageSelection, caption: Sequence[tuple[str, str]]) -> Figure:
    """Retention over layers: the plan as steps, the real share as points, the shares of each part as lines."""
    lines = [line for text, colour in caption for line in wrap(text, WIDTH - 2 * MARGIN, colour)]
    shares = _shares(record)
    legend_rows = 1 + -(-len(shares) // 2)
    height = 2 * MARGIN + (legend_rows + 0.6 + len(lines) + 0.5) * LINE + HEIGHT + BELOW
    page = Page(WIDTH, height, DPI)
    top = MARGIN + (legend_rows + 0.6) * LINE
    axes = page.figure.add_axes(
        (LEFT / WIDTH, 1 - (top + HEIGHT) / height, (WIDTH - LEFT - 0.12) / WIDTH, HEIGHT / height)
    )
    layers = np.arange(record.num_layers)
    edges = np.arange(record.num_layers + 1) - 0.5
    real = record.kept.mean(axis=1)
    axes.stairs(
        record.retention,
        edges,
        baseline=None,
        color=QUIET,
        linewidth=1.2,
        label=f"planned, mean {record.retention.mean():.3f}",
    )
    axes.plot(layers, real, "o", color="#d55e00", markersize=2.6, label=f"real, mean {real.mean():.3f}")
    for name, (label, values) in shares.items():
        axes.plot(layers, values, color=COLOURS[name], linewidth=0.9, label=label)
    axes.set_xlim(-0.5, record.num_layers - 0.5)
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("layer", fontsize=TEXT_PT, color=INK, labelpad=2)
    axes.set_ylabel("share of vision tokens kept", fontsize=TEXT_PT, color=INK, labelpad=3)
    axes.tick_params(labelsize=SMALL_PT, colors=INK, length=2, pad=2)
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # a MaxNLocator
    axes.grid(True, color="#e4e4e4", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    page.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 1),
        ncols=2,
        fontsize=SMALL_PT,
        frameon=False,
        borderaxespad=0.5,
        columnspacing=1.2,
        handlelength=1.4,
    )
    for number, (words, colour) in enumerate(lines):
        page.text(MARGIN, height - MARGIN - (len(lines) - number) * LINE, words, colour)
    return page.figure


def _shares(record: ImageSelection) -> dict[str, tuple[str, np.ndarray]]:
    """Of an image with several parts: label and share of its tokens kept, (L,), for each."""
    if len(record.layout.parts) == 1:
        return {}
    base, tiles = record.layout.parts
    groups = {
        "base": ("whole image", base.tokens.ravel()),
        "tiles": ("tiles", tiles.tokens.ravel()),
        "ends of rows": ("ends of rows", tiles.newlines),
    }
    return {
        name: (f"{label}, {len(tokens)} tokens", record.kept[:, tokens].mean(axis=1))
        for name, (label, tokens) in groups.items()
        if len(tokens)
    }
