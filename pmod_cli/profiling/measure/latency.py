"""Time and memory of real runs: stock, p-MoD and controls in turn, beside what their FLOPs and bytes allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.core.text import GIB
from pmod_cli.model import SELECTIONS
from pmod_cli.profiling.comparison import Profile, profile
from pmod_cli.profiling.count.formulas import prefill
from pmod_cli.profiling.count.memory import DTYPE_BYTES, bytes_per_token
from pmod_cli.profiling.count.trace import meta_model
from pmod_cli.profiling.count.workload import Workload, ranking
from pmod_cli.profiling.measure.clock import Timing, interleaved, peak_bytes, shares_of_time, threads, timed
from pmod_cli.profiling.measure.devices import Device, named_device
from pmod_cli.profiling.measure.phases import (
    CHECKPOINTED,
    DECODE,
    FIRST_TOKEN,
    NAMES,
    PMOD,
    PREFILL,
    STOCK,
    TRAIN,
    ModelPair,
    PhaseBench,
    loaded_pair,
    prompt,
    random_pair,
)
from pmod_cli.profiling.subject import Subject

DEFAULT_STEPS = 16  # decoded tokens of a call, where the workload names none


@dataclass(frozen=True)
class LatencySettings:
    """How it is measured.

    Args:
        device: A torch device.
        dtype: Of weights and cache; auto is the checkpoint's own, and for random weights bfloat16 on a GPU and float32
            on a CPU.
        attention: Attention implementation.
        phases: Some of `phases.PHASES`.
        names: `p-mod`, and selections to run beside it on the same weights; the stock model always runs.
        warmup: Untimed rounds.
        repeats: Timed rounds.
        threads: CPU threads of torch; None leaves them as they are.
        memory: Also measure the peak memory of each phase, in a run of its own.
        gpu: Name of the device whose peaks the times are compared with; None measures those of `device`.
    """

    device: str = "cpu"
    dtype: str = "auto"
    attention: str = "sdpa"
    phases: Sequence[str] = (PREFILL, FIRST_TOKEN, DECODE)
    names: Sequence[str] = NAMES
    warmup: int = 1
    repeats: int = 5
    threads: int | None = None
    memory: bool = True
    gpu: str | None = None


@dataclass(frozen=True)
class PhaseResult:
    """One phase of all models. Every dict has one entry a model, the stock model's first.

    Args:
        phase: One of `phases.PHASES`.
        timings: Times; of a decoded token in the phase `decode`.
        flops: FLOPs of what is timed, attention over the full rectangle.
        causal_flops: The same with half of it, as a causal kernel computes; equal to `flops` while decoding.
        bytes_read: Weights and cache that one decoded token reads; empty in other phases.
        peaks: Peak bytes of tensors beyond the weights and the inputs; empty if not measured.
    """

    phase: str
    timings: dict[str, Timing]
    flops: dict[str, int]
    causal_flops: dict[str, int]
    bytes_read: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def ratio(self, name: str, clock: str = "seconds") -> float:
        """Time of a model over that of the stock model, median of the rounds."""
        return self.timings[name].ratio(self.timings[STOCK], clock)

    def limit(self, name: str) -> float:
        """The ratio that the counts allow: of bytes while decoding, of FLOPs otherwise."""
        counts = self.bytes_read or self.flops
        return counts[name] / counts[STOCK]

    def causal_limit(self, name: str) -> float:
        """As `limit`, of a kernel that computes no hidden half of the attention products."""
        counts = self.bytes_read or self.causal_flops
        return counts[name] / counts[STOCK]


@dataclass(frozen=True)
class Latency:
    """All that was measured.

    Args:
        settings: How.
        device: The device's peaks.
        num_threads: CPU threads that torch used.
        attention: Attention implementation.
        dtype: Of weights and cache.
        steps: Decoded tokens of one call.
        phases: One entry per phase.
        cache_bytes: Held by the cache after a prefill, by model.
        parts: Share of the time to first token by part of the model, by model; empty without that phase.
    """

    settings: LatencySettings
    device: Device
    num_threads: int
    attention: str
    dtype: str
    steps: int
    phases: list[PhaseResult]
    cache_bytes: dict[str, int]
    parts: dict[str, dict[str, float]]


def measure_latency(
    subject: Subject,
    workload: Workload,
    folder: Path | None,
    settings: LatencySettings,
    on_phase: Callable[[str], None] | None = None,
) -> tuple[Profile, Latency]:
    """Count a batch and run it.

    Args:
        folder: Checkpoint with the weights, stock or p-MoD. None: random weights of the subject's shape.
        on_phase: Is told of each phase before it begins.

    Raises:
        PmodError: the device is not there or too small for the weights, or an attention implementation is unknown.
    """
    peaks = named_device(settings.gpu) if settings.gpu else None
    on_gpu = settings.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise PmodError(f"there is no device {settings.device} on this machine", hint="`device=cpu`")
    dtype = settings.dtype
    if folder is None:
        dtype = ("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype
        _check_memory(subject, dtype, settings.device)
    how = {"device": settings.device, "attention": settings.attention}
    with threads(settings.threads) as num_threads:
        try:
            if folder is None:
                pair = random_pair(subject, dtype=dtype, **how)
            else:
                pair = loaded_pair(subject, folder, dtype=dtype, **how)
        except (ValueError, ImportError) as error:
            raise PmodError(f"{subject.name}: {first_line(error)}", hint="`attention=sdpa`") from error
        model = pair.stock
        result = profile(subject, workload, dtype=str(model.dtype).removeprefix("torch."))
        known = dict.fromkeys((*NAMES, *SELECTIONS))
        names = [STOCK, *(name for name in known if name in settings.names and name != STOCK)]
        inputs = prompt(model.config, result.rows, device=settings.device, dtype=model.dtype)
        bench = PhaseBench(pair, inputs, workload.new_tokens or DEFAULT_STEPS)
        caches = {name: cache_bytes(bench.filled_cache(name)) for name in names}
        phases, parts = [], {}
        for phase in settings.phases:
            if on_phase is not None:
                on_phase(phase)
            phases.append(_measure_phase(phase, bench, result, names, settings))
            if phase == FIRST_TOKEN:
                calls = {name: bench.call(phase, name) for name in names}
                parts = {name: shares_of_time(pair[name], call, settings.device) for name, call in calls.items()}
        device = peaks or measured_device(settings.device, model.dtype)
    return result, Latency(
        settings=settings,
        device=device,
        num_threads=num_threads,
        attention=model.config._attn_implementation,
        dtype=result.dtype,
        steps=bench.steps,
        phases=phases,
        cache_bytes=caches,
        parts=parts,
    )


def _check_memory(subject: Subject, dtype: str, device: str) -> None:
    """Random weights fit before they are made: a machine that runs full stops more than this program."""
    needed = sum(parameter.numel() for parameter in meta_model(subject.pmod).parameters()) * DTYPE_BYTES[dtype]
    if device.startswith("cuda"):
        there = torch.cuda.mem_get_info(device)[0]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * there:
        raise PmodError(
            f"random weights of {subject.name} in {dtype} take {needed / GIB:.1f} GiB, and {device} has "
            f"{there / GIB:.1f}",
            hint="make the model narrower: `hidden_size=512`",
        )


def _measure_phase(
    phase: str, bench: PhaseBench, result: Profile, names: list[str], settings: LatencySettings
) -> PhaseResult:
    calls = {name: bench.call(phase, name) for name in names}
    timings = interleaved(
        calls,
        device=settings.device,
        warmup=settings.warmup,
        repeats=settings.repeats,
        per=bench.steps if phase == DECODE else 1,
    )
    # Decoding frees what was there before, so that a difference would say nothing; its memory is the cache's.
    weighed = calls if settings.memory and phase != DECODE else {}
    peaks = {name: peak_bytes(call, settings.device) for name, call in weighed.items()}
    counted = {name: phase_flops(result, phase, name, bench.steps) for name in names}
    return PhaseResult(
        phase=phase,
        timings=timings,
        flops={name: full for name, (full, _) in counted.items()},
        causal_flops={name: causal for name, (_, causal) in counted.items()},
        bytes_read={name: bytes_read(result, bench.pair, name, bench.steps) for name in names}
        if phase == DECODE
        else {},
        peaks=peaks,
    )


def phase_flops(result: Profile, phase: str, name: str, steps: int) -> tuple[int, int]:
    """FLOPs of one timed unit: with attention over the full rectangle, and with half of it."""
    cost = result.stock if name == STOCK else result.pmod
    half, other = cost.attention_products // 2, _other_ranking(result, name)
    if phase == DECODE:
        flops = sum(cost.decode(step) for step in range(1, steps + 1)) // steps
        return flops, flops
    if phase in (PREFILL, FIRST_TOKEN):  # lm_head on the last position only, as in `generate`
        flops = result.total(cost, "generate") - (result.vision.total if phase == PREFILL else 0) + other
        return flops, flops - half
    flops = result.training(checkpointing=phase == CHECKPOINTED)[name != STOCK].step + other
    passes = {TRAIN: 3, CHECKPOINTED: 4}[phase]  # forward, two products backward, forward again
    return flops, flops - passes * half


def _other_ranking(result: Profile, name: str) -> int:
    """FLOPs that a control ranks the tokens of a prefill with, less those of the selection in whose place it stands."""
    if name in (STOCK, PMOD):
        return 0
    routed = replace(result.routed, cost=ranking(result.subject.pmod.settings.method, name))
    return prefill(result.sizes, result.rows, routed).selector - result.pmod.selector


def bytes_read(result: Profile, pair: ModelPair, name: str, steps: int) -> int:
    """Bytes that one decode step must read: decoder weights, lm_head and the cache, half of the new tokens in it."""
    model = pair[name]
    decoder = model.model.language_model
    weights = sum(p.nbytes for part in (decoder.layers, decoder.norm, model.lm_head) for p in part.parameters())
    held = result.stock if name == STOCK else result.pmod
    token = bytes_per_token(result.sizes.decoder, result.dtype)
    keys = sum(layer.cached + (steps + 1) / 2 for layer in held.layers)
    return weights + round(held.batch * keys * token)


def cache_bytes(cache: Any) -> int:
    """Bytes that the K and V of a cache keep in memory: of their storages, so that hidden copies would show."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    }
    return sum(storages.values())


def peak_share(phase: PhaseResult, name: str, device: Device) -> tuple[float | None, float | None]:
    """Share of the device's arithmetic and of its memory bandwidth that was reached; None where a peak is unknown.

    The arithmetic that was really done counts: the causal half of the attention products.
    """
    seconds = phase.timings[name].median("wall" if phase.timings[name].samples[0].device is None else "seconds")
    compute = phase.causal_flops[name] / seconds / device.flops if device.flops else None
    moved = phase.bytes_read.get(name)
    return compute, moved / seconds / device.bandwidth if moved and device.bandwidth else None


def measured_device(device: str, dtype: torch.dtype) -> Device:
    """Peaks of the device at hand: a large matrix product and a large copy, the best of several."""
    on_gpu = device.startswith("cuda")
    side, length = (8192, 2**28) if on_gpu else (1024, 2**24)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(length, device=device) for _ in range(2))

    def best(call: Callable[[], object]) -> float:
        samples = [timed(call, device) for _ in range(5)]
        return min(sample.wall if sample.device is None else sample.device for sample in samples)

    flops = 2 * side**3 / best(lambda: torch.mm(a, b))
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    name = torch.cuda.get_device_name(device) if on_gpu else "this CPU"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else 0
    return Device(name, memory, flops, bandwidth, "measured here: a matrix product and a copy")
