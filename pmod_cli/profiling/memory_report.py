"""Predicted memory as tables and as JSON: inference, what fits a GPU, and training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.table import Table

from pmod_cli.core.text import GIB, KIB, MIB, percent
from pmod_cli.profiling.comparison import Profile
from pmod_cli.profiling.count.memory import RESERVE, Fit, InferenceMemory, fit, inference_memory
from pmod_cli.profiling.count.training import TrainingMemory, TrainingSetup, training_memory
from pmod_cli.profiling.count.workload import Routed
from pmod_cli.profiling.measure.devices import DEVICES, Device
from pmod_cli.reporting import plain_table

_UNITS = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
USUAL_GPUS = ("rtx-4090", "a100-40gb", "h100")
# Ways to train, by `pmod finetune`: the paper's engines, and adapters. Tower frozen, bfloat16 by autocast.
_TRAINED = partial(TrainingSetup, precision="bfloat16", answers_only=True)
_LOW = partial(_TRAINED, checkpointing=True)
USUAL = {
    "all weights": _TRAINED(),
    "all weights, checkpointing": _LOW(),
    "the same, ZeRO-1 on 8 GPUs": _LOW(engine="zero1", devices=8),
    "the same, ZeRO-3 or FSDP2 on 8 GPUs": _LOW(engine="zero3", devices=8),
    "LoRA rank 128, checkpointing": _LOW(lora_rank=128, frozen_dtype="bfloat16"),
    "QLoRA rank 128, checkpointing": _LOW(lora_rank=128, frozen_dtype="nf4"),
}


@dataclass(frozen=True)
class Memory:
    """All that is predicted; every pair is stock, p-MoD.

    Args:
        inference: Of the workload.
        fits: What fits each GPU.
        training: By way to train, of the workload as one device's batch.
    """

    inference: tuple[InferenceMemory, InferenceMemory]
    fits: list[tuple[Device, Fit, Fit]]
    training: dict[str, tuple[TrainingMemory, TrainingMemory]]


def predict(result: Profile, gpus: list[Device] | None = None) -> Memory:
    """Predict the memory of a profiled workload.

    Args:
        gpus: GPUs to fill; some usual ones if None.
    """
    sizes, rows, dtype, new = result.sizes, result.rows, result.dtype, result.workload.new_tokens

    def held(routed: Routed | None) -> InferenceMemory:
        return inference_memory(sizes, rows, dtype, new_tokens=new, routed=routed)

    def filled(device: Device, routed: Routed | None) -> Fit:
        return fit(sizes, result.longest, dtype, device.memory, new_tokens=new, routed=routed)

    def trained(setup: TrainingSetup, routed: Routed | None) -> TrainingMemory:
        return training_memory(sizes, rows, setup, routed)

    devices = gpus or [DEVICES[name] for name in USUAL_GPUS]
    return Memory(
        inference=(held(None), held(result.routed)),
        fits=[(device, filled(device, None), filled(device, result.routed)) for device in devices],
        training={name: (trained(setup, None), trained(setup, result.routed)) for name, setup in USUAL.items()},
    )


def tables(result: Profile, memory: Memory) -> list[Table]:
    """Inference, what fits, and training."""
    kinds = {"weights": "weights", "KV cache": "cache", "work space": "work", "peak": "total"}
    used = _sizes_table(
        f"Inference, {{}} in {result.dtype}",
        "part",
        {name: tuple(getattr(each, kind) for each in memory.inference) for name, kind in kinds.items()},
    )
    fits = plain_table("What fits", "GPU", "GiB", "batch: stock", "p-MoD", "context: stock", "p-MoD")
    for device, *both in memory.fits:
        batches = [str(each.batch) if each.batch else "none" for each in both]
        contexts = [f"{each.context:,}{'*' if each.limited_by == 'context' else ''}" for each in both]
        fits.add_row(device.name, f"{device.memory / GIB:.0f}", *batches, *contexts)
    trained = _sizes_table(
        "Training step, peak {} of one GPU",
        "way",
        {name: tuple(step.total for step in steps) for name, steps in memory.training.items()},
    )
    return [used, fits, trained]


def _sizes_table(title: str, heading: str, sizes: dict[str, tuple[int, ...]]) -> Table:
    """Bytes of stock and p-MoD by name, all in GiB unless one of them would then be 0.0."""
    smallest = min((size for pair in sizes.values() for size in pair if size), default=GIB)
    unit, name = next(((unit, name) for unit, name in _UNITS if smallest >= 0.05 * unit), _UNITS[-1])
    table = plain_table(title.format(name), heading, "stock", "p-MoD", "of stock")
    for label, (stock, pmod) in sizes.items():
        cells = (f"{stock / unit:,.2f}", f"{pmod / unit:,.2f}", f"{percent(pmod, stock):.1f} %")
        table.add_row(label, *cells, style="bold" if label == "peak" else None)
    return table


NOTES = [
    f"batch: rows of this prompt in the GPU's memory less {RESERVE // GIB} GiB for CUDA and fragmentation; "
    "context: tokens of one row with this image and as much text as fits (*: the model's context ends first)",
    "training: this workload as one GPU's batch; AdamW, trained weights in float32, forward and backward in bfloat16, "
    "vision tower frozen, fused attention",
]


def to_json(memory: Memory) -> dict[str, Any]:
    """The prediction, bytes in the keys."""
    names = ("stock", "pmod")

    def in_bytes(part: InferenceMemory | TrainingMemory) -> dict[str, int]:
        return {**{f"{key}_bytes": value for key, value in asdict(part).items()}, "peak_bytes": part.total}

    return {
        "inference": dict(zip(names, map(in_bytes, memory.inference), strict=True)),
        "reserve_bytes": RESERVE,
        "fits": [
            {"gpu": device.name, "memory_bytes": device.memory, "source": device.source}
            | {
                name: {"batch_rows": each.batch, "context_tokens": each.context, "limited_by": each.limited_by}
                for name, each in zip(names, both, strict=True)
            }
            for device, *both in memory.fits
        ],
        "training": {
            name: dict(zip(names, map(in_bytes, both), strict=True)) for name, both in memory.training.items()
        },
    }


def rows(memory: Memory) -> list[dict[str, Any]]:
    """One row for each GPU and model."""
    return [
        {
            "gpu": device.name,
            "memory_bytes": device.memory,
            "model": name,
            "batch_rows": each.batch,
            "context_tokens": each.context,
            "limited_by": each.limited_by,
        }
        for device, *both in memory.fits
        for name, each in zip(("stock", "p-mod"), both, strict=True)
    ]
