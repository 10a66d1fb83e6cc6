"""Calibrations as tables, JSON, a section of the model card, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pmod_cli.calibration.calibration import Calibration, CalibrationSettings, Judged
from pmod_cli.calibration.search import TOGETHER, describe
from pmod_cli.reporting import markdown_table, plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

HEADINGS = ("model", "FLOPs", "retention", "KV cache", "KL to stock", "answers unchanged")
NOTES = (
    "KL to stock: nats an answer token; answers unchanged: token by token. Both on pictures that nothing was chosen by",
    "cosine, calibrated: the paper's schedule, a router fitted in the same way; converted: as pmod convert makes it",
    "uniform and random: the same schedule and layers, evenly spaced tokens and random ones (mean of three draws)",
)


def notes(results: Sequence[Calibration], settings: CalibrationSettings) -> list[str]:
    """How to read the tables."""
    vision, text = results[0].tokens
    prompt = "image of 672x672" if settings.prompt == "profile" else f"mean prompt of the data: {vision} vision"
    logits = "" if settings.logits == "every" else ", lm_head on the last position"
    counted = f"FLOPs: share of the stock decoder's prefill ({prompt}, {text} text tokens, attention counted{logits})"
    return [f"{counted}; KV cache of it", *NOTES]


def cells(row: Judged) -> list[str]:
    """A line of the table."""
    return [
        row.name,
        f"{100 * row.flops:.1f} %",
        f"{row.retention:.3f}",
        f"{100 * row.kv:.1f} %",
        f"{row.divergence:.4f}",
        f"{row.unchanged:.3g} of {row.pictures}",
    ]


def tables(results: Sequence[Calibration]) -> list[Table]:
    """One for each budget."""
    made = []
    for result in results:
        table = plain_table(f"Budget {result.share:g}", *HEADINGS)
        for row in result.judged:
            table.add_row(*cells(row))
        made.append(table)
    return made


def chosen(result: Calibration) -> str:
    """What was found, in one line."""
    found = result.found
    if not found.routers:
        return f"budget {result.share:g}: every layer keeps every token"
    by = ", ".join(f"layer {layer} by {found.target[layer]}" for layer in found.schedule.select_at)
    return f"budget {result.share:g}: chosen in {by}; kept: {describe(found.schedule)}"


def to_json(results: Sequence[Calibration], settings: CalibrationSettings) -> dict[str, Any]:
    """Everything that was measured. KL in nats an answer token."""
    said = asdict(settings)
    said["images"] = None if settings.images is None else settings.images.name
    return {"schema_version": 1, "asked_for": said, "budgets": [_budget_json(result) for result in results]}


def _budget_json(result: Calibration) -> dict[str, Any]:
    found = result.found
    return {
        "share": result.share,
        "vision_tokens": result.tokens[0],
        "text_tokens": result.tokens[1],
        "ratios": list(found.schedule.ratios),
        "select_at": list(found.schedule.select_at),
        "routers": {
            str(layer): {"target": found.target[layer], "correlation_on_pictures_left_out": found.correlation[layer]}
            for layer in found.routers
        },
        "kl_on_the_samples_of_the_search": found.divergence,
        "judged": [asdict(row) for row in result.judged],
        "kl_hidden_from": result.hidden,
        "kl_of_neighbours_at_a_ratio": {
            _neighbours(layer, len(found.schedule.ratios)): {
                f"{ratio:g}": loss for ratio, loss in sorted(losses.items())
            }
            for layer, losses in found.thinned.items()
        },
        "tried": [{"what": what, "kl": loss} for what, loss in found.steps],
    }


def _neighbours(first: int, layers: int) -> str:
    """The layers that were changed at once: `6-7`; of an odd number of layers, the last one alone."""
    last = min(first + TOGETHER, layers) - 1
    return f"{first}-{last}" if last > first else f"{first}"


def card(result: Calibration, settings: CalibrationSettings) -> str:
    """What the model card says."""
    judging = result.judged[0].pictures
    lines = [
        f"No weight of the source was trained. {settings.samples - judging} samples of `{_data(settings)}` chose; the "
        f"table is of {judging} others, with other pictures. {chosen(result)[0].upper()}{chosen(result)[1:]}.",
        "",
        markdown_table(HEADINGS, [cells(row) for row in result.judged]),
        "",
        *(f"- {note}" for note in notes([result], settings)),
        "",
        "`calibration.json` has everything that was measured, `calibration.png` what each layer keeps and needs.",
    ]
    return "\n".join(lines)


def _data(settings: CalibrationSettings) -> str:
    """The data by its last name: a path says more about a machine than about a model."""
    return settings.data.rstrip("/").rsplit("/", 1)[-1] if settings.data.startswith((".", "/", "~")) else settings.data


def depth_figure(result: Calibration) -> Figure:
    """What each layer keeps, above what it costs to hide images from it on, or from it and its neighbour alone."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from pmod_cli.profiling.plots import PMOD, SECOND, STYLE, THIRD

    found, layers = result.found, list(range(len(result.hidden)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        kept, needed = figure.subplots(2, 1, sharex=True)
        colors = [THIRD if layer in found.schedule.select_at else PMOD for layer in layers]
        kept.bar(layers, found.schedule.ratios, width=0.8, color=colors)
        chooses = Patch(color=THIRD, label="chooses, the layers behind it hold the choice")
        kept.legend(handles=[chooses], loc="upper right")
        kept.set_ylim(0, 1.15)
        kept.set_ylabel("retention ratio")
        needed.plot(layers, result.hidden, ".-", color=THIRD, label="vision tokens hidden from here on, stock model")
        if found.thinned:
            widths = [min(TOGETHER, len(layers) - layer) - 0.2 for layer in found.thinned]
            alone = [losses[0.0] for losses in found.thinned.values()]
            label = "hidden from two neighbours alone, in the search"
            needed.bar([layer - 0.4 for layer in found.thinned], alone, widths, align="edge", color=SECOND, label=label)
        needed.set_yscale("symlog", linthresh=0.001)
        needed.set_ylim(bottom=0)
        needed.set_ylabel("KL to stock, nats")
        needed.set_xlabel("decoder layer")
        needed.set_xlim(-0.7, len(layers) - 0.3)
        needed.xaxis.get_major_locator().set_params(integer=True)
        needed.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
    return figure


def pareto_figure(results: Sequence[Calibration]) -> Figure:
    """KL over the share of FLOPs, the calibrated model beside its controls."""
    import matplotlib
    from matplotlib.figure import Figure

    from pmod_cli.profiling.plots import PMOD, SCORE, SECOND, STOCK, STYLE, THIRD

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(row.name for result in results for row in result.judged))
        for name, color in zip(names, (PMOD, THIRD, SCORE, SECOND, STOCK), strict=False):
            rows = sorted((row for r in results for row in r.judged if row.name == name), key=lambda row: row.flops)
            axes.plot(
                [100 * row.flops for row in rows], [row.divergence for row in rows], "o-", color=color, label=name
            )
        axes.set_yscale("symlog", linthresh=0.001)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prefill FLOPs, percent of stock")
        axes.set_ylabel("KL to stock, nats an answer token")
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
    return figure
