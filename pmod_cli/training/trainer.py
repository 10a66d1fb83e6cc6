"""transformers' Trainer with what p-MoD adds: a rate for each part, images for text-only batches, counts in the log."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors import SafetensorError
from torch import Tensor, nn, zeros
from torch import tensor as as_tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import is_torch_tf32_available

from pmod_cli import recipe_files
from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.families.configs import known_family, small_side
from pmod_cli.training.answers import POSITIONS, AnswersHead, positions
from pmod_cli.training.distillation import divergence, stock_logits
from pmod_cli.training.folder import STATE
from pmod_cli.training.parts import gathered_alone, parameter_groups
from pmod_cli.training.resume import list_files
from pmod_cli.training.run_data import COUNTS, Counting
from pmod_cli.training.run_settings import Settings, TrainArgs, processes
from pmod_cli.training.teacher_forced import maskless
from pmod_cli.training.watch import Watch


class BlankImage:
    """Adds the features of a blank image, times zero, to the embeddings of the next step of a LLaVA.

    A process whose batch is text only must still use the vision tower and the projector: otherwise DDP waits for their
    gradients, and FSDP2 and ZeRO-3 for their weights, forever. (Routers see to themselves, in the decoder.)

    Args:
        model: stock or p-MoD, before it is wrapped for distributed training. The features are made while its own
            forward runs, where all engines have its weights at hand.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.llava = model.model
        self.wanted = False
        self.llava.language_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, decoder: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict] | None:
        if not self.wanted:
            return None
        self.wanted = False
        embeds = named["inputs_embeds"]
        made = self.llava.get_image_features(**self._inputs(embeds), return_dict=True)
        features = _tensors([made.pooler_output, getattr(made, "deepstack_features", None) or ()])
        return arguments, {**named, "inputs_embeds": embeds + 0.0 * sum(image.sum() for image in features)}

    def _inputs(self, embeds: Tensor) -> dict[str, Tensor]:
        config = self.llava.config
        shape, others = known_family(config).pixel_inputs(config, [(small_side(config),) * 2])
        pixels = zeros(shape, dtype=embeds.dtype, device=embeds.device)
        return {"pixel_values": pixels, **{name: as_tensor(o, device=embeds.device) for name, o in others.items()}}


def _tensors(features: Any) -> Iterator[Tensor]:
    """All tensors of nested lists: features are one an image, and with DeepStack one a layer and image."""
    if isinstance(features, Tensor):
        yield features
    else:
        for part in features:
            yield from _tensors(part)


class PmodTrainer(Trainer):
    """Trainer for a p-MoD or a stock LLaVA, or one of them with adapters.

    Args:
        train: the settings of the optimizer.
        watch: looks after each step; see ``Watch``.
        sampler: gives the order of the rows; without it they are shuffled.
        logs_to: folder for TensorBoard.
        others: what ``Trainer`` takes; ``data_collator`` is a ``Counting`` one.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *,
        train: TrainArgs,
        watch: Watch,
        sampler: Sampler | None = None,
        logs_to: Path | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.train_args, self.watch, self.sampler = train, watch, sampler
        llava = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = gathered_alone(llava)
        self.blank_image = BlankImage(llava)
        self.answers_head = AnswersHead(llava)
        self.maskless = maskless(llava)
        # Qwen-VL says that it does not, and its loss does: each answer token of a step weighs the same in all families,
        # however the step is cut into forward passes and processes.
        self.model_accepts_loss_kwargs = True
        llava.config.__dict__.pop("use_cache", None)  # Trainer's mark; a LLaVA reads its decoder's, so see compute_loss
        self.remove_callback(PrinterCallback)  # it prints to stdout
        if logs_to is not None:
            board = TensorBoardCallback()
            board.logging_dir = str(logs_to)
            self.add_callback(board)
        watch.attach(self, llava)
        self.add_callback(watch)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, and FSDP2 on CPUs, where accelerate leaves the plugin out without a word and runs DDP.

        Raises:
            PmodError: something else would run in place of the engine that was asked for.
        """
        super().create_accelerator_and_postprocess()
        state, asked = self.accelerator.state, None
        if self.args.fsdp_plugin_args is not None:
            asked = DistributedType.FSDP
            if state.distributed_type == DistributedType.MULTI_CPU:
                state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                state.distributed_type = PartialState._shared_state["distributed_type"] = asked
                self.is_fsdp_enabled = True
            if state.mixed_precision == "bf16":  # accelerate's own policy rounds the loss and the sums of gradients too
                policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
                state.fsdp_plugin.mixed_precision_policy = policy
        elif self.args.deepspeed:
            asked = DistributedType.DEEPSPEED
        if asked not in (None, state.distributed_type):
            raise PmodError(
                f"accelerate runs {state.distributed_type.value} in place of {asked.value}", hint="`train.engine=ddp`"
            )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW (or what the arguments name) over groups by part. Trainer's own knows two groups and one rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.train_args, self.get_decay_parameter_names(model))
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def train_rest(self, checkpoint: str | None) -> None:
        """Train what is left from a checkpoint on: nothing where it is of the last step, and its process died later.

        Trainer's own loop takes a step more before it looks.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
            if state.global_step >= self.args.max_steps:
                self.state = state
                self.watch.on_train_begin(self.args, state, self.control)
                return
        self.train(resume_from_checkpoint=checkpoint)

    def _get_train_sampler(
        self, train_dataset: torch.utils.data.Dataset | None = None
    ) -> torch.utils.data.Sampler | None:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """One forward and backward pass; nothing in it waits for the device."""
        self.watch.count(inputs.pop(COUNTS))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add_loss(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The model's loss: no KV cache, logits of the answers alone, and no attention mask where none is needed."""
        inputs = dict(inputs)
        answers = inputs.pop(POSITIONS) if POSITIONS in inputs else positions(inputs["labels"])
        learnt = inputs["labels"].flatten()[answers + 1]
        inputs |= {"use_cache": False, "shift_labels": learnt, **self.maskless}
        ask: Callable[..., Any] = model
        with self.answers_head.at(answers):
            if self.train_args.loss == "distill":  # the teacher first, so that no activations are held while it runs
                self.blank_image.wanted = "pixel_values" not in inputs
                taught = stock_logits(self.accelerator.unwrap_model(model), inputs)[0]

                def ask(**asked: Any) -> Any:
                    """The model, whose loss has the divergence in it before Trainer scales it for several processes."""
                    outputs = model(**asked)
                    outputs.loss = outputs.loss + divergence(taught, outputs.logits[0], num_items_in_batch)
                    return outputs

            self.blank_image.wanted = "pixel_values" not in inputs
            return super().compute_loss(ask, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the watch knows to what Trainer logs."""
        if "loss" in logs and self.optimizer is not None:
            del logs["learning_rate"]
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
                logs[f"{group['part']}_learning_rate"] = rate
            logs |= {"num_input_tokens_seen": self.state.num_input_tokens_seen, **self.watch.interval()}
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


def training_arguments(settings: Settings, out: Path, device: str) -> TrainingArguments:
    """Everything the Trainer is told, but ``max_steps``, which the data decide.

    Made before the model is loaded: FSDP and DeepSpeed have a say in that. It also joins the processes of the run.
    """
    train, on_gpu = settings.train, device.startswith("cuda")
    distributed = "LOCAL_RANK" in os.environ
    if on_gpu and not distributed:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device if ":" in device else "cuda:0"
    arguments = TrainingArguments(
        output_dir=str(out / STATE),
        max_steps=1,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=settings.accumulation(processes()),
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_schedule,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,  # PmodTrainer stops at a loss that is not a number
        save_steps=train.save_steps,
        save_total_limit=train.keep_checkpoints,
        bf16=settings.dtype_on(device) == "bfloat16",
        tf32=train.tf32 and on_gpu and is_torch_tf32_available(),
        ddp_find_unused_parameters=False,  # text-only batches reach every part; see BlankImage
        dataloader_num_workers=settings.data.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        report_to="wandb" if train.report_to == "wandb" else "none",  # TensorBoard: a callback of PmodTrainer
        run_name=out.name,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **(engine_options(settings) if distributed else {}),
    )
    if not distributed:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer takes every GPU it sees for slow DataParallel
    return arguments


def engine_options(settings: Settings) -> dict:
    """The shipped configuration of the engine, as the Trainer takes it. DDP, the default, needs none."""
    engine = settings.train.engine
    if engine in ("auto", "ddp"):
        return {}
    config = json.loads((recipe_files.folder() / "engines" / f"{engine}.json").read_text())
    return {"fsdp": True, "fsdp_config": config} if engine == "fsdp2" else {"deepspeed": config}
