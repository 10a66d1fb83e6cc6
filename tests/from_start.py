"""Trained with routing from the start, or trained plain and then routed: which ends higher after equal steps?

    python -m tests.from_start --out DIR [--seeds N]

The start is the bundled model with most of its projector drawn anew, so that it has to learn to see again: the paper,
too, starts from a language model and a projector that have not met its questions. One way routes all steps; the other
trains the stock model for two thirds of them, fits routers to it, and routes the last third. Same schedule, rates and
documents. Stopped, the same command goes on.
"""

import argparse
import json
from collections.abc import Iterator
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
from pmod_cli.reporting import markdown_table
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune
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

    name: str
    stages: tuple[tuple[float, tuple[str, ...]], ...]


ARMS = (
    Arm("not routed", ((1, PLAIN),)),
    Arm("routed from the start, anew", ((1, (*ANEW, ZERO)),)),
    Arm("routed from the start, held", ((1, (*HELD, ZERO)),)),
    Arm("plain, then routed anew", ((2 / 3, PLAIN), (1 / 3, (*ANEW, CALIBRATED)))),
    Arm("plain, then routed, held", ((2 / 3, PLAIN), (1 / 3, (*HELD, CALIBRATED)))),
)


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


def train(arm: Arm, seed: int, steps: int, out: Path) -> dict:
    """Train one arm and score it.

    Returns:
        Answers right in percent of each task, seconds of training, and the most memory that this process held in MiB.
    """
    memory, model, done, seconds = PeakMemory("cpu"), out / "start", 0, 0.0
    for number, (share, overrides) in enumerate(arm.stages):
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
        name = "-".join([str(seed), str(count), *overrides]) if number == 0 else f"{seed}-{arm.name}"
        model = out / "runs" / "".join(c if c.isalnum() else "-" for c in name)
        report = finetune(settings, model)
        if report.status == "interrupted":
            raise SystemExit("interrupted: repeat the command, and it goes on")
        done, seconds = done + count, seconds + report.seconds
    trained, processor = load_model(model, dtype="float32")
    scores = answered(trained, processor, TASKS, IMAGES)
    return {
        "score_percent": {task: 100 * right / asked for task, (right, asked) in scores.items()},
        "seconds": round(seconds, 1),
        "peak_memory_mib": memory.mib(),
    }


def table(found: dict[str, list[dict]]) -> Iterator[list[str]]:
    """A row an arm: each task, the mean with the standard deviation of the seeds, each seed's, and what it took."""
    for name, cells in found.items():
        means = [mean(cell["score_percent"].values()) for cell in cells]
        spread = f" ± {stdev(means):.1f}" if len(means) > 1 else ""
        tasks = [f"{mean(cell['score_percent'][task] for cell in cells):.1f}" for task in TASKS]
        cost = [
            f"{mean(cell['seconds'] for cell in cells):.0f}",
            f"{max(cell['peak_memory_mib'] or 0 for cell in cells):.0f}",
        ]
        each = ", ".join(f"{one:.1f}" for one in means)
        yield [name, str(len(cells)), *tasks, f"{mean(means):.1f}{spread}", each, *cost]


def main() -> None:
    """The program `python -m tests.from_start`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    make_start(out / "start")
    found: dict[str, list[dict]] = {arm.name: [] for arm in ARMS}
    for seed in range(arguments.seeds):
        for arm in ARMS:
            file = out / "cells" / f"{seed}-{arm.name.replace(' ', '-').replace(',', '')}.json"
            if not file.exists():
                result = train(arm, seed, arguments.steps, out)
                file.parent.mkdir(exist_ok=True)
                write_json(file, result)
            found[arm.name].append(json.loads(file.read_text(encoding="utf-8")))
            print(f"seed {seed}, {arm.name}: {mean(found[arm.name][-1]['score_percent'].values()):.1f}", flush=True)
            rows = list(table({name: cells for name, cells in found.items() if cells}))
            text = markdown_table(["trained", "seeds", *TASKS, "mean", "of each seed", "seconds", "MiB"], rows) + "\n"
            write_text(out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
