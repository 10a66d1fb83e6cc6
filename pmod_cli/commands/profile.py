"""`pmod profile`: what a model costs, stock beside p-MoD: counted without weights, and measured with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pmod_cli.commands.common import (
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    ModelOpt,
    OfflineOpt,
    RevisionOpt,
    model_or_default,
    pick_device,
)
from pmod_cli.core import output, state
from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from pmod_cli import profiling
    from pmod_cli.profiling.latency import Latency

EXAMPLES = """\
pmod profile --report flops
pmod profile --model llava-1.5-7b --report all --html cost.html
pmod profile --report memory --gpu-memory 24GB --new-tokens 256
pmod profile --image-size 1280x720 --new-tokens 128 --json
pmod profile --sweep shift=0.3:0.7:0.05 --plot sweep.png
pmod profile --from-data llava_v1_5_mix665k.json --images-root images --text-tokens 200
pmod profile --report latency --random-weights --hidden-size 512 --threads 1
"""

REPORTS = ("flops", "kv", "memory", "latency", "all")
PICTURES = (".png", ".svg", ".pdf")
FORMATS = ("table", "markdown", "csv", "json")
DEFAULT_MODEL = "llava-next-7b"
WORKLOAD = "Workload: one batch"
OVERRIDES = "What if: settings that replace the checkpoint's own"
MEASURING = "Measuring: --report latency"
KINDS = "cosine, linear, stepped, interleaved or constant."
PHASES = ("prefill", "first-token", "decode", "train", "train-checkpointed")
CONTESTANTS = ("stock", "random", "uniform")


def _report(name: str) -> str:
    if name not in REPORTS:
        raise typer.BadParameter(f"{name!r} is not a report. Known: {', '.join(REPORTS)}")
    return name


def _format(name: str | None) -> str | None:
    if name is not None and name not in FORMATS:
        raise typer.BadParameter(f"{name!r} is not a format. Known: {', '.join(FORMATS)}")
    return name


def _image_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    sizes = []
    for size in text.split(",") if text else ():
        width, by, height = size.strip().lower().partition("x")
        if not (by and _side(width) and _side(height)):
            raise typer.BadParameter(f"{size!r} is not WIDTHxHEIGHT in pixels, as in 672x672")
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def _side(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _some_of(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is no {what}. Known: {', '.join(known)}")
    return names


def profile(
    context: typer.Context,
    report: Annotated[
        str,
        typer.Option("--report", callback=_report, metavar="|".join(REPORTS), help="What to show; all is all counts."),
    ] = "flops",
    model: ModelOpt = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH[,WxH]",
            rich_help_panel=WORKLOAD,
            help="Image in pixels, one a row of the batch; two by two tiles, the paper's case, if not given.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(rich_help_panel=WORKLOAD, help="Images in a row.")] = 1,
    text_tokens: Annotated[
        int | None, typer.Option(rich_help_panel=WORKLOAD, help="Text tokens of a row. (default: 58)")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(rich_help_panel=WORKLOAD, help="Generated tokens fed back after the prefill.")
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", rich_help_panel=WORKLOAD, help="Rows. (default: one a size)")
    ] = None,
    from_data: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WORKLOAD,
            metavar="FILE",
            help="Average over a LLaVA JSON or JSONL file: image headers only.",
        ),
    ] = None,
    images_root: Annotated[
        Path | None,
        typer.Option(rich_help_panel=WORKLOAD, metavar="DIR", help="Folder of its images. (default: the file's)"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=WORKLOAD, help="First rows of the file only.")
    ] = None,
    dtype: DtypeOpt = "auto",
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|NAME", help="--report memory: the GPU to fill, as 24GB or h100.", show_default=False
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING=VALUES",
            help="shift, target-retention, max-ratio, min-ratio as first:last:step; or schedule, image-size lists.",
        ),
    ] = None,
    runs: Annotated[
        str | None, typer.Option(metavar="DIR[,DIR]", help="--sweep: runs of pmod eval whose scores stand beside it.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw layers, or the sweep, to a .png, .svg or .pdf.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one page.")] = None,
    output_format: Annotated[
        str | None,
        typer.Option("--format", callback=_format, metavar="FORMAT", help=f"{', '.join(FORMATS)}. (default: table)"),
    ] = None,
    macs: Annotated[bool, typer.Option("--macs", help="Show multiply-adds instead of FLOPs.")] = False,
    schedule: Annotated[str | None, typer.Option(metavar="KIND", rich_help_panel=OVERRIDES, help=KINDS)] = None,
    shift: Annotated[
        float | None, typer.Option(rich_help_panel=OVERRIDES, help="Shift of a decaying schedule.")
    ] = None,
    target_retention: Annotated[
        float | None, typer.Option(rich_help_panel=OVERRIDES, help="Mean retention ratio to reach.")
    ] = None,
    max_ratio: Annotated[
        float | None, typer.Option(rich_help_panel=OVERRIDES, help="Ratios above it become plain layers.")
    ] = None,
    min_ratio: Annotated[
        float | None, typer.Option(rich_help_panel=OVERRIDES, help="Floor of a decaying schedule.")
    ] = None,
    target_tokens: Annotated[
        str | None, typer.Option(metavar="KIND", rich_help_panel=OVERRIDES, help="vision_all or vision_hr.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(rich_help_panel=OVERRIDES, help="Another width of the same architecture.")
    ] = None,
    layers: Annotated[int | None, typer.Option(rich_help_panel=OVERRIDES, help="Another number of layers.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", rich_help_panel=MEASURING, help="Random weights of the model's shape.")
    ] = False,
    phases: Annotated[
        str, typer.Option(rich_help_panel=MEASURING, metavar="LIST", help=f"Some of {', '.join(PHASES)}.")
    ] = "prefill,first-token,decode",
    against: Annotated[
        str, typer.Option(rich_help_panel=MEASURING, metavar="LIST", help=f"Some of {', '.join(CONTESTANTS)}.")
    ] = "stock,random,uniform",
    repeats: Annotated[int, typer.Option(min=1, rich_help_panel=MEASURING, help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, rich_help_panel=MEASURING, help="Rounds before them.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=4096, rich_help_panel=MEASURING, help="CPU threads. (default: torch's choice)"),
    ] = None,
    device: DeviceOpt = "auto",
    attention: Annotated[
        str, typer.Option(rich_help_panel=MEASURING, metavar="KIND", help="sdpa, eager or flash_attention_2.")
    ] = "sdpa",
    gpu: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MEASURING, metavar="NAME", help="Compare with this GPU's peaks, not measured ones."
        ),
    ] = None,
    revision: RevisionOpt = None,
    as_json: JsonOpt = False,
    offline: OfflineOpt = False,
) -> None:
    """Count FLOPs, KV cache and memory, or measure time, p-MoD beside stock.

    Counting needs no weights, no network for an alias, and no GPU. --report all is every count; latency is measured.
    """
    if as_json and output_format not in (None, "json"):
        raise PmodError(f"--json and --format {output_format} are two forms: give one of them")
    output_format = "json" if as_json else output_format or "table"
    sizes = _image_sizes(image_size)
    chosen_phases, controls = _some_of(phases, PHASES, "phase"), _some_of(against, CONTESTANTS, "contestant")
    _check_files(plot, html)
    for given, flag in ((from_data, "--from-data"), (sweep, "--sweep")):
        if given is not None and report in ("latency", "memory"):
            raise PmodError(
                f"{flag} counts; it does not go with --report {report}", hint=f"leave --report {report} out"
            )
    _check_used(context, report, from_data is not None, sweep is not None)
    name = _model(model)
    from pmod_cli import profiling
    from pmod_cli.checkpoints import resolve

    overrides: dict[str, Any] = {
        "schedule": schedule,
        "shift": shift,
        "mean": target_retention,
        "max_ratio": max_ratio,
        "min_ratio": min_ratio,
        "target_tokens": target_tokens,
    }
    overrides = {key: value for key, value in overrides.items() if value is not None}
    subject = profiling.load_subject(name, overrides, revision=revision)
    if subject.assumed:
        output.note(
            f"{subject.source} leaves out {', '.join(subject.assumed)}: these are transformers' defaults, and there "
            "are no weights here to hold them to"
        )
    subject = profiling.scaled(subject, hidden_size=hidden_size, layers=layers)
    if from_data is not None:
        shown = _average(subject, from_data, images_root, text_tokens, limit, dtype)
        return _show(shown, output_format, html, plot)
    workload = profiling.Workload(sizes, images, 58 if text_tokens is None else text_tokens, new_tokens, batch_size)
    if sweep is not None:
        if hidden_size or layers:
            raise PmodError("--sweep takes the model's own size", hint="leave --hidden-size and --layers out")
        shown = _sweep(name, sweep, workload, overrides, dtype, revision, runs)
        return _show(shown, output_format, html, plot)
    if report == "latency":
        if not random_weights and (hidden_size or layers):
            raise PmodError(
                "--hidden-size and --layers change the shape: no checkpoint has such weights",
                hint="add --random-weights",
            )
        settings = profiling.LatencySettings(
            device=pick_device(device),
            dtype=dtype,
            attention=attention,
            phases=chosen_phases,
            names=("p-mod", *controls),
            warmup=warmup,
            repeats=repeats,
            threads=threads,
            gpu=gpu,
        )
        folder = None if random_weights else resolve(name, revision=revision).path
        result, latency = profiling.measure(subject, workload, folder, settings, lambda phase: output.note(phase))
    else:
        result, latency = profiling.profile(subject, workload, dtype=dtype), None
    if result.unknown_operators:
        output.warn(f"operators that nobody counted: {', '.join(sorted(result.unknown_operators))}")
    _show(_profiled(result, latency, report, macs, gpu_memory), output_format, html, plot)


# What an option is for: given elsewhere, it would be ignored.
_USES = {
    "--report latency": (
        ("random_weights", "phases", "against", "repeats", "warmup", "threads", "device", "attention", "gpu"),
        lambda report, data, sweep: report == "latency",
    ),
    "--report memory": (("gpu_memory",), lambda report, data, sweep: report in ("memory", "all") and not data | sweep),
    "--from-data": (("images_root", "limit"), lambda report, data, sweep: data),
    "--sweep": (("runs",), lambda report, data, sweep: sweep),
    "a report of one batch": (
        ("image_size", "images", "new_tokens", "batch_size", "sweep"),
        lambda report, data, sweep: not data,
    ),
    "--report flops or all": (("macs",), lambda report, data, sweep: report in ("flops", "all") and not data | sweep),
}


def _check_used(context: typer.Context, report: str, data: bool, sweep: bool) -> None:
    """Raises PmodError at an option that this call would ignore."""
    for place, (names, applies) in _USES.items():
        for name in names:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE" and not applies(report, data, sweep):
                raise PmodError(
                    f"--{name.replace('_', '-')} belongs to {place}: here it would change nothing",
                    hint="leave it out, or see pmod profile --help",
                )


def _check_files(plot: Path | None, html: Path | None) -> None:
    """Before anything heavy is imported.

    Raises:
        PmodError: a kind of picture that is not drawn, a folder that is not there, or one where a file has to be.
    """
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise PmodError(f"--plot {plot}: the name ends in none of {', '.join(PICTURES)}", hint="--plot cost.png")
    for file, flag, example in ((plot, "--plot", "cost.png"), (html, "--html", "cost.html")):
        if file is not None and not file.absolute().parent.is_dir():
            raise PmodError(f"{flag} {file}: there is no folder {file.parent}", hint=f"mkdir -p {file.parent}")
        if file is not None and file.is_dir():
            raise PmodError(f"{flag} {file} is a folder: expected a file", hint=f"{flag} {example}")


def _model(model: str | None) -> str:
    """--model, else the checkpoint of this directory, else the paper's larger model; the choice is named on stderr."""
    if model is None and state.default_model() is None:
        output.note(f"model: {DEFAULT_MODEL}, from its built-in configuration (no --model, and no checkpoint here yet)")
        return DEFAULT_MODEL
    return model_or_default(model)


@dataclass(frozen=True)
class Shown:
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


def _show(shown: Shown, form: str, html: Path | None, plot: Path | None) -> None:
    """Files first, so that stdout says nothing that a full disk would make untrue."""
    if plot is not None:
        from pmod_cli.profiling import plots

        if shown.figure is None:
            raise PmodError("--plot: there is nothing to draw of this report", hint="--report flops, kv or --sweep")
        plots.save(shown.figure(), plot)
        output.note(f"plot: {plot}")
    if html is not None:
        from pmod_cli.core.atomic import write_text
        from pmod_cli.profiling import plots
        from pmod_cli.profiling.page import to_html

        figures = [] if shown.figure is None else [(shown.caption, plots.to_svg(shown.figure()))]
        write_text(html, to_html(shown.title, shown.headline, figures, shown.tables, shown.notes))
        output.note(f"page: {html}")
    if form == "json":
        output.print_json(shown.json)
    elif form in ("csv", "markdown"):
        from pmod_cli.profiling import exports

        text = (
            exports.to_csv(shown.rows)
            if form == "csv"
            else exports.to_markdown(shown.headline, shown.tables, shown.notes)
        )
        output.stdout.file.write(text)
    else:
        output.stdout.print(shown.headline + "\n", soft_wrap=True, markup=False)
        for table in shown.tables:
            output.stdout.print(table, "")
        for line in shown.notes:
            output.stdout.print(line, style="dim", soft_wrap=True, markup=False)


def _profiled(
    result: profiling.Profile, latency: Latency | None, report: str, macs: bool, gpu_memory: str | None
) -> Shown:
    from pmod_cli.profiling import (
        CONVENTIONS,
        devices,
        latency_report,
        memory_report,
        plots,
        tables,
        to_json,
    )

    said, notes = to_json(result, latency, macs=macs), []
    rows = said["layers"]
    if latency is not None:
        shown = [latency_report.latency_table(result, latency), latency_report.cache_table(result, latency)]
        shown += [latency_report.parts_table(latency)] if latency.parts else []
        notes, rows = latency_report.notes(latency), said["latency"]["phases"]
    else:
        shown = [] if report == "memory" else tables.sections(result, report, macs=macs)
    if report in ("flops", "all"):
        unit = "1 MAC" if macs else "2 FLOPs"
        notes = [f"{unit} a multiply-add of matrix products; all else counts 0."]
        notes += [f"{name}: {counted}" for name, counted in CONVENTIONS.items()]
    if report in ("memory", "all"):
        gpus = [devices.parse_memory(gpu_memory)] if gpu_memory else None
        memory = memory_report.predict(result, gpus)
        shown += memory_report.tables(result, memory)
        notes += memory_report.NOTES
        said["memory"] = memory_report.to_json(memory)
        if report == "memory":
            rows = memory_report.rows(memory)
    drawn = None if report in ("latency", "memory") else lambda: plots.layers_figure(result)
    caption = "Retention ratio, FLOPs and KV cache of each decoder layer, p-MoD beside stock"
    return Shown(result.subject.name, tables.headline(result), shown, notes, said, rows, drawn, caption)


def _sweep(
    name: str,
    text: str,
    workload: profiling.Workload,
    overrides: dict[str, Any],
    dtype: str,
    revision: str | None,
    runs: str | None,
) -> Shown:
    from pmod_cli.profiling import exploration, plots
    from pmod_cli.profiling.schema import SCHEMA_VERSION
    from pmod_cli.profiling.scores import read_scores
    from pmod_cli.profiling.sweep import parse_axis, sweep

    axis = parse_axis(text)
    dtype = "bfloat16" if dtype == "auto" else dtype
    points = sweep(name, axis, workload, overrides, dtype, revision=revision)
    scores = read_scores([Path(run.strip()) for run in runs.split(",") if run.strip()], axis, points) if runs else None
    notes = [f"retention: mean ratio over the layers; V: vision tokens; KV cache in {dtype}"]
    if scores:
        notes.append(f"score: mean of {', '.join(scores.tasks)}, by the runs with the same schedule")
    rows = exploration.sweep_rows(axis, points, scores)
    said = {"schema_version": SCHEMA_VERSION, "model": {"name": name}, "sweep": {"setting": axis.name, "points": rows}}
    return Shown(
        title=name,
        headline=f"{name}: {axis.name} over {len(points)} values, {workload.text_tokens} text tokens",
        tables=[exploration.sweep_table(axis, points, scores)],
        notes=notes,
        json=said,
        rows=rows,
        figure=lambda: plots.sweep_figure(axis, points, scores),
        caption=f"Prefill FLOPs and KV cache over {axis.name}",
    )


def _average(
    subject: profiling.Subject,
    file: Path,
    images: Path | None,
    text_tokens: int | None,
    limit: int | None,
    dtype: str,
) -> Shown:
    from pmod_cli.profiling import dataset, exploration
    from pmod_cli.profiling.report import cache_dtype
    from pmod_cli.profiling.schema import SCHEMA_VERSION
    from pmod_cli.profiling.sizes import Sizes

    if text_tokens is not None and text_tokens < 0:
        raise PmodError(f"--text-tokens {text_tokens} is negative: expected 0 or more", hint="pmod profile --help")
    count_text = dataset.tokenizer_of(subject) if text_tokens is None else lambda _: text_tokens
    sizes = Sizes.of(subject.stock)
    rows = dataset.read_rows(file, images, sizes, count_text, limit)
    dtype = cache_dtype(subject.stock) if dtype == "auto" else dtype
    settings = subject.pmod.settings
    means = dataset.average(sizes, rows, subject.pmod.retention, settings.target_tokens, dtype)
    said = exploration.average_json(means)
    counted = "as given" if text_tokens is not None else "by the model's tokenizer, without a chat template"
    return Shown(
        title=subject.name,
        headline=f"{subject.name} over {file}: {len(rows):,} rows",
        tables=exploration.average_tables(means),
        notes=[f"text tokens {counted}; of an image only the header is read; KV cache in {dtype}"],
        json={"schema_version": SCHEMA_VERSION, "model": {"name": subject.name}, "data": {"file": str(file)} | said},
        rows=[{"file": str(file)} | said],
    )
