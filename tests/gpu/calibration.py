"""The step `calibrate`: a search at the shape of LLaVA-NeXT-7B, its time and what it holds beside the weights."""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForImageTextToText, LlavaNextImageProcessorPil, LlavaNextProcessor

from pmod_cli.calibration import calibration
from pmod_cli.calibration.calibration import CalibrationSettings
from pmod_cli.checkpoints import bundled_path, load_processor
from pmod_cli.core.memory import MIB, PeakMemory
from pmod_cli.core.text import GIB
from tests.gpu.machine import Machine
from tests.gpu.rows import Row, emit
from tests.gpu.speed import NEXT

BUDGET = 0.54
SAMPLES, TOY_SAMPLES = 64, 8
SIDE = 336  # pixels of a tile


def calibrate(machine: Machine) -> None:
    """`pmod calibrate` with 64 pictures and one budget, on random weights: the same work as on trained ones."""
    subject = machine.subject(NEXT)
    processor = _processor()
    config = subject.stock
    config.image_token_id = config.image_token_index = processor.image_token_id
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    with torch.device(machine.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, machine.dtype)).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    machine.clear()
    memory, begin = PeakMemory(machine.device), time.monotonic()
    settings = CalibrationSettings(samples=TOY_SAMPLES if machine.cpu else SAMPLES, budgets=(BUDGET,), data="doc")
    (result,) = calibration.calibrate(
        model, processor, subject.sizes, settings, note=lambda line: print(line, flush=True)
    )
    seconds, peak = time.monotonic() - begin, (memory.mib() or 0) * MIB
    note = f"{settings.samples} pictures, KL {result.judged[0].divergence:.2g} of random weights"
    emit(Row("calibrate, one budget", seconds, "s", goal=600.0, note=note))
    note = f"{peak / GIB:.1f} GiB held at most, weights {weights / GIB:.1f} GiB"
    # On a CPU the process's own memory is all that is known, with Python and libraries many times such weights.
    emit(Row("calibrate, peak over the weights", None if machine.cpu else peak / weights, goal=1.3, note=note))


def _processor() -> LlavaNextProcessor:
    """The bundled model's tokenizer and template, with tiles as LLaVA-NeXT cuts them."""
    small = load_processor(bundled_path("tiny-llava-next"))
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
    )
    return LlavaNextProcessor(
        images,
        small.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=small.chat_template,
    )
