"""`pmod finetune`: train a p-MoD model, or the stock model for comparison, from a recipe."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli import recipe_files
from pmod_cli.commands import common
from pmod_cli.commands.finetune_runs import evaluate, run_here, run_sweep
from pmod_cli.commands.finetune_show import (
    refuse_unfit,
    show_check,
    show_plan,
    show_report,
    silence_transformers,
    warn,
)
from pmod_cli.core import output
from pmod_cli.core.errors import INTERRUPTED, PmodError, require
from pmod_cli.core.folders import staging_of
from pmod_cli.core.paths import expanded

if TYPE_CHECKING:
    from pmod_cli.training.run_settings import Settings

EXAMPLES = """\
pmod finetune --recipe tiny
pmod finetune tiny --model tiny-llava-next -o runs/stock
pmod finetune --recipe tiny --set train.router_learning_rate=1e-2 --max-steps 100
pmod finetune --recipe llava-next-7b --dry-run --gpu a100-80gb --num-processes 8
pmod finetune --recipe llava-1.5-7b --num-processes 8 -o runs/p-mod-7b
pmod finetune --sweep ablations --seeds 3
pmod finetune --merge runs/lora
pmod finetune --recipe runs/stock/config.yaml -o runs/stock
"""
DEFAULT = "tiny"
SETTINGS = {  # those of a recipe that have an option of their own
    "model.name": "--model",
    "model.precision": "--dtype",
    "train.max_steps": "--max-steps",
    "train.batch_size": "--batch-size",
    "train.learning_rate": "--learning-rate",
    "train.seed": "--seed",
    "train.report_to": "--report-to",
    "train.engine": "--engine",
    "data.on_bad_row": "--on-bad-row",
    "eval": "--eval",
    "eval_limit": "--eval-limit",
}
_data = common.option_under("Data")
_processes = common.option_under("Several GPUs and machines")
MERGING = {"merge", "model", "as_json", "quiet", "shown", "offline", "help"}
"""What `--merge` reads."""
SWEEPING = {"sweep", "seeds", "model", "out", "overrides", "max_steps", "batch_size", "learning_rate", "report_to"}
SWEEPING |= {"on_bad_row", "device", "dtype", "dry_run", "as_json", "quiet", "shown", "offline", "help"}
"""What `--sweep` reads; it runs each recipe in one process, and scores it on the bundled tasks."""
_planning = common.option_under("Planning (--dry-run)")


def finetune(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="The same as --recipe.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="NAME|FILE",
            help="What to run; see `pmod recipes ls`. (default: tiny)",
            show_default=False,
        ),
    ] = None,
    model: common.ModelOpt = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Run folder; without it ./runs/RECIPE-TIME.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted key; repeatable.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Optimizer steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", metavar="N", help="Rows in one forward pass on one device.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", metavar="RATE", help="Peak learning rate.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of everything random.")] = None,
    report_to: Annotated[
        str | None, typer.Option("--report-to", metavar="WHERE", help="tensorboard, wandb or none.")
    ] = None,
    eval_tasks: Annotated[
        str | None, typer.Option("--eval", metavar="TASKS", help="Score the finished run, as `pmod eval --tasks`.")
    ] = None,
    eval_limit: Annotated[
        int | None,
        typer.Option("--eval-limit", metavar="N", min=1, help="Only N questions of each task, as `pmod eval --limit`."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            metavar="GROUP",
            help="Run recipes of a group, or of your folder; one table: ablations, choice/held-1, mine/.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds of each recipe of --sweep.")] = 3,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="DIR", help="Fold the adapters of a LoRA run into its weights.")
    ] = None,
    check_data: Annotated[
        bool, _data("--check-data", help="Look at every row, list bad ones in bad_rows.jsonl, and stop.")
    ] = False,
    on_bad_row: Annotated[str | None, _data("--on-bad-row", metavar="WHAT", help="error or skip.")] = None,
    engine: Annotated[
        str | None, _processes("--engine", metavar="NAME", help="ddp, fsdp2, zero1, zero2 or zero3.")
    ] = None,
    num_processes: Annotated[int, _processes("--num-processes", metavar="N", min=1, help="On all machines.")] = 1,
    num_machines: Annotated[int, _processes("--num-machines", metavar="N", min=1)] = 1,
    machine_rank: Annotated[int, _processes("--machine-rank", metavar="N", min=0, help="Number of this one.")] = 0,
    main_process_ip: Annotated[
        str | None, _processes("--main-process-ip", metavar="HOST", help="Address of machine 0.")
    ] = None,
    main_process_port: Annotated[int, _processes("--main-process-port", metavar="N", min=1)] = 29500,
    accelerate_config: Annotated[
        Path | None,
        _processes(
            "--accelerate-config", metavar="FILE", help="As `accelerate config` writes it, instead of all the above."
        ),
    ] = None,
    gpu: Annotated[str | None, _planning("--gpu", metavar="NAME|SIZE", help="Plan for a100-80gb, 24GB, …")] = None,
    utilization: Annotated[
        float, _planning("--utilization", metavar="SHARE", min=0.01, max=1.0, help="Of peak FLOPs.")
    ] = 0.4,
    device: common.DeviceOpt = "auto",
    dtype: common.DtypeOpt = "auto",
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Go on with an unfinished run in --out, which is the default, or not."
        ),
    ] = None,
    overwrite: common.OverwriteOpt = False,
    dry_run: common.DryRunOpt = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved settings as YAML and stop.")
    ] = False,
    as_json: common.JsonOpt = False,
    quiet: common.QuietOpt = False,
    shown: common.ProgressOpt = True,
    offline: common.OfflineOpt = False,
) -> None:
    """Train a p-MoD model, or the stock model for comparison, from a recipe.

    A flag beats --set, and --set beats the recipe. The run folder holds the settings from the start, and a checkpoint
    that every other command takes in the end.
    """
    from pmod_cli.training.recipe import dump, load_settings

    _check_used(context, dry_run=dry_run, sweep=sweep is not None, merge=merge is not None)
    if overwrite and resume:
        raise PmodError(
            "--overwrite starts anew and --resume goes on: they exclude each other", hint="give one of them"
        )
    if resume and out is None:
        raise PmodError("--resume goes on with the run in a folder: name it with --out", hint="ls runs")
    resume = resume is not False

    if name is not None and recipe is not None:
        raise PmodError(f"two recipes: {name} and --recipe {recipe}; give one")
    given = {
        "model.name": model,
        "model.precision": None if dtype == "auto" else dtype,
        "train.max_steps": max_steps,
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
        "train.seed": seed,
        "train.report_to": report_to,
        "train.engine": engine,
        "data.on_bad_row": on_bad_row,
        "eval": eval_tasks.split(",") if eval_tasks else None,
        "eval_limit": eval_limit,
    }
    flags = {key: (SETTINGS[key], value) for key, value in given.items()}
    if sweep:
        require("train", "accelerate", "peft")
        run_sweep(
            sweep,
            out,
            seeds=seeds,
            overrides=[
                *(overrides or ()),
                *(
                    f"{key}={json.dumps(value, ensure_ascii=False)}"
                    for key, value in given.items()
                    if value is not None
                ),
            ],
            device=common.pick_device(device),
            dry_run=dry_run,
            as_json=as_json,
            quiet=quiet,
        )
        return
    if merge is not None:
        _merge(merge, model, as_json)
        return
    settings = load_settings(recipe_files.find(name or recipe or DEFAULT), overrides or (), flags)
    if not settings.eval:
        common.refuse_ignored(context, ("eval_limit",), "--eval", "finetune")
    if print_config:
        output.stdout.file.write(dump(settings))
        return
    if settings.model.llm is None:
        settings.model.name = _lasting_name(common.model_or_default(settings.model.name))
    require("train", "accelerate", "peft")
    if check_data:
        _check_data(settings, out or Path(), as_json)
        return

    from pmod_cli.training.launch import Distributed
    from pmod_cli.training.preflight import Intent, preflight

    elsewhere = dry_run and gpu is not None
    distributed = Distributed(
        num_processes, num_machines, machine_rank, main_process_ip, main_process_port, accelerate_config
    )
    launched = "LOCAL_RANK" in os.environ
    wanted, device = device, "cuda" if elsewhere else common.pick_device(device)
    if wanted == "auto" and device == "cpu" and num_processes > 1:
        raise PmodError(
            f"--num-processes {num_processes}: each process takes a GPU of its own, and none was found",
            hint="--device cpu shares the cores; --dry-run --gpu NAME plans for a machine that has GPUs",
        )
    lacking = preflight(Intent(settings, distributed, device, out, resume, overwrite, launched), elsewhere=elsewhere)
    silence_transformers()
    if dry_run:
        from pmod_cli.training.plan import plan
        from pmod_cli.training.run_data import beyond_context

        found = plan(
            settings,
            processes=num_processes,
            device=device,
            gpu=gpu,
            utilization=utilization,
            out=out or Path("runs"),
            lacking=lacking,
        )
        show_plan(found, as_json, quiet)
        if note := beyond_context(found.data.longest, found.context):
            warn(note)
        for sentence in lacking:
            output.note(f"it could not start on this machine: {sentence}")
        refuse_unfit(found)
        return

    from pmod_cli.training import folder
    from pmod_cli.training.launch import launch

    shares = engine is not None or settings.train.engine not in ("auto", "ddp")
    if shares and not distributed.is_launch and not launched:
        named = f"--engine {engine}" if engine else f"train.engine: {settings.train.engine}"
        output.warn(f"{named}: one process shares nothing; it is used with --num-processes")
    out = out or Path("runs", f"{settings.name}-{datetime.now():%Y%m%d-%H%M%S}")
    if distributed.is_launch:
        job = {
            "settings": asdict(settings),
            "out": str(out.resolve()),
            "named": str(out),
            "device": device.partition(":")[0],
            "resume": resume,
            "overwrite": overwrite,
            "quiet": quiet,
            "progress": shown,
        }
        report = launch(distributed, job, lambda command: output.note(f"$ {command}"))
        report = replace(report, path=out)
    else:
        report = run_here(settings, out, device=device, resume=resume, overwrite=overwrite, named=out)
    if report.status == "interrupted":
        again = f" --num-processes {num_processes}" if num_processes > 1 else ""
        again, where = (f"{again} --overwrite", staging_of(out)) if overwrite else (again, out)
        saved = quote(str(where / folder.SETTINGS))
        raise PmodError(
            f"interrupted after step {report.step} of {report.max_steps}; the run is saved in {where}",
            hint=f"go on with: pmod finetune --recipe {saved} --out {quote(str(out))}{again}",
            code=INTERRUPTED,
        )
    if folder.is_checkpoint(out):
        common.record_current(out)
        if settings.eval and machine_rank == 0:
            evaluate(out, settings.eval, device, limit=settings.eval_limit, quiet=quiet)
    show_report(report, as_json, quiet)


def _check_used(context: typer.Context, *, dry_run: bool, sweep: bool, merge: bool) -> None:
    """Raises PmodError at an option that this call would ignore."""
    refuse = partial(common.refuse_ignored, context, command="finetune")
    names = {parameter.name or "" for parameter in context.command.params}
    if merge:
        refuse(sorted(names - MERGING), place="a training run, and --merge ends one")
    if not dry_run or sweep:
        refuse(("gpu", "utilization"), place="--dry-run of one recipe")
    if not sweep:
        refuse(("seeds",), place="--sweep")
        return
    if context.params["seed"] is not None:
        raise PmodError("--seed: a sweep runs several seeds", hint="say how many with --seeds")
    refuse(sorted(names - SWEEPING), place="a run of one recipe")


def _check_data(settings: Settings, folder: Path, as_json: bool) -> None:
    silence_transformers()
    from pmod_cli.training.run_data import check_all

    show_check(check_all(settings), folder, as_json, skips=settings.data.on_bad_row == "skip")


def _merge(folder: Path, model: str | None, as_json: bool) -> None:
    require("train", "peft")
    silence_transformers()
    from pmod_cli.training.adapters import merge

    merged = merge(folder, name=_lasting_name(model) if model else None)
    common.record_current(folder)
    if as_json:
        output.print_json({"schema_version": 1, "path": str(folder), "adapter": merged})
        return
    output.note(f"merged {merged}")
    output.print_line(folder)
    output.note(f"next: pmod eval --tasks tiny --model {quote(str(folder))}")


def _lasting_name(name: str) -> str:
    """The name as the run folder keeps it: a folder by its full path, so that the run goes on from any directory."""
    folder = expanded(name)
    return str(folder.resolve()) if folder.is_dir() else name
