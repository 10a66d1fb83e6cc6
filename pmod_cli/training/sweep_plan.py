"""What an ablation sweep would do, counted: no weights are read, and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from pmod_cli.training.ablation_sweep import IMAGES, prepared
from pmod_cli.training.run_settings import Settings
from pmod_cli.training.sweep_cells import Cell, read_result

if TYPE_CHECKING:
    from pmod_cli.training.plan import DataShape


def plan_sweep(
    cells: Sequence[Cell], out: Path, *, overrides: Sequence[str] = (), images: int = IMAGES, device: str = "cpu"
) -> dict:
    """What ``sweep`` would do. No weights are read, and nothing is written.

    Args:
        cells: as ``sweep`` takes them, and so are the others.
        overrides: ``key.path=value``.
        images: unseen documents of each task that a cell is scored on.

    Returns:
        A row a recipe, and the sums: cells, those done and left, FLOPs and (where a cell is done) CPU seconds of those
        left.

    Raises:
        PmodError: whatever ``sweep`` would refuse before its first cell.
    """
    wanted = prepared(cells, out, overrides, images, device)
    shapes: dict[str, DataShape] = {}
    rows, seconds = [], []
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        mine = [cell for cell in cells if cell.recipe == recipe]
        found = {cell.seed: read_result(out, cell) for cell in mine}
        done = [seed for seed, result in found.items() if result is not None]
        seconds += [
            result["cpu_seconds"] for result in found.values() if result and result.get("cpu_seconds") is not None
        ]
        row = _row(wanted[mine[0]], shapes)
        left = len(mine) - len(done)
        rows.append(
            {
                "recipe": mine[0].row,
                "done": done,
                "left": [cell.seed for cell in mine if cell.seed not in done],
                **row,
                "flops_left": row["flops_per_cell"] * left,
            }
        )
    left = sum(len(row["left"]) for row in rows)
    return {
        "schema_version": 1,
        "folder": str(out),
        "device": device,
        "cells": len(cells),
        "done": len(cells) - left,
        "left": left,
        "flops_left": sum(row["flops_left"] for row in rows),
        "cpu_seconds_left": round(mean(seconds) * left, 1) if seconds else None,
        "rows": rows,
    }


def _row(settings: Settings, shapes: dict[str, DataShape]) -> dict:
    """Of one cell. Its data are sampled once for all recipes that read the same."""
    from pmod_cli.training.cost import run_flops  # these import torch, which no refusal has to wait for
    from pmod_cli.training.plan import data_shape, model_of

    subject, routed, _ = model_of(settings)
    sizes, per_step = subject.sizes, settings.rows_per_step()
    read = repr((asdict(settings.data), settings.model.name, per_step))
    if read not in shapes:
        shapes[read] = data_shape(settings, sizes, per_step)
    shape, steps = shapes[read], settings.steps(shapes[read].rows_per_epoch)
    config, trained = subject.pmod if routed else subject.stock, settings.rows_read(steps, shape.rows_per_epoch)
    tokens, vision = round(shape.tokens * trained), round(shape.vision_tokens * trained)
    return {
        "mean_retention": subject.pmod.settings.mean_retention(sizes.decoder.layers) if routed else 1.0,
        "steps": steps,
        "rows": trained,
        "tokens": tokens,
        "flops_per_cell": run_flops(settings, config, trained, tokens, vision),
    }
