"""One fine-tuning run, from settings to a checkpoint. What it leaves where: see ``folder``."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from accelerate import PartialState
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import get_last_checkpoint

from pmod_cli.checkpoints import load_model
from pmod_cli.data.collator import Collator
from pmod_cli.errors import PmodError
from pmod_cli.training import folder
from pmod_cli.training.arguments import processes, training_arguments
from pmod_cli.training.calibration import calibrate_routers
from pmod_cli.training.dataset import Counting, SyntheticDocuments
from pmod_cli.training.parts import Part, count, freeze
from pmod_cli.training.settings import Settings
from pmod_cli.training.start import source_of, starting_checkpoint
from pmod_cli.training.trainer import PmodTrainer
from pmod_cli.training.watch import Step, Watch

CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    Attributes:
        path: the run folder; once finished, a checkpoint, or a LoRA run's adapter that waits to be merged.
        status: finished; interrupted, and can go on; or already finished, nothing was done.
        step: optimizer steps done, of ``max_steps``, in this and earlier processes.
        loss: mean training loss of the last logged steps.
        seconds: wall time of this process' training.
        tokens: text and vision tokens trained on, without padding.
        parameters: of each part, how many there are and how many were trained.
    """

    path: Path
    status: Literal["finished", "interrupted", "already finished"]
    step: int
    max_steps: int
    loss: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    parameters: dict[str, Part] = field(default_factory=dict)


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
    source_of(settings)
    rows = SyntheticDocuments(settings.data, synthetic_rows(settings))
    steps = settings.steps(len(rows), processes())
    arguments = training_arguments(settings, out, device, steps)
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            folder.open_run(out, settings, processes(), resume=resume, overwrite=overwrite)
        source = starting_checkpoint(settings, out / folder.STATE / folder.START)
    if folder.is_checkpoint(out) or folder.adapter_of(out):
        return FinetuneReport(out, "already finished", steps, steps)

    checkpoint = get_last_checkpoint(str(out / folder.STATE))
    model, processor = load_model(
        Path(checkpoint or source), dtype="float32", attn_implementation=settings.model.attention
    )
    if settings.model.router_start == "attention" and getattr(model.config, "router_state", None) == "untrained":
        model.to(device)
        calibrate_routers(model, calibration_batches(rows, processor, settings.model.calibration_images, device))
    freeze(model, settings.model.freeze)
    if hasattr(model, "set_selection"):
        model.set_selection(settings.pmod.selection, seed=settings.train.seed)
    if hasattr(model.config, "router_state"):
        model.config.router_state = "trained"
    watch = Watch(on_step)
    trainer = PmodTrainer(
        train=settings.train,
        watch=watch,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=Counting(Collator(processor), processor, model.config.image_token_id),
    )
    started = perf_counter()
    with watch.signals():
        trainer.train(resume_from_checkpoint=checkpoint)
    finished = trainer.state.global_step >= steps
    if finished and trainer.is_world_process_zero():
        publish(model.to(_dtype_of(source)), processor, trainer.state.log_history, out)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return FinetuneReport(
        path=out,
        status="finished" if finished else "interrupted",
        step=trainer.state.global_step,
        max_steps=steps,
        loss=losses[-1] if losses else None,
        seconds=perf_counter() - started,
        tokens=trainer.state.num_input_tokens_seen,
        parameters=count(model),
    )


def synthetic_rows(settings: Settings) -> int:
    """Different images of the run: as many as it was told, else as it uses."""
    if settings.data.rows is None and settings.train.max_steps is None:
        raise PmodError("synthetic documents have no end: expected train.max_steps or data.rows", hint="--max-steps 9")
    return settings.data.rows or settings.train.max_steps * settings.rows_per_step(processes())


def calibration_batches(
    rows: SyntheticDocuments, processor: ProcessorMixin, images: int, device: str
) -> Iterator[dict[str, torch.Tensor]]:
    """The first ``images`` rows in small batches of model inputs, since eager attention is large."""
    collate, total = Collator(processor), min(images, len(rows))
    for start in range(0, total, CALIBRATION_BATCH):
        batch = collate([rows[i] for i in range(start, min(start + CALIBRATION_BATCH, total))])
        yield {name: batch[name].to(device) for name in ("input_ids", "pixel_values", "image_sizes") if name in batch}


def publish(model: PreTrainedModel, processor: ProcessorMixin, log: list[dict], out: Path) -> None:
    """Put the checkpoint into the run folder."""
    with folder.publishing(out) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        (staging / folder.LOG).write_text("".join(json.dumps(line) + "\n" for line in log))
    folder.close_run(out)


def _dtype_of(source: Path) -> torch.dtype:
    """The dtype the source is stored in: the run is stored in the same."""
    return AutoConfig.from_pretrained(source).dtype or torch.float32
