"""Time and memory of calls: CPU seconds and wall seconds, CUDA events on a GPU, peak bytes of the tensors held."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.profiler import profile


@dataclass(frozen=True)
class Sample:
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

    samples: list[Sample]
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


def timed(call: Callable[[], object], device: str) -> Sample:
    """Run `call` once."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    if not on_gpu:
        return Sample(time.process_time() - cpu, time.perf_counter() - wall)
    end.record()
    torch.cuda.synchronize(device)
    return Sample(time.process_time() - cpu, time.perf_counter() - wall, begin.elapsed_time(end) / 1000)


def interleaved(
    calls: dict[str, Callable[[], object]], *, device: str, warmup: int, repeats: int, per: int = 1
) -> dict[str, Timing]:
    """Time calls in turn, in every second round in reverse, so that each meets the same machine.

    Args:
        calls: By name.
        device: Where they run.
        warmup: Untimed rounds at first.
        repeats: Timed rounds.
        per: Units of work in a call.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
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
