"""What a run costs: its settings as `profiling` counts them, its disk, and changes that make it fit its devices."""

import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from pmod_cli.core.errors import PmodError
from pmod_cli.core.paths import expanded
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.count.training import TrainingSetup, training_flops
from pmod_cli.profiling.count.workload import Routed, Row, Workload
from pmod_cli.profiling.measure.devices import Device, parse_memory
from pmod_cli.training.parts import PartCount
from pmod_cli.training.run_settings import Settings


def setup_of(settings: Settings, processes: int, on_gpu: bool) -> TrainingSetup:
    """How a run trains, as far as its cost depends on it."""
    return TrainingSetup(
        precision=settings.dtype_on("cuda" if on_gpu else "cpu"),
        checkpointing=settings.model.gradient_checkpointing,
        frozen=frozenset(settings.model.freeze),
        frozen_dtype=_frozen_dtype(settings, on_gpu),
        lora_rank=settings.lora.rank if settings.lora.enabled else None,
        lora_targets=tuple(settings.lora.targets),
        distilled=settings.train.loss == "distill",
        answers_only=True,
        accumulation=settings.accumulation(processes),
        engine="ddp" if settings.train.engine == "auto" else settings.train.engine,
        devices=processes,
    )


def _frozen_dtype(settings: Settings, on_gpu: bool) -> str:
    if settings.model.quantize != "none":
        return settings.model.quantize
    return settings.dtype_on("cuda" if on_gpu else "cpu") if settings.lora.enabled else "float32"


def row_of(sizes: Sizes, vision_tokens: float, tokens: float) -> Row:
    """A row of one image with ``vision_tokens``, and as much text as makes ``tokens`` in all.

    Where the tower reads tiles, as many as give so many tokens in a large image.
    """
    image, vision = Workload().rows(sizes)[0].images[0], min(round(vision_tokens), round(tokens))
    if not sizes.family.tiled:  # a line of so many cells, so that the tower reads what has tokens
        side = sizes.tower.cell
        line = replace(image, width=side * vision, height=side, base=vision, patches_per_tile=vision)
        return Row((line,), round(tokens) - vision)
    base, tiles = min(image.base, vision), -(-image.tiles * vision // image.tokens)
    return Row((replace(image, tiles=tiles, high_resolution=vision - base, base=base),), round(tokens) - vision)


def run_flops(settings: Settings, config: PretrainedConfig, rows: int, tokens: int, vision_tokens: float) -> float:
    """FLOPs of the forward and backward passes of a run, from the mean of its rows.

    What checkpointing repeats is not counted, since the model does not need it.

    Args:
        config: of its model, stock or p-MoD.
        rows: seen in the run.
        tokens: in all of them, without padding.
        vision_tokens: of these, those of images.
    """
    sizes = Sizes.of(config)
    setup = replace(setup_of(settings, 1, False), accumulation=1, checkpointing=False)
    row = row_of(sizes, vision_tokens / rows, tokens / rows)
    routed = Routed.of(config) if hasattr(config, "retention") else None
    return float(training_flops(sizes, [row], setup, routed).step) * rows


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


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes. Logs and tokenizer files are left out: they are small.

    Attributes:
        checkpoint: one training checkpoint: weights and AdamW's two moments, or those of the adapters alone.
        result: the weights that the run leaves in the end.
        peak: at most at once: a new checkpoint is whole before the oldest goes, and the result before the last does.
        free: where the run folder will be; None where the run is planned for another machine.
    """

    checkpoint: int
    result: int
    peak: int
    free: int | None

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where that is not known."""
        return None if self.free is None else self.peak <= self.free


def disk_of(
    settings: Settings, parameters: dict[str, PartCount], config: PretrainedConfig, steps: int, out: Path | None
) -> Disk:
    """The disk that a run needs.

    Args:
        parameters: of each part of its model.
        config: of the model that it starts from; the result keeps its dtype.
        steps: optimizer steps of the run.
        out: the run folder, or one above it; None where that is on another machine.
    """
    whole = sum(part.parameters for part in parameters.values())
    trained = sum(part.trained for part in parameters.values())
    lora = settings.lora.enabled
    checkpoint = 4 * ((trained if lora else whole) + 2 * trained)  # bytes of float32: weights, two moments
    stored = 2 if str(config.dtype).endswith("16") else 4  # the result has the dtype of the source
    result = 4 * trained if lora else 0
    result += 0 if lora and not settings.lora.merge else whole * stored
    saves = -(-steps // settings.train.save_steps)
    kept = min(settings.train.keep_checkpoints, saves)
    peak = max(min(kept + 1, saves) * checkpoint, kept * checkpoint + result)
    free = None
    if out is not None:
        absolute = expanded(out).absolute()
        free = shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free
    return Disk(checkpoint, result, peak, free)


SHARING = "fsdp2"  # shares weights, gradients and optimizer states, and needs no package beside torch
MOST_DEVICES = 64


@dataclass(frozen=True)
class Remedy:
    """A change after which the run fits.

    Attributes:
        settings: dotted keys and their new values.
        processes: devices that share the run.
        memory: bytes on one device at the peak.
    """

    settings: dict[str, Any]
    processes: int
    memory: int


def remedies(
    settings: Settings, processes: int, memory: Callable[[Settings, int], int], room: float, on_gpu: bool
) -> list[Remedy]:
    """Each single change that is enough, or where none is, the first of several together.

    Args:
        memory: bytes on one device at the peak of a run of these settings on so many devices.
        room: bytes that a device has.
        on_gpu: whether the devices are GPUs; elsewhere weights cannot be held in 4 bits.
    """

    def tried(changes: dict[str, Any], devices: int) -> Remedy | None:
        changed = _changed(settings, changes)
        if changed is None or not _deals_evenly(changed, devices):
            return None
        needed = memory(changed, devices)
        return Remedy(changes, devices, needed) if needed <= room else None

    def first(candidates: Iterator[tuple[dict[str, Any], int]]) -> Remedy | None:
        return next((found for changes, devices in candidates if (found := tried(changes, devices))), None)

    checkpointing = {} if settings.model.gradient_checkpointing else {"model.gradient_checkpointing": True}
    adapters = {} if settings.lora.enabled else {"lora.enabled": True}
    four_bits = {**adapters, "model.quantize": "nf4"} if on_gpu and settings.model.quantize == "none" else {}
    single = [
        first((changes, processes) for changes in _smaller_batches(settings)),
        checkpointing and tried(checkpointing, processes),
        first(({"train.engine": SHARING}, devices) for devices in _device_counts(processes)),
        adapters and tried(adapters, processes),
        four_bits and tried(four_bits, processes),
    ]
    if found := [remedy for remedy in single if remedy]:
        return found
    smallest = list(_smaller_batches(settings))[-1:] or [{}]
    together = checkpointing | smallest[0]
    combined = [
        tried(together, processes),
        adapters and tried(together | adapters, processes),
        first((together | {"train.engine": SHARING}, devices) for devices in _device_counts(processes)),
        four_bits and tried(together | four_bits, processes),
    ]
    return [remedy for remedy in combined if remedy]


def _smaller_batches(settings: Settings) -> Iterator[dict[str, Any]]:
    """Half the batch, a quarter and so on; an optimizer step sees as many rows as before."""
    before, factor = settings.train.batch_size, 2
    while before >= factor:
        if before % factor == 0:
            changes: dict[str, Any] = {"train.batch_size": before // factor}
            if settings.train.global_batch_size is None:
                changes["train.gradient_accumulation"] = settings.train.gradient_accumulation * factor
            yield changes
        factor *= 2


def _device_counts(processes: int) -> Iterator[int]:
    devices = max(processes, 2)
    while devices <= max(MOST_DEVICES, processes):
        yield devices
        devices *= 2


def _changed(settings: Settings, changes: dict[str, Any]) -> Settings | None:
    """The settings with the changes; None where these contradict the others, or change nothing."""
    changed = deepcopy(settings)
    for key, value in changes.items():
        group, name = key.split(".")
        setattr(getattr(changed, group), name, value)
    return None if changed.conflicts() else changed


def _deals_evenly(settings: Settings, processes: int) -> bool:
    try:
        settings.accumulation(processes)
    except ValueError:
        return False
    return True
