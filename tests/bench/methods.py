"""What each method takes beyond its own FLOP count at 54 % and at 15 %, and apart from it what ranking takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import METHODS, PmodSettings
from pmod_cli.profiling.budgets import solve
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.workload import Routed
from pmod_cli.profiling.measure.clock import interleaved
from pmod_cli.profiling.measure.phases import PMOD, PREFILL, STOCK, PhaseBench

BOUNDS = {0.54: 1.05, 0.15: 1.10}
CAUSAL = 0.5  # of the square of attention, which a causal kernel computes


@dataclass(frozen=True)
class Overhead:
    """One method at one budget.

    Attributes:
        ratio: Prefill time over the stock model's, without what ranking takes.
        limit: The same of FLOPs as the kernels compute them.
        ranking: What ranking takes, over the stock model's prefill.
    """

    method: str
    share: float
    ratio: float
    limit: float
    ranking: float


def overheads(bench: PhaseBench, rows, rounds: int, device: str, wanted: Callable[[str], bool]) -> Iterator[Overhead]:
    """The wanted methods that reach a budget. Not what ranks in the vision tower: a prefill starts behind it."""
    model, sizes = bench.pair.pmod, Sizes.of(bench.pair.pmod.config)
    for share in BOUNDS:
        for method in METHODS:
            if METHODS[method].in_tower or METHODS[method].routers or not wanted(method):
                continue
            try:
                settings = solve(method, share, sizes, rows)
            except PmodError:
                continue
            model.set_method(settings.to_dict())
            calls = {name: bench.call(PREFILL, name) for name in (STOCK, PMOD)}
            timings = interleaved(calls, device=device, warmup=1, repeats=rounds)
            with ranking(model) as spent:
                started = time.process_time()
                calls[PMOD]()
                whole = time.process_time() - started
            ratio, part = timings[PMOD].ratio(timings[STOCK]), sum(spent) / whole
            limit = kernel_flops(sizes, rows, settings) / formulas.prefill(sizes, rows, attention=CAUSAL).layers
            yield Overhead(method, share, ratio * (1 - part), limit, ratio * part)


def kernel_flops(sizes: Sizes, rows, settings: PmodSettings) -> float:
    """FLOPs of the layers without ranking; queries with a mask of their own compute all of the rectangle."""
    routed = Routed.by(settings, sizes.decoder.layers)
    counted = formulas.prefill(sizes, rows, routed, attention=CAUSAL)
    flops = counted.layers - counted.selector
    if routed.keep_keys:
        thinned = Routed([ratio for ratio in routed.retention if ratio < 1], keep_keys=True)
        flops += (1 - CAUSAL) * formulas.prefill(sizes, rows, thinned).attention_products
    return flops


@contextmanager
def ranking(model) -> Iterator[list[float]]:
    """CPU seconds of each choice inside the block."""
    kind, spent = type(model.model.language_model.selection), []
    stock = kind.scores

    def scores(*arguments):
        started = time.process_time()
        try:
            return stock(*arguments)
        finally:
            spent.append(time.process_time() - started)

    kind.scores = scores
    try:
        yield spent
    finally:
        kind.scores = stock
