"""One fine-tuning run, from settings to a checkpoint. What it leaves where: see ``folder``."""

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import get_last_checkpoint, set_seed

from pmod_cli.checkpoints import load_model, load_processor, stored_dtype
from pmod_cli.checkpoints.tokenizer_files import carry_model_file
from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.data.dataset import Rows
from pmod_cli.families.configs import context_of, vision_token_ids
from pmod_cli.training import folder
from pmod_cli.training.adapters import add_adapters, copy_adapter, fold
from pmod_cli.training.calibration import STARTS
from pmod_cli.training.parts import count, freeze, repeat_in_backward, use_liger
from pmod_cli.training.preflight import check_requirements, check_settings
from pmod_cli.training.resume import hold_rows, hold_source, set_damaged_aside
from pmod_cli.training.run_data import Counting, Data, beyond_context, open_data
from pmod_cli.training.run_settings import Settings, processes
from pmod_cli.training.start import hold_routing, source_of, starting_checkpoint
from pmod_cli.training.summary import FinetuneReport, Summary, write_reports
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Step, Watch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

CALIBRATION_BATCH = 8


def finetune(
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    overwrite: bool = False,
    on_open: Callable[[], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> FinetuneReport:
    """Train a p-MoD model, or a stock LLaVA, and leave a checkpoint in ``out``.

    An unfinished run in ``out`` goes on where it stopped. Ctrl-C or SIGTERM saves after the step under way. In a run of
    several processes each of them calls this.

    Args:
        settings: the whole run; ``model.name`` must be given.
        device: cpu, cuda, cuda:N or mps.
        resume: go on with what is in ``out``; otherwise ``out`` must be new.
        overwrite: replace an earlier run in ``out`` when this one is whole. Until then it is in the folder that
            ``core.folders.staging_of(out)`` names, and goes on from there when it is repeated.
        on_open: is told, in the first process, when ``out`` has been taken for the run: nothing is refused any more
            for its settings.
        on_note: is told, in the first process, what a run that goes on has to know about where it goes on from, and
            that rows are longer than the decoder was made for.
        on_step: is told of each finished step.

    Raises:
        PmodError: ``out`` holds something else, or a run with other settings; a run cannot go on, since none of its
            training checkpoints is whole or its adapters belong to other weights; something is missing that the
            settings need; the loss is not a number; memory or disk is full.
    """
    check_requirements(settings, device, "LOCAL_RANK" in os.environ)
    check_settings(settings, processes())
    source_of(settings)
    with folder.RunFolder(out, overwrite=overwrite) as opened:
        return _run(settings, opened, device, resume, on_open, on_step, on_note or (lambda note: None))


def _run(
    settings: Settings,
    opened: folder.RunFolder,
    device: str,
    resume: bool,
    on_open: Callable[[], None] | None,
    on_step: Callable[[Step], None] | None,
    on_note: Callable[[str], None],
) -> FinetuneReport:
    out = opened.path
    arguments = training_arguments(settings, out, device)
    arguments.run_name = opened.out.name
    _ = arguments.device  # joins the other processes
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            opened.open(settings, processes(), resume=resume)
            if on_open is not None:
                on_open()
            if not folder.is_finished(out, settings):
                for note in (*set_damaged_aside(out / folder.STATE), hold_source(settings, out / folder.STATE)):
                    if note is not None:
                        on_note(note)
        source = starting_checkpoint(settings, out / folder.STATE / folder.START)
        data = open_data(settings, load_processor(source), out)
        if PartialState().is_main_process and not folder.is_finished(out, settings):
            note = hold_rows(len(data.rows), out / folder.STATE)
            if note is not None:
                on_note(note)
    arguments.max_steps = steps = settings.steps(data.rows_per_epoch, processes())
    done = folder.is_finished(out, settings)
    if done or (settings.lora.enabled and folder.adapter_of(out) is not None):
        if PartialState().is_main_process:
            if not done:
                fold(out)  # it was left apart, or the process died before it was merged
            folder.close_run(out)  # the start of a run that has nothing to do
            opened.put_in_place()
        PartialState().wait_for_everyone()
        return FinetuneReport(opened.out, "already finished", steps, steps)

    checkpoint = get_last_checkpoint(str(out / folder.STATE))
    set_seed(settings.train.seed)  # of new adapters
    model = _model(settings, source, checkpoint and Path(checkpoint), data, device)
    watch = Watch(on_step)
    trainer = PmodTrainer(
        train=settings.train,
        watch=watch,
        sampler=data.sampler,
        logs_to=out / folder.TENSORBOARD if settings.train.report_to == "tensorboard" else None,
        model=model,
        args=arguments,
        train_dataset=data.rows,
        data_collator=Counting(data.collate, data.processor, vision_token_ids(model.config)),
    )
    note = beyond_context(data.longest, context_of(model.config))
    if note is not None:
        on_note(note)
    parameters = count(model)
    try:
        with watch.signals():
            trainer.train_rest(checkpoint)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        raise _out_of_memory(error, settings) or error from None
    state = trainer.state
    finished = state.global_step >= steps
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    report = FinetuneReport(
        path=opened.out,
        status="finished" if finished else "interrupted",
        step=state.global_step,
        max_steps=steps,
        loss=losses[-1] if losses else None,
        seconds=watch.elapsed(),
        tokens=state.num_input_tokens_seen,
        parameters=parameters,
        summary=Summary.of(
            settings,
            model.config,
            state,
            settings.rows_read(state.global_step, data.rows_per_epoch, processes()),
            watch.elapsed(),
            device,
        ),
        rows=data.rows.counts() if isinstance(data.rows, Rows) else {},
    )
    if finished and trainer.is_world_process_zero():
        del trainer, model
        publish(settings, source, data, out, report, state)
        opened.put_in_place()
    PartialState().wait_for_everyone()
    return report


def _model(settings: Settings, source: Path, checkpoint: Path | None, data: Data, device: str) -> PreTrainedModel:
    """The model as it goes into the Trainer: loaded, its routers started, frozen where it is to be."""
    lora, quantized = settings.lora.enabled, settings.model.quantize != "none"
    # Frozen weights of a LoRA run are held as they are computed with; weights that are trained are float32.
    dtype = settings.dtype_on(device) if lora else "float32"
    options = {"quantization": four_bits()} if quantized else {}
    model, _ = load_model(
        source if lora or checkpoint is None else checkpoint,
        dtype=dtype,
        attn_implementation=settings.model.attention,
        **options,
    )
    untrained = getattr(model.config, "router_state", None) == "untrained" and checkpoint is None
    if settings.model.router_start != "zero" and untrained:
        if not quantized:
            model.to(device)
        STARTS[settings.model.router_start](model, calibration_batches(data, settings.model.calibration_images, device))
    hold_routing(model.config, settings)
    if hasattr(model, "set_selection"):
        model.set_selection(model.config.settings.selection, seed=settings.train.seed)
    if settings.model.liger_kernel:
        use_liger(model)
    if lora:
        model = add_adapters(model, settings, checkpoint)
    else:
        freeze(model, settings.model.freeze)
    if settings.model.gradient_checkpointing:
        repeat_in_backward(model, settings.model.freeze)
    return model


def four_bits() -> "BitsAndBytesConfig":
    """QLoRA's 4-bit numbers for the decoder's matrices. The rest is small, or read by the router: it stays as it is."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        # Each is the beginning of a module's name, or its end.
        llm_int8_skip_modules=[
            *("model.multi_modal_projector", "model.vision_tower", "model.visual"),
            "lm_head",
            "router",
        ],
    )


def calibration_batches(data: Data, images: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """The first ``images`` rows with images or videos, in small batches of model inputs: eager attention is large.

    Raises:
        PmodError: no row has any.
    """
    lengths = data.rows.lengths if isinstance(data.rows, Rows) else None  # synthetic documents are all pictures
    pictured = (row for row in range(len(data.rows)) if lengths is None or lengths[row] > 0)
    chosen = list(islice(pictured, images))
    if not chosen:
        raise PmodError(
            f"none of the {len(data.rows)} rows has an image for `model.router_start` to look at",
            hint="name rows with images, or set `model.router_start=zero`",
        )
    for start in range(0, len(chosen), CALIBRATION_BATCH):
        batch = data.collate([data.rows[row] for row in chosen[start : start + CALIBRATION_BATCH]])
        yield {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}


def publish(
    settings: Settings, source: Path, data: Data, out: Path, report: FinetuneReport, state: TrainerState
) -> None:
    """Make the run folder the checkpoint that the run was for, from its last training checkpoint.

    All engines leave that one in the same form, and a process that dies here is repeated from it.
    """
    last = Path(get_last_checkpoint(str(out / folder.STATE)))
    with folder.publishing(out) as staging:
        write_reports(staging, settings, report, state)
        if settings.lora.enabled:
            copy_adapter(last, staging / folder.ADAPTER)
        else:
            model, _ = load_model(last, dtype=stored_dtype(source))
            model.save_pretrained(staging)
            data.processor.save_pretrained(staging)
            carry_model_file(source, staging)
    if settings.lora.enabled and settings.lora.merge:
        fold(out)
    folder.close_run(out)


def _out_of_memory(error: BaseException, settings: Settings) -> PmodError | None:
    """What to lower, if this is what happened."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in text:
        return None
    train, model, lower = settings.train, settings.model, []
    if train.batch_size > 1:
        lower.append(f"`train.batch_size={train.batch_size // 2}` (and twice the train.gradient_accumulation)")
    if not model.gradient_checkpointing:
        lower.append("`model.gradient_checkpointing=true`, which goes on from the last training checkpoint")
    if not settings.lora.enabled:
        lower.append("`lora.enabled=true`")
    if settings.data.max_length is None or settings.data.max_length > 1024:
        lower.append("a lower data.max_length")
    said = (text.splitlines() or ["the allocation failed"])[0]
    return PmodError(
        f"out of memory with train.batch_size {train.batch_size}: {said}",
        hint="any of: " + "; ".join(lower) + ". `dry_run` estimates what fits" if lower else "a larger device",
        code=RUN_FAILED,
    )
