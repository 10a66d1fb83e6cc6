"""The ablation sweep: each recipe of a group with each seed, a cell at a time, and one table of what came out.

A cell is an ordinary run of ``finetune`` that is scored and then removed; its result stays as ``cells/NAME.json``. A
sweep that was stopped goes on with the cells that are missing, and started several times at once, the processes
share the cells among themselves.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter, process_time

from pmod_cli import recipe_files
from pmod_cli.core.atomic import Busy, locked, write_json
from pmod_cli.core.errors import INTERRUPTED, PmodError
from pmod_cli.core.memory import PeakMemory
from pmod_cli.core.paths import expanded
from pmod_cli.reporting import markdown_table
from pmod_cli.training.folder import SUMMARY
from pmod_cli.training.preflight import Intent, preflight
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run_settings import Settings
from pmod_cli.training.sweep_cells import CELLS, RUNS, Cell, read_result, refuse_other_run, result_of, start_of

REFERENCE = "p-mod"  # the recipe that the others of a group change in one thing
OWN = {  # settings that a sweep would not follow
    "train.seed": "a sweep gives each cell its seed",
    **dict.fromkeys(("eval", "eval_limit"), "a sweep scores its cells itself, on the bundled tasks"),
}
SEED_STRIDE = 1_000_000  # images
IMAGES = 100  # unseen documents of each task that a cell is scored on


def cells_of(group: str, seeds: Sequence[int]) -> list[Cell]:
    """All cells of some recipes: the reference first, and one seed of everything before the next.

    Args:
        group: Shipped groups, single recipes of one, patterns of them, or folders of one's own recipes, separated by
            commas: `choice`, `choice/p-mod,choice/held-1`, `ablations/p-mod,ablations/norm-*`, `mine/`.

    Raises:
        PmodError: there is no recipe of such a name, none in such a group, or two of one name.
    """
    found: dict[str, str] = {}
    for recipe in (recipe for part in group.split(",") for recipe in _recipes(part.strip())):
        row = Cell(recipe, 0).row
        if found.setdefault(row, recipe) != recipe:
            raise PmodError(
                f"{found[row]} and {recipe} would both be the row {row} of one table",
                hint="sweep them into folders of their own (`out`)",
            )

    def order(row: str) -> tuple:
        """The reference first, and layers-8-15 before layers-16-23."""
        parts = [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", row) if part]
        return row != REFERENCE, parts

    return [Cell(found[row], seed) for seed in seeds for row in sorted(found, key=order)]


def _recipes(part: str) -> list[str]:
    """The recipes that one part of a group names. A shipped group wins over a folder of its name."""
    shipped = [name for name in recipe_files.names() if "/" in name]
    prefix = f"{part.strip('/')}/"
    if own := [name for name in shipped if f"{name}/".startswith(prefix) or fnmatchcase(name, part)]:
        return own
    if part.endswith(recipe_files.SUFFIXES):
        return [str(recipe_files.find(part))]
    if part and (folder := expanded(part)).is_dir():
        if own := sorted(str(path) for path in folder.iterdir() if path.suffix in recipe_files.SUFFIXES):
            return own
        raise PmodError(f"no recipe ({' or '.join(recipe_files.SUFFIXES)}) in {folder}", hint="pmod recipes ls")
    groups = sorted({name.partition("/")[0] for name in shipped})
    raise PmodError(
        f"no recipes are called {part}/…; there are groups {', '.join(groups) or 'none'}", hint="pmod recipes ls"
    )


def folder_of(cells: Sequence[Cell]) -> Path:
    """Where a sweep goes that no folder is named for: `runs/choice`, or `runs/` and the name of one's own folder."""
    return Path("runs", Path(cells[0].recipe).parent.absolute().name)


def sweep(
    cells: Sequence[Cell],
    out: Path,
    *,
    overrides: Sequence[str] = (),
    images: int = IMAGES,
    device: str = "cpu",
    on_cell: Callable[[Cell, str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict:
    """Run the cells that have no result yet, and return the table as ``table`` builds it.

    Args:
        cells: what to run, in this order.
        overrides: ``key.path=value``, the same for all cells.
        images: unseen documents of each task that a cell is scored on.
        on_cell: is told of each cell what becomes of it: running, done before, done, failed, taken.
        on_note: is told what ``finetune`` notes of a run.

    Raises:
        PmodError: a recipe is wrong, a cell that was begun or finished has other settings or another start, the sweep
            was interrupted, or disk or memory was full. A run that diverges is a result.
    """
    tell = on_cell or (lambda cell, what: None)
    wanted = prepared(cells, out, overrides, images, device)
    (out / CELLS).mkdir(parents=True, exist_ok=True)
    for cell, settings in wanted.items():
        if result_of(out, cell, settings, images) is not None:
            shutil.rmtree(out / RUNS / cell.name, ignore_errors=True)  # of a process that died behind its result
            tell(cell, "done before")
            continue
        with ExitStack() as held:
            try:  # the system drops the lock of a process that dies
                held.enter_context(locked(out / CELLS / f".{cell.name}.lock"))
            except Busy:
                tell(cell, "taken by another process")
                continue
            if result_of(out, cell, settings, images) is None:
                tell(cell, "running")
                result = _run(cell, settings, out, images, device, on_note)
                write_json(out / CELLS / f"{cell.name}.json", result)
                shutil.rmtree(out / RUNS / cell.name, ignore_errors=True)
                tell(cell, f"failed: {result['failed']}" if "failed" in result else "done")
    for cell, settings in wanted.items():  # another process may have other settings
        result_of(out, cell, settings, images)
    return table(cells, out)


def prepared(
    cells: Sequence[Cell], out: Path, overrides: Sequence[str], images: int, device: str
) -> dict[Cell, Settings]:
    """The settings of the cells, when nothing speaks against any of them.

    Raises:
        PmodError: a recipe is wrong or cannot run here, or a cell that was begun or finished has other settings or
            another start.
    """
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key in OWN:
            raise PmodError(f"{key}: {OWN[key]}", hint=f"leave {key} out; say with `seeds` how many there are")
    wanted = {cell: _settings(cell, overrides) for cell in cells}
    for cell in {cell.recipe: cell for cell in cells}.values():
        preflight(Intent(wanted[cell], device=device))
    for cell, settings in wanted.items():
        if result_of(out, cell, settings, images) is None:
            refuse_other_run(out, cell, settings)
    return wanted


def table(cells: Sequence[Cell], out: Path) -> dict:
    """What is known of each recipe so far: mean and spread (sample standard deviation) over its seeds, in percent.

    Beside it what a cell takes: steps, CPU seconds of training and scoring (mean), memory (the most of its seeds). A
    recipe without a result has status "not run".
    """
    rows = []
    for recipe in dict.fromkeys(cell.recipe for cell in cells):
        mine = [cell for cell in cells if cell.recipe == recipe]
        results = [result for cell in mine if (result := read_result(out, cell)) is not None]
        good = [result for result in results if "failed" not in result]
        row = {
            "recipe": mine[0].row,
            "status": "not run" if not results else "run" if len(results) == len(mine) else "partly run",
            "seeds": [result["seed"] for result in good],
            "failed": {str(result["seed"]): result["failed"] for result in results if "failed" in result},
            "mean_retention": results[0]["mean_retention"] if results else None,
        }
        if good:
            scores = [{task: 100 * right / asked for task, (right, asked) in r["answered"].items()} for r in good]
            row["questions"] = {task: asked for task, (_, asked) in good[0]["answered"].items()}
            row["score_percent"] = {task: _spread([score[task] for score in scores]) for task in scores[0]}
            means = [mean(score.values()) for score in scores]
            row["of_each_seed"], row["mean_score_percent"] = means, _spread(means)
            # A cell that was interrupted cannot tell what its earlier processes took.
            spent = [r["cpu_seconds"] for r in good if r.get("cpu_seconds") is not None]
            row["cpu_seconds"] = round(mean(spent), 1) if spent else None
            # A cell of an earlier version says neither, and not every system tells the memory.
            row["steps"] = good[0].get("steps")
            row["peak_memory_mib"] = max(r.get("peak_memory_mib") or 0 for r in good) or None
        rows.append(row)
    return {"schema_version": 1, "rows": rows}


def markdown(found: dict) -> str:
    """The table as Markdown, rows grouped by what they change, the reference first."""
    scored = [row["score_percent"] for row in found["rows"] if "score_percent" in row]
    tasks = list(dict.fromkeys(task for scores in scored for task in scores))
    head, lines, group = ["recipe", "retention", *tasks, "mean", "seeds", "steps", "CPU s", "MiB"], [], None
    for row in found["rows"]:
        name = row["recipe"]
        if "-" in name and name != REFERENCE and name.partition("-")[0] != group:
            group = name.partition("-")[0]
            lines.append([group, *[""] * (len(head) - 1)])
        lines.append(_cells_of_row(row, tasks))
    unlike = any(len(scores) < len(tasks) for scores in scored)
    note = "\nThe recipes were not scored on the same tasks: a mean is over a row's own.\n" if unlike else ""
    return markdown_table(head, lines) + "\n" + note


def why_unscored(row: dict) -> str:
    """What a row of the table has in place of a score: how its runs failed, or that there was none."""
    return "; ".join(sorted(set(row["failed"].values()))) or row["status"]


def _cells_of_row(row: dict, tasks: list[str]) -> list[str]:
    head = [row["recipe"], "" if row["mean_retention"] is None else f"{row['mean_retention']:.4f}"]
    if "score_percent" not in row:
        return [*head, *[""] * len(tasks), why_unscored(row), "0", "", "", ""]
    own = row["score_percent"]
    scores = [_shown(own[task]) if task in own else "" for task in tasks]
    failed = f" ({len(row['failed'])} failed)" if row["failed"] else ""
    cost = ["" if row[key] is None else f"{row[key]:.0f}" for key in ("steps", "cpu_seconds", "peak_memory_mib")]
    return [*head, *scores, _shown(row["mean_score_percent"]), f"{len(row['seeds'])}{failed}", *cost]


def _shown(value: dict) -> str:
    return f"{value['mean']:.1f}" + ("" if value["spread"] is None else f" ± {value['spread']:.1f}")


def _spread(values: list[float]) -> dict:
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None}


def _run(
    cell: Cell, settings: Settings, out: Path, images: int, device: str, on_note: Callable[[str], None] | None
) -> dict:
    """Train and score; the result, or with ``failed`` why there is none.

    Raises:
        PmodError: the run was interrupted, or failed for want of disk or memory. That says nothing of the recipe, so
            the cell is not done.
    """
    from pmod_cli.checkpoints import load_model
    from pmod_cli.data.documents import TASKS
    from pmod_cli.training.run import finetune
    from pmod_cli.training.teacher_forced import answered
    from pmod_cli.training.watch import Diverged

    wall, cpu, memory, folder = perf_counter(), process_time(), PeakMemory(device), out / RUNS / cell.name
    goes_on = folder.exists()
    result = {
        "schema_version": 1,
        "recipe": cell.recipe,
        "seed": cell.seed,
        "date": f"{datetime.now():%Y-%m-%d}",
        "device": device,
        "mean_retention": _mean_retention(settings),
        "settings": asdict(settings),
        "source": start_of(settings),
        "images": images,
    }
    try:
        report = finetune(settings, folder, device=device, on_note=on_note)
    except Diverged as error:
        return result | {"failed": error.what.partition(":")[0]}
    if report.status == "interrupted":
        raise PmodError(
            f"interrupted in cell {cell.name}, after step {report.step} of {report.max_steps}",
            hint="run the same command again: it goes on from here",
            code=INTERRUPTED,
        )
    model, processor = load_model(folder, dtype=settings.dtype_on(device))
    model.to(device)
    if hasattr(model, "set_selection"):
        model.set_selection(model.config.settings.selection, seed=settings.train.seed)
    taught = settings.data.tasks if settings.data.kind == "synthetic" else TASKS
    tasks = dict.fromkeys([*(task for task in TASKS if task in taught), *taught])
    scores = answered(model, processor, tasks, images)
    spent = {
        "steps": report.step,
        "wall_seconds": None if goes_on else round(perf_counter() - wall, 1),
        "cpu_seconds": None if goes_on else round(process_time() - cpu, 1),
        "peak_memory_mib": (peak := memory.mib()) and round(peak, 1),
    }
    loss = report.loss
    if loss is None:  # the run had finished in a process that was stopped before it could score
        loss = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["loss"]
    return result | {"loss": loss, "answered": {task: list(score) for task, score in scores.items()}} | spent


def _mean_retention(settings: Settings) -> float:
    """Of the model that a cell trains: as its settings say, else as the checkpoint is routed."""
    from pmod_cli.training.plan import model_of

    subject, routed, _ = model_of(settings)
    return subject.pmod.settings.mean_retention(subject.sizes.decoder.layers) if routed else 1.0


def _settings(cell: Cell, overrides: Sequence[str]) -> Settings:
    """A seed means another order and other images, the same ones for every recipe.

    Adapters are merged, whatever a recipe says: a cell is scored as one model, and none of it is kept.
    """
    settings = load_settings(recipe_files.find(cell.recipe), [*overrides, f"train.seed={cell.seed}"])
    settings.data.first += cell.seed * SEED_STRIDE
    settings.lora.merge |= settings.lora.enabled
    return settings
