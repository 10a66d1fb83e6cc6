"""What `pmod finetune` shows: steps as they come, a look at the data, a report, and the plan of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from pmod_cli.core import output
from pmod_cli.core.errors import RUN_FAILED, PmodError, as_flags
from pmod_cli.core.text import GIB, disk_size, memory_size
from pmod_cli.reporting import plain_table

if TYPE_CHECKING:
    from pathlib import Path

    from pmod_cli.data.check import DataReport
    from pmod_cli.training.cost import Remedy
    from pmod_cli.training.plan import Cost, Plan
    from pmod_cli.training.run_settings import Settings
    from pmod_cli.training.summary import FinetuneReport
    from pmod_cli.training.watch import Step


def silence_transformers() -> None:
    """Its own bars and notes would run through ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class Watching:
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

    def __enter__(self) -> Watching:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, step: Step) -> None:
        """Show a step that has ended."""
        loss, left = f"{step.loss:.4f}", _minutes(step.seconds_left)
        if output.shows_progress():
            self.bar.update(self.task, completed=step.step, total=step.max_steps, loss=loss, left=left)
        elif step.step % self.interval == 0 or step.step == step.max_steps:
            output.note(f"step {step.step}/{step.max_steps}  loss {loss}  {left} left")


def warn(note: str) -> None:
    """A note of the library, its settings as they are typed."""
    output.warn(as_flags(note, {}, settings=True))


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


BAD_ROWS = "bad_rows.jsonl"
SHOWN_ROWS = 20  # that --json names; the file has all


def show_check(report: DataReport, folder: Path, as_json: bool, *, skips: bool) -> None:
    """What a look at every row has found; bad ones end in an error, unless the run leaves them out.

    Args:
        folder: where all bad rows are written, to `BAD_ROWS`. A list of an earlier look there is replaced.
    """
    from pmod_cli.core.atomic import write_text
    from pmod_cli.data.check import describe_bad, refuse_bad

    file = folder / BAD_ROWS
    faults = [{**fault._asdict(), "file": report.name} for fault in report.bad]
    if faults or file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults))
    if as_json:
        found = {**asdict(report), "num_bad": report.num_bad, "bad": faults[:SHOWN_ROWS]}
        output.print_json({"schema_version": 2, **found, "bad_rows_file": str(file) if faults else None})
    else:
        table = Table(show_header=False)
        table.add_row("rows", f"{report.rows:,}")
        table.add_row("with images", f"{report.with_images:,}")
        table.add_row("tokens", f"{report.tokens:,} ({report.tokens_per_row:.0f} a row)")
        table.add_row("longest row", f"{report.longest:,} tokens")
        table.add_row("cut to data.max_length", f"{report.cut:,}")
        table.add_row("without a label", f"{report.without_labels:,}")
        table.add_row("cannot be used", f"{report.num_bad:,}")
        output.stdout.print(table)
    if faults:
        output.note(f"all rows that cannot be used: {file}")
    if skips and 0 < report.num_bad < report.checked:
        output.warn(f"{describe_bad(report)}\n  the run leaves them out, as data.on_bad_row says")
    else:
        refuse_bad(report, skip=skips)


def show_report(report: FinetuneReport, as_json: bool, quiet: bool) -> None:
    """What a run did and what it took, and the command that follows."""
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
        took = report.summary
        assert took is not None  # a run that has just ended has one
        hours = f"{took.device_hours:.3g} {'GPU' if took.device != 'cpu' else 'CPU'} hours"
        share = "" if took.utilization is None else f", {took.utilization:.1%} of peak"
        peak = memory_size(took.peak_memory_gib * GIB)
        output.note(f"{hours}, {took.tokens_per_second:,.0f} tokens/s{share}, peak {peak}")
        if any(report.rows.values()):
            left_out, cut, silent = (report.rows[name] for name in ("skipped", "cut", "without_labels"))
            output.note(
                f"rows left out {left_out:,} (skipped_rows.jsonl), cut {cut:,}, passed over without a label {silent:,}"
            )
    output.print_line(report.path)
    merged = (report.path / "config.json").is_file()
    following = ("eval --tasks tiny --model " if merged else "finetune --merge ") + quote(str(report.path))
    output.note(f"next: pmod {following}")


def show_plan(plan: Plan, as_json: bool, quiet: bool) -> None:
    """One table: what is trained, what it takes, p-MoD beside stock."""
    if as_json:
        output.print_json(_plan_json(plan))
        return
    if quiet:  # the exit code says whether it fits
        return
    table = plain_table("What is trained", "part", "parameters", "trained", "learning rate")
    for part, numbers in plan.parameters.items():
        rate = f"{plan.learning_rates[part]:g}" if numbers.trained else "frozen"
        table.add_row(part, f"{numbers.parameters:,}", f"{numbers.trained:,}", rate)
    output.stdout.print(table)

    columns = (plan.pmod, plan.stock)
    table = Table(f"{plan.model} on {plan.devices} x {plan.device.name}", "p-MoD", "stock", caption=_caption(plan))
    for part in ("weights", "optimizer", "gradients", "activations", "logits", "total"):
        name = "memory of one device, peak" if part == "total" else f"  {part}"
        table.add_row(name, *(f"{memory_size(getattr(cost.memory, part))}" for cost in columns))
    disk = plan.disk
    fits = {True: "yes", False: "no", None: "not known"}
    table.add_row(f"fits {memory_size(plan.device.memory)}", *(fits[cost.fits] for cost in columns))
    table.add_section()
    table.add_row("steps", *[f"{plan.steps:,}"] * 2)
    table.add_row("rows, a step and in all", *[f"{plan.rows_per_step:,}; {plan.rows:,}"] * 2)
    table.add_row("tokens", *[f"{plan.tokens:,}"] * 2)
    table.add_row("mean retention ratio", *(f"{cost.mean_retention:.2%}" for cost in columns))
    table.add_row("training FLOPs", *(f"{cost.flops:.3g}" for cost in columns))
    table.add_row("disk: a checkpoint, the result", *[f"{disk_size(disk.checkpoint)}, {disk_size(disk.result)}"] * 2)
    free = "" if disk.free is None else f" of {disk_size(disk.free)} free"
    table.add_row("disk at most", *[f"{disk_size(disk.peak)}{free}"] * 2)
    table.add_row(
        f"hours at {plan.utilization:.0%} of peak",
        *("not known" if cost.hours is None else f"{cost.hours:.1f}" for cost in columns),
    )
    output.stdout.print(table)


def _caption(plan: Plan) -> str:
    name = {"p-mod": "p-MoD", "stock": "stock"}[plan.runs_as]
    source = plan.device.source
    return f"this run is the {name} column; data: {plan.data.source}; device: {source}"


def _plan_json(plan: Plan) -> dict:
    def cost(column: Cost) -> dict[str, Any]:
        memory = {f"{part}_bytes": number for part, number in asdict(column.memory).items()}
        return {
            "memory_bytes": column.memory.total,
            **memory,
            "fits": column.fits,
            "flops": column.flops,
            "hours": column.hours,
            "mean_retention_ratio": column.mean_retention,
        }

    return {
        "schema_version": 1,
        "model": plan.model,
        "runs_as": plan.runs_as,
        "parameters": {
            part: {**asdict(numbers), "learning_rate": plan.learning_rates.get(part)}
            for part, numbers in plan.parameters.items()
        },
        "data": asdict(plan.data),
        "context": plan.context,
        "steps": plan.steps,
        "rows_per_step": plan.rows_per_step,
        "rows": plan.rows,
        "tokens": plan.tokens,
        "device": {"name": plan.device.name, "count": plan.devices, "memory_bytes": plan.device.memory},
        "utilization": plan.utilization,
        "pmod": cost(plan.pmod),
        "stock": cost(plan.stock),
        "disk": {
            "checkpoint_bytes": plan.disk.checkpoint,
            "result_bytes": plan.disk.result,
            "peak_bytes": plan.disk.peak,
            "free_bytes": plan.disk.free,
            "fits": plan.disk.fits,
        },
        "remedies": [asdict(remedy) for remedy in plan.remedies],
        "lacking_here": plan.lacking,
    }


def refuse_unfit(plan: Plan) -> None:
    """End a plan that cannot be carried out with what would make it fit.

    Raises:
        PmodError: the run takes more memory or more disk than there is.
    """
    needed, there = plan.cost.memory.total, plan.device.memory
    if plan.cost.fits is False:
        ways = "; ".join(f"{_flags(remedy, plan.devices)} ({memory_size(remedy.memory)})" for remedy in plan.remedies)
        raise PmodError(
            f"the run does not fit: it takes {memory_size(needed)} on each {plan.device.name}, which has "
            f"{memory_size(there)}",
            hint=f"what would fit: {ways}" if ways else "no batch, engine or adapter makes it fit: take a larger GPU",
            code=RUN_FAILED,
        )
    if plan.disk.fits is False:
        raise PmodError(
            f"the run does not fit on the disk: it needs {disk_size(plan.disk.peak)}, and "
            f"{disk_size(plan.disk.free or 0)} are free",
            hint="choose another disk with --out, or keep fewer: --set train.keep_checkpoints=1",
            code=RUN_FAILED,
        )


def _flags(remedy: Remedy, processes: int) -> str:
    """A remedy as the words of the command."""
    words = [f"`{key}={str(value).lower()}`" for key, value in remedy.settings.items()]
    return " ".join([*words, *([f"`num_processes={remedy.processes}`"] if remedy.processes != processes else [])])


def show_sweep(found: dict[str, Any], out: Path, as_json: bool, quiet: bool, table: str | None = None) -> None:
    """The plan of a sweep, or its results as a Markdown table."""
    if as_json:
        output.print_json(found)
    elif quiet:
        output.print_line(out)
    elif table is not None:
        output.print_line(table.rstrip())
    else:
        _show_sweep_plan(found)


def _show_sweep_plan(plan: dict[str, Any]) -> None:
    table = Table("recipe", "mean retention", "steps", "rows", "FLOPs a cell", "seeds done", "left")
    for row in plan["rows"]:
        done, left = (", ".join(map(str, row[name])) or "-" for name in ("done", "left"))
        counts = (f"{row['steps']:,}", f"{row['rows']:,}", f"{row['flops_per_cell']:.3g}")
        table.add_row(row["recipe"], f"{row['mean_retention']:.2%}", *counts, done, left)
    output.stdout.print(table)
    seconds = plan["cpu_seconds_left"]
    took = "" if seconds is None else f", {seconds / 3600:.1f} CPU hours by the cells that are done"
    output.print_line(
        f"{plan['cells']} cells in {plan['folder']}: {plan['done']} done, {plan['left']} left, "
        f"{plan['flops_left']:.3g} FLOPs{took}"
    )
