"""What a run leaves beside its weights: the log, a summary, curves, a model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PretrainedConfig, TrainerState

from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.text import GIB, memory_size
from pmod_cli.families.configs import known_family
from pmod_cli.reporting import markdown_table
from pmod_cli.training import folder
from pmod_cli.training.cost import run_flops, this_device
from pmod_cli.training.parts import PartCount
from pmod_cli.training.recipe import dump
from pmod_cli.training.run_settings import Settings, processes


@dataclass(frozen=True)
class Summary:
    """What a run took, over all its processes and sessions.

    Attributes:
        model: what was trained: p-MoD or stock, and of which family.
        device: what it ran on; of several processes, what the first one did.
        processes: how many shared it.
        device_hours: wall time times processes.
        tokens_per_second: text and vision tokens without padding, of all processes together.
        peak_memory_gib: of the first process: on a GPU what was allocated, else the most it held.
        tflops_per_second: of the model's forward and backward passes, of all processes together.
        utilization: the same as a share of the devices' peak; None where that is not known.
    """

    model: str
    device: str
    processes: int
    device_hours: float
    tokens_per_second: float
    peak_memory_gib: float
    tflops_per_second: float
    utilization: float | None = None

    @classmethod
    def of(
        cls, settings: Settings, config: PretrainedConfig, state: TrainerState, rows: int, seconds: float, device: str
    ) -> "Summary":
        """From the state of a run, the configuration of its model, the rows it read, and the seconds it took."""
        lines, count = state.log_history, processes()
        vision = sum(line.get("vision_tokens", 0.0) for line in lines)
        flops = run_flops(settings, config, rows, state.num_input_tokens_seen, vision) if rows else 0.0
        peak = this_device(device).flops * count
        rate = flops / max(seconds, 1e-9)
        return cls(
            model=f"{'p-MoD' if hasattr(config, 'retention') else 'stock'} {known_family(config).title}",
            device=torch.cuda.get_device_name() if device.startswith("cuda") else device,
            processes=count,
            device_hours=seconds * count / 3600,
            tokens_per_second=state.num_input_tokens_seen / max(seconds, 1e-9),
            peak_memory_gib=max((line.get("memory_gib", 0.0) for line in lines), default=0.0),
            tflops_per_second=rate / 1e12,
            utilization=rate / peak if peak else None,
        )


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        path: the run folder; once finished, a checkpoint, or a LoRA run's adapter that waits to be merged.
        status: finished; interrupted, and can go on; or already finished, nothing was done.
        step: optimizer steps done, of ``max_steps``, in this and earlier processes.
        loss: mean training loss of the last logged steps.
        seconds: wall time of the training, in this and earlier processes.
        tokens: text and vision tokens trained on, without padding.
        parameters: of each part, how many there are and how many were trained.
        summary: what the run took.
        rows: what became of the rows that this process read: left out, cut, passed over since they teach nothing.
    """

    path: Path
    status: Literal["finished", "interrupted", "already finished"]
    step: int
    max_steps: int
    loss: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    parameters: dict[str, PartCount] = field(default_factory=dict)
    summary: Summary | None = None
    rows: dict[str, int] = field(default_factory=dict)


def write_reports(staging: Path, settings: Settings, report: FinetuneReport, state: TrainerState) -> None:
    """Fill a folder with the log, the summary, the curves and the card of a finished run."""
    lines = state.log_history
    write_text(staging / folder.LOG, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(staging / folder.SUMMARY, {"schema_version": 1, **asdict(report), "path": report.path.name})
    draw_curves([line for line in lines if "loss" in line], staging / folder.CURVES)
    write_text(staging / folder.CARD, card(settings, report))


def draw_curves(lines: Sequence[dict], path: Path) -> None:
    """Loss, gradient norm, rates, and the router weights of each layer, over the steps, as PNG."""
    routers = sorted(key for key in (lines[-1] if lines else {}) if key.startswith("router/"))
    figure = Figure(figsize=(11, 7 if routers else 3.8), layout="constrained")
    axes = figure.subplots(2 if routers else 1, 2).ravel()
    steps = [line["step"] for line in lines]
    marker = "o" if len(lines) < 30 else ""
    axes[0].plot(steps, [line["loss"] for line in lines], color="tab:blue", marker=marker, markersize=3)
    _label(axes[0], "loss", "training loss")
    rates = sorted(key for key in (lines[0] if lines else {}) if key.endswith("_learning_rate"))
    for rate, style in zip(rates, ("-", "--", "-.", ":"), strict=False):  # parts of one rate lie on each other
        part = rate.removesuffix("_learning_rate").replace("_", " ")
        axes[1].plot(steps, [line.get(rate) or None for line in lines], style, label=part)
    axes[1].set_yscale("log")
    _label(axes[1], "learning rate", "learning rate of each part")
    if rates:
        axes[1].legend(frameon=False)
    if routers:
        _draw_routers(axes[2], lines, [key for key in routers if key.endswith("_mean")], "mean of a layer's weights")
        _draw_routers(axes[3], lines, [key for key in routers if key.endswith("_spread")], "their standard deviation")
    figure.savefig(path, dpi=120)


def _draw_routers(axes: Axes, lines: Sequence[dict], keys: Sequence[str], title: str) -> None:
    from matplotlib import colormaps

    with_routers = [line for line in lines if keys[0] in line]
    for place, key in enumerate(keys):
        color = colormaps["viridis"](place / max(len(keys) - 1, 1))
        label = f"layer {int(key[len('router/layer_') :].partition('_')[0])}"
        shown = label if place in (0, len(keys) // 2, len(keys) - 1) else None
        steps = [line["step"] for line in with_routers]
        axes.plot(steps, [line[key] for line in with_routers], color=color, label=shown, linewidth=1)
    _label(axes, "router weight", title)
    axes.legend(frameon=False)


def _label(axes: Axes, name: str, title: str) -> None:
    axes.set(xlabel="step", ylabel=name)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


SCORES = "\n## Scores\n\n"


def add_scores(out: Path, table: str, scores: dict) -> None:
    """Put scores into the summary of a run, and their table at the end of its model card, in the place of earlier ones.

    Args:
        table: as Markdown.
        scores: of each task and model, as the summary is to have them.
    """
    summary = json.loads((out / folder.SUMMARY).read_text(encoding="utf-8"))
    write_json(out / folder.SUMMARY, {**summary, "scores": scores})
    card = (out / folder.CARD).read_text(encoding="utf-8").partition(SCORES)[0]
    write_text(out / folder.CARD, f"{card.rstrip()}\n{SCORES}{table.strip()}\n")


def card(settings: Settings, report: FinetuneReport) -> str:
    """The model card of a finished run, as Markdown: what it is, how it was made, what it took."""
    model, summary, data = settings.model, report.summary, settings.data
    start = Path(model.name).name if model.name else f"{model.llm} + {model.vision_tower} + {model.projector or 'new'}"
    assert summary is not None  # a run that has ended has one
    trained = ", ".join(part.replace("_", " ") for part, numbers in report.parameters.items() if numbers.trained)
    source = "synthetic documents (pmod_cli.data.documents)" if data.path is None else Path(data.path).name
    rows = [
        ("kind", summary.model),
        ("started from", start),
        ("recipe", f"{settings.name}; all settings are in {folder.SETTINGS}"),
        ("data", source),
        ("trained", trained + (f", by LoRA of rank {settings.lora.rank}" if settings.lora.enabled else "")),
        ("steps", f"{report.step:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("last loss", "" if report.loss is None else f"{report.loss:.4f}"),
    ]
    share = "" if summary.utilization is None else f" ({summary.utilization:.1%} of peak)"
    rows += [
        ("device", f"{summary.processes} x {summary.device}"),
        ("device hours", f"{summary.device_hours:.3g}"),
        ("tokens a second", f"{summary.tokens_per_second:,.0f}"),
        ("TFLOPs a second", f"{summary.tflops_per_second:.3g}{share}"),
        ("peak memory", memory_size(summary.peak_memory_gib * GIB)),
    ]
    parts = [
        f"# {report.path.name}",
        f"A {summary.model} model, fine-tuned with `pmod finetune`.",
        markdown_table(["", ""], rows, words=2),
        f"![training curves]({folder.CURVES})",
        "## Use\n\n```\npmod eval --tasks docvqa,chartqa --model DIR\npmod visualize image.png --model DIR\n```",
        f"## Settings\n\n```yaml\n{dump(settings).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"
