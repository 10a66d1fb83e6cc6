"""What a conversion did, or would do: the report, the record of where everything came from, and the model card."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pmod_cli import __version__, paper
from pmod_cli.checkpoints import files, toy
from pmod_cli.checkpoints.conversion_plan import ConversionPlan
from pmod_cli.checkpoints.layout import THIS_FOLDER, Options, Source
from pmod_cli.checkpoints.layouts import LAYOUTS
from pmod_cli.core.text import printable
from pmod_cli.families import DECODERS, FAMILIES
from pmod_cli.model import PmodSettings

PROVENANCE = "pmod_provenance.json"
ASKED = ("seed", "vision_tower", "tokenizer", "projector", "anyres")  # options that change what is written
CARD = "README.md"
SCORES = Path("eval", "results.md")  # where `pmod finetune --eval` puts them
THIS_IS_TOY = f"this is {toy.NOTE}"
_STATES = {
    "untrained": "The routers are new and untrained: what they keep means nothing yet. Fine-tune it first.",
    "trained": "The routers are trained.",
    "calibrated": "Routers and ratios were fitted to what the stock model reads; no weight was trained.",
    "stock": "The plain model, without routers.",
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote, or would write.

    Attributes:
        target: Folder of the result.
        source: What it was made from: a folder, or `repository@commit`.
        layout: Layout of the source: `huggingface`, `original`, `published` or `parts`.
        to: Layout of the result.
        model_type: As its config.json says.
        family: Name of the family of the source.
        decoder: Name of the decoder.
        retention: Retention ratio per decoder layer, length L; empty for a stock model.
        routed_layers: Layers that have a router.
        router_parameters: Parameters of all routers.
        settings: The p-MoD settings, as our `config.json` holds them; empty for a stock model.
        router_state: `stock`, `untrained`, `trained` or `calibrated`.
        num_layers: Decoder layers, L.
        read_bytes: Size of the source's weights.
        streamed_bytes: Weights that are renamed, cast or merged on the way, hence written anew.
        copied_bytes: Weight files that are copied as they are.
        free_bytes: Free space on the target's disk before.
        linked: Weight files that share their bytes with the source.
        symlinked: Weight files that only point to the source.
        copied: Weight files that are copies, as asked for or since the source is on another file system.
        streamed: Weight files that were written anew.
        written: Small files.
        notes: What the user has to know.
        verified: What `--verify` compared; empty without it.
    """

    target: Path
    source: str
    layout: str
    to: str
    model_type: str
    family: str
    decoder: str
    retention: list[float]
    routed_layers: list[int]
    router_parameters: int
    settings: dict
    router_state: str
    num_layers: int
    read_bytes: int
    streamed_bytes: int
    copied_bytes: int = 0
    free_bytes: int = 0
    linked: list[str] = field(default_factory=list)
    symlinked: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    streamed: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)

    @property
    def mean_retention(self) -> float:
        """The share of the vision KV cache that is left: mean of the ratios, times what `before` leaves."""
        return PmodSettings.from_dict(self.settings).mean_retention(self.num_layers) if self.settings else 1.0


def planned_report(plan: ConversionPlan, target: Path, origin: str) -> ConversionReport:
    """The report of a plan, before anything is written. `origin` is what the source is called."""
    unchanged, routed = plan.weights.unchanged, plan.draft.routed_layers
    device = existing_parent(target).stat().st_dev
    linkable = all(path.stat().st_dev == device for path in unchanged.values())
    way = {"hard": "linked" if linkable else "copied", "copy": "copied", "symlink": "symlinked"}[plan.options.link]
    return ConversionReport(
        target=target,
        source=origin,
        layout=plan.source.layout,
        to=plan.options.to,
        model_type=plan.draft.config["model_type"],
        family=plan.source.kind,
        decoder=plan.source.decoder,
        retention=plan.retention,
        routed_layers=routed,
        router_parameters=len(routed) * (plan.source.hidden_size + 1),
        settings=plan.draft.settings.to_dict() if plan.draft.settings else {},
        router_state=plan.router_state,
        num_layers=plan.source.num_layers,
        read_bytes=sum(path.stat().st_size for path in plan.source.files),
        streamed_bytes=plan.streamed_bytes,
        copied_bytes=sum(path.stat().st_size for path in unchanged.values()) if way == "copied" else 0,
        free_bytes=shutil.disk_usage(existing_parent(target)).free,
        streamed=list(plan.weights.streamed),
        written=sorted({*map(plan.source.name_of, plan.source.small_files)} | {files.CONFIG, PROVENANCE, CARD}),
        notes=[*plan.source.notes, *([THIS_IS_TOY] if toy.is_toy(plan.source.config) else [])],
        **{way: list(unchanged)},
    )


def existing_parent(target: Path) -> Path:
    """The folder above a target that is there already."""
    return next(parent for parent in target.absolute().parents if parent.exists())


def with_files(report: ConversionReport, ways: dict[str, str], staging: Path) -> ConversionReport:
    """The report with what became of each file."""
    linked, symlinked, copied = (
        [name for name in ways if ways[name] == way] for way in ("linked", "symlinked", "copied")
    )
    weights = {*ways, *report.streamed}
    return replace(
        report,
        linked=linked,
        symlinked=symlinked,
        copied=copied,
        copied_bytes=sum((staging / name).stat().st_size for name in copied),
        written=sorted({PROVENANCE, *(path.name for path in staging.iterdir() if path.name not in weights)}),
    )


def provenance(report: ConversionReport, plan: ConversionPlan) -> dict:
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
        "source_files_sha256": {
            printable(plan.source.name_of(path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in small
        },
        "source_shards": {
            _shard_name(path, plan.source): {"bytes": path.stat().st_size, "header_sha256": files.header_digest(path)}
            for path in plan.source.files
        },
        "unchanged_shards": {name: _shard_name(path, plan.source) for name, path in plan.weights.unchanged.items()},
        **_asked(plan.options),
    }
    return made | ({"original_config": plan.source.original_config} if plan.source.original_config else {})


def _shard_name(path: Path, source: Source) -> str:
    """Below the source's folder; of a part that lies elsewhere, with its own folder: their names may be alike."""
    name = source.name_of(path)
    return printable(name if path.is_relative_to(source.folder) else f"{path.parent.name}/{name}")


def _asked(options: Options) -> dict:
    """Of `ASKED`, what was given; a seed only where something was drawn."""
    given = {name: getattr(options, name) for name in ASKED if getattr(options, name) != getattr(Options(), name)}
    if not (options.router_std or options.anyres):
        given.pop("seed", None)
    return {name: printable(str(value)) if isinstance(value, str | Path) else value for name, value in given.items()}


def model_card(report: ConversionReport, calibration: str = "", scores: str = "") -> str:
    """Markdown with the hub's metadata: what it is, its schedule, results marked as published, provenance.

    Args:
        calibration: What was measured when its routers were fitted, Markdown.
        scores: What was measured with these weights, Markdown.
    """
    title = Path(report.target).absolute().name
    base = report.source.partition("@")[0]
    from_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    metadata = ["---", "pipeline_tag: image-text-to-text", "library_name: transformers"]
    metadata += [f"base_model: {base}"] if from_hub else []
    metadata += ["tags:", f"- {report.family}", *(["- p-mod", "- mixture-of-depths"] if report.settings else []), "---"]
    lines = [*metadata, "", f"# {title}", "", f"{_what(report)} {_state(report)}", ""]
    lines += [f"This is {toy.NOTE}.", ""] if THIS_IS_TOY in report.notes else []
    lines += ["## Use", "", LAYOUTS[report.to].usage.replace(THIS_FOLDER, title)]
    if report.settings:
        lines += _schedule(report)
    if calibration:
        lines += ["## Calibration", "", calibration, ""]
    of_paper = next((model for model in paper.MODELS.values() if base.endswith(model.repository)), None)
    lines += ["## Results", "", *([scores.strip(), ""] if scores else [])]
    if of_paper is not None:
        results = ", ".join(f"{paper.BENCHMARKS[name]} {score.pmod}" for name, score in of_paper.scores.items())
        lines += [f"Published by the authors of the source, not measured with this checkpoint: {results}.", ""]
    elif not scores:
        lines += ["None measured yet: `pmod eval --tasks docvqa,chartqa` writes them.", ""]
    lines += [
        "## Provenance",
        "",
        f"Made by pmod {__version__} from `{_shown(report.source)}` ({report.layout} layout).",
    ]
    lines += ["Digests, settings and versions are in `pmod_provenance.json`. The licence is that of the source.", ""]
    return "\n".join(lines)


def _state(report: ConversionReport) -> str:
    selection = report.settings.get("selection", "router")
    if report.router_state == "untrained" and selection != "router":
        return f"The routers are new and untrained, and only weigh tokens: `{selection}` chooses them."
    return _STATES[report.router_state]


def _what(report: ConversionReport) -> str:
    over = f" over a {report.decoder.capitalize()} decoder"
    if any(kind.family == report.family for kind in DECODERS.values()):
        over = ""  # its own, which has no other name
    size = f"{FAMILIES[report.family].title}{over} of {report.num_layers} layers"
    if not report.settings:
        return f"{size}."
    routers = f"{count} layers have" if (count := len(report.routed_layers)) != 1 else "1 layer has"
    return (
        f"p-MoD (Mixture-of-Depths with progressive ratio decay) of a {size}: "
        f"{routers} a router, the mean retention ratio is {report.mean_retention:.4f}."
    )


def _schedule(report: ConversionReport) -> list[str]:
    settings = report.settings
    norm = f"{settings['norm']} (alpha {settings['alpha']})" if settings["norm"] == "tanh" else settings["norm"]
    string = "scaled by their weight" if settings["string"] else "passed on unchanged"
    lines = ["## Schedule", "", f"`{settings['schedule']}`, weight norm {norm}, skipped tokens {string}, "]
    lines[-1] += f"routed tokens `{settings['target_tokens']}`. Vision tokens that each layer keeps"
    if settings.get("before"):
        lines[-1] += f" (of those that `{settings.get('before')}` leaves in front of the decoder)"
    lines[-1] += ":"
    lines += ["", "| layers | retention ratio |", "|---|---|"]
    start = 0
    for layer in range(1, report.num_layers + 1):
        if layer == report.num_layers or report.retention[layer] != report.retention[start]:
            layers = f"{start}" if layer - start == 1 else f"{start}–{layer - 1}"
            lines.append(f"| {layers} | {report.retention[start]:.4f} |")
            start = layer
    if chosen := settings.get("select_at"):
        choose = f"Layer {chosen[0]} chooses" if len(chosen) == 1 else f"Layers {', '.join(map(str, chosen))} choose"
        lines += ["", f"{choose}; each later layer keeps the first of the last ranking before it."]
    return [*lines, ""]


def _shown(source: str) -> str:
    """A hub id as it is; of a folder its name alone, since a path says more about a machine than about a model."""
    return Path(source).name if source.startswith((".", "/", "~")) else source
