"""The settings of a run in the terms that `profiling` counts its cost in."""

import os
from dataclasses import replace

import torch
from transformers import PretrainedConfig

from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.count.training import TrainingSetup, training_flops
from pmod_cli.profiling.count.workload import Row, Workload
from pmod_cli.profiling.measure.devices import Device, parse_memory
from pmod_cli.training.arguments import precision
from pmod_cli.training.settings import Settings


def setup_of(settings: Settings, processes: int, on_gpu: bool) -> TrainingSetup:
    """How a run trains, as far as its cost depends on it."""
    return TrainingSetup(
        precision=precision(settings, "cuda" if on_gpu else "cpu"),
        checkpointing=settings.model.gradient_checkpointing,
        frozen=frozenset(settings.model.freeze),
        frozen_dtype=_frozen_dtype(settings, on_gpu),
        lora_rank=settings.lora.rank if settings.lora.enabled else None,
        lora_targets=tuple(settings.lora.targets),
        accumulation=settings.accumulation(processes),
        engine="ddp" if settings.train.engine == "auto" else settings.train.engine,
        devices=processes,
    )


def _frozen_dtype(settings: Settings, on_gpu: bool) -> str:
    if settings.model.quantize != "none":
        return settings.model.quantize
    return precision(settings, "cuda" if on_gpu else "cpu") if settings.lora.enabled else "float32"


def row_of(sizes: Sizes, vision_tokens: float, tokens: float) -> Row:
    """A row of one image with ``vision_tokens``, and as much text as makes ``tokens`` in all."""
    image, vision = Workload().rows(sizes)[0].images[0], min(round(vision_tokens), round(tokens))
    base = min(image.base, vision)
    return Row((replace(image, high_resolution=vision - base, base=base),), round(tokens) - vision)


def run_flops(settings: Settings, config: PretrainedConfig, rows: int, tokens: int, vision_tokens: float) -> float:
    """FLOPs of the forward and backward passes of a run, from the mean of its rows; nothing for what checkpointing
    repeats, since the model does not need it.

    Args:
        settings: of the run.
        config: of its model, stock or p-MoD.
        rows: seen in the run.
        tokens: in all of them, without padding.
        vision_tokens: of these, those of images.
    """
    sizes = Sizes.of(config)
    setup = replace(setup_of(settings, 1, False), accumulation=1, checkpointing=False)
    routed = getattr(config, "retention", None)
    target = config.settings.target_tokens if routed else "vision_all"
    row = row_of(sizes, vision_tokens / rows, tokens / rows)
    routers = config.has_router if routed else None
    return float(training_flops(sizes, [row], setup, routed, target, routers=routers).step) * rows


def this_device(device: str) -> Device:
    """What there is: a GPU with the peak its maker states, where that is known, or the CPU and its memory."""
    if device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        try:
            known = parse_memory(properties.name.lower().replace("nvidia", "").strip())
            return Device(properties.name, properties.total_memory, known.flops, known.bandwidth, known.source)
        except PmodError:
            return Device(properties.name, properties.total_memory, 0, 0, "this machine")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory, 0, 0, "this machine")
