"""A LLaVA checkpoint of any layout to one of any other: read, plan, write.

A MoD layer only adds `router.weight` and `router.bias` to stock names. So from the Hugging Face layout the stock shards
are hard-linked, and one small shard of new routers, the index and the config are written. Where names or dtypes differ,
shards are written anew, one by one. Everything is checked first, from config and headers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pmod_cli import __version__, paper
from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.conversion_plan import ROUTERS, ConversionPlan, make_plan
from pmod_cli.checkpoints.layouts import LAYOUTS, output_layout, output_layouts, read_source
from pmod_cli.checkpoints.layouts.huggingface import HUGGINGFACE
from pmod_cli.checkpoints.lora import keep_apart, merged, read_config
from pmod_cli.checkpoints.options import ConversionReport, Options
from pmod_cli.checkpoints.source import Source
from pmod_cli.checkpoints.verify import verify
from pmod_cli.checkpoints.writing import place, stream, write_routers
from pmod_cli.core.atomic import write_json
from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import check_replaceable, refuse_existing, staged_directory
from pmod_cli.core.text import disk_size, one_of, printable
from pmod_cli.model import PmodSettings

PROVENANCE = "pmod_provenance.json"
CARD = "README.md"


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
    progress: Callable[[int], None] = lambda written: None,
) -> ConversionReport:
    """Write a checkpoint in another layout; by default the p-MoD checkpoint of a stock LLaVA, its routers untrained.

    Args:
        source: Folder of a LLaVA over a Llama, Mistral or Qwen2 decoder, in any of the layouts that are read; or what
            `read_source` made of it.
        target: Folder to write. It appears whole or not at all.
        settings: Schedule, weight norm and the rest; None keeps those of a p-MoD checkpoint.
        options: Layout, dtype and the rest.
        overwrite: Replace an existing target.
        resume: Keep an existing target if it was made of the same files in the same way.
        dry_run: Check everything and write nothing.
        origin: What to name as the source instead of the folder, such as `repository@commit`.
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
    _refuse_same_again(read, options)
    plan = make_plan(read, settings, options)
    report = _report(plan, target, origin or str(folder))
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
            _copy_small_file(path, staging / path.name)
        ways = {name: place(path, staging / name, options.link) for name, path in plan.weights.unchanged.items()}
        stream(plan.weights, staging, progress)
        if plan.draft.routers:
            write_routers(staging / ROUTERS, plan.draft.routers, plan.router_dtype, options.router_std, options.seed)
        _write_index(plan, staging)
        if (finish := LAYOUTS[options.to].finish) is not None:
            report = replace(report, notes=[*report.notes, *finish(plan.draft, staging, progress)])
        if options.adapter is not None and not options.merge:
            keep_apart(options.adapter, staging / "adapter")
        write_json(staging / files.CONFIG, plan.draft.config)
        (staging / CARD).write_text(printable(model_card(report)), encoding="utf-8")
        report = _with_files(report, ways, staging)
        write_json(staging / PROVENANCE, _provenance(report, plan))
        if options.verify:
            report = replace(report, verified=verify(plan, staging))
    return report


def sources_of(source: Path, options: Options) -> list[Path]:
    """All files and folders that a conversion reads, as far as they are on this machine under these names."""
    given = (options.adapter, options.vision_tower, options.tokenizer, options.projector)
    return [source, *(path for path in (Path(name).expanduser() for name in given if name) if path.exists())]


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
            hint=f"pmod finetune --model {source.folder}, or convert it --to {others}",
        )


def _report(plan: ConversionPlan, target: Path, origin: str) -> ConversionReport:
    same = _links(plan, target)
    unchanged = list(plan.weights.unchanged)
    sizes = {name: path.stat().st_size for name, path in plan.weights.unchanged.items()}
    routed, link = plan.draft.routed_layers, plan.options.link
    return ConversionReport(
        target=target,
        source=origin,
        layout=plan.source.layout,
        to=plan.options.to,
        model_type=plan.draft.config["model_type"],
        decoder=plan.source.decoder,
        retention=plan.retention,
        routed_layers=routed,
        router_parameters=len(routed) * (plan.hidden + 1),
        settings=plan.draft.settings.to_dict() if plan.draft.settings else {},
        router_state=plan.router_state,
        num_layers=plan.num_layers,
        read_bytes=sum(path.stat().st_size for path in plan.source.files),
        streamed_bytes=plan.streamed_bytes,
        copied_bytes=0 if link == "symlink" or same else sum(sizes.values()),
        free_bytes=shutil.disk_usage(_existing(target)).free,
        linked=unchanged if same else [],
        symlinked=unchanged if link == "symlink" else [],
        copied=[] if link == "symlink" or same else unchanged,
        streamed=list(plan.weights.streamed),
        written=sorted({path.name for path in plan.source.small_files} | {files.CONFIG, PROVENANCE, CARD}),
        notes=plan.source.notes,
    )


def _links(plan: ConversionPlan, target: Path) -> bool:
    """Whether unchanged files are hard-linked: asked for, and on the file system of the target."""
    device = _existing(target).stat().st_dev
    return plan.options.link == "hard" and all(path.stat().st_dev == device for path in plan.weights.unchanged.values())


def _existing(target: Path) -> Path:
    return next(parent for parent in target.absolute().parents if parent.exists())


def _check_space(report: ConversionReport, target: Path) -> None:
    needed = report.streamed_bytes + report.copied_bytes
    if needed > report.free_bytes:
        raise PmodError(
            f"{_existing(target)} has {disk_size(report.free_bytes)} free, and this needs {disk_size(needed)}: "
            f"{disk_size(needed - report.free_bytes)} more",
            hint="choose another disk with `out`",
        )


def _finished(report: ConversionReport, plan: ConversionPlan, target: Path) -> ConversionReport:
    """The report of a target that is there already.

    Raises:
        PmodError: it was made of something else, or otherwise.
    """
    there, wanted = files.read_json(target / PROVENANCE), json.loads(json.dumps(_provenance(report, plan)))
    changed = [key for key in wanted if key not in ("made_by", "made_at", "versions") and there.get(key) != wanted[key]]
    if changed:
        raise PmodError(
            f"{target} exists and was made otherwise: {', '.join(changed)} differ",
            hint="replace it with `overwrite=True`, or choose another folder with `out`",
        )
    report = replace(report, notes=[*report.notes, f"{target} was there already, made the same way: kept"])
    return replace(report, verified=verify(plan, target)) if plan.options.verify else report


def _copy_small_file(path: Path, target: Path) -> None:
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


def _provenance(report: ConversionReport, plan: ConversionPlan) -> dict:
    """Enough to say later what this was made of: digests of what is small, header digests of the shards."""
    folder = plan.source.folder
    small = [path for path in [folder / files.CONFIG, *plan.source.small_files] if path.is_file()]
    made = {
        "schema_version": 2,
        "made_by": f"pmod {__version__}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": printable(report.source),
        "source_layout": report.layout,
        "to": report.to,
        "settings": report.settings,
        "retention": report.retention,
        "router_init": plan.options.router_init,
        "dtype": plan.options.dtype,
        "adapter": printable(str(plan.options.adapter)) if plan.options.adapter else None,
        "versions": {name: version(name) for name in ("safetensors", "transformers")},
        "source_files_sha256": {printable(path.name): hashlib.sha256(path.read_bytes()).hexdigest() for path in small},
        "source_shards": {
            path.name: {"bytes": path.stat().st_size, "header_sha256": _digest(path)} for path in plan.source.files
        },
        "unchanged_shards": {name: path.name for name, path in plan.weights.unchanged.items()},
    }
    return made | ({"original_config": plan.source.original_config} if plan.source.original_config else {})


def _digest(path: Path) -> str | None:
    return files.header_digest(path) if path.suffix == ".safetensors" else None


def _with_files(report: ConversionReport, ways: dict[str, str], staging: Path) -> ConversionReport:
    """The report with what became of each file."""
    of_way = {way: [name for name in ways if ways[name] == way] for way in ("linked", "symlinked", "copied")}
    weights = {*ways, *report.streamed}
    small = [path.name for path in staging.iterdir() if path.name not in weights]
    copied = sum((staging / name).stat().st_size for name in of_way["copied"])
    return replace(report, **of_way, copied_bytes=copied, written=sorted({*small, PROVENANCE}))


_STATES = {
    "untrained": "The routers are new and untrained: what they keep means nothing yet. Fine-tune it first.",
    "trained": "The routers are trained.",
    "calibrated": "The routers were fitted to the attention of the stock model, not trained.",
    "stock": "A plain LLaVA, without routers.",
}


def model_card(report: ConversionReport) -> str:
    """Markdown with the hub's metadata: what it is, its schedule, results marked as published, provenance.

    Args:
        report: What the conversion wrote.
    """
    title = Path(report.target).absolute().name
    base = report.source.partition("@")[0]
    from_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    metadata = ["---", "pipeline_tag: image-text-to-text", "library_name: transformers"]
    metadata += [f"base_model: {base}"] if from_hub else []
    metadata += ["tags:", "- llava", *(["- p-mod", "- mixture-of-depths"] if report.settings else []), "---"]
    lines = [*metadata, "", f"# {title}", "", f"{_what(report)} {_STATES[report.router_state]}", ""]
    lines += ["## Use", "", LAYOUTS[report.to].usage]
    if report.settings:
        lines += _schedule(report)
    of_paper = next((model for model in paper.MODELS.values() if base.endswith(model.repository)), None)
    lines += ["## Results", ""]
    if of_paper is not None:
        results = ", ".join(f"{paper.BENCHMARKS[name]} {score.pmod}" for name, score in of_paper.scores.items())
        lines += [f"Published by the authors of the source, not measured with this checkpoint: {results}.", ""]
    else:
        lines += ["None measured yet: `pmod eval --tasks docvqa,chartqa` writes them.", ""]
    lines += [
        "## Provenance",
        "",
        f"Made by pmod {__version__} from `{_shown(report.source)}` ({report.layout} layout).",
    ]
    lines += ["Digests, settings and versions are in `pmod_provenance.json`. The licence is that of the source.", ""]
    return "\n".join(lines)


def _what(report: ConversionReport) -> str:
    kind = "LLaVA-NeXT" if report.model_type.endswith("next") else "LLaVA"
    size = f"{kind} over a {report.decoder.capitalize()} decoder of {report.num_layers} layers"
    if not report.settings:
        return f"{size}."
    return (
        f"p-MoD (Mixture-of-Depths with progressive ratio decay) of a {size}: "
        f"{len(report.routed_layers)} layers have a router, the mean retention ratio is {report.mean_retention:.4f}."
    )


def _schedule(report: ConversionReport) -> list[str]:
    settings = report.settings
    norm = f"{settings['norm']} (alpha {settings['alpha']})" if settings["norm"] == "tanh" else settings["norm"]
    string = "scaled by their weight" if settings["string"] else "passed on unchanged"
    lines = ["## Schedule", "", f"`{settings['schedule']}`, weight norm {norm}, skipped tokens {string}, "]
    lines[-1] += f"routed tokens `{settings['target_tokens']}`. Vision tokens that each layer keeps:"
    lines += ["", "| layers | retention ratio |", "|---|---|"]
    start = 0
    for layer in range(1, report.num_layers + 1):
        if layer == report.num_layers or report.retention[layer] != report.retention[start]:
            layers = f"{start}" if layer - start == 1 else f"{start}–{layer - 1}"
            lines.append(f"| {layers} | {report.retention[start]:.4f} |")
            start = layer
    return [*lines, ""]


def _shown(source: str) -> str:
    """A hub id as it is; of a folder its name alone, since a path says more about a machine than about a model."""
    return Path(source).name if source.startswith((".", "/", "~")) else source
