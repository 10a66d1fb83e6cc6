"""`pmod convert`: a stock LLaVA to a p-MoD checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pmod_cli import output, state
from pmod_cli.commands.common import (
    CacheDirOpt,
    DryRunOpt,
    JsonOpt,
    OfflineOpt,
    OverwriteOpt,
    ProgressOpt,
    QuietOpt,
    RevisionOpt,
)
from pmod_cli.errors import PmodError

EXAMPLES = """\
pmod convert llava-next-7b
pmod convert tiny-llava-next -o tiny-pmod
pmod convert ./my-llava --schedule linear --target-retention 0.5
pmod convert llava-1.5-7b --dry-run
pmod convert --list
"""
METHOD = "What to keep"


def convert(
    name: Annotated[str | None, typer.Argument(help="Folder, alias, or hub id as org/name[@revision].")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. (default: checkpoints/NAME-pmod)", show_default=False),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(help="cosine, linear, stepped, interleaved, constant or list.", rich_help_panel=METHOD),
    ] = "cosine",
    shift: Annotated[
        float | None,
        typer.Option(help="β of the schedules cosine and linear. (default: 0.5)", rich_help_panel=METHOD),
    ] = None,
    target_retention: Annotated[
        float | None,
        typer.Option(help="Mean retention ratio over all layers, instead of a shift.", rich_help_panel=METHOD),
    ] = None,
    max_ratio: Annotated[
        float, typer.Option(help="Layers above this ratio stay plain; above 1 none does.", rich_help_panel=METHOD)
    ] = 0.85,
    min_ratio: Annotated[float, typer.Option(help="Floor of the decaying schedules.", rich_help_panel=METHOD)] = 0.15,
    ratios: Annotated[
        str | None,
        typer.Option(metavar="R,R,...", help="For --schedule list: one ratio a layer.", rich_help_panel=METHOD),
    ] = None,
    norm: Annotated[
        str,
        typer.Option(help="tanh, softmax, shifted_softmax, sigmoid, none, or as tanh_0.2_1.", rich_help_panel=METHOD),
    ] = "tanh",
    alpha: Annotated[float, typer.Option(help="Range of the tanh norm.", rich_help_panel=METHOD)] = 0.2,
    string: Annotated[
        bool,
        typer.Option("--string/--no-string", help="Scale skipped tokens by their weight.", rich_help_panel=METHOD),
    ] = True,
    target_tokens: Annotated[
        str, typer.Option(help="vision_all, or vision_hr: the high-resolution part only.", rich_help_panel=METHOD)
    ] = "vision_all",
    list_names: Annotated[bool, typer.Option("--list", help="List the aliases and stop.")] = False,
    overwrite: OverwriteOpt = False,
    dry_run: DryRunOpt = False,
    as_json: JsonOpt = False,
    revision: RevisionOpt = None,
    offline: OfflineOpt = False,
    cache_dir: CacheDirOpt = None,
    quiet: QuietOpt = False,
    progress: ProgressOpt = True,
) -> None:
    """Turn a stock LLaVA checkpoint into a p-MoD checkpoint, without copying its weights."""
    from pmod_cli import checkpoints

    if list_names:
        _print_aliases(checkpoints.ALIASES, as_json)
        return
    if name is None:
        raise PmodError("no model named", hint="pmod convert --list, or pmod convert --help")
    settings = _settings(
        schedule=schedule,
        shift=shift,
        mean=target_retention,
        max_ratio=max_ratio,
        min_ratio=min_ratio,
        values=_numbers(ratios),
        norm=norm,
        alpha=alpha,
        string=string,
        target_tokens=target_tokens,
    )
    found = checkpoints.resolve(name, revision=revision, offline=offline, cache_dir=cache_dir)
    origin = f"{found.repo}@{found.commit}" if found.repo else found.alias or str(found.path)
    output.note(f"source: {origin} ({found.origin})")
    target = out or Path(
        "checkpoints", f"{found.alias or (found.repo or str(found.path.resolve())).split('/')[-1]}-pmod"
    )
    report = checkpoints.convert(found.path, target, settings, overwrite=overwrite, dry_run=dry_run, origin=origin)
    if not dry_run:
        state.record_current(target)
    if as_json:
        output.print_json(
            {"schema_version": 1, "dry_run": dry_run, "mean_retention": report.mean_retention, **vars(report)}
        )
    elif quiet:
        output.print_line(target)
    else:
        _print_report(report, dry_run)
    if not dry_run:
        output.note("next: pmod finetune --recipe tiny" if found.alias == "tiny-llava-next" else "next: pmod finetune")
        output.note("  the routers are untrained: every token ties, so what is kept now means nothing yet")


def _settings(**values):
    from pmod_cli.model import PmodSettings

    try:
        return PmodSettings(**values)
    except ValueError as error:
        raise PmodError(str(error), hint="pmod convert --help") from None


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else None
    except ValueError:
        raise PmodError(f"--ratios {text!r}: expected numbers separated by commas, one a layer") from None


def _print_aliases(aliases: dict, as_json: bool) -> None:
    rows = {name: alias.repo or "bundled" for name, alias in aliases.items()}
    if as_json:
        output.print_json({"schema_version": 1, "aliases": rows})
        return
    for name, repo in rows.items():
        output.print_line(f"{name:24}{repo}")


def _print_report(report, dry_run: bool) -> None:
    total, routed = len(report.retention), len(report.routed_layers)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("would write" if dry_run else "wrote", str(report.target))
    table.add_row("model", f"{report.model_type} over {report.decoder}, {total} layers, {routed} of them with a router")
    table.add_row("linked", f"{len(report.linked)} weight files: the same bytes as the source")
    if report.copied:
        table.add_row("copied", f"{len(report.copied)} weight files: the source is on another file system")
    table.add_row("written", f"{report.router_parameters:,} router parameters and {len(report.written)} small files")
    ratios = f"{report.retention[0]:.2f} → {report.retention[-1]:.2f}, mean {report.mean_retention:.4f}"
    table.add_row("retention", f"{_chart(report.retention)}  {ratios}")
    output.stdout.print(table, markup=False)


def _chart(retention: list[float]) -> str:
    """One letter a layer, its height the ratio; tenths where the terminal has no block letters."""
    encoding = (getattr(output.stdout.file, "encoding", None) or "ascii").lower()
    letters = "▁▂▃▄▅▆▇█" if encoding.startswith("utf") else "0123456789"
    return "".join(letters[min(int(ratio * len(letters)), len(letters) - 1)] for ratio in retention)
