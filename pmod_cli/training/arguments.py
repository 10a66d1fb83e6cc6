"""The settings as transformers' Trainer takes them."""

import json
import os
from pathlib import Path

from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available

from pmod_cli import recipes
from pmod_cli.training.folder import STATE
from pmod_cli.training.settings import Settings


def processes() -> int:
    """Processes of the run; each knows it from the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_arguments(settings: Settings, out: Path, device: str) -> TrainingArguments:
    """Everything the Trainer is told, but ``max_steps``, which the data decide.

    Made before the model is loaded: FSDP and DeepSpeed have a say in that. It also joins the processes of the run.

    Args:
        settings: the whole run.
        out: the run folder.
        device: cpu, cuda, cuda:N or mps.
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
        bf16=precision(settings, device) == "bfloat16",
        tf32=train.tf32 and on_gpu and is_torch_tf32_available(),
        ddp_find_unused_parameters=False,  # text-only batches reach every part; see text_only.py
        dataloader_num_workers=settings.data.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        include_num_input_tokens_seen="non_padding",
        report_to="wandb" if train.report_to == "wandb" else "none",  # TensorBoard: see reporting.py
        run_name=out.name,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **(engine_options(settings) if distributed else {}),
    )
    if not distributed:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer takes every GPU it sees for slow DataParallel
    return arguments


def precision(settings: Settings, device: str) -> str:
    """The dtype of forward and backward: float32 or bfloat16."""
    if settings.model.precision == "auto":
        return "bfloat16" if device.startswith("cuda") else "float32"
    return settings.model.precision


def engine_options(settings: Settings) -> dict:
    """The shipped configuration of the engine, as the Trainer takes it. DDP, the default, needs none."""
    engine = settings.train.engine
    if engine in ("auto", "ddp"):
        return {}
    config = json.loads((recipes.folder() / "engines" / f"{engine}.json").read_text())
    return {"fsdp": True, "fsdp_config": config} if engine == "fsdp2" else {"deepspeed": config}
