"""A LLaVA checkpoint of any layout to one of any other: read, plan, write.

A MoD layer only adds `router.weight` and `router.bias` to stock names. So from the Hugging Face layout the stock shards
are hard-linked, and one small shard of new routers, the index and the config are written. Where names or dtypes differ,
shards are written anew, one by one. Everything is checked first, from config and headers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.conversion_plan import ROUTERS, ConversionPlan, make_plan
from pmod_cli.checkpoints.conversion_report import (
    ASKED,
    CARD,
    PROVENANCE,
    SCORES,
    ConversionReport,
    existing_parent,
    model_card,
    planned_report,
    provenance,
    with_files,
)
from pmod_cli.checkpoints.layout import Calibrated, Options, Source
from pmod_cli.checkpoints.layouts import LAYOUTS, output_layout, output_layouts, read_source
from pmod_cli.checkpoints.layouts.huggingface import HUGGINGFACE
from pmod_cli.checkpoints.lora import APART, keep_apart, merged, read_config, stands_apart
from pmod_cli.checkpoints.verify import check_selection, verify
from pmod_cli.checkpoints.writing import place, stream, write_routers
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import check_replaceable, refuse_existing, staged_directory
from pmod_cli.core.paths import expanded
from pmod_cli.core.text import disk_size, one_of, printable
from pmod_cli.model import PmodSettings


def convert(
    source: Path | Source,
    target: Path,
    settings: PmodSettings | None = None,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    origin: str | None = None,
    calibrated: Calibrated | None = None,
    progress: Callable[[int], None] = lambda written: None,
) -> ConversionReport:
    """Write a checkpoint in another layout; by default the p-MoD checkpoint of a stock LLaVA, its routers untrained.

    Args:
        source: Folder of a LLaVA over a Llama, Mistral or Qwen2 decoder, in any of the layouts that are read; or what
            `read_source` made of it.
        target: Folder to write. It appears whole or not at all.
        settings: Schedule, weight norm and the rest; None keeps those of a p-MoD checkpoint.
        overwrite: Replace an existing target.
        resume: Keep an existing target if it was made of the same files in the same way.
        dry_run: Check everything and write nothing.
        origin: What to name as the source instead of the folder, such as `repository@commit`.
        calibrated: Values of the routers, where they were fitted to the source.
        progress: Told the bytes of each piece of weights that is written.

    Raises:
        PmodError: the source is no whole checkpoint of a known kind, the settings do not fit it, the disk is too
            small, or `target` exists.
    """
    target, options = Path(target), options or Options()
    folder = source.folder if isinstance(source, Source) else Path(source)
    read_by = sources_of(folder, options)
    check_target(target, read_by, overwrite=overwrite, resume=resume)
    read = source if isinstance(source, Source) else read_source(folder, options)
    if options.adapter is not None:
        read_config(options.adapter)
        read = merged(read, options.adapter) if options.merge else read
        if not options.merge:
            note = f"the adapter is kept in {target / APART}, and no command of pmod applies it"
            read = replace(read, notes=[*read.notes, note])
    elif (apart := stands_apart(folder)) is not None:
        note = f"the adapter in {apart} is left out: `--adapter {apart}` merges it"
        read = replace(read, notes=[*read.notes, note])
    _refuse_same_again(read, options)
    plan = make_plan(read, settings, options, calibrated=calibrated is not None)
    check_selection(plan)
    report = planned_report(plan, target, origin or str(folder))
    _check_space(report, target)
    if resume and target.exists():
        return _finished(report, plan, target)
    if dry_run:
        return report
    read_by += [*read.files, *read.small_files]  # and what these are symlinks to
    with staged_directory(target, "checkpoint", overwrite=overwrite, sources=read_by) as staging:
        if read.write_processor:
            read.write_processor(staging)
        for path in read.small_files:
            _copy_small_file(path, staging / read.name_of(path))
        ways = {name: place(path, staging / name, options.link) for name, path in plan.weights.unchanged.items()}
        stream(plan.weights, staging, progress)
        if plan.draft.routers:
            given = None if calibrated is None else calibrated.by_name(plan.draft.routers)
            write_routers(
                staging / ROUTERS, plan.draft.routers, plan.router_dtype, options.router_std, options.seed, given
            )
        _write_index(plan, staging)
        if (finish := LAYOUTS[options.to].finish) is not None:
            report = replace(report, notes=[*report.notes, *finish(plan.draft, staging, progress)])
        if options.adapter is not None and not options.merge:
            keep_apart(options.adapter, staging / APART)
        write_json(staging / files.CONFIG, plan.draft.config)
        said = "" if calibrated is None else calibrated.card
        (staging / CARD).write_text(printable(model_card(report, said, _scores(plan))), encoding="utf-8")
        if calibrated is not None:
            calibrated.finish(staging)
        report = with_files(report, ways, staging)
        write_json(staging / PROVENANCE, provenance(report, plan))
        if options.verify:
            report = replace(report, verified=verify(plan, staging))
    return report


def sources_of(source: Path, options: Options) -> list[Path]:
    """All files and folders that a conversion reads, as far as they are on this machine under these names."""
    given = (options.adapter, options.vision_tower, options.tokenizer, options.projector)
    return [source, *(path for path in (expanded(name) for name in given if name) if path.exists())]


def check_target(target: Path, sources: list[Path], *, overwrite: bool, resume: bool = False) -> None:
    """Refuse, before anything is read, a target that could not be written.

    Raises:
        PmodError: `target` exists and may be neither replaced nor kept.
    """
    refuse_existing(target, overwrite or resume)
    if not resume:
        check_replaceable(target, "checkpoint", sources)
    elif target.exists() and not (target / PROVENANCE).is_file():
        raise PmodError(
            f"{target} was not written by pmod convert: it lacks {PROVENANCE}",
            hint="choose another folder with `out`, or remove it yourself",
        )


def _refuse_same_again(source: Source, options: Options) -> None:
    ours = source.layout == HUGGINGFACE.name and source.settings is not None
    same = ours and output_layout(options.to).current
    if same and not (options.dtype or options.max_shard_bytes or options.adapter):
        others = one_of(layout.name for layout in output_layouts().values() if not layout.current)
        raise PmodError(
            f"{source.folder} is a p-MoD checkpoint already, in this layout",
            hint=f"pmod finetune --model {quote(str(source.folder))}, or convert it --to {others}",
        )


def _check_space(report: ConversionReport, target: Path) -> None:
    needed = report.streamed_bytes + report.copied_bytes
    if needed > report.free_bytes:
        raise PmodError(
            f"{existing_parent(target)} has {disk_size(report.free_bytes)} free, and this needs {disk_size(needed)}: "
            f"{disk_size(needed - report.free_bytes)} more",
            hint="choose another disk with `out`",
        )


def _finished(report: ConversionReport, plan: ConversionPlan, target: Path) -> ConversionReport:
    """The report of a target that is there already.

    Raises:
        PmodError: it was made of something else, or otherwise, or is not whole any more.
    """
    there, wanted = files.read_json(target / PROVENANCE), json.loads(json.dumps(provenance(report, plan)))
    keys = dict.fromkeys([*wanted, *ASKED])
    changed = [
        key for key in keys if key not in ("made_by", "made_at", "versions") and there.get(key) != wanted.get(key)
    ]
    if changed:
        raise PmodError(
            f"{target} exists and was made otherwise: {', '.join(changed)} differ",
            hint="replace it with `overwrite=True`, or choose another folder with `out`",
        )
    adapter = [] if plan.options.adapter is None else sorted(plan.options.adapter.iterdir())
    made = (target / PROVENANCE).stat().st_mtime_ns
    later = [path for path in (*plan.source.files, *adapter) if path.stat().st_mtime_ns > made]
    if later and not (plan.options.verify and plan.options.merge):  # it compares all bytes, but for an adapter apart
        raise PmodError(
            f"{later[0]} was written after {target} had been made of it",
            hint="replace the result with `overwrite=True`, or compare the two with `verify=True`",
        )
    try:
        files.read_tensors(target)  # headers alone
    except PmodError as error:
        raise PmodError(
            f"{target} is not whole any more: {error.what}", hint="write it again with `overwrite=True`"
        ) from error
    report = replace(report, notes=[*report.notes, f"{target} was there already, made the same way: kept"])
    return replace(report, verified=verify(plan, target)) if plan.options.verify else report


def _scores(plan: ConversionPlan) -> str:
    """What `pmod finetune --eval` has measured with the source, Markdown; of other weights it says nothing."""
    table, options = plan.source.folder / SCORES, plan.options
    same = plan.source.settings is not None and plan.draft.settings == plan.source.settings
    if not same or options.dtype or options.adapter or not table.is_file():
        return ""
    return f"Measured with these weights by `pmod eval`:\n\n{table.read_text(encoding='utf-8', errors='replace')}"


def _copy_small_file(path: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if path.name != "generation_config.json":
        shutil.copyfile(path, target)
        return
    values = files.read_json(path)
    if not values.get("do_sample"):  # sampling values without sampling are an error to today's transformers
        values = {key: value for key, value in values.items() if key not in ("temperature", "top_p", "top_k", "min_p")}
    write_json(target, values)


def _write_index(plan: ConversionPlan, staging: Path) -> None:
    names = [*plan.weights.names, *([ROUTERS] if plan.draft.routers else [])]
    if names != [files.SINGLE]:
        index = {"metadata": {"total_size": plan.total_bytes()}, "weight_map": plan.weight_map()}
        (staging / files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
