"""Trained with routing from the start, or trained plain and then routed: which ends higher after equal steps?

    python -m tests.from_start --out DIR [--seeds N] [--arms stock,start-held]

The start is the bundled model with much of its projector drawn anew, so that it has to learn to see again: the paper,
too, starts from a language model and a projector that have not met its questions. One way routes all steps; the other
trains the stock model for two thirds of them, fits routers to it, and routes the last third. Same schedule, rates and
documents. Stopped, the same command goes on.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from pmod_cli import recipe_files
from pmod_cli.checkpoints import load_model, resolve
from pmod_cli.core.atomic import write_json, write_text
from pmod_cli.core.folders import staged_directory
from pmod_cli.core.memory import PeakMemory
from pmod_cli.data.documents import TASKS
from pmod_cli.profiling.plots import save
from pmod_cli.reporting import markdown_table
from pmod_cli.training.folder import SUMMARY
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune
from pmod_cli.training.sweep_figure import sweep_figure
from pmod_cli.training.teacher_forced import answered

BUNDLED = "tiny-llava-next"
NEW_SHARE = 0.7  # of each weight of the projector, drawn anew; its spread stays
FIRST, STRIDE, ROWS = 30_000_000, 1_000_000, 16  # first image, images from one seed to the next, rows of a step
IMAGES = 100  # unseen documents of each task that a model is scored on

PLAIN = ("pmod.enabled=false",)
ANEW = ("pmod.enabled=true",)
HELD = ("pmod.enabled=true", "pmod.select_at=[8]")
ZERO, CALIBRATED = "model.router_start=zero", "model.router_start=calibrated"


@dataclass(frozen=True)
class Arm:
    """One way to train: stages, each a share of the steps and what differs from recipe `tiny` in it."""

    title: str
    stages: tuple[tuple[float, tuple[str, ...]], ...]


ARMS = {
    "stock": Arm("not routed", ((1, PLAIN),)),
    "start-anew": Arm("routed from the start, chosen anew in each layer", ((1, (*ANEW, ZERO)),)),
    "start-held": Arm("routed from the start, chosen at layer 8 and held", ((1, (*HELD, ZERO)),)),
    "later-anew": Arm("plain, then routed, anew", ((2 / 3, PLAIN), (1 / 3, (*ANEW, CALIBRATED)))),
    "later-held": Arm("plain, then routed, held", ((2 / 3, PLAIN), (1 / 3, (*HELD, CALIBRATED)))),
}


def make_start(folder: Path) -> None:
    """Write the bundled model with `NEW_SHARE` of its projector drawn anew, if it is not there."""
    if folder.exists():
        return
    model, processor = load_model(resolve(BUNDLED).path, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            noise = torch.randn(weight.shape, generator=generator) * weight.std()
            weight.mul_((1 - NEW_SHARE**2) ** 0.5).add_(noise, alpha=NEW_SHARE)
    with staged_directory(folder, "model") as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)


def train(name: str, seed: int, steps: int, out: Path) -> dict:
    """Train one arm and score it.

    Returns:
        Answers right in percent of each task, seconds of training, and the most memory that this process held in MiB.
    """
    memory, model, done, seconds = PeakMemory("cpu"), out / "start", 0, 0.0
    for number, (share, overrides) in enumerate(ARMS[name].stages):
        count = round(share * steps)
        given = [
            f"model.name={model}",
            "model.calibration_images=64",
            f"data.first={FIRST + seed * STRIDE + done * ROWS}",
            f"train.seed={seed}",
            f"train.max_steps={count}",
            "train.report_to=none",
        ]
        settings = load_settings(recipe_files.find("tiny"), [*given, *overrides])
        # Arms that begin alike share that stage.
        begins_plain = number == 0 and overrides == PLAIN
        model = out / "runs" / (f"seed{seed}-plain-{count}" if begins_plain else f"seed{seed}-{name}")
        report = finetune(settings, model)
        if report.status == "interrupted":
            raise SystemExit("interrupted: repeat the command, and it goes on")
        # A stage that another arm has trained is told by its folder alone.
        done, seconds = done + count, seconds + json.loads((model / SUMMARY).read_text(encoding="utf-8"))["seconds"]
    trained, processor = load_model(model, dtype="float32")
    scores = answered(trained, processor, TASKS, IMAGES)
    return {
        "score_percent": {task: 100 * right / asked for task, (right, asked) in scores.items()},
        "seconds": round(seconds, 1),
        "peak_memory_mib": memory.mib(),
    }


def row(name: str, cells: list[dict]) -> dict:
    """An arm over its seeds: each task, the mean with the standard deviation of the seeds, and what it took."""
    means = [mean(cell["score_percent"].values()) for cell in cells]
    return {
        "arm": name,
        "title": ARMS[name].title,
        "score_percent": {task: mean(cell["score_percent"][task] for cell in cells) for task in TASKS},
        "mean_score_percent": {"mean": mean(means), "spread": stdev(means) if len(means) > 1 else None},
        "of_each_seed": means,
        "seconds": mean(cell["seconds"] for cell in cells),
        "peak_memory_mib": max(cell["peak_memory_mib"] or 0 for cell in cells),
    }


def markdown(rows: list[dict]) -> str:
    """The table as docs/results.md has it."""
    lines = []
    for found in rows:
        spread = found["mean_score_percent"]["spread"]
        whole = f"{found['mean_score_percent']['mean']:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
        tasks = [f"{found['score_percent'][task]:.1f}" for task in TASKS]
        each = ", ".join(f"{one:.1f}" for one in found["of_each_seed"])
        lines.append(
            [found["title"], *tasks, whole, each, f"{found['seconds']:.0f}", f"{found['peak_memory_mib']:.0f}"]
        )
    return markdown_table(["trained", *TASKS, "mean", "of each seed", "seconds", "MiB"], lines) + "\n"


def main() -> None:
    """The program `python -m tests.from_start`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", default=",".join(ARMS))
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    make_start(out / "start")
    (out / "cells").mkdir(exist_ok=True)
    found: dict[str, list[dict]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.arms.split(","):
            file = out / "cells" / f"{name}-seed{seed}.json"
            if not file.exists():
                write_json(file, {"steps": arguments.steps, **train(name, seed, arguments.steps, out)})
            cell = json.loads(file.read_text(encoding="utf-8"))
            if cell.get("steps", arguments.steps) != arguments.steps:
                raise SystemExit(f"{file} is of {cell['steps']} steps, not {arguments.steps}: choose another --out")
            found.setdefault(name, []).append(cell)
            rows = [row(arm, cells) for arm, cells in found.items()]
            write_json(out / "table.json", {"schema_version": 1, "steps": arguments.steps, "rows": rows})
            write_text(out / "table.md", markdown(rows))
            save(sweep_figure([{"recipe": row["title"], **row} for row in rows]), out / "table.png")
            print(f"seed {seed}, {name}: {rows[list(found).index(name)]['of_each_seed'][-1]:.1f}", flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
