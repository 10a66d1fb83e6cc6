"""Methods at their budgets as a figure: scores against FLOPs and seconds, and against random dropping; and the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pmod_cli.core.atomic import write_text
from pmod_cli.evaluation.intervals import is_gain
from pmod_cli.evaluation.results import markdown, tables
from pmod_cli.profiling.plots import STYLE, save, to_svg
from pmod_cli.reporting import plain_table, report_page

PICTURE, PICTURE_OF_MEAN, PAGE = "pareto.png", "pareto-mean.png", "report.html"
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c510a", "#5e3c99"),  # Okabe-Ito and two
    *("#882255", "#44aa99", "#999933", "#661100"),  # of Tol's
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h")
ON = " on "  # between a method and its model
RANDOM, STOCK, FRONT = "#9a9a9a", "#000000", "#4a4a4a"
APART = 0.5  # percent of the stock FLOPs between two intervals, so that none hides another


@dataclass(frozen=True)
class Point:
    """One model on one benchmark.

    Attributes:
        flops: Of the decoder's prefill, percent of the stock model's.
        seconds: In `generate`, a question; None where no time was taken.
        score, low, high: With its interval; the bounds are None where there is none.
        gain: Difference, low and high bound of it, to random dropping at the same FLOPs; None where there is none.
        lower_is_better: Of the score.
    """

    flops: float
    seconds: float | None
    score: float
    low: float | None
    high: float | None
    gain: tuple[float, float | None, float | None] | None
    lower_is_better: bool = False

    @property
    def beats_random(self) -> bool:
        """Whether the interval of the difference is on the good side of zero; what is not compared is not beaten."""
        return self.gain is None or is_gain(*self.gain[1:], lower_is_better=self.lower_is_better)


def has_costs(results: Mapping[str, Any]) -> bool:
    """Whether there is something to draw: models of different FLOPs, or methods."""
    costs = {tables.cost_of(model).get("flops") for model in results["models"].values()}
    return len(costs - {None}) > 1 or tables.has_methods(results)


def curves(results: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, list[Point]]:
    """By method, or by label of a model that runs under none: its points on a benchmark or kind, the cheapest first.

    Where methods ran on several models, a method has a curve for each, `fastv on MODEL`. The budgets of
    one calibration, `OUT-54` and so on, are points of one curve, `OUT`.
    """
    found: dict[str, list[Point]] = {}
    bases = {model.get("weights_sha256") for model in results["models"].values() if model.get("method")}
    stems = Counter(_stem(label, model) for label, model in results["models"].items())
    for label, model in results["models"].items():
        entry, flops = part["scores"].get(label, {}), tables.cost_of(model).get("flops")
        if entry.get("score") is None or flops is None:
            continue
        gain = entry.get("over_random")
        point = Point(
            flops=100 * flops,
            seconds=_seconds(entry),
            score=entry["score"],
            low=entry.get("low"),
            high=entry.get("high"),
            gain=gain and (gain["difference"], gain["low"], gain["high"]),
            lower_is_better=bool(entry.get("lower_is_better")),
        )
        stem = _stem(label, model)
        name = model.get("method")
        if name and len(bases) > 1:
            name += ON + Path(model.get("path", "")).name
        found.setdefault(name or (label if stems[stem] == 1 else stem), []).append(point)
    return {name: sorted(points, key=lambda point: point.flops) for name, points in found.items()}


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) pairs that no other one beats by costing no more and scoring no less, the cheapest first."""
    ordered = sorted(set(points), key=lambda point: (point[0], -point[1]))
    best = accumulate((score for _, score in ordered), max, initial=float("-inf"))
    return [point for point, before in zip(ordered, best, strict=False) if point[1] > before]


def figure(results: Mapping[str, Any], *, mean: bool = False) -> Figure:
    """A row a kind of task, or a benchmark where there is one kind: score over FLOPs, difference to random, seconds.

    A mark without filling does not beat random at the same FLOPs. The stepped line joins what nothing cheaper beats.

    Args:
        mean: Draw the mean of all tasks alone.
    """
    parts = results["kinds"] if tables.has_kinds(results) else results["tasks"]
    parts = parts[-1:] if mean else parts
    shown = [(part, own) for part in parts if (own := curves(results, part))]
    timed = any(point.seconds for _, own in shown for points in own.values() for point in points)
    names = list(dict.fromkeys(name for _, own in shown for name in own))
    looks = _looks(names, results)
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(3.4 * (2 + timed) + 0.4, 2.5 * len(shown) + 0.8), layout="constrained")
        grid: list[list[Axes]] = drawn.subplots(len(shown), 2 + timed, squeeze=False).tolist()
        for (part, own), row in zip(shown, grid, strict=True):
            for axes, cost in zip(row[::2], ("flops", "seconds"), strict=False):
                _scores(axes, own, looks, cost)
                lower = ", lower is better" if part.get("lower_is_better") else ""
                axes.set_ylabel(f"{part['title']}, score{lower}")
            _gains(row[1], own, looks)
            row[1].set_ylabel("score − random")
        grid[0][1].set_title("filled: beats random at the same FLOPs", fontsize=9)
        for axes, words in zip(
            grid[-1], ("FLOPs, % of stock", "FLOPs, % of stock", "seconds a question"), strict=False
        ):
            axes.set_xlabel(words)
        legend = [Line2D([], [], color=look[0], marker=look[1], linestyle=look[2]) for look in looks.values()]
        drawn.legend(legend, list(looks), loc="outside upper center", ncols=5 if timed else 3)
    return drawn


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes the figure and the page, which has the tables and what the text says of random too."""
    picture = figure(results)
    save(picture, folder / PICTURE)
    if tables.has_kinds(results):
        save(figure(results, mean=True), folder / PICTURE_OF_MEAN)
    listed = tables.rows(results)
    columns = tables.score_columns(results, listed)
    shown = [("Scores", list(columns), [[cell(row) for cell in columns.values()] for row in listed])]
    if tables.has_kinds(results):
        shown.append(("Scores by kind of task", *tables.kind_rows(results)))
    shown.append(("Cost", *tables.cost_rows(results)))
    plain = [plain_table(title, *headings) for title, headings, _ in shown]
    for table, (_, _, lines) in zip(plain, shown, strict=True):
        for line in lines:
            table.add_row(*line)
    words = "Scores against FLOPs and seconds, and the difference to random dropping at the same FLOPs"
    lead = ". ".join([*markdown.warnings(results), words])
    title = f"{next(iter(results['models']))} and others: scores against FLOPs"
    page = report_page(title, lead, [(words, to_svg(picture))], plain, markdown.notes(results))
    write_text(folder / PAGE, page)


def _stem(label: str, model: Mapping[str, Any]) -> str:
    """The name without the budget that `pmod calibrate` puts behind it."""
    return re.sub(r"-\d+(\.\d+)?$", "", label) if model.get("routers") == "calibrated" else label


def _seconds(entry: Mapping[str, Any]) -> float | None:
    return entry["generate_seconds"] / entry["questions"] if entry.get("generate_seconds") else None


def _looks(names: Sequence[str], results: Mapping[str, Any]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line of each curve: black what runs under no method, grey random."""
    looks: dict[str, tuple[str, str, str]] = {}
    named = {model.get("method") for model in results["models"].values()}
    methods = 0
    for name in sorted(names, key=lambda name: (name not in results["models"], name.partition(ON)[0] != "random")):
        method = name.partition(ON)[0]
        if name in results["models"]:
            looks[name] = (STOCK, "*d<>"[len(looks) % 4], "")
        elif method not in named:  # the budgets of a calibration
            looks[name] = (STOCK, "osDv"[len(looks) % 4], "-")
        elif method == "random":
            looks[name] = (RANDOM, MARKERS[sum(look[0] == RANDOM for look in looks.values()) % len(MARKERS)], "--")
        else:
            looks[name] = (COLOURS[methods % len(COLOURS)], MARKERS[methods % len(MARKERS)], "-")
            methods += 1
    return looks


def _scores(axes: Axes, own: Mapping[str, list[Point]], looks: Mapping[str, Any], cost: str) -> None:
    """Scores over one of the two costs, and what nothing cheaper beats; budgets are met to a percent."""
    sign = -1 if any(point.lower_is_better for points in own.values() for point in points) else 1
    pairs = []
    for name, points in own.items():
        colour, marker, line = looks[name]
        known = [(getattr(point, cost), point) for point in points if getattr(point, cost) is not None]
        axes.plot([place for place, _ in known], [point.score for _, point in known], line, color=colour, linewidth=1.0)
        for place, point in known:
            _mark(axes, place, point.score, colour, marker, point)
            pairs.append((round(place) if cost == "flops" else place, sign * point.score))
    best = [(place, sign * score) for place, score in front(pairs)]
    axes.step(*zip(*best, strict=True), where="post", color=FRONT, linewidth=0.8, linestyle=":", zorder=0)


def _gains(axes: Axes, own: Mapping[str, list[Point]], looks: Mapping[str, Any]) -> None:
    """Differences to random at the same FLOPs with their paired intervals, side by side."""
    axes.axhline(0, color=RANDOM, linewidth=1, linestyle="--")
    compared = [name for name, points in own.items() if any(point.gain for point in points)]
    for number, name in enumerate(compared):
        colour, marker, _ = looks[name]
        for point in own[name]:
            if point.gain is None:
                continue
            place, (points_of, low, high) = point.flops + APART * (number - (len(compared) - 1) / 2), point.gain
            if low is not None and high is not None:
                axes.plot([place] * 2, [low, high], color=colour, linewidth=1.0)
            _mark(axes, place, points_of, colour, marker, point)


def _mark(axes: Axes, x: float, y: float, colour: str, marker: str, point: Point) -> None:
    filling = colour if point.beats_random else "white"
    axes.plot(x, y, marker, color=colour, markerfacecolor=filling, markersize=5)
