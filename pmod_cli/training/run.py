"""One fine-tuning run: a folder with its settings at first, its training state meanwhile, a checkpoint in the end."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_tf32_available

from pmod_cli.checkpoints import load_model, resolve
from pmod_cli.checkpoints.atomic import write_text
from pmod_cli.data.collator import Collator
from pmod_cli.errors import PmodError
from pmod_cli.training.calibration import calibrate_routers
from pmod_cli.training.dataset import SyntheticDocuments
from pmod_cli.training.parts import count, freeze
from pmod_cli.training.recipe import differences, dump, load_settings
from pmod_cli.training.settings import Settings
from pmod_cli.training.trainer import PmodTrainer, Step

SETTINGS = "config.yaml"  # the settings that ran: a recipe
LOG = "training_log.jsonl"  # one line per logged step
CALIBRATION_BATCH = 8
STATE = "checkpoints"  # what a run goes on from; removed when it is finished


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        path: the run folder; once finished, a checkpoint.
        status: finished; interrupted, and can go on; or already finished, nothing was done.
        step: optimizer steps done, of ``max_steps``, in this and earlier processes.
        loss: mean training loss of the last logged steps.
        seconds: wall time of this process' training.
        tokens: text and vision tokens trained on, without padding.
        parameters: of each part, how many there are and whether they were trained.
    """

    path: Path
    status: Literal["finished", "interrupted", "already finished"]
    step: int
    max_steps: int
    loss: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    parameters: dict[str, tuple[int, bool]] = field(default_factory=dict)


def finetune(
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> FinetuneReport:
    """Train a p-MoD model, or a stock LLaVA, and leave a checkpoint in ``out``.

    An unfinished run in ``out`` goes on where it stopped. Ctrl-C or SIGTERM saves after the step under way.

    Args:
        settings: the whole run; ``model.name`` must be given.
        out: the run folder.
        device: cpu, cuda, cuda:N or mps.
        resume: go on with what is in ``out``; otherwise ``out`` must be new.
        overwrite: remove an earlier run in ``out`` first.
        on_step: is told of each finished step.

    Raises:
        PmodError: ``out`` holds something else, or a run with other settings; the loss is not a number.
    """
    source = resolve(settings.model.name).path
    if overwrite and (out / SETTINGS).is_file():
        shutil.rmtree(out)
    _check_folder(out, settings, resume)
    if (out / "config.json").is_file():
        return FinetuneReport(out, "already finished", settings.train.max_steps, settings.train.max_steps)
    checkpoint = get_last_checkpoint(str(out / STATE)) if (out / STATE).is_dir() else None
    model, processor = load_model(
        Path(checkpoint or source), dtype="float32", attn_implementation=settings.model.attention
    )
    (out / STATE).mkdir(parents=True, exist_ok=True)
    write_text(out / SETTINGS, dump(settings))

    rows = SyntheticDocuments(settings.data, settings.data.images or settings.images_used * _world_size())
    if settings.model.router_start == "attention" and getattr(model.config, "router_state", None) == "untrained":
        model.to(device)
        calibrate_routers(model, calibration_batches(rows, processor, settings.model.calibration_images, device))
    freeze(model, settings.model.freeze)
    if hasattr(model.config, "router_state"):
        model.config.router_state = "trained"
    trainer = PmodTrainer(
        train=settings.train,
        on_step=on_step,
        model=model,
        args=training_arguments(settings, out, device),
        train_dataset=rows,
        data_collator=Collator(processor),
    )
    started = perf_counter()
    with trainer.watch.signals():
        trainer.train(resume_from_checkpoint=checkpoint)
    finished = trainer.state.global_step >= settings.train.max_steps
    if finished and trainer.is_world_process_zero():
        model.to(_dtype_of(source))
        publish(model, processor, trainer.state.log_history, out)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return FinetuneReport(
        path=out,
        status="finished" if finished else "interrupted",
        step=trainer.state.global_step,
        max_steps=settings.train.max_steps,
        loss=losses[-1] if losses else None,
        seconds=perf_counter() - started,
        tokens=trainer.state.num_input_tokens_seen,
        parameters=count(model),
    )


def calibration_batches(
    rows: SyntheticDocuments, processor: ProcessorMixin, images: int, device: str
) -> Iterator[dict[str, torch.Tensor]]:
    """The first ``images`` rows in small batches of model inputs, since eager attention is large."""
    collate, count = Collator(processor), min(images, len(rows))
    for start in range(0, count, CALIBRATION_BATCH):
        batch = collate([rows[i] for i in range(start, min(start + CALIBRATION_BATCH, count))])
        yield {name: batch[name].to(device) for name in ("input_ids", "pixel_values", "image_sizes") if name in batch}


def training_arguments(settings: Settings, out: Path, device: str) -> TrainingArguments:
    """The settings as transformers' Trainer takes them."""
    train, on_gpu = settings.train, device.startswith("cuda")
    if on_gpu and "LOCAL_RANK" not in os.environ:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device if ":" in device else "cuda:0"
    precision = settings.model.precision
    arguments = TrainingArguments(
        output_dir=str(out / STATE),
        max_steps=train.max_steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
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
        bf16=precision == "bfloat16" or (precision == "auto" and on_gpu),
        tf32=on_gpu and is_torch_tf32_available(),
        activation_checkpointing=settings.model.gradient_checkpointing,
        dataloader_num_workers=settings.data.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    if "LOCAL_RANK" not in os.environ:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer takes every GPU it sees for slow DataParallel
    return arguments


def publish(model: PreTrainedModel, processor: ProcessorMixin, log: list[dict], out: Path) -> None:
    """Put the checkpoint into the run folder, ``config.json`` last: without it the folder is no checkpoint yet."""
    staging = out / STATE / "finished"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    processor.save_pretrained(staging)
    (staging / LOG).write_text("".join(json.dumps(line) + "\n" for line in log))
    for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(out / file.name)
    shutil.rmtree(out / STATE)


def _check_folder(out: Path, settings: Settings, resume: bool) -> None:
    """The run folder is new or empty, or the run in it is this one and may go on."""
    saved = out / SETTINGS
    if saved.is_file():
        if not resume:
            raise PmodError(
                f"{out} already holds a run, and --no-resume was given", hint="choose another --out, or add --overwrite"
            )
        changed = differences(load_settings(saved), settings)
        if changed:
            raise PmodError(
                f"{out} holds a run with other settings:\n  " + "\n  ".join(changed),
                hint=f"go on with its own: pmod finetune --recipe {saved} --out {out}; or choose another --out",
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PmodError(f"{out} exists and is not a run of pmod finetune", hint="choose another --out")


def _dtype_of(source: Path) -> torch.dtype:
    """The dtype the source is stored in: the run is stored in the same."""
    return AutoConfig.from_pretrained(source).dtype or torch.float32


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
