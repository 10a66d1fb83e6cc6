"""README.md of a result: the model card that the hub shows, complete before `hf upload`."""

from __future__ import annotations

from pathlib import Path

from pmod_cli import __version__, paper
from pmod_cli.checkpoints.layouts import LAYOUTS
from pmod_cli.checkpoints.options import ConversionReport

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
