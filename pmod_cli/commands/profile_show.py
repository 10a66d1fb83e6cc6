"""What `pmod profile` shows: a report as tables, JSON, CSV, Markdown, a picture or a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.core import output
from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from pmod_cli import profiling
    from pmod_cli.profiling.measure.latency import Latency


@dataclass(frozen=True)
class ShownReport:
    """A report before it is given a form.

    Args:
        title: The model.
        headline: What was profiled.
        tables: For people.
        notes: What their words mean.
        json: One object.
        rows: For CSV.
        figure: Draws it; None where there is nothing to draw.
        caption: What the figure shows, in words.
    """

    title: str
    headline: str
    tables: list[Table]
    notes: list[str]
    json: dict[str, Any]
    rows: list[dict[str, Any]]
    figure: Callable[[], Figure] | None = None
    caption: str = ""


def show(shown: ShownReport, form: str, html: Path | None, plot: Path | None, quiet: bool = False) -> None:
    """Files first, so that stdout says nothing that a full disk would make untrue.

    Args:
        quiet: No notes; of a table that is also drawn or written as a page, the paths of these files alone.
    """
    if plot is not None:
        from pmod_cli.profiling import plots

        assert shown.figure is not None  # --plot is refused where there is nothing to draw
        plots.save(shown.figure(), plot)
        output.note(f"plot: {plot}")
    if html is not None:
        from pmod_cli.core.atomic import write_text
        from pmod_cli.profiling import plots
        from pmod_cli.reporting import report_page

        figures = [] if shown.figure is None else [(shown.caption, plots.to_svg(shown.figure()))]
        write_text(html, report_page(shown.title, shown.headline, figures, shown.tables, shown.notes))
        output.note(f"page: {html}")
    if form == "json":
        output.print_json(shown.json)
    elif form in ("csv", "markdown"):
        from pmod_cli.reporting import to_csv, to_markdown

        text = to_csv(shown.rows) if form == "csv" else to_markdown(shown.headline, shown.tables, shown.notes)
        output.stdout.file.write(text)
    elif quiet and (plot or html):
        for file in filter(None, (plot, html)):
            output.print_line(file)
    else:
        output.stdout.print(shown.headline + "\n", soft_wrap=True, markup=False)
        for table in shown.tables:
            output.stdout.print(table, "")
        for line in () if quiet else shown.notes:
            output.stdout.print(line, style="dim", soft_wrap=True, markup=False)


def profiled(
    result: profiling.Profile, latency: Latency | None, report: str, macs: bool, gpu_memory: str | None
) -> ShownReport:
    """The report of one batch, counted or measured."""
    from pmod_cli.profiling import CONVENTIONS, count_report, latency_report, memory_report, plots, to_json
    from pmod_cli.profiling.measure.devices import parse_memory

    said, notes = to_json(result, latency, macs=macs), []
    rows = said["layers"]
    if latency is not None:
        shown = [latency_report.latency_table(result, latency), latency_report.cache_table(result, latency)]
        shown += [latency_report.parts_table(latency)] if latency.parts else []
        notes, rows = latency_report.notes(latency), said["latency"]["phases"]
    else:
        shown = [] if report == "memory" else count_report.sections(result, report, macs=macs)
    if report in ("flops", "all"):
        unit = "1 MAC" if macs else "2 FLOPs"
        notes = [f"{unit} a multiply-add of matrix products; all else counts 0."]
        notes += [f"{name}: {counted}" for name, counted in CONVENTIONS.items()]
    if report in ("memory", "all"):
        gpus = [parse_memory(gpu_memory)] if gpu_memory else None
        memory = memory_report.predict(result, gpus)
        shown += memory_report.tables(result, memory)
        notes += memory_report.NOTES
        said["memory"] = memory_report.to_json(memory)
        if report == "memory":
            rows = memory_report.rows(memory)
    drawn = None if report in ("latency", "memory") else lambda: plots.layers_figure(result)
    caption = "Retention ratio, FLOPs and KV cache of each decoder layer, p-MoD beside stock"
    return ShownReport(result.subject.name, result.headline, shown, notes, said, rows, drawn, caption)


def swept(
    name: str,
    subject: profiling.Subject,
    text: str,
    workload: profiling.Workload,
    overrides: dict[str, Any],
    dtype: str,
    revision: str | None,
    runs: str | None,
) -> ShownReport:
    """The report of `--sweep`; the subject is the model without the swept setting."""
    from pmod_cli.profiling import plots
    from pmod_cli.profiling.comparison import cache_dtype
    from pmod_cli.profiling.cost_sweep import parse_axis, read_scores, sweep, sweep_rows, sweep_table
    from pmod_cli.profiling.count_report import SCHEMA_VERSION

    axis = parse_axis(text)
    dtype = cache_dtype(subject.stock) if dtype == "auto" else dtype
    points = sweep(name, axis, workload, overrides, dtype, revision=revision)
    scores = None
    if runs:
        from pmod_cli.evaluation.benchmarks import BENCHMARKS

        weights = {benchmark.name: benchmark.weight for benchmark in BENCHMARKS.values()}
        scores = read_scores([Path(run.strip()) for run in runs.split(",") if run.strip()], axis, points, weights)
    notes = [f"retention: mean ratio over the layers; V: vision tokens; KV cache in {dtype}"]
    if scores:
        notes.append(f"score: mean of {', '.join(scores.tasks)}, by the runs with the same schedule")
    rows = sweep_rows(axis, points, scores)
    found = {"setting": axis.name, "dtype": dtype, "points": rows}
    said = {"schema_version": SCHEMA_VERSION, "model": {"name": name}, "sweep": found}
    return ShownReport(
        title=name,
        headline=f"{name}: {axis.name} over {len(points)} values, {workload.text_tokens} text tokens",
        tables=[sweep_table(axis, points, scores)],
        notes=notes,
        json=said,
        rows=rows,
        figure=lambda: plots.sweep_figure(axis, points, scores),
        caption=f"Prefill FLOPs and KV cache over {axis.name}",
    )


def averaged(
    subject: profiling.Subject,
    file: Path,
    images: Path | None,
    text_tokens: int | None,
    limit: int | None,
    dtype: str,
) -> ShownReport:
    """The report of `--from-data`."""
    from pmod_cli.profiling import Routed, average
    from pmod_cli.profiling.comparison import cache_dtype
    from pmod_cli.profiling.count_report import SCHEMA_VERSION

    if text_tokens is not None and text_tokens < 0:
        raise PmodError(f"--text-tokens {text_tokens} is negative: expected 0 or more", hint="pmod profile --help")
    count_text = average.tokenizer_of(subject) if text_tokens is None else lambda _: text_tokens
    sizes = subject.sizes
    rows = average.read_rows(file, images, sizes, count_text, limit)
    dtype = cache_dtype(subject.stock) if dtype == "auto" else dtype
    means = average.average(sizes, rows, Routed.of(subject.pmod), dtype)
    said = average.average_json(means)
    counted = "as given" if text_tokens is not None else "by the model's tokenizer, without a chat template"
    return ShownReport(
        title=subject.name,
        headline=f"{subject.name} over {file}: {len(rows):,} rows",
        tables=average.average_tables(means),
        notes=[f"text tokens {counted}; of an image only the header is read; KV cache in {dtype}"],
        json={"schema_version": SCHEMA_VERSION, "model": {"name": subject.name}, "data": {"file": str(file)} | said},
        rows=[{"file": str(file)} | said],
    )
