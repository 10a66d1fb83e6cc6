"""`pmod profile`: what a model costs, stock beside p-MoD: counted without weights, and measured with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli import output, state
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
from pmod_cli.errors import PmodError

if TYPE_CHECKING:
    from pmod_cli import profiling
    from pmod_cli.profiling.latency import Latency

EXAMPLES = """\
pmod profile --report flops
pmod profile --model llava-1.5-7b --report all
pmod profile --image-size 1280x720 --new-tokens 128 --json
pmod profile --schedule linear --target-retention 0.4
pmod profile --report latency --random-weights --hidden-size 512 --threads 1
"""

REPORTS = ("flops", "kv", "latency", "all")
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


def _image_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    sizes = []
    for size in text.split(",") if text else ():
        width, by, height = size.strip().lower().partition("x")
        if not (by and width.isdigit() and height.isdigit()):
            raise typer.BadParameter(f"{size!r} is not WIDTHxHEIGHT in pixels, as in 672x672")
        sizes.append((int(width), int(height)))
    return tuple(sizes)


def _some_of(text: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is no {what}. Known: {', '.join(known)}")
    return names


def profile(
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
    text_tokens: Annotated[int, typer.Option(rich_help_panel=WORKLOAD, help="Text tokens of a row.")] = 58,
    new_tokens: Annotated[
        int, typer.Option(rich_help_panel=WORKLOAD, help="Generated tokens fed back after the prefill.")
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", rich_help_panel=WORKLOAD, help="Rows. (default: one a size)")
    ] = None,
    dtype: DtypeOpt = "auto",
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
        int | None, typer.Option(min=1, rich_help_panel=MEASURING, help="CPU threads. (default: torch's choice)")
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
    """Count FLOPs and KV cache, or measure time and memory, p-MoD beside stock.

    Counting needs no weights, no network for an alias, and no GPU.
    """
    sizes = _image_sizes(image_size)
    chosen_phases, controls = _some_of(phases, PHASES, "phase"), _some_of(against, CONTESTANTS, "contestant")
    name = _model(model)
    from pmod_cli import profiling
    from pmod_cli.checkpoints import resolve

    overrides = {
        "schedule": schedule,
        "shift": shift,
        "mean": target_retention,
        "max_ratio": max_ratio,
        "min_ratio": min_ratio,
        "target_tokens": target_tokens,
    }
    subject = profiling.load_subject(
        name, {key: value for key, value in overrides.items() if value is not None}, revision=revision
    )
    subject = profiling.scaled(subject, hidden_size=hidden_size, layers=layers)
    workload = profiling.Workload(sizes, images, text_tokens, new_tokens, batch_size)
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
    if as_json:
        output.print_json(profiling.to_json(result, latency, macs=macs))
    else:
        _render(result, latency, report, macs)


def _model(model: str | None) -> str:
    """--model, else the checkpoint of this directory, else the paper's larger model; the choice is named on stderr."""
    if model is None and state.default_model() is None:
        output.note(f"model: {DEFAULT_MODEL}, from its built-in configuration (no --model, and no checkpoint here yet)")
        return DEFAULT_MODEL
    return model_or_default(model)


def _render(result: profiling.Profile, latency: Latency | None, report: str, macs: bool) -> None:
    from pmod_cli.profiling import CONVENTIONS, latency_report, tables

    output.stdout.print(tables.headline(result) + "\n", soft_wrap=True, markup=False)
    if latency is not None:
        shown = [latency_report.latency_table(result, latency), latency_report.cache_table(result, latency)]
        shown += [latency_report.parts_table(latency)] if latency.parts else []
    else:
        shown = tables.sections(result, report, macs=macs)
    for table in shown:
        output.stdout.print(table, "")
    notes = latency_report.notes(latency) if latency is not None else []
    if report in ("flops", "all"):
        unit = "1 MAC" if macs else "2 FLOPs"
        notes = [f"{unit} a multiply-add of matrix products; all else counts 0."]
        notes += [f"{name}: {counted}" for name, counted in CONVENTIONS.items()]
    for line in notes:
        output.stdout.print(line, style="dim", soft_wrap=True, markup=False)
