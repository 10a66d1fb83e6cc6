"""Where a model reads, as tables, JSON, CSV rows and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pmod_cli.calibration.depth import IDLE, READS, Depth
from pmod_cli.reporting import plain_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

NOTES = (
    "nats: rise of the loss of an answer token, minus the log-likelihood, above that of the model as it is",
    "skipped: no token passes the layer; vision skips it: no vision token does, and none is seen in it",
    "hidden from it on: no vision token passes this layer or a later one",
    f"idle: layers that all tokens can skip at a rise below {IDLE}; read: a rise of {READS} or more",
)


def depth_tables(found: Mapping[str, Depth]) -> list[Table]:
    """A summary, then the layers of each task."""
    summary = plain_table(
        "Where the vision tokens are read", "task", "answer tokens", "loss", "idle layers", "read last at", "read at"
    )
    for task, depth in found.items():
        last = "-" if depth.last_read is None else str(depth.last_read)
        reads = " ".join(map(str, depth.reads_at)) or "-"
        summary.add_row(task, f"{depth.tokens:,}", f"{depth.base:.4f}", f"{depth.idle}", last, reads)
    tables = [summary]
    for task, depth in found.items():
        table = plain_table(f"{task}: rise in nats", "layer", "skipped", "vision skips it", "hidden from it on")
        for layer, values in enumerate(zip(*depth.rise.values(), strict=True)):
            table.add_row(str(layer), *(_shown(value) for value in values))
        tables.append(table)
    return tables


def _shown(value: float) -> str:
    return f"{value:.3f}".replace("-0.000", "0.000")


def depth_json(found: Mapping[str, Depth]) -> dict[str, Any]:
    """By task, the base loss, the summary and the rise of each layer, in nats an answer token."""
    return {
        task: {
            "answer_tokens": depth.tokens,
            "loss": depth.base,
            "idle_layers": depth.idle,
            "reads_at": depth.reads_at,
            "last_read": depth.last_read,
            "rise": depth.rise,
        }
        for task, depth in found.items()
    }


def depth_rows(found: Mapping[str, Depth]) -> list[dict[str, Any]]:
    """A row for each task and layer."""
    return [
        {"task": task, "layer": layer, "loss": depth.base} | {way: depth.rise[way][layer] for way in depth.rise}
        for task, depth in found.items()
        for layer in range(len(depth.rise["skipped"]))
    ]


def depth_figure(found: Mapping[str, Depth]) -> Figure:
    """A row of axes for each task: single layers skipped as bars, images hidden from a layer on as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    from pmod_cli.profiling.plots import PMOD, STOCK, STYLE, THIRD

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.6 + 1.7 * len(found)), layout="constrained")
        rows: list[Any] = list(figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0])
        for axes, (task, depth) in zip(rows, found.items(), strict=True):
            layers = list(range(len(depth.rise["skipped"])))
            axes.bar([x - 0.2 for x in layers], depth.rise["skipped"], width=0.4, color=STOCK, label="skipped by all")
            vision = depth.rise["skipped_vision"]
            axes.bar([x + 0.2 for x in layers], vision, width=0.4, color=PMOD, label="skipped by vision tokens")
            hidden = depth.rise["hidden_from"]
            axes.plot(layers, hidden, color=THIRD, marker=".", label="vision tokens hidden from here on")
            axes.set_yscale("symlog", linthresh=0.01)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.set_ylabel(f"{task}\nrise, nats")
        rows[0].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.2)
        rows[-1].set_xlabel("decoder layer")
        rows[-1].set_xlim(-0.7, len(layers) - 0.3)
        rows[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure
