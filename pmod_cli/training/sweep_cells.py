"""The cells of a sweep, and what its folder holds of one: a result or an unfinished run, of these settings or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli import recipe_files
from pmod_cli.checkpoints.files import read_json
from pmod_cli.core import json_text
from pmod_cli.core.errors import PmodError
from pmod_cli.training.folder import SETTINGS, STATE
from pmod_cli.training.recipe import differences, flatten, load_settings
from pmod_cli.training.start import is_here

if TYPE_CHECKING:
    from pmod_cli.training.run_settings import Settings

CELLS = "cells"
RUNS = "runs"


@dataclass(frozen=True)
class Cell:
    """One recipe with one seed."""

    recipe: str  # as it is listed: "ablations/norm-none"; or the file of one's own: "mine/norm-none.yaml"
    seed: int

    @property
    def row(self) -> str:
        """Of its table: `norm-none`."""
        name = self.recipe.rpartition("/")[2]
        return name.rpartition(".")[0] if name.endswith(recipe_files.SUFFIXES) else name

    @property
    def name(self) -> str:
        """Of its files: `norm-none-seed0`."""
        return f"{self.row}-seed{self.seed}"


def read_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell in the folder of a sweep; None where it has none.

    Raises:
        PmodError: its file is damaged, or holds something else.
    """
    path = out / CELLS / f"{cell.name}.json"
    try:
        found = json_text.loads(path.read_bytes())
        if wrong := _wrong(found, cell):
            raise ValueError(f"{wrong} not as a sweep writes it")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PmodError(
            f"{path} is no result of this cell: {error}", hint="remove that file: the cell is then run again"
        ) from None
    return found


def result_of(out: Path, cell: Cell, settings: Settings, images: int) -> dict[str, Any] | None:
    """The result of a cell, if there is one.

    Raises:
        PmodError: it belongs to other settings, or cannot be read.
    """
    found = read_result(out, cell)
    if found is None:
        return None
    old, new = (dict(flatten(tree)) for tree in (found["settings"], asdict(settings)))
    changed = [f"{key}: {value!r} -> {new[key]!r}" for key, value in old.items() if key in new and new[key] != value]
    if found["images"] != images:
        changed.append(f"images: {found['images']} -> {images}")
    changed += _other_start(found.get("source"), settings)
    if changed:
        raise PmodError(
            f"{out} holds cell {cell.name} with other settings:\n  " + "\n  ".join(changed),
            hint=f"choose another `out`, or remove {out / CELLS / cell.name}.json",
        )
    return found


def refuse_other_run(out: Path, cell: Cell, settings: Settings) -> None:
    """Refuse a cell that was stopped and has other settings or another start now, before any cell is run.

    Raises:
        PmodError: its unfinished run cannot go on.
    """
    run = out / RUNS / cell.name
    if not (run / SETTINGS).is_file():
        return
    from pmod_cli.training.resume import SOURCE  # imports torch, and only where a run goes on

    try:
        changed = differences(load_settings(run / SETTINGS), settings)
        record = run / STATE / SOURCE  # gone where only the score is missing
        changed += _other_start(read_json(record).get("sha256") if record.is_file() else None, settings)
    except PmodError:  # another process has just finished it, or else the run says what is wrong
        return
    if changed:
        raise PmodError(
            f"{run} is an unfinished run of cell {cell.name} with other settings:\n  " + "\n  ".join(changed),
            hint=f"choose another `out`, or remove {run}",
        )


def start_of(settings: Settings) -> dict[str, str]:
    """The digests of the weights that a cell starts from, by setting."""
    from pmod_cli.training.resume import source_digests  # imports torch

    return source_digests(settings)


def _other_start(before: object, settings: Settings) -> list[str]:
    """The settings that name other weights than a cell started from, as far as that is known."""
    if not isinstance(before, dict) or not is_here(settings):
        return []
    now = start_of(settings)
    return [f"{key}: other weights under that name" for key, digest in now.items() if before.get(key) != digest]


def _wrong(found: Any, cell: Cell) -> str:
    """The keys of a result that a table could not be made of; a later version may have more."""
    if not isinstance(found, dict):
        return f"a {type(found).__name__} is"
    right = {
        "seed": found.get("seed") == cell.seed,
        "settings": isinstance(found.get("settings"), dict),
        "images": type(found.get("images")) is int,
        "mean_retention": _is_number(found.get("mean_retention")),
    }
    if "failed" in found:
        right["failed"] = isinstance(found["failed"], str)
    else:
        right["answered"] = _are_answers(found.get("answered"))
        costs = ("cpu_seconds", "steps", "peak_memory_mib")  # each null or absent where it is not known
        right |= {key: found.get(key) is None or _is_number(found[key]) for key in costs}
    wrong = [key for key, holds in right.items() if not holds]
    return f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'}" if wrong else ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_answers(value: Any) -> bool:
    """By task, how many answers are right, and how many questions were asked."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(
            isinstance(counts, list)
            and [type(count) for count in counts] == [int, int]
            and 0 <= counts[0] <= counts[1] > 0
            for counts in value.values()
        )
    )
