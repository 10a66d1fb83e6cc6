"""transformers' Trainer with what p-MoD adds: a rate for each part, images for text-only batches, counts in the log."""

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.training.parts import parameter_groups
from pmod_cli.training.resume import list_files
from pmod_cli.training.run_data import COUNTS, Counting
from pmod_cli.training.settings import TrainArgs
from pmod_cli.training.text_only import BlankImage
from pmod_cli.training.watch import Watch


class PmodTrainer(Trainer):
    """Trainer for a p-MoD or a stock LLaVA, or one of them with adapters.

    Args:
        train: the settings of the optimizer.
        watch: looks after each step; see ``Watch``.
        sampler: gives the order of the rows; without it they are shuffled.
        logs_to: folder for TensorBoard.
        others: what ``Trainer`` takes; ``data_collator`` is a ``Counting`` one.
    """

    def __init__(
        self,
        *,
        train: TrainArgs,
        watch: Watch,
        sampler: torch.utils.data.Sampler | None = None,
        logs_to: Path | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.train_args, self.watch, self.sampler = train, watch, sampler
        llava = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.blank_image = BlankImage(llava)
        llava.config.__dict__.pop("use_cache", None)  # Trainer's mark; a LLaVA reads its decoder's, so see compute_loss
        self.remove_callback(PrinterCallback)  # it prints to stdout
        if logs_to is not None:
            board = TensorBoardCallback()
            board.logging_dir = str(logs_to)
            self.add_callback(board)
        watch.attach(self, llava)
        self.add_callback(watch)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what the arguments name) over groups by part. Trainer's own knows two groups and one rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.train_args, self.get_decay_parameter_names(model))
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """One forward and backward pass; nothing in it waits for the device."""
        self.watch.count(inputs.pop(COUNTS))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add_loss(loss)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss, without KV cache and without attention mask: the collator pads on the right, where a causal
        decoder never looks, and without a mask its attention kernel skips half of the work."""
        self.blank_image.wanted = "pixel_values" not in inputs
        inputs = {**inputs, "use_cache": False, "attention_mask": None}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the watch knows to what Trainer logs."""
        if "loss" in logs:
            del logs["learning_rate"]
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                logs[f"{group['part']}_learning_rate"] = rate
            logs |= self.watch.interval()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the processor too: a training checkpoint is a model that every command takes."""
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.data_collator, Counting):
            self.data_collator.processor.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing: ``finetune`` has loaded the model from the checkpoint.

        Trainer's own takes the names in the file for those of the model. The file has the published LLaVA names,
        so that none would match and the run would go on with the weights it started from.
        """

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write the checkpoint under another name, then rename it: a killed run leaves none that is half written."""
        target = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        staging = target.parent / "incomplete"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._full_disk(error, staging) or error from None
        finally:
            del self._staging
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            list_files(staging / target.name)
            shutil.rmtree(target, ignore_errors=True)
            (staging / target.name).rename(target)
            rotate_checkpoints(str(target.parent), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()  # no process ends, and has the others ended, before the rename

    def _full_disk(self, error: Exception, staging: Path) -> PmodError | None:
        """The sentence, if this is what happened; what was written so far is removed, and the last checkpoint stays.

        torch says only that writing failed, so that the disk itself is asked.
        """
        said = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if not said and shutil.disk_usage(staging.parent).free > 1 << 20:
            return None
        shutil.rmtree(staging, ignore_errors=True)
        before = get_last_checkpoint(self.args.output_dir)
        kept = f"{before} stays" if before else "there is no earlier one"
        return PmodError(
            f"the disk is full: the training checkpoint of step {self.state.global_step} could not be saved; {kept}",
            hint="free some space, then repeat the same command with the same `out`",
            code=RUN_FAILED,
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(getattr(self, "_staging", self.args.output_dir))
