"""`pmod profile`: what a model costs, stock beside p-MoD, counted without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pmod_cli import output, state
from pmod_cli.commands.common import DtypeOpt, JsonOpt, ModelOpt, OfflineOpt, RevisionOpt, model_or_default

if TYPE_CHECKING:
    from pmod_cli import profiling

EXAMPLES = """\
pmod profile --report flops
pmod profile --model llava-1.5-7b --report all
pmod profile --image-size 1280x720 --new-tokens 128 --json
pmod profile --schedule linear --target-retention 0.4
"""

REPORTS = ("flops", "kv", "all")
DEFAULT_MODEL = "llava-next-7b"
OVERRIDES = "What if: settings that replace the checkpoint's own"
KINDS = "cosine, linear, stepped, interleaved or constant."


def _report(name: str) -> str:
    if name not in REPORTS:
        raise typer.BadParameter(f"{name!r} is not a report. Known: {', '.join(REPORTS)}")
    return name


def _image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, by, height = text.lower().partition("x")
    if not (by and width.isdigit() and height.isdigit()):
        raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, as in 672x672")
    return int(width), int(height)


def profile(
    report: Annotated[
        str, typer.Option("--report", callback=_report, metavar="flops|kv|all", help="What to show.")
    ] = "flops",
    model: ModelOpt = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size", metavar="WxH", help="Image in pixels; two by two tiles, the paper's case, if not given."
        ),
    ] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", help="Text tokens of the prompt.")] = 58,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Generated tokens fed back after the prefill.")] = 0,
    dtype: DtypeOpt = "auto",
    schedule: Annotated[
        str | None, typer.Option("--schedule", metavar="KIND", rich_help_panel=OVERRIDES, help=KINDS)
    ] = None,
    shift: Annotated[
        float | None, typer.Option("--shift", rich_help_panel=OVERRIDES, help="Shift of a decaying schedule.")
    ] = None,
    target_retention: Annotated[
        float | None,
        typer.Option("--target-retention", rich_help_panel=OVERRIDES, help="Mean retention ratio to reach."),
    ] = None,
    max_ratio: Annotated[
        float | None,
        typer.Option("--max-ratio", rich_help_panel=OVERRIDES, help="Ratios above it become plain layers."),
    ] = None,
    min_ratio: Annotated[
        float | None, typer.Option("--min-ratio", rich_help_panel=OVERRIDES, help="Floor of a decaying schedule.")
    ] = None,
    target_tokens: Annotated[
        str | None,
        typer.Option("--target-tokens", metavar="KIND", rich_help_panel=OVERRIDES, help="vision_all or vision_hr."),
    ] = None,
    revision: RevisionOpt = None,
    as_json: JsonOpt = False,
    offline: OfflineOpt = False,
) -> None:
    """Count FLOPs and KV cache, p-MoD beside stock. Needs no weights, no network for an alias, and no GPU."""
    name = _model(model)
    size = _image_size(image_size)
    from pmod_cli import profiling

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
    workload = profiling.Workload(image_size=size, text_tokens=text_tokens, new_tokens=new_tokens)
    result = profiling.profile(subject, workload, dtype=dtype)
    if result.unknown_operators:
        output.warn(f"operators that nobody counted: {', '.join(sorted(result.unknown_operators))}")
    if as_json:
        output.print_json(profiling.to_json(result))
    else:
        _render(result, report)


def _model(model: str | None) -> str:
    """--model, else the checkpoint of this directory, else the paper's larger model; the choice is named on stderr."""
    if model is None and state.default_model() is None:
        output.note(f"model: {DEFAULT_MODEL}, from its built-in configuration (no --model, and no checkpoint here yet)")
        return DEFAULT_MODEL
    return model_or_default(model)


def _render(result: profiling.Profile, report: str) -> None:
    from pmod_cli.profiling import CONVENTIONS, tables

    sections = {
        "flops": (tables.layers_table, tables.flops_table, tables.decode_table, tables.kv_table),
        "kv": (tables.kv_layers_table, tables.kv_table),
        "all": (tables.layers_table, tables.flops_table, tables.decode_table, tables.kv_layers_table, tables.kv_table),
    }
    image = result.image
    output.stdout.print(
        f"{result.subject.name}: one image of {image.width}x{image.height} pixels in {image.tiles} tile(s), "
        f"{image.tokens} vision + {result.workload.text_tokens} text tokens\n",
        soft_wrap=True,
        markup=False,
    )
    for table in sections[report]:
        output.stdout.print(table(result), "")
    if report != "kv":
        output.stdout.print("2 FLOPs a multiply-add of matrix products; all else counts 0.", style="dim")
        for name, counted in CONVENTIONS.items():
            output.stdout.print(f"{name}: {counted}", style="dim", soft_wrap=True)
