"""Where a model reads: how much the loss of its answers rises when single layers are skipped, or images are hidden.

This is the paper's Figure 3 without training. Three things are done to each layer l, and nothing else is changed:

    skipped         no token passes the layer
    skipped_vision  no vision token passes it, and none is seen in it: text attends to text
    hidden_from     the same in layer l and in every layer behind it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from pmod_cli.calibration.asked import AskedBatch
from pmod_cli.calibration.replay import Replay, Stream, answer_losses

IDLE = 0.01  # nats: a layer whose absence costs less does nothing for the answers
READS = 0.05  # nats: a rise that says that vision tokens are read
ALL = "mean of tasks"
WAYS = ("skipped", "skipped_vision", "hidden_from")


@dataclass
class Depth:
    """Losses of one task, in nats an answer token.

    Attributes:
        tokens: Answer tokens.
        base: Of the model as it is.
        rise: By each of `WAYS`, length L: how much more the loss is.
    """

    tokens: int = 0
    base: float = 0.0
    rise: dict[str, list[float]] = field(default_factory=dict)

    @property
    def idle(self) -> int:
        """Layers that all tokens can skip at a rise below `IDLE`."""
        return sum(rise < IDLE for rise in self.rise["skipped"])

    @property
    def reads_at(self) -> list[int]:
        """Layers that vision tokens cannot skip without a rise of `READS` or more."""
        return [layer for layer, rise in enumerate(self.rise["skipped_vision"]) if rise >= READS]

    @property
    def last_read(self) -> int | None:
        """The deepest layer from which vision tokens cannot be hidden without a rise of `READS` or more."""
        return max((layer for layer, rise in enumerate(self.rise["hidden_from"]) if rise >= READS), default=None)


@torch.no_grad()
def measure_depth(
    replay: Replay, batches: Iterable[AskedBatch], on_layer: Callable[[], None] = lambda: None
) -> dict[str, Depth]:
    """What each layer is for, by task.

    Memory holds one batch in front of one layer at a time. Time is that of about L full passes.

    Args:
        replay: The model.
        batches: Rows with answers.
        on_layer: Called when a layer of a batch is done.
    """
    sums: dict[str, dict[str, torch.Tensor]] = {}
    for batch in batches:
        stream = replay.begin(batch)
        losses: dict[str, list[torch.Tensor]] = {way: [] for way in WAYS}
        for layer in range(len(replay)):
            for way, loss in _without(replay, stream, layer):
                losses[way].append(loss)
            on_layer()
        base = answer_losses(replay.logits(stream), stream.targets)
        for task in dict.fromkeys(batch.tasks):
            rows = torch.tensor([each == task for each in batch.tasks], device=base.device)
            mine = rows[stream.rows]
            found = {way: torch.stack(losses[way])[:, mine].sum(dim=1).double().cpu() for way in WAYS}
            found |= {"base": base[mine].sum().double().cpu(), "tokens": mine.sum().cpu()}
            before = sums.setdefault(task, {name: torch.zeros_like(value) for name, value in found.items()})
            sums[task] = {name: before[name] + value for name, value in found.items()}
    return {task: _depth(found) for task, found in sums.items()}


def over_tasks(found: Mapping[str, Depth]) -> dict[str, Depth]:
    """The tasks and, where they are several, the mean of them, in which each counts the same."""
    if len(found) < 2:
        return dict(found)
    tasks = list(found.values())
    rise = {
        way: [sum(values) / len(tasks) for values in zip(*(task.rise[way] for task in tasks), strict=True)]
        for way in WAYS
    }
    base = sum(task.base for task in tasks) / len(tasks)
    return {**found, ALL: Depth(sum(task.tokens for task in tasks), base, rise)}


def _without(replay: Replay, stream: Stream, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(way, losses `(A,)`) of a stream in front of `layer`; afterwards it is in front of the next one."""
    targets = stream.targets
    if stream.routing is not None:
        with replay.keeping([layer], 0.0):
            yield "skipped_vision", answer_losses(replay.logits(stream), targets)
        with replay.keeping(range(layer, len(replay)), 0.0):
            yield "hidden_from", answer_losses(replay.logits(stream), targets)
    before = stream.hidden
    replay.advance(stream)  # a choice that later layers hold is made even where the layer is skipped
    skipped = answer_losses(replay.logits(stream, hidden=stream.behind(layer, before)), targets)
    yield "skipped", skipped
    if stream.routing is None:  # a batch of text alone has nothing to hide
        base = answer_losses(replay.logits(stream), targets)
        yield "skipped_vision", base
        yield "hidden_from", base


def _depth(found: dict[str, torch.Tensor]) -> Depth:
    tokens = int(found["tokens"])
    base = float(found["base"]) / tokens
    return Depth(tokens, base, {way: (found[way] / tokens - base).tolist() for way in WAYS})
