"""What groups of layers do for vision tokens: ``python -m tests.beds.groups --model tiny-llava-next --data tiny``.

How much the loss of the answers rises, without training, where in a group of layers

    skipped  vision tokens neither pass nor are seen, as tokens that a p-MoD layer skips
    frozen   they do not pass, but are seen: what is missed is their way through these layers
    unseen   they pass, but text does not see them: what is missed is reading them in these layers

``pmod profile --report depth`` does the first to single layers. One thread reproduces the numbers of docs/results.md.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from pmod_cli.calibration.asked import Asked, AskedBatch
from pmod_cli.calibration.replay import Replay, Stream, answer_losses
from pmod_cli.calibration.samples import read_samples
from pmod_cli.checkpoints import load_model, resolve

WAYS = ("skipped", "frozen", "unseen")


@torch.no_grad()
def rises(replay: Replay, batches: Iterable[AskedBatch], groups: Sequence[range]) -> dict[str, dict[tuple, float]]:
    """By task, and by (way, number of the group), in nats an answer token."""
    sums: dict[str, dict[tuple, float]] = defaultdict(lambda: defaultdict(float))
    tokens: dict[str, int] = defaultdict(int)
    for batch in batches:
        start = replay.begin(batch)
        base = answer_losses(replay.logits(start), start.targets)
        for number, group in enumerate(groups):
            for way in WAYS:
                rise = answer_losses(replay.logits(_behind(replay, start, group, way)), start.targets) - base
                for task in set(batch.tasks):
                    sums[task][way, number] += rise[_rows(batch, task)[start.rows]].double().sum().item()
        for task in set(batch.tasks):
            tokens[task] += int(_rows(batch, task)[start.rows].sum())
    return {task: {key: value / tokens[task] for key, value in found.items()} for task, found in sums.items()}


def _rows(batch: AskedBatch, task: str) -> Tensor:
    return torch.tensor([each == task for each in batch.tasks])


def _behind(replay: Replay, start: Stream, group: range, way: str) -> Stream:
    """The stream behind a group whose vision tokens go this way."""
    stream = replay.advance(start.fork(), group.start)
    for layer in group:
        vision = stream.routing.target[..., None]
        passed = replay.advance(stream.fork()).hidden
        with replay.keeping([layer], 0.0):
            apart = replay.advance(stream.fork()).hidden
        ends = {"skipped": (stream.hidden, apart), "frozen": (stream.hidden, passed), "unseen": (passed, apart)}[way]
        stream = stream.fork(layer=layer + 1, hidden=torch.where(vision, *ends))
    return stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a stock checkpoint, or the name of a bundled model")
    parser.add_argument("--data", default="tiny", help="as in `pmod profile --report depth --data`")
    parser.add_argument("--samples", type=int, default=140)
    parser.add_argument("--size", type=int, default=8, help="layers of a group")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(resolve(options.model).path, dtype="float32", device="cpu")
    replay = Replay(model)
    groups = [range(first, min(first + options.size, len(replay))) for first in range(0, len(replay), options.size)]
    batches = Asked(model, processor).batches(read_samples(options.data, options.samples))
    found = rises(replay, batches, groups)
    for way in WAYS:
        for number, group in enumerate(groups):
            each = {task: found[task][way, number] for task in sorted(found)}
            row = "  ".join(f"{task} {rise:.3f}" for task, rise in each.items())
            print(f"{way:7}  layers {group[0]} to {group[-1]}  mean {fmean(each.values()):.3f}  {row}")


if __name__ == "__main__":
    main()
