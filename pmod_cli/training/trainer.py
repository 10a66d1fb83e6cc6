"""transformers' Trainer with what p-MoD adds: a rate for each part, routers in every batch, a count of what is kept."""

import math
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from pmod_cli.errors import RUN_FAILED, PmodError
from pmod_cli.model import kept_tokens
from pmod_cli.training.parts import parameter_groups, part_of
from pmod_cli.training.settings import TrainArgs


@dataclass(frozen=True)
class Step:
    """One finished optimizer step, as it is reported while a run lasts.

    Attributes:
        step: its number, from 1.
        max_steps: the number of the last one.
        loss: the loss of its last batch.
        seconds_left: estimate for the rest of the run, from the steps since the start of this process.
    """

    step: int
    max_steps: int
    loss: float
    seconds_left: float


class PmodTrainer(Trainer):
    """Trainer for a p-MoD or a stock LLaVA.

    Args:
        train: the settings of the optimizer.
        on_step: is told of each finished step.
        others: what ``Trainer`` takes.
    """

    def __init__(self, *, train: TrainArgs, on_step: Callable[[Step], None] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.train_args = train
        self.last_loss = math.nan
        self._vision = self._kept = 0.0
        config = self.model.config
        self._image_token = config.image_token_id
        self._retention = getattr(config, "retention", None)  # a stock model has none: it keeps everything
        config.__dict__.pop("use_cache", None)  # Trainer's mark; a LLaVA reads its decoder's, so see compute_loss
        self.remove_callback(PrinterCallback)  # it prints to stdout
        self.watch = Watch(self, on_step)
        self.add_callback(self.watch)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what the arguments name) over groups by part. Trainer's own knows two groups and one rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.train_args, self.get_decay_parameter_names(model))
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, without KV cache and without attention mask: the collator pads on the right, where a causal
        decoder never looks, and without a mask its attention kernel skips half of the work.

        Text-only batches add a zero that reaches the parts they do not use.

        Without it a process whose batch has no image has no gradient for routers and projector, and the processes of
        a distributed run wait for each other forever.
        """
        self._count_vision(inputs["input_ids"])
        inputs = {**inputs, "use_cache": False, "attention_mask": None}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "pixel_values" in inputs:
            return result
        unused = [p for n, p in model.named_parameters() if p.requires_grad and part_of(n) != "language_model"]
        zero = sum(0.0 * parameter.sum() for parameter in unused)
        return (result[0] + zero, result[1]) if return_outputs else result + zero

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            PmodError: the loss is not a number. The optimizer has not stepped: checkpoints on disk are good.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.last_loss = loss.item()
        if not math.isfinite(self.last_loss):
            raise PmodError(
                f"the loss is {self.last_loss} at step {self.state.global_step + 1}: training has diverged. "
                f"The last good training checkpoint is the newest in {self.args.output_dir}",
                hint="lower --learning-rate or train.router_learning_rate, or use --dtype float32",
                code=RUN_FAILED,
            )
        return loss

    def _count_vision(self, input_ids: torch.Tensor) -> None:
        """Add up the vision tokens of a batch, and the share of them that the layers keep by their schedule."""
        rows = (input_ids == self._image_token).sum(dim=1).tolist()
        self._vision += sum(rows)
        if self._retention is not None:
            kept = sum(kept_tokens(row, ratio) for row in rows for ratio in self._retention)
            self._kept += kept / len(self._retention)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each part's learning rate and the vision tokens since the last line to what Trainer logs."""
        if "loss" in logs:
            del logs["learning_rate"]
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                logs[f"{group['part']}_learning_rate"] = rate
            logs["vision_tokens"] = self._vision
            logs["vision_tokens_kept"] = self._vision if self._retention is None else self._kept
            self._vision = self._kept = 0.0
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the processor too: a training checkpoint is a model that every command takes."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.data_collator.processor.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing where the model is loaded before it is sharded: ``finetune`` has loaded it from the checkpoint.

        Trainer's own takes the names in the file for those of the model. The file has the published LLaVA names,
        so that none would match and the run would go on with the weights it started from.
        """
        if model is not None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, then rename it: a killed run leaves none that is half written."""
        target = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        staging = target.parent / "incomplete"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._staging = staging
        super()._save_checkpoint(model, trial)
        del self._staging
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(target, ignore_errors=True)
            (staging / target.name).rename(target)
            rotate_checkpoints(str(target.parent), self.args.save_total_limit)

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_staging", self.args.output_dir))


class Watch(TrainerCallback):
    """Reports each step, and on a signal saves and stops after the step under way."""

    def __init__(self, trainer: PmodTrainer, on_step: Callable[[Step], None] | None) -> None:
        self.trainer, self.on_step = trainer, on_step
        self.interrupted = False

    def on_train_begin(self, args, state, control, **_) -> None:
        self.started, self.first = perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **_) -> None:
        if self.on_step is not None and state.is_world_process_zero:
            pace = (perf_counter() - self.started) / (state.global_step - self.first)
            left = pace * (state.max_steps - state.global_step)
            self.on_step(Step(state.global_step, state.max_steps, self.trainer.last_loss, left))
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if control.should_training_stop:
            control.should_log = True  # the last loss, whatever the interval

    @contextmanager
    def signals(self):
        """While this lasts, Ctrl-C and SIGTERM (a cluster wants its machine) ask for a stop; a second one insists."""

        def ask(number, frame):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
