"""The runs behind `pmod finetune`: one in this process, as worker of a launcher, or all of a sweep; and their scores.

`python -m pmod_cli.commands.finetune_runs FOLDER` is one process of `--num-processes`, started by a launcher. FOLDER
has `job.json`. The first process of a machine writes `report.json` there, one that fails `error-RANK.json`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pmod_cli.commands.finetune_show import Watching, show_sweep, silence_transformers, warn
from pmod_cli.core import output
from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.errors import INTERRUPTED, PARTIAL, PmodError, explain

if TYPE_CHECKING:
    from pmod_cli.training.run_settings import Settings
    from pmod_cli.training.summary import FinetuneReport
    from pmod_cli.training.sweep_cells import Cell

EVAL = "eval"  # in the run folder


def run_here(
    settings: Settings, out: Path, *, device: str, resume: bool, overwrite: bool, named: str | Path
) -> FinetuneReport:
    """Run in this process, with steps, notes and the folder's name as it was typed (`named`) on stderr."""
    from pmod_cli.training.run import finetune

    with Watching(settings) as watching:
        return finetune(
            settings,
            out,
            device=device,
            resume=resume,
            overwrite=overwrite,
            on_open=lambda: output.note(f"run folder: {named}"),
            on_note=warn,
            on_step=watching.update,
        )


def main(folder: Path) -> int:
    """Do the job of a worker; 0 also where the run was interrupted, which the report says."""
    job = json.loads((folder / "job.json").read_text())
    rank, first_here = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK", "0") == "0"
    output.set_quiet(job["quiet"] or rank > 0)
    output.set_progress(job["progress"])
    try:
        from pmod_cli.training.launch import write_report
        from pmod_cli.training.recipe import settings_of

        silence_transformers()
        how = {name: job[name] for name in ("device", "resume", "overwrite", "named")}
        report = run_here(settings_of(job["settings"]), Path(job["out"]), **how)
    except BaseException as error:
        known = explain(error)
        if known is None or os.environ.get("PMOD_DEBUG") == "1":
            raise
        said = {"what": known.what, "hint": known.hint, "code": known.code}
        (folder / f"error-{rank}.json").write_text(json.dumps(said))
        return known.code
    if first_here:
        write_report(report, folder / "report.json")
    return 0


def run_sweep(
    group: str,
    out: Path | None,
    *,
    seeds: int,
    overrides: list[str],
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run what is missing of a sweep, then write `table.json`, `.md` and `.png` in its folder, and print one of them.

    With `dry_run`, only plan it.

    Raises:
        PmodError: another process is at some of its runs.
    """
    from pmod_cli.training import ablation_sweep as sweep

    cells = sweep.cells_of(group, range(seeds))
    out = out or sweep.folder_of(cells)
    if dry_run:
        from pmod_cli.training.sweep_plan import plan_sweep

        show_sweep(plan_sweep(cells, out, overrides=overrides, device=device), out, as_json, quiet)
        return
    from pmod_cli.profiling.plots import save
    from pmod_cli.training.sweep_figure import sweep_figure

    silence_transformers()
    output.note(f"{len(cells)} cells in {out}; run the same command again to go on, or beside this one to share them")
    number = {cell: place for place, cell in enumerate(cells, 1)}

    def tell(cell: Cell, what: str) -> None:
        output.note(f"cell {number[cell]}/{len(cells)}  {cell.name}  {what}")

    found = sweep.sweep(cells, out, overrides=overrides, device=device, on_cell=tell, on_note=warn)
    table = sweep.markdown(found)
    write_json(out / "table.json", found)
    write_text(out / "table.md", table)
    save(sweep_figure(found["rows"], sweep.REFERENCE), out / "table.png")
    show_sweep(found, out, as_json, quiet, table)
    if missing := [row["recipe"] for row in found["rows"] if row["status"] != "run"]:
        raise PmodError(
            f"not finished here: {', '.join(missing)}", hint="another process may be at them; repeat", code=PARTIAL
        )


def evaluate(out: Path, tasks: list[str], device: str, *, limit: int | None = None, quiet: bool = False) -> None:
    """Score the checkpoint in `out`, as a user would, into `out/eval`; the scores go into its summary and model card.

    A run folder that was scored in part goes on: `pmod eval` keeps a journal of its answers.

    Raises:
        PmodError: scoring failed. The training did not: its checkpoint is there.
    """
    from pmod_cli.training.folder import SETTINGS
    from pmod_cli.training.summary import add_scores

    words = ["eval", "--tasks", ",".join(tasks), "--model", str(out), "-o", str(out / EVAL), "--device", device]
    words += [] if limit is None else ["--limit", str(limit)]
    output.note(f"$ pmod {shlex.join(words)}")
    words += ["--quiet"] if quiet else []
    done = subprocess.run([sys.executable, "-m", "pmod_cli", *words], stdout=subprocess.PIPE, text=True)
    table = out / EVAL / "results.md"
    if done.returncode or not table.is_file():
        # The run itself, which has nothing left to train: `pmod eval` would leave its card without the scores.
        again = ["finetune", "--recipe", str(out / SETTINGS), "--out", str(out), "--eval", ",".join(tasks)]
        again += [] if limit is None else ["--eval-limit", str(limit)]
        raise PmodError(
            f"{out} is trained, but scoring it failed",
            hint=f"pmod {shlex.join([*again, '--device', device])}",
            code=INTERRUPTED if done.returncode == INTERRUPTED else PARTIAL,
        )
    if done.stdout.strip():
        output.note(done.stdout.rstrip())
    found = json.loads((out / EVAL / "results.json").read_text(encoding="utf-8"))
    kept = ("score", "metric", "questions", "low", "high")
    scores = {
        task["name"]: {model: {key: score[key] for key in kept} for model, score in task["scores"].items()}
        for task in found["tasks"]
    }
    add_scores(out, table.read_text(encoding="utf-8"), scores)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
