"""The step `kernels`: where the time goes beyond the limit, by kind of kernel; and what was left out.

Kinds are read from the names of kernels (on a CPU: of operators).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from pmod_cli.profiling.measure.phases import DECODE, PMOD, PREFILL, STOCK
from tests.gpu.machine import Machine
from tests.gpu.rows import Row, emit
from tests.gpu.speed import NEXT, TOKENS

KINDS = (
    ("attention", ("flash", "attention", "fmha", "cudnn")),
    ("sort", ("sort", "topk", "radix")),
    ("gather", ("gather", "index_select", "embedding")),
    ("scatter", ("scatter",)),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "aten::mm", "addmm", "matmul", "bmm", "splitk", "gemv")),
    ("norms", ("rsqrt", "mean", "reduce", "pow", "norm")),
    ("copies", ("copy", "cat", "memcpy", "memset", "fill", "clone")),
    ("elementwise", ("elementwise", "mul", "add", "silu", "tanh", "neg", "sub", "where", "vectorized")),
)
REPEATS = 3


def kernels(machine: Machine) -> None:
    """Milliseconds a call by kind, p-MoD's and stock's; then single questions that a profile raises."""
    subject = machine.subject(NEXT)
    pair = machine.pair(subject)
    for phase, per, new in ((PREFILL, 1, 0), (DECODE, TOKENS, TOKENS)):
        batch = machine.batch(pair, subject, 1, new)
        limit = batch.byte_limit() if phase == DECODE else batch.flop_limit(phase)
        spent = {name: _by_kind(machine, call, per) for name, call in machine.both(batch, phase).items()}
        beyond = {kind: spent[PMOD][kind][0] - limit * spent[STOCK][kind][0] for kind in (*spent[PMOD], *spent[STOCK])}
        for kind in sorted(beyond, key=beyond.get, reverse=True):
            (ours, launches), (stock, stocks) = spent[PMOD][kind], spent[STOCK][kind]
            note = f"p-MoD {ours:.3f} ms, {launches:.0f} launches; stock {stock:.3f} ms, {stocks:.0f} launches"
            emit(Row(f"{phase}: {kind}, beyond the limit", beyond[kind], "ms", note=note))
        machine.clear()
    _ranking(machine)
    _scaled_scatter(machine)


def _by_kind(machine: Machine, call: Callable[[], object], per: int) -> dict[str, tuple[float, float]]:
    """(milliseconds, launches) of one unit, by kind."""
    activities = [ProfilerActivity.CPU] if machine.cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    call()
    with profile(activities=activities) as seen:
        for _ in range(REPEATS):
            call()
    found: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in seen.key_averages():
        spent = event.self_cpu_time_total if machine.cpu else event.self_device_time_total
        if spent <= 0 or (not machine.cpu and event.device_type == torch.autograd.DeviceType.CPU):
            continue
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS if any(word in name for word in words)), "other")
        before = found[kind]
        found[kind] = before[0] + spent / 1000 / REPEATS / per, before[1] + event.count / REPEATS / per
    return found


def _ranking(machine: Machine) -> None:
    """A stable sort of all tokens, as it is, beside `topk` of the vision tokens, which promises no order of ties."""
    length, vision, kept = (300, 240, 40) if machine.cpu else (2986, 2928, 439)
    scores = torch.randn(1, length, device=machine.device)
    text = torch.arange(length - vision, device=machine.device)[None]

    def sort() -> torch.Tensor:
        return scores.argsort(dim=1, descending=True, stable=True)[:, : length - vision + kept].sort(dim=1).values

    def top() -> torch.Tensor:
        index = scores[:, length - vision :].topk(kept, sorted=False).indices + (length - vision)
        return torch.cat([text, index], dim=1).sort(dim=1).values

    _compare(machine, "ranking: topk of V over sort of N", sort, top)


def _scaled_scatter(machine: Machine) -> None:
    """Scaling all tokens and scattering the kept ones, as it is, beside the same compiled into one kernel."""
    length, kept, width = (300, 100, 64) if machine.cpu else (2986, 1400, 4096)
    dtype = getattr(torch, machine.dtype)
    states, scale = (torch.randn(1, length, size, device=machine.device, dtype=dtype) for size in (width, 1))
    part = torch.randn(1, kept, width, device=machine.device, dtype=dtype)
    index = torch.randperm(length, device=machine.device)[:kept].sort().values[None, :, None].expand(-1, -1, width)

    def merged() -> torch.Tensor:
        return (states * scale).scatter_(1, index, part)

    compiled = merged if machine.cpu else torch.compile(merged, fullgraph=True)
    _compare(machine, "scale and scatter: compiled over eager", merged, compiled)


def _compare(machine: Machine, name: str, now: Callable[[], object], other: Callable[[], object]) -> None:
    with torch.inference_mode():
        calls = {key: _many(call) for key, call in (("now", now), ("other", other))}
        timings = machine.time(calls, per=20)
    seconds = {key: timing.median() for key, timing in timings.items()}
    samples = {key: [sample.seconds / timing.per for sample in timing.samples] for key, timing in timings.items()}
    note = "not compiled on a CPU" if machine.cpu and "compiled" in name else ""
    emit(Row(name, timings["other"].ratio(timings["now"]), seconds=seconds, samples=samples, note=note))


def _many(call: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(20):
            call()

    return repeated
