"""A sweep and a data set's average as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from pmod_cli.profiling.dataset import Average
from pmod_cli.profiling.scores import Scores
from pmod_cli.profiling.sweep import Axis, Point
from pmod_cli.profiling.units import GIGA, MIB, TERA, percent
from pmod_cli.reporting.tables import plain_table


def sweep_table(axis: Axis, points: list[Point], scores: Scores | None = None) -> Table:
    """One row a value."""
    small = max(point.stock_flops for point in points) < TERA
    unit, name = (GIGA, "GFLOPs") if small else (TERA, "TFLOPs")
    table = plain_table(
        f"Prefill in {name} (full convention), KV cache in MiB",
        axis.name,
        "retention",
        "V",
        "stock",
        "p-MoD",
        "of stock",
        "KV stock",
        "p-MoD",
        "of stock",
        *(["score"] if scores else []),
        space=1 if scores else 2,
    )
    for index, point in enumerate(points):
        score = scores.at[index] if scores else None
        table.add_row(
            str(point.value) if isinstance(point.value, str) else f"{point.value:g}",
            f"{round(point.mean_retention, 6):.4f}",
            f"{point.vision_tokens}",
            f"{point.stock_flops / unit:.2f}",
            f"{point.pmod_flops / unit:.2f}",
            f"{percent(point.pmod_flops, point.stock_flops):.1f} %",
            f"{point.stock_kv / MIB:,.1f}",
            f"{point.pmod_kv / MIB:,.1f}",
            f"{percent(point.pmod_kv, point.stock_kv):.1f} %",
            *(["-" if score is None else f"{score:.1f}"] if scores else []),
        )
    return table


def sweep_rows(axis: Axis, points: list[Point], scores: Scores | None = None) -> list[dict[str, Any]]:
    """The same, unrounded, units in the keys."""
    return [
        {
            axis.name.replace("-", "_"): point.value,
            "mean_retention_ratio": point.mean_retention,
            "vision_tokens": point.vision_tokens,
            "stock_tflops": point.stock_flops / TERA,
            "pmod_tflops": point.pmod_flops / TERA,
            "stock_paper_tflops": point.stock_paper_flops / TERA,
            "pmod_paper_tflops": point.pmod_paper_flops / TERA,
            "stock_kv_cache_mib": point.stock_kv / MIB,
            "pmod_kv_cache_mib": point.pmod_kv / MIB,
            **({"mean_score": scores.at[index]} if scores else {}),
        }
        for index, point in enumerate(points)
    ]


def average_tables(average: Average) -> list[Table]:
    """What the rows are like, and what a row costs on average."""
    seen = plain_table(f"{average.rows:,} rows, {average.with_image:,} with images", "a row", "mean", "median", "most")
    for name, (mean, median, most) in (("vision tokens", average.vision_tokens), ("text tokens", average.text_tokens)):
        seen.add_row(name, f"{mean:,.1f}", f"{median:,.1f}", f"{most:,}")
    seen.add_row("tiles", f"{average.tiles:.2f}", "", "")
    cost = plain_table("Mean of a row by itself", "", "stock", "p-MoD", "of stock")
    for name, kind, unit in (
        ("prefill, full convention, TFLOPs", "flops", TERA),
        ("prefill, paper convention, TFLOPs", "paper_flops", TERA),
        ("training step, TFLOPs", "step_flops", TERA),
        ("KV cache after the prefill, MiB", "kv", MIB),
    ):
        stock, pmod = (getattr(average, f"{which}_{kind}") for which in ("stock", "pmod"))
        if unit is TERA and stock < TERA:
            name, unit = name.replace("TFLOPs", "GFLOPs"), GIGA
        cost.add_row(name, f"{stock / unit:,.3f}", f"{pmod / unit:,.3f}", f"{percent(pmod, stock):.1f} %")
    return [seen, cost]


def average_json(average: Average) -> dict[str, Any]:
    """The average, units in the keys."""
    values = asdict(average)
    named = {key: values.pop(key) for key in ("rows", "with_image")}
    for key in ("vision_tokens", "text_tokens"):
        mean, median, most = values.pop(key)
        named[key] = {"mean": mean, "median": median, "most": most}
    named["mean_tiles"] = values.pop("tiles")
    return named | {
        f"mean_{key}_bytes" if key.endswith("kv") else f"mean_{key}": value for key, value in values.items()
    }
