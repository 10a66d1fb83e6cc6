"""Looks after the steps of a run: stops it when asked to or when the loss is no number, counts, reports."""

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.core.memory import peak_memory
from pmod_cli.model import kept_tokens
from pmod_cli.model.routing import Routing
from pmod_cli.training.run_data import Counts


class Diverged(PmodError):
    """The loss is not a number: another run with the same settings would end so too."""


@dataclass(frozen=True)
class Step:
    """One finished optimizer step, as it is reported while a run lasts.

    Attributes:
        step: its number, from 1.
        max_steps: the number of the last one.
        loss: the loss of its batch.
        seconds_left: estimate for the rest of the run, from the steps since the start of this process.
    """

    step: int
    max_steps: int
    loss: float
    seconds_left: float


class RouterStatistics:
    """Mean and spread of the router weights of each layer in one forward pass.

    It takes the place of a ``SelectionRecord``. Sums stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}

    def add(self, layer: int, routing: Routing, gathered: Tensor, weight: Tensor | None, logit: Tensor | None) -> None:
        """Called by a routed layer while it runs, and again where checkpointing repeats it; None: it has no router."""
        if weight is None:
            return
        weight, target = weight.detach().double(), routing.target
        self.sums[layer] = torch.stack([target.sum(), (weight * target).sum(), (weight.square() * target).sum()])

    def read(self) -> dict[str, float]:
        """Log entries; the spread is a standard deviation over the vision tokens of a batch."""
        entries = {}
        for layer, (count, total, squares) in sorted((layer, sums.tolist()) for layer, sums in self.sums.items()):
            mean = total / max(count, 1)
            entries[f"router/layer_{layer:02d}_mean"] = mean
            entries[f"router/layer_{layer:02d}_spread"] = math.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
        return entries


class Watch(TrainerCallback):
    """Reports each step, and stops the run.

    On a signal, all processes save and stop after the step under way; where the loss is no number, they stop before the
    optimizer uses it. That costs one exchange of five numbers a step.

    Args:
        on_step: is told of each finished step, in the first process.
    """

    def __init__(self, on_step: Callable[[Step], None] | None = None) -> None:
        self.on_step = on_step
        self.asked: float | None = None  # when this process was asked to stop
        self.interrupted = False  # whether any was
        self.last_loss = math.nan
        self.tokens = 0  # trained on by all processes since the start of this one
        self._loss: Tensor | float = 0.0
        self._local = [0.0, 0.0, 0.0]  # tokens, vision tokens, kept ones, of this process and step
        self._since = 0.0  # when the last line of the log was written
        self._interval = [0.0, 0.0, 0.0]  # the same since the last line of the log, of all processes

    def attach(self, trainer: Trainer, llava: PreTrainedModel) -> None:
        """Called by the trainer before the run."""
        self.trainer = trainer
        self.decoder = llava.model.language_model
        self.retention: list[float] | None = getattr(
            llava.config, "retention", None
        )  # a stock model has none: it keeps everything
        self.statistics = RouterStatistics()
        if self.retention is not None:
            self._left: float = (llava.config.settings.before_decoder or ("", 1.0))[1]
            self.decoder.register_forward_pre_hook(self._count_skipped, with_kwargs=True)

    def count(self, counts: Counts) -> None:
        """Add the tokens of a batch: of its vision tokens, what a layer skips is taken away when it is routed."""
        vision = sum(counts.vision)
        self._local = [total + more for total, more in zip(self._local, (counts.tokens, vision, vision), strict=True)]

    def _count_skipped(self, decoder: nn.Module, arguments: tuple, named: dict) -> None:
        """Take away what a layer skips, mean over the layers; a teacher's pass is not routed."""
        routing: Routing | None = named.get("routing")
        if routing is None or self.retention is None:
            return
        rows, skipped = [vision for vision, *_ in routing.known_counts], 0
        for ratio, layers in Counter(self.retention).items():
            kept = [kept_tokens(kept_tokens(row, self._left), ratio) for row in rows]
            skipped += layers * (sum(rows) - sum(routing.kept(ratio) if self._left == 1 else kept))
        self._local[2] -= skipped / len(self.retention)

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one forward pass, as the Trainer scales it: a step's losses add up to its own."""
        self._loss = self._loss + loss

    def interval(self) -> dict[str, float]:
        """Entries for a line of the log; counts and router statistics start anew."""
        now = perf_counter()
        tokens, vision, kept = self._interval
        entries = {
            "tokens_per_second": tokens / max(now - self._since, 1e-9),
            "vision_tokens": vision,
            "vision_tokens_kept": kept,
            "memory_gib": peak_memory() / 2**30,
            "elapsed_seconds": self.elapsed(),
            "seconds_left": self._seconds_left(self.trainer.state),
            **self.statistics.read(),
        }
        self._interval, self._since = [0.0, 0.0, 0.0], now
        self.statistics = RouterStatistics()
        return entries

    def elapsed(self) -> float:
        """Seconds of training, in this and earlier processes."""
        return self._before + perf_counter() - self.started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.started = self._since = perf_counter()
        self.first = state.global_step
        # Of earlier processes, up to the checkpoint that this one goes on from.
        self._before = max((line.get("elapsed_seconds", 0.0) for line in state.log_history), default=0.0)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before a step that is logged, watch the routers."""
        step = state.global_step + 1
        due = step == state.max_steps or 0 in (step % args.logging_steps, step % args.save_steps)
        if self.retention is not None and due:
            self.decoder.selection_recorder = self.statistics

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the other processes, and hear from them.

        Raises:
            Diverged: the loss is not a number. The optimizer has not stepped: checkpoints on disk are good.
        """
        if self.retention is not None:
            self.decoder.selection_recorder = None
        loss = torch.as_tensor(self._loss, dtype=torch.float64).reshape(1)
        shared = torch.cat([loss, torch.tensor([float(self.asked is not None), *self._local]).to(loss)])
        if args.world_size > 1:
            shared = self.trainer.accelerator.reduce(shared.to(args.device), reduction="sum")
        loss, interrupted, *counts = shared.tolist()
        self.last_loss = loss / args.world_size
        self.interrupted = interrupted > 0
        self._loss, self._local = 0.0, [0.0, 0.0, 0.0]
        self._interval = [total + more for total, more in zip(self._interval, counts, strict=True)]
        state.num_input_tokens_seen += round(counts[0])
        self.tokens += round(counts[0])
        if not math.isfinite(self.last_loss):
            raise Diverged(
                f"the loss is {self.last_loss} at step {state.global_step + 1}: training has diverged. "
                f"The last good training checkpoint is the newest in {args.output_dir}",
                hint="lower `train.learning_rate` or `train.router_learning_rate`, or use `model.precision=float32`",
                code=RUN_FAILED,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report the step, and stop where that was asked."""
        if self.on_step is not None and state.is_world_process_zero:
            self.on_step(Step(state.global_step, state.max_steps, self.last_loss, self._seconds_left(state)))
        self.interrupted = self.interrupted or (args.world_size == 1 and self.asked is not None)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if control.should_save or control.should_training_stop:
            # Whatever the interval: a run that goes on from a checkpoint has no more of the steps before than its log.
            control.should_log = True

    def _seconds_left(self, state: TrainerState) -> float:
        pace = (perf_counter() - self.started) / max(state.global_step - self.first, 1)
        return pace * (state.max_steps - state.global_step)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While this lasts, Ctrl-C and SIGTERM (a cluster wants its machine) ask for a stop; a later one insists.

        A launcher passes on what the terminal has sent already: what comes within two seconds is the same request.
        """

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked is not None and perf_counter() - self.asked > 2:
                raise KeyboardInterrupt
            self.asked = self.asked or perf_counter()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
