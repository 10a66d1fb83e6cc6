"""A profile and a sweep as figures for a paper or a page. Colours are Okabe and Ito's, told apart by every eye."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.text import GIGA, MIB, TERA, percent
from pmod_cli.profiling.comparison import Profile
from pmod_cli.profiling.cost_sweep import Axis, Scores, SweepPoint

STOCK, PMOD, SECOND, THIRD, SCORE = "#9a9a9a", "#0072b2", "#56b4e9", "#d55e00", "#009e73"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "pmod",
}


def layers_figure(result: Profile) -> Figure:
    """Retention, GFLOPs and KV cache of every layer, stock as the outline behind p-MoD."""
    layers = result.pmod.layers
    index = [layer.layer for layer in layers]
    edges = [number - 0.5 for number in range(len(layers) + 1)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 6.0), layout="constrained")
        retention, flops, cache = figure.subplots(3, 1, sharex=True)
        left = result.routed.before  # of all vision tokens, those that reach the decoder: the mean is of all, too
        retention.bar(index, [left * layer.retention for layer in layers], width=0.8, color=PMOD)
        retention.axhline(result.mean_retention, color=THIRD, linewidth=1, linestyle="--")
        retention.text(
            len(layers) - 0.4,
            result.mean_retention + 0.02,
            f"mean {round(result.mean_retention, 6):.4f}",
            color=THIRD,
            ha="right",
            va="bottom",
        )
        retention.set_ylim(0, 1.05)
        retention.set_ylabel("retention ratio")
        bottom = [0.0] * len(layers)
        for label, color, part in (
            ("MLP", PMOD, "mlp"),
            ("attention projections", SECOND, "attention"),
            ("attention products", THIRD, "attention_products"),
        ):
            values = [getattr(layer, part) / GIGA for layer in layers]
            flops.bar(index, values, width=0.8, bottom=bottom, color=color, label=label)
            bottom = [below + value for below, value in zip(bottom, values, strict=True)]
        stock = [layer.total / GIGA for layer in result.stock.layers]
        flops.stairs(stock, edges, baseline=None, color=STOCK, linewidth=1.4, label="stock")
        flops.set_ylabel("GFLOPs")
        flops.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
        cache.bar(index, [layer.vision / MIB for layer in result.pmod_kv], width=0.8, color=PMOD, label="vision")
        cache.bar(
            index,
            [layer.text / MIB for layer in result.pmod_kv],
            width=0.8,
            bottom=[layer.vision / MIB for layer in result.pmod_kv],
            color=THIRD,
            label="text",
        )
        cache.stairs(
            [layer.total / MIB for layer in result.stock_kv],
            edges,
            baseline=None,
            color=STOCK,
            linewidth=1.4,
            label="stock",
        )
        cache.set_ylabel(f"KV cache, MiB\n{result.dtype}")
        cache.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
        cache.set_xlabel("decoder layer")
        cache.set_xlim(-0.7, len(layers) - 0.3)
        cache.xaxis.get_major_locator().set_params(integer=True)
    return figure


def sweep_figure(axis: Axis, points: Sequence[SweepPoint], scores: Scores | None = None) -> Figure:
    """FLOPs and KV cache in percent of stock over the swept setting; over resolutions, TFLOPs of both models.

    Scores have an axis of their own, to the right.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        numeric = all(not isinstance(point.value, str) for point in points)
        places = [point.value for point in points] if numeric else list(range(len(points)))
        if axis.name == "image-size":
            axes.plot(places, [point.stock.full / TERA for point in points], "s-", color=STOCK, label="stock")
            axes.plot(places, [point.pmod.full / TERA for point in points], "o-", color=PMOD, label="p-MoD")
            axes.set_ylabel("prefill, TFLOPs")
        else:
            flops = [percent(point.pmod.full, point.stock.full) for point in points]
            held = [percent(point.pmod_kv, point.stock_kv) for point in points]
            axes.plot(places, flops, "o-", color=PMOD, label="prefill FLOPs")
            axes.plot(places, held, "s--", color=THIRD, label="KV cache")
            axes.set_ylabel("percent of stock")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        if not numeric:
            axes.set_xticks(places, [str(point.value) for point in points])
        axes.set_xlabel(axis.name)
        handles, labels = axes.get_legend_handles_labels()
        if scores is not None:
            right = axes.twinx()
            right.spines["right"].set_visible(True)
            right.grid(False)
            known = [(place, score) for place, score in zip(places, scores.at, strict=True) if score is not None]
            right.plot(*zip(*known, strict=True), "D:", color=SCORE, label="score")
            right.set_ylabel(f"mean score of {', '.join(scores.tasks)}" if len(scores.tasks) < 3 else "mean score")
            more, names = right.get_legend_handles_labels()
            handles, labels = handles + more, labels + names
        axes.legend(handles, labels, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture; an existing file is replaced at once or not at all."""
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    kind = path.suffix.lower().lstrip(".")
    metadata: Any = {"Date": None} if kind == "svg" else None  # no date, so that a picture is the same again
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format=kind, dpi=200, metadata=metadata)
    write_bytes(path, out.getvalue())


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element, for a page."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
