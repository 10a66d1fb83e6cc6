"""`pmod finetune`: train a p-MoD model, or the stock model for comparison, from a recipe."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from pmod_cli import output, recipes, state
from pmod_cli.commands.common import (
    DeviceOpt,
    DryRunOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    OfflineOpt,
    OverwriteOpt,
    ProgressOpt,
    QuietOpt,
    model_or_default,
    pick_device,
)
from pmod_cli.commands.sweep import run_sweep
from pmod_cli.errors import INTERRUPTED, PmodError
from pmod_cli.extras import require

if TYPE_CHECKING:
    from pmod_cli.training.plan import Plan
    from pmod_cli.training.run import FinetuneReport
    from pmod_cli.training.settings import Settings
    from pmod_cli.training.trainer import Step

EXAMPLES = """\
pmod finetune --recipe tiny
pmod finetune --recipe tiny --model tiny-llava-next -o runs/stock
pmod finetune --recipe tiny --set train.router_learning_rate=1e-2 --max-steps 100
pmod finetune --recipe tiny --dry-run
pmod finetune --sweep ablations --seeds 3
pmod finetune --recipe runs/stock/config.yaml -o runs/stock
"""


def finetune(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="What to run; see `pmod recipes ls`.")
    ] = "tiny",
    model: ModelOpt = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Run folder; without it ./runs/RECIPE-TIME.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted key; repeatable.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Optimizer steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", metavar="N", help="Images in one forward pass.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="RATE", help="Peak learning rate.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of everything random.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="GROUP", help="Run all recipes of a group, e.g. `ablations`; one table."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds of each recipe of --sweep.")] = 3,
    device: DeviceOpt = "auto",
    dtype: DtypeOpt = "auto",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run in --out.")] = True,
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings as YAML and stop.")
    ] = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    shown: ProgressOpt = True,
    offline: OfflineOpt = False,
) -> None:
    """Train a p-MoD model, or the stock model for comparison, from a recipe.

    A flag beats --set, and --set beats the recipe. The run folder holds the settings from the start, and a checkpoint
    that every other command takes in the end.
    """
    from pmod_cli.training.recipe import dump, load_settings

    flags = {
        "model.name": ("--model", model),
        "model.precision": ("--dtype", None if dtype == "auto" else dtype),
        "train.max_steps": ("--max-steps", max_steps),
        "train.batch_size": ("--batch-size", batch_size),
        "train.learning_rate": ("--learning-rate", learning_rate),
        "train.seed": ("--seed", seed),
    }
    if sweep:
        if seed is not None:
            raise PmodError("--seed: a sweep runs several seeds", hint="say how many with --seeds")
        require("train", "accelerate")
        _silence_transformers()
        run_sweep(
            sweep,
            out or Path("runs", sweep),
            seeds=seeds,
            overrides=[
                *(overrides or ()),
                *(f"{key}={value}" for key, (_, value) in flags.items() if value is not None),
            ],
            device=pick_device(device),
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    settings = load_settings(recipes.find(recipe), overrides or (), flags)
    if print_config:
        output.stdout.file.write(dump(settings))
        return
    settings.model.name = _lasting_name(model_or_default(settings.model.name))
    require("train", "accelerate")
    _silence_transformers()
    device = pick_device(device)
    if dry_run:
        from pmod_cli.training.plan import plan

        _show_plan(plan(settings, device=device), as_json)
        return

    from pmod_cli.training import folder, run

    out = out or Path("runs", f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S}")
    output.note(f"run folder: {out}")
    with _Watching(settings) as watching:
        report = run.finetune(settings, out, device=device, resume=resume, overwrite=overwrite, on_step=watching.update)
    if report.status == "interrupted":
        raise PmodError(
            f"interrupted after step {report.step} of {report.max_steps}; the run is saved in {out}",
            hint=f"go on with: pmod finetune --recipe {out / folder.SETTINGS} --out {out}",
            code=INTERRUPTED,
        )
    state.record_current(out)
    _show_report(report, as_json, quiet)


def _lasting_name(name: str) -> str:
    """The name as the run folder keeps it: a folder by its full path, so that the run goes on from any directory."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _silence_transformers() -> None:
    """Its own bars and notes would run through ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class _Watching:
    """Shows the steps of a run: a bar on a terminal, else one line for each interval of the log."""

    def __init__(self, settings: Settings) -> None:
        self.interval = settings.train.log_steps
        self.bar = output.progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[left]} left"),
        )
        self.task = self.bar.add_task("training", total=None, loss="-", left="-")

    def __enter__(self) -> _Watching:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, step: Step) -> None:
        loss, left = f"{step.loss:.4f}", _minutes(step.seconds_left)
        if output.shows_progress():
            self.bar.update(self.task, completed=step.step, total=step.max_steps, loss=loss, left=left)
        elif step.step % self.interval == 0 or step.step == step.max_steps:
            output.note(f"step {step.step}/{step.max_steps}  loss {loss}  {left} left")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _show_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        parameters = {
            part: {**asdict(numbers), "learning_rate": plan.learning_rates.get(part)}
            for part, numbers in plan.parameters.items()
        }
        output.print_json({"schema_version": 1, **asdict(plan), "parameters": parameters})
        return
    table = Table("part", "parameters", "learning rate")
    for part, numbers in plan.parameters.items():
        rate = f"{plan.learning_rates[part]:g}" if numbers.trained else "frozen"
        table.add_row(part, f"{numbers.parameters:,}", rate)
    output.stdout.print(table)
    table = Table(show_header=False)
    table.add_row("steps", f"{plan.steps:,}")
    table.add_row("images", f"{plan.images:,}")
    table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens_per_image:.0f} an image)")
    table.add_row("vision tokens kept", f"{plan.mean_retention:.1%} of each layer on average")
    table.add_row("memory, estimated", f"{plan.memory_gib:.2f} GiB")
    output.stdout.print(table)


def _show_report(report: FinetuneReport, as_json: bool, quiet: bool) -> None:
    if as_json:
        output.print_json({"schema_version": 1, **asdict(report)})
        return
    if quiet:
        output.print_line(report.path)
        return
    if report.status == "already finished":
        output.note("this run is already finished; nothing was done")
    else:
        output.note(
            f"{report.step} steps, {report.tokens:,} tokens, {_minutes(report.seconds)}, loss {report.loss:.4f}"
        )
    output.print_line(report.path)
    output.note(f"next: pmod eval --tasks tiny --model {report.path}")
