"""`pmod convert`: a LLaVA of any layout to a p-MoD checkpoint, or to another layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pmod_cli.checkpoints.layouts import output_layouts
from pmod_cli.commands import common
from pmod_cli.core import output
from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import one_of
from pmod_cli.model.registry import SELECTIONS
from pmod_cli.model.schedule import SCHEDULES

EXAMPLES = """\
pmod convert llava-next-7b
pmod convert tiny-llava-next -o tiny-pmod
pmod convert ./my-llava --schedule linear --target-retention 0.5
pmod convert ./my-llava --calibrate folder-of-pictures --target-flops 0.54
pmod convert llava-1.5-7b --target-flops 0.55 --dry-run
pmod convert liuhaotian/llava-v1.5-7b --dtype bfloat16 --verify
pmod convert MCG-NJU/p-MoD-LLaVA-NeXT-7B
pmod convert --llm lmsys/vicuna-7b-v1.5 --vision-tower openai/clip-vit-large-patch14-336 --projector mm_projector.bin
pmod convert llava-1.5-7b --adapter ./my-lora
pmod convert ./my-pmod --to published -o my-pmod-for-the-authors-code
pmod convert --list
"""
OUTPUTS = output_layouts().values()
SETTINGS = {"budget": "--target-flops"}  # of calibration
ARGUMENTS = {"mean": "target_retention", "values": "ratios"}  # settings whose options have another name
_method = common.option_under("What to keep")
_result = common.option_under("What to write")
_parts = common.option_under("What to read")


def convert(
    name: Annotated[str | None, typer.Argument(help="Folder, alias, or hub id as org/name@REV.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. (default: checkpoints/NAME-pmod)", show_default=False),
    ] = None,
    schedule: Annotated[str | None, _method(metavar="KIND", help=f"{one_of(SCHEDULES)}. (default: cosine)")] = None,
    shift: Annotated[float | None, _method(help="β of a decaying schedule, such as cosine. (default: 0.5)")] = None,
    target_retention: Annotated[
        float | None, _method(help="Mean retention ratio over all layers; solved for the shift.")
    ] = None,
    target_flops: Annotated[
        float | None,
        _method(
            help="Share of the stock decoder's prefill FLOPs (image of 672x672, 58 text tokens, attention counted); "
            "solved for the shift."
        ),
    ] = None,
    max_ratio: Annotated[
        float | None, _method(help="Layers above this ratio stay plain; above 1 none does. (default: 0.85)")
    ] = None,
    min_ratio: Annotated[float | None, _method(help="Floor of the decaying schedules. (default: 0.15)")] = None,
    ratios: Annotated[str | None, _method(metavar="R,R,...", help="For --schedule list: one ratio a layer.")] = None,
    norm: Annotated[
        str | None, _method(help="tanh, softmax, shifted_softmax, sigmoid, none, or as tanh_0.2_1. (default: tanh)")
    ] = None,
    alpha: Annotated[float | None, _method(help="Range of the tanh norm. (default: 0.2)")] = None,
    string: Annotated[
        bool | None,
        _method(
            "--string/--no-string", help="Scale skipped tokens by their weight. (default: string)", show_default=False
        ),
    ] = None,
    target_tokens: Annotated[
        str | None,
        _method(
            metavar="KIND",
            help="vision_all; vision_hr: the high-resolution part; vision_image, vision_video. (default: vision_all)",
        ),
    ] = None,
    quota: Annotated[
        str | None,
        _method(metavar="row|per_image", help="K of all vision tokens of a row, or of each image and frame."),
    ] = None,
    selection: Annotated[
        str | None, _method(metavar="NAME", help=f"What ranks the tokens: {one_of(SELECTIONS)}. (default: router)")
    ] = None,
    select_at: Annotated[
        str | None,
        _method(
            metavar="L,L,...",
            help="Layers that choose and have a router; those up to the next one hold the choice. (default: all that "
            "keep less)",
        ),
    ] = None,
    before: Annotated[
        str | None,
        _method(metavar="NAME:SHARE", help="Drop tokens for good before the decoder, then route: divprune:0.33."),
    ] = None,
    calibrate: Annotated[
        str | None,
        _method(
            metavar="DATA",
            help="Choose ratios and routers by pictures: tiny, a file, a folder or a data set, as pmod calibrate. With "
            "--target-flops or --target-retention as its budget. (default: 0.54)",
        ),
    ] = None,
    router_init: Annotated[str, _method(help="zero, or normal:STD such as normal:0.02.")] = "zero",
    to: Annotated[
        str,
        _result(
            help=f"{'; '.join(f'{each.name}: {each.summary}' if each.summary else each.name for each in OUTPUTS)}."
        ),
    ] = "pmod",
    max_shard_size: Annotated[
        str | None, _result(metavar="SIZE", help="Such as 5GB. (default: the files of the source)")
    ] = None,
    copy: Annotated[bool, _result("--copy", help="Copy unchanged weight files, not hard-link.")] = False,
    symlink: Annotated[bool, _result("--symlink", help="Point to unchanged weight files instead.")] = False,
    verify: Annotated[
        bool, _result("--verify", help="Read the result again: bytes, shapes, one forward pass.")
    ] = False,
    vision_tower: Annotated[
        str | None, _parts(metavar="NAME", help="Original layout: folder or hub id of the CLIP tower.")
    ] = None,
    tokenizer: Annotated[Path | None, _parts(metavar="DIR", help="Original layout: folder of the tokenizer.")] = None,
    llm: Annotated[str | None, _parts(metavar="NAME", help="Language model to build a LLaVA of, not NAME.")] = None,
    projector: Annotated[Path | None, _parts(metavar="FILE", help="With --llm: the pretrained mm_projector.")] = None,
    anyres: Annotated[bool, _parts("--anyres", help="With --llm: LLaVA-NeXT, not LLaVA-1.5.")] = False,
    adapter: Annotated[Path | None, _parts(metavar="DIR", help="LoRA adapter that was trained on NAME.")] = None,
    merge: Annotated[
        bool, _parts("--merge/--no-merge", help="Add the adapter to the weights, or keep it apart.")
    ] = True,
    list_names: Annotated[bool, typer.Option("--list", help="List the aliases and stop.")] = False,
    overwrite: common.OverwriteOpt = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is there if it was made the same way, else refuse.")
    ] = False,
    dry_run: common.DryRunOpt = False,
    dtype: common.DtypeOpt = "auto",
    seed: common.SeedOpt = 0,
    as_json: common.JsonOpt = False,
    revision: common.RevisionOpt = None,
    offline: common.OfflineOpt = False,
    cache_dir: common.CacheDirOpt = None,
    quiet: common.QuietOpt = False,
    progress: common.ProgressOpt = True,
) -> None:
    """Turn a LLaVA checkpoint of any layout into a p-MoD checkpoint, where possible without copying its weights."""
    from pmod_cli import checkpoints
    from pmod_cli.commands import convert_show as view
    from pmod_cli.commands.calibrate_run import calibrate_to, calibration_budget
    from pmod_cli.commands.convert_settings import choose_settings

    if list_names:
        if name is not None:
            raise PmodError(f"--list lists the aliases, and takes no model: {name!r:.60} is one", hint="leave it out")
        view.print_aliases(checkpoints.ALIASES, as_json)
        return
    if (llm is None) != (projector is None) or (anyres and llm is None):
        raise PmodError("--llm and --projector go together, and --anyres with them", hint="pmod convert --help")
    if overwrite and resume:
        raise PmodError("--overwrite replaces what is there and --resume keeps it; give one")
    if llm is not None and name is not None:
        raise PmodError(f"two models: {name} and --llm {llm}; give one")
    name = name or llm
    if name is None:
        raise PmodError("no model named", hint="pmod convert --list, or pmod convert --help")
    if not merge and adapter is None:
        raise PmodError("--no-merge keeps an --adapter apart, and none was given")
    layout = checkpoints.output_layout(to)
    if not layout.routed and router_init != "zero":
        raise PmodError(f"--to {to} has no routers for --router-init", hint="leave one of them out")
    if copy and symlink:
        raise PmodError("--copy and --symlink exclude each other")
    if (ratios is not None) != (schedule == "list"):
        raise PmodError("--schedule list and --ratios, one ratio a layer, go together")
    options = checkpoints.Options(
        to=to,
        dtype=None if dtype == "auto" else dtype,
        max_shard_bytes=_bytes(max_shard_size),
        link="copy" if copy else "symlink" if symlink else "hard",
        router_init=router_init,
        seed=seed,
        vision_tower=vision_tower,
        tokenizer=tokenizer,
        projector=projector,
        anyres=anyres,
        adapter=adapter,
        merge=merge,
        verify=verify,
        offline=offline,
    )
    wanted = common.given_settings(
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
        quota=quota,
        selection=selection,
        select_at=select_at,
        before=before,
    )
    if not layout.routed and (wanted or target_flops is not None):
        names = sorted([*wanted, *([] if target_flops is None else ["target_flops"])])
        raise PmodError(
            f"--to {to} writes a plain LLaVA, without {', '.join(f'`{ARGUMENTS.get(name, name)}`' for name in names)}",
            hint="leave one of them out",
        )
    choose_settings(wanted, target_flops, None)  # what is wrong whatever the model is, before anything is fetched
    if calibrate is not None:
        if options != checkpoints.Options(seed=seed, offline=offline) or resume or dry_run or llm is not None:
            raise PmodError("--calibrate writes a p-MoD checkpoint as it is, without other options of what to write")
        asked_for = {"data": calibrate, "seed": seed} | calibration_budget(wanted, target_flops)
        return calibrate_to(
            name,
            out,
            asked_for,
            overwrite=overwrite,
            revision=revision,
            offline=offline,
            cache_dir=cache_dir,
            as_json=as_json,
            quiet=quiet,
        )
    found = checkpoints.resolve(name, revision=revision, offline=offline, cache_dir=cache_dir)
    origin = f"{found.repo}@{found.commit}" if found.repo else found.alias or str(found.path)
    output.note(f"source: {origin} ({found.origin})")
    target = out or Path(
        "checkpoints", f"{found.alias or (found.repo or str(found.path.resolve())).split('/')[-1]}-{to}"
    )
    checkpoints.check_target(target, checkpoints.sources_of(found.path, options), overwrite=overwrite, resume=resume)
    source = checkpoints.read_source(found.path, options)
    settings = choose_settings(wanted, target_flops, source)
    with view.written_bytes() as written:
        report = checkpoints.convert(
            source,
            target,
            settings,
            options,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
            origin=origin,
            progress=written,
        )
    if not dry_run and layout.current:  # an export is for other programs
        common.record_current(target)
    if as_json:
        output.print_json(view.as_json(report, dry_run))
    elif quiet:
        output.print_line(target)
    else:
        view.print_report(report, dry_run)
    if not dry_run:
        view.print_next(report, tiny=found.origin == "bundled")


def _bytes(text: str | None) -> int | None:
    """`5GB` and the like, decimal."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]) if match else 0
    if size < 1:
        raise PmodError(f"--max-shard-size {text[:60]!r}: expected a size such as 5GB or 500MB")
    return size


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in text.split(",")) if text is not None else None
    except ValueError:
        raise PmodError(f"--ratios {text!r}: expected numbers separated by commas, one a layer") from None
