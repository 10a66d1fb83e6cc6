"""What was drawn, in words: the table of a picture, the lines of a summary, the object for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pmod_cli.visualization.job import Drawn
from pmod_cli.visualization.statistics import in_common

if TYPE_CHECKING:
    from rich.table import Table


def layer_table(drawn: Drawn) -> Table:
    """One row a layer that was drawn: tokens kept, retention, and what a comparison has in common."""
    from rich.table import Table

    record = drawn.record
    common = in_common(record, drawn.against)[0] if drawn.against else None
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", f"kept of {record.layout.size}", "retention", *(["in common"] if drawn.against else [])):
        table.add_column(heading, justify="right")
    for layer in drawn.layers:
        kept = str(record.kept[layer].sum()) if record.routed[layer] else "all (plain)"
        shared = [f"{common[layer]:.0%}"] if drawn.against else []
        table.add_row(str(layer), kept, f"{record.retention[layer]:.3f}", *shared)
    return table


def summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The numbers of `summarise` beside chance, one line each; none where nothing is known."""
    for words, numbers in (
        ("kept tokens that the next layer keeps too", summary["neighbour_overlap"]),
        ("kept tokens that lie on the boxes", summary["kept_on_regions"]),
        ("the same, against as many tokens of each part", summary["kept_on_regions_in_parts"]),
    ):
        if numbers:
            interval = ""
            if numbers["lift_95"]:
                low, high = numbers["lift_95"]
                interval = f" (95 % interval: {low:.2f} … {high:.2f})"
            yield (
                f"{words}: {numbers['mean']:.1%}, by chance {numbers['by_chance']:.1%}, "
                f"lift {numbers['lift']:.2f}{interval}"
            )


def describe(drawn: Drawn) -> dict[str, Any]:
    """Everything about one picture, for JSON; `against` is null where nothing was compared."""
    against = None
    if drawn.against:
        common, chance = in_common(drawn.record, drawn.against)
        against = drawn.against.to_dict(drawn.layers)
        for layer in against["layers"]:
            layer["in_common"] = round(float(common[layer["layer"]]), 4)
            layer["in_common_by_chance"] = round(float(chance[layer["layer"]]), 4)
    written = {"image": str(drawn.item.path), "files": [str(file) for file in drawn.files]}
    return {**written, **drawn.record.to_dict(drawn.layers), "against": against}
