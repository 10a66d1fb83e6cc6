"""What `pmod finetune` shows: steps as they come, a look at the data, a report."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from pmod_cli.core import output

if TYPE_CHECKING:
    from pmod_cli.data.check import DataReport
    from pmod_cli.training.settings import Settings
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
        loss, left = f"{step.loss:.4f}", _minutes(step.seconds_left)
        if output.shows_progress():
            self.bar.update(self.task, completed=step.step, total=step.max_steps, loss=loss, left=left)
        elif step.step % self.interval == 0 or step.step == step.max_steps:
            output.note(f"step {step.step}/{step.max_steps}  loss {loss}  {left} left")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def show_check(report: DataReport, as_json: bool, *, skips: bool) -> None:
    """What a look at every row has found; bad ones end in an error, unless the run leaves them out."""
    from pmod_cli.data.check import describe_bad, refuse_bad

    if as_json:
        output.print_json({"schema_version": 1, **asdict(report)})
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
    if skips and report.num_bad:
        output.warn(f"{describe_bad(report)}\n  the run leaves them out, as data.on_bad_row says")
    else:
        refuse_bad(report)


def show_report(report: FinetuneReport, as_json: bool, quiet: bool) -> None:
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
        hours = f"{took.device_hours:.3g} {'GPU' if took.device != 'cpu' else 'CPU'} hours"
        share = "" if took.utilization is None else f", {took.utilization:.1%} of peak"
        output.note(f"{hours}, {took.tokens_per_second:,.0f} tokens/s{share}, peak {took.peak_memory_gib:.2f} GiB")
        if any(report.rows.values()):
            left_out, cut, silent = (report.rows[name] for name in ("skipped", "cut", "without_labels"))
            output.note(
                f"rows left out {left_out:,} (skipped_rows.jsonl), cut {cut:,}, passed over without a label {silent:,}"
            )
    output.print_line(report.path)
    merged = (report.path / "config.json").is_file()
    following = f"eval --tasks tiny --model {report.path}" if merged else f"finetune --merge {report.path}"
    output.note(f"next: pmod {following}")
