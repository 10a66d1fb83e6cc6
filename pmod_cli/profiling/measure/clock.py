"""Time and memory of calls: CPU seconds and wall seconds, CUDA events on a GPU, peak bytes of the tensors held.

`shares_of_time` splits the time of one forward by part of the model.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.profiler import profile
from transformers import PreTrainedModel

REST = "norms, routing, residuals"  # what no part has a module for


@dataclass(frozen=True)
class TimedCall:
    """One timed call, in seconds.

    Args:
        cpu: CPU time of this process, all its threads.
        wall: From start to end, the device's work included.
        device: Between two CUDA events; None without a GPU.
    """

    cpu: float
    wall: float
    device: float | None = None

    @property
    def seconds(self) -> float:
        """What ratios are made of: the device's time on a GPU, else CPU time, which neighbours disturb least."""
        return self.cpu if self.device is None else self.device


@dataclass(frozen=True)
class Timing:
    """Samples of one call.

    Args:
        samples: In the order of the rounds.
        per: Units of work in a call, such as decoded tokens; times are given for one.
    """

    samples: list[TimedCall]
    per: int = 1

    def median(self, clock: str = "seconds") -> float:
        """Median time of one unit, by `seconds`, `cpu` or `wall`."""
        return statistics.median(getattr(sample, clock) for sample in self.samples) / self.per

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 for a single sample."""
        times = [sample.seconds for sample in self.samples]
        if len(times) < 2:
            return 0.0
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return (high - low) / 2 / statistics.median(times)

    def ratio(self, other: Timing, clock: str = "seconds") -> float:
        """Median of the ratios within each round: what drifts over minutes drops out."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in pairs) * other.per / self.per


def timed(call: Callable[[], object], device: str) -> TimedCall:
    """Run `call` once."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if not on_gpu:
        return TimedCall(time.process_time() - cpu, time.perf_counter() - wall)
    end.record()
    torch.cuda.synchronize(device)
    return TimedCall(time.process_time() - cpu, time.perf_counter() - wall, begin.elapsed_time(end) / 1000)


def interleaved(
    calls: dict[str, Callable[[], object]], *, device: str, warmup: int, repeats: int, per: int = 1
) -> dict[str, Timing]:
    """Time calls in turn, in every second round in reverse, so that each meets the same machine.

    Args:
        warmup: Untimed rounds at first.
        per: Units of work in a call.
    """
    samples: dict[str, list[TimedCall]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()  # a collection would hit one of them at random
    try:
        for number in range(-warmup, repeats):
            for name in calls if number % 2 == 0 else reversed(calls):
                sample = timed(calls[name], device)
                if number >= 0:
                    samples[name].append(sample)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(taken, per) for name, taken in samples.items()}


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes of tensors that were held at once during `call`, beyond those held before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler greets on stderr
    with profile(profile_memory=True) as seen:
        call()
    changes = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held, default=0)


@contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Torch on `number` threads meanwhile; None leaves it as it is. Yields how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def shares_of_time(model: PreTrainedModel, call: Callable[[], object], device: str) -> dict[str, float]:
    """Share of the time of one forward in each part of the model, from hooks around its modules; they add up to 1.

    Args:
        model: The model that `call` runs.
        call: One forward. It runs once.
        device: Where it runs. On a GPU each hook waits for it, so the shares hold, but not the times.
    """
    on_gpu = device.startswith("cuda")

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    spent: dict[str, float] = defaultdict(float)
    started: list[float] = []

    def watch(module: nn.Module, part: str) -> list:
        def enter(*_: object) -> None:
            started.append(now())

        def leave(*_: object) -> None:
            spent[part] += now() - started.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    hooks = []
    for part, modules in _parts(model).items():
        for module in modules:
            hooks += watch(module, part)
    try:
        begin = now()
        call()
        whole = now() - begin
    finally:
        for hook in hooks:
            hook.remove()
    shares = {part: seconds / whole for part, seconds in spent.items()}
    return {**shares, REST: 1 - sum(shares.values())}


def _parts(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    """Modules that do not lie in one another, by part."""
    layers = model.model.language_model.layers
    if hasattr(model.model, "visual"):  # of a Qwen-VL, which holds its mergers
        seen = {"vision tower": [model.model.visual]}
    else:
        seen = {"vision tower": [model.model.vision_tower], "projector": [model.model.multi_modal_projector]}
    return {
        **seen,
        "attention": [layer.self_attn for layer in layers],
        "MLP": [layer.mlp for layer in layers],
        "router": [layer.router for layer in layers if getattr(layer, "router", None) is not None],
        "lm_head": [model.lm_head],
    }
