"""A sweep as a picture: the mean score of each recipe, its seeds and their spread, the reference as a line."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from pmod_cli.profiling.plots import PMOD, STOCK, STYLE, THIRD
from pmod_cli.training.ablation_sweep import why_unscored

ROW = 0.26  # inches


def sweep_figure(rows: Sequence[dict], reference: str | None = None) -> Figure:
    """One line a row, from above in the order given; a row without a score says why.

    Args:
        rows: as `ablation_sweep.table` has them: `recipe`, and where it was scored `mean_score_percent` (mean and
            standard deviation of the seeds, in percent) and `of_each_seed`; elsewhere `status`, and `failed` by seed.
        reference: the `recipe` of the row that the others change in one thing.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(6.4, 0.8 + ROW * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            found = row.get("mean_score_percent")
            if found is None:
                axes.annotate(
                    why_unscored(row), (0.01, place), xycoords=("axes fraction", "data"), va="center", color=STOCK
                )
                continue
            color = THIRD if row["recipe"] == reference else PMOD
            axes.errorbar(found["mean"], place, xerr=found["spread"] or 0, fmt="o", color=color)
            each = row.get("of_each_seed", [])
            axes.plot(each, [place] * len(each), "|", color=color, markersize=9, alpha=0.6)
            if row["recipe"] == reference:
                axes.axvline(found["mean"], color=THIRD, linewidth=0.8, linestyle="--", zorder=0)
        axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("mean score, percent (bar: spread of the seeds)")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure
