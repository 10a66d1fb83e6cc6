"""Predicted memory as tables and as JSON: inference, what fits a GPU, and training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from pmod_cli.core.text import GIB, percent
from pmod_cli.profiling.count.memory import RESERVE, Fit, InferenceMemory, fit, inference_memory
from pmod_cli.profiling.count.training import TrainingMemory, TrainingSetup, training_memory
from pmod_cli.profiling.measure.devices import DEVICES, Device
from pmod_cli.profiling.report import Profile
from pmod_cli.reporting import plain_table

USUAL_GPUS = ("rtx-4090", "a100-40gb", "h100")
# Ways to train: the paper's engines, and adapters. Tower frozen, bfloat16 by autocast.
_LOW = {"precision": "bfloat16", "checkpointing": True}
USUAL = {
    "all weights": TrainingSetup(precision="bfloat16"),
    "all weights, checkpointing": TrainingSetup(**_LOW),
    "the same, ZeRO-1 on 8 GPUs": TrainingSetup(**_LOW, engine="zero1", devices=8),
    "the same, ZeRO-3 or FSDP2 on 8 GPUs": TrainingSetup(**_LOW, engine="zero3", devices=8),
    "LoRA rank 128, checkpointing": TrainingSetup(**_LOW, lora_rank=128, frozen_dtype="bfloat16"),
    "QLoRA rank 128, checkpointing": TrainingSetup(**_LOW, lora_rank=128, frozen_dtype="nf4"),
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
    both, new = (None, result.routed), result.workload.new_tokens
    common = (result.sizes, result.longest, result.dtype)
    devices = gpus or [DEVICES[name] for name in USUAL_GPUS]
    return Memory(
        inference=tuple(
            inference_memory(result.sizes, result.rows, result.dtype, new_tokens=new, routed=which) for which in both
        ),
        fits=[
            (device, *(fit(*common, device.memory, new_tokens=new, routed=which) for which in both))
            for device in devices
        ],
        training={
            name: tuple(training_memory(result.sizes, result.rows, setup, which) for which in both)
            for name, setup in USUAL.items()
        },
    )


def tables(result: Profile, memory: Memory) -> list[Table]:
    """Inference, what fits, and training."""
    stock, pmod = memory.inference
    used = plain_table(f"Inference, GiB in {result.dtype}", "part", "stock", "p-MoD", "of stock")
    for name, kind in (("weights", "weights"), ("KV cache", "cache"), ("work space", "work"), ("peak", "total")):
        used.add_row(name, *_pair(getattr(stock, kind), getattr(pmod, kind)), style="bold" if kind == "total" else None)
    fits = plain_table("What fits", "GPU", "GiB", "batch: stock", "p-MoD", "context: stock", "p-MoD")
    for device, *both in memory.fits:
        batches = [str(each.batch) if each.batch else "none" for each in both]
        contexts = [f"{each.context:,}{'*' if each.limited_by == 'context' else ''}" for each in both]
        fits.add_row(device.name, f"{device.memory / GIB:.0f}", *batches, *contexts)
    trained = plain_table("Training step, peak GiB of one GPU", "way", "stock", "p-MoD", "of stock")
    for name, (stock_step, pmod_step) in memory.training.items():
        trained.add_row(name, *_pair(stock_step.total, pmod_step.total))
    return [used, fits, trained]


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


def _pair(stock: int, pmod: int) -> list[str]:
    return [f"{stock / GIB:.2f}", f"{pmod / GIB:.2f}", f"{percent(pmod, stock):.1f} %"]


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
