"""What `pmod convert` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shlex import quote
from typing import TYPE_CHECKING

from rich.table import Table

from pmod_cli.core import output
from pmod_cli.core.text import disk_size

if TYPE_CHECKING:
    from pmod_cli.checkpoints import ConversionReport


def print_aliases(aliases: dict, as_json: bool) -> None:
    """Alias, hub id, decoder layers, parameters and size in 16 bit."""
    rows = {
        name: {"repo": alias.repo or "bundled", "layers": alias.layers, "parameters": alias.parameters}
        for name, alias in aliases.items()
    }
    if as_json:
        output.print_json({"schema_version": 2, "aliases": rows})
        return
    width = max(len(row["repo"]) for row in rows.values())
    for name, row in rows.items():
        number = row["parameters"]
        size = f"{number / 1e9:.1f}B" if number > 1e9 else f"{number / 1e6:.1f}M"
        gigabytes = f"{disk_size(2 * number):>8}"
        output.print_line(f"{name:22}{row['repo']:{width}} {row['layers']:3} layers {size:>7} {gigabytes}")


def as_json(report: ConversionReport, dry_run: bool) -> dict:
    """One object: the report's fields."""
    return {"schema_version": 2, "dry_run": dry_run, "mean_retention": report.mean_retention, **vars(report)}


def print_report(report: ConversionReport, dry_run: bool) -> None:
    """A table on stdout, notes on stderr."""
    total, routed = report.num_layers, len(report.routed_layers)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("would write" if dry_run else "wrote", str(report.target))
    kinds = f"{report.model_type} over {report.decoder}, {total} layers"
    table.add_row("model", f"{kinds}, {routed} of them with a router" if report.settings else kinds)
    table.add_row("reads" if dry_run else "read", f"{disk_size(report.read_bytes)} in the {report.layout} layout")
    for names, what in (
        (report.linked, "the same bytes as the source"),
        (report.symlinked, "they point to the source: keep it where it is"),
    ):
        if names:
            table.add_row("linked", f"{_files(names)}: {what}")
    if report.copied:
        table.add_row("copied", f"{_files(report.copied)}, {disk_size(report.copied_bytes)}")
    if report.streamed:
        table.add_row("rewritten", f"{_files(report.streamed)}, {disk_size(report.streamed_bytes)}")
    table.add_row("written", f"{report.router_parameters:,} router parameters and {len(report.written)} small files")
    table.add_row("disk", f"{disk_size(report.free_bytes)} free {'now' if dry_run else 'before'}")
    if report.settings:
        ratios = f"{report.retention[0]:.2f} → {report.retention[-1]:.2f}, mean {report.mean_retention:.4f}"
        shift = report.settings["shift"]
        shifted = f", shift {shift:.4g}" if shift is not None else ""
        before = f", behind {report.settings['before']}" if report.settings.get("before") else ""
        table.add_row("schedule", f"{report.settings['schedule']}{shifted}{before}")
        table.add_row("retention", f"{_chart(report.retention)}  {ratios}")
    for checked in report.verified:
        table.add_row("verified", checked)
    output.stdout.print(table, markup=False)


def print_next(report: ConversionReport, *, tiny: bool) -> None:
    """What the user has to know, and the command that follows."""
    for note in report.notes:
        output.note(f"note: {note}")
    from pmod_cli.checkpoints import output_layout

    goes_on = output_layout(report.to).current
    if goes_on and report.router_state == "untrained":
        output.note("next: pmod finetune --recipe tiny" if tiny else "next: pmod finetune")
        if report.settings.get("selection", "router") == "router":
            output.note("  the routers are untrained: they have learnt nothing, so what is kept now means nothing yet")
    elif goes_on:
        output.note(f"next: pmod eval --tasks docvqa,chartqa --model {quote(str(report.target))}")
    else:
        output.note(f"next: hf upload YOUR/NAME {quote(str(report.target))}")


@contextmanager
def written_bytes() -> Iterator[Callable[[int], None]]:
    """A bar of the bytes that are written, on a terminal; it appears with the first piece."""
    from rich.progress import DownloadColumn, TextColumn, TransferSpeedColumn

    with output.progress(TextColumn("writing"), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("writing", total=None, visible=False)
        yield lambda written: bar.update(task, advance=written, visible=True)


def _files(names: list[str]) -> str:
    return f"{len(names)} weight file{'s' if len(names) != 1 else ''}"


def _chart(retention: list[float]) -> str:
    """One letter a layer, its height the ratio; tenths where the terminal has no block letters."""
    encoding = (getattr(output.stdout.file, "encoding", None) or "ascii").lower()
    letters = "▁▂▃▄▅▆▇█" if encoding.startswith("utf") else "0123456789"
    return "".join(letters[min(int(ratio * len(letters)), len(letters) - 1)] for ratio in retention)
