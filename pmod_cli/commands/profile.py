"""`pmod profile`: what a model costs, stock beside p-MoD: counted without weights, and measured with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.commands import common
from pmod_cli.commands.profile_checks import (
    COMPARED,
    FORMATS,
    PHASES,
    REPORTS,
    check_files,
    check_used,
    image_sizes,
    known_tasks,
    some_of,
    videos_of,
)
from pmod_cli.commands.profile_show import averaged, profiled, show, swept
from pmod_cli.core import output
from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import one_of
from pmod_cli.model.methods import METHODS
from pmod_cli.model.registry import SELECTIONS
from pmod_cli.model.schedule import SCHEDULES

EXAMPLES = """\
pmod profile --report flops
pmod profile --model llava-1.5-7b --report all --html cost.html
pmod profile --report memory --gpu-memory 24GB --new-tokens 256
pmod profile --image-size 1280x720 --new-tokens 128 --json
pmod profile --sweep shift=0.3:0.7:0.05 --plot sweep.png
pmod profile --from-data llava_v1_5_mix665k.json --images-root images --text-tokens 200
pmod profile --report latency --random-weights --hidden-size 512 --threads 1
pmod profile --report depth --model tiny-llava-next --plot depth.png
"""

DEFAULT_MODEL = "llava-next-7b"
_workload = common.option_under("Workload: one batch")
_overrides = common.option_under("What if: settings that replace the checkpoint's own")
_measuring = common.option_under("Measuring: --report latency")
_reading = common.option_under("Where it reads: --report depth")
KINDS = f"{one_of(name for name in SCHEDULES if name != 'list')}."


def profile(
    context: typer.Context,
    report: Annotated[
        str,
        typer.Option(
            "--report",
            callback=common.one_of_these(REPORTS, "report"),
            metavar="|".join(REPORTS),
            help="What to show; all is all counts.",
        ),
    ] = "flops",
    model: common.ModelOpt = None,
    image_size: Annotated[
        str | None,
        _workload(
            "--image-size",
            "--image",
            metavar="WxH[,WxH]",
            help="Image in pixels, one a row of the batch; two by two tiles, the paper's case, if not given.",
        ),
    ] = None,
    images: Annotated[int, _workload(help="Images in a row.")] = 1,
    video: Annotated[
        list[str] | None,
        _workload(metavar="FRAMESxWxH[@FPS]", help="A video of each row, as 64x480x360@2. May be given again."),
    ] = None,
    text_tokens: Annotated[int | None, _workload(help="Text tokens of a row. (default: 58)")] = None,
    new_tokens: Annotated[int, _workload(help="Generated tokens fed back after the prefill.")] = 0,
    batch_size: Annotated[int | None, _workload("--batch-size", "-b", help="Rows. (default: one a size)")] = None,
    from_data: Annotated[
        Path | None, _workload(metavar="FILE", help="Average over a LLaVA JSON or JSONL file: image headers only.")
    ] = None,
    images_root: Annotated[
        Path | None, _workload(metavar="DIR", help="Folder of its images. (default: the file's)")
    ] = None,
    limit: Annotated[int | None, _workload(min=1, help="First rows of the file only.")] = None,
    dtype: common.DtypeOpt = "auto",
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
        typer.Option(
            "--format",
            callback=common.one_of_these(FORMATS, "format"),
            metavar="FORMAT",
            help=f"{', '.join(FORMATS)}. (default: table)",
        ),
    ] = None,
    macs: Annotated[bool, typer.Option("--macs", help="Show multiply-adds instead of FLOPs.")] = False,
    schedule: Annotated[str | None, _overrides(metavar="KIND", help=KINDS)] = None,
    shift: Annotated[float | None, _overrides(help="Shift of a decaying schedule.")] = None,
    target_retention: Annotated[float | None, _overrides(help="Mean retention ratio to reach.")] = None,
    max_ratio: Annotated[float | None, _overrides(help="Ratios above it become plain layers.")] = None,
    min_ratio: Annotated[float | None, _overrides(help="Floor of a decaying schedule.")] = None,
    target_tokens: Annotated[
        str | None, _overrides(metavar="KIND", help="vision_all, vision_hr, vision_image or vision_video.")
    ] = None,
    quota: Annotated[str | None, _overrides(metavar="row|per_image", help="What K is taken of.")] = None,
    selection: Annotated[str | None, _overrides(metavar="NAME", help=f"{one_of(SELECTIONS)}.")] = None,
    select_at: Annotated[str | None, _overrides(metavar="L,L,...", help="Layers that choose.")] = None,
    method: Annotated[str | None, _overrides(metavar="NAME", help=f"{one_of(METHODS)}.")] = None,
    before: Annotated[
        str | None, _overrides(metavar="NAME:SHARE", help="Drop tokens before the decoder: divprune:0.33.")
    ] = None,
    hidden_size: Annotated[int | None, _overrides(help="Another width of the same architecture.")] = None,
    layers: Annotated[int | None, _overrides(help="Another number of layers.")] = None,
    random_weights: Annotated[
        bool, _measuring("--random-weights", help="Random weights of the model's shape.")
    ] = False,
    phases: Annotated[
        str, _measuring(metavar="LIST", help=f"Some of {', '.join(PHASES)}.")
    ] = "prefill,first-token,decode",
    against: Annotated[
        str, _measuring(metavar="LIST", help=f"Some of {', '.join(COMPARED)}.")
    ] = "stock,random,uniform",
    repeats: Annotated[int, _measuring(min=1, help="Timed rounds.")] = 5,
    warmup: Annotated[int, _measuring(min=0, help="Rounds before them.")] = 1,
    threads: Annotated[int | None, _measuring(min=1, max=4096, help="CPU threads. (default: torch's choice)")] = None,
    device: common.DeviceOpt = "auto",
    attention: Annotated[str, _measuring(metavar="KIND", help="sdpa, eager or flash_attention_2.")] = "sdpa",
    gpu: Annotated[
        str | None, _measuring(metavar="NAME", help="Compare with this GPU's peaks, not measured ones.")
    ] = None,
    tasks: Annotated[str, _reading(metavar="LIST", help="tiny, or some of its tasks.")] = "tiny",
    data: Annotated[
        str | None,
        _reading(metavar="NAME", help="Instead: a LLaVA JSON file, a folder of pictures or a data set of the hub."),
    ] = None,
    samples: Annotated[int, _reading(min=1, help="Pictures to ask about.")] = 32,
    revision: common.RevisionOpt = None,
    as_json: common.JsonOpt = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=common.set_quiet,
            is_eager=True,
            help="The report without notes; with --plot or --html only the paths of their files.",
        ),
    ] = False,
    offline: common.OfflineOpt = False,
) -> None:
    """Count FLOPs, KV cache and memory, or measure time, p-MoD beside stock.

    Counting needs no weights, no network for an alias, and no GPU. --report all is every count. Measured are latency,
    and depth: what the answers lose when a layer is skipped, or images are hidden from it on.
    """
    if as_json and output_format not in (None, "json"):
        raise PmodError(f"--json and --format {output_format} are two forms: give one of them")
    output_format = "json" if as_json else output_format or "table"
    if output_format in ("csv", "json"):
        common.refuse_ignored(context, ("macs",), "tables; csv and json have units in their names", "profile")
    sizes, (videos, rate) = image_sizes(image_size), videos_of(video)
    chosen_phases, controls = (
        some_of(phases, PHASES, "phase"),
        some_of(against, ("stock", *SELECTIONS), "model to compare"),
    )
    check_files(plot, html)
    for given, flag in ((from_data, "--from-data"), (sweep, "--sweep")):
        if given is not None and report in ("latency", "memory", "depth"):
            raise PmodError(
                f"{flag} counts; it does not go with --report {report}", hint=f"leave --report {report} out"
            )
    check_used(context, report, from_data is not None, None if sweep is None else sweep.partition("=")[0].strip())
    if videos and not sizes:
        common.refuse_ignored(context, ("images",), "rows with pictures, whose size --image-size says", "profile")
    if report == "depth":
        from pmod_cli.commands.profile_depth import read_depth

        if data:
            common.refuse_ignored(context, ("tasks",), "pictures that are drawn, without --data", "profile")
        chosen = data or known_tasks(tasks)
        shown = read_depth(
            common.model_or_default(model),
            chosen,
            images_root,
            samples,
            device=common.pick_device(device),
            dtype=dtype,
            revision=revision,
        )
        return show(shown, output_format, html, plot, quiet)
    name = _model(model)
    from pmod_cli import profiling
    from pmod_cli.checkpoints import resolve

    overrides = common.given_settings(
        schedule=schedule,
        shift=shift,
        mean=target_retention,
        max_ratio=max_ratio,
        min_ratio=min_ratio,
        target_tokens=target_tokens,
        quota=quota,
        selection=selection,
        select_at=select_at,
        method=method,
        before=before,
    )
    subject = profiling.load_subject(name, overrides, revision=revision)
    if subject.assumed:
        output.note(
            f"{subject.source} leaves out {', '.join(subject.assumed)}: these are transformers' defaults, and there "
            "are no weights here to hold them to"
        )
    subject = profiling.scaled(subject, hidden_size=hidden_size, layers=layers)
    if from_data is not None:
        shown = averaged(subject, from_data, images_root, text_tokens, limit, dtype)
        return show(shown, output_format, html, plot, quiet)
    text = 58 if text_tokens is None else text_tokens
    workload = profiling.Workload(sizes, images, text, new_tokens, batch_size, videos, rate)
    if sweep is not None:
        if hidden_size or layers:
            raise PmodError("--sweep takes the model's own size", hint="leave --hidden-size and --layers out")
        shown = swept(name, subject, sweep, workload, overrides, dtype, revision, runs)
        return show(shown, output_format, html, plot, quiet)
    if report == "latency":
        if not random_weights and (hidden_size or layers):
            raise PmodError(
                "--hidden-size and --layers change the shape: no checkpoint has such weights",
                hint="add --random-weights",
            )
        settings = profiling.LatencySettings(
            device=common.pick_device(device),
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
        result, latency = profiling.measure_latency(
            subject, workload, folder, settings, lambda phase: output.note(phase)
        )
    else:
        result, latency = profiling.profile(subject, workload, dtype=dtype), None
    if result.unknown_operators:
        output.warn(f"operators that nobody counted: {', '.join(sorted(result.unknown_operators))}")
    show(profiled(result, latency, report, macs, gpu_memory), output_format, html, plot, quiet)


def _model(model: str | None) -> str:
    """--model, else the checkpoint of this directory, else the paper's larger model; the choice is named on stderr."""
    if model is None and common.default_model() is None:
        output.note(f"model: {DEFAULT_MODEL}, from its built-in configuration (no --model, and no checkpoint here yet)")
        return DEFAULT_MODEL
    return common.model_or_default(model)
