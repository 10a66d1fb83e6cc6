"""What would make a run fit into the memory of its devices: tried out on the formulas, the smallest change first."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from pmod_cli.training.settings import Settings

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
        settings: of the run that does not fit.
        processes: devices that share it.
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
        first(({"train.engine": SHARING}, devices) for devices in _fleets(processes)),
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
        first((together | {"train.engine": SHARING}, devices) for devices in _fleets(processes)),
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


def _fleets(processes: int) -> Iterator[int]:
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
