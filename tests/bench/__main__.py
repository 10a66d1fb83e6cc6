"""Times p-MoD against the stock model on the same weights, and fails where a ratio passes its bound.

    python -m tests.bench                       # what `make bench` runs: 8 layers, 2 rounds
    python -m tests.bench --layers 32           # the numbers of docs/results.md
    python -m tests.bench --only decode,train   # rows whose names begin so

Random weights, 2,928 + 58 tokens, one thread, CPU time (GPU: CUDA events), both models in turn; a ratio is the median
over rounds of p-MoD's time over the stock model's. Vision tokens, text and heads are LLaVA-NeXT's; width, depth and
vocabulary are small, in the 7B's proportions. Bounds: docs/design.md, "Speed". In brackets behind a method, not in its
ratio: what ranking takes.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from pmod_cli.model import METHODS
from pmod_cli.profiling.comparison import Profile, profile
from pmod_cli.profiling.count.workload import Workload
from pmod_cli.profiling.latency_report import predicted_cache
from pmod_cli.profiling.measure.clock import interleaved, peak_bytes, threads
from pmod_cli.profiling.measure.latency import bytes_read, cache_bytes, phase_flops
from pmod_cli.profiling.measure.phases import (
    CHECKPOINTED,
    DECODE,
    PMOD,
    PREFILL,
    STOCK,
    TRAIN,
    ModelPair,
    PhaseBench,
    prompt,
    random_pair,
)
from pmod_cli.profiling.subject import load_subject, scaled
from tests.bench.methods import BOUNDS, overheads
from tests.bench.start import start_ratio

UNEQUAL = ((672, 672), (336, 336), (672, 336), (336, 1008))


@dataclass(frozen=True)
class Row:
    """One line of the table: a measured ratio, p-MoD over stock, and what it must not pass.

    Args:
        limit: What FLOPs or bytes allow; None where nothing is counted.
        bound: The ratio at which the guard fails.
        at_least: The bound is a floor.
    """

    name: str
    ratio: float
    bound: float
    limit: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.ratio >= self.bound if self.at_least else self.ratio <= self.bound

    def __str__(self) -> str:
        limit = "-" if self.limit is None else f"{self.limit:.4f}"
        beyond = "-" if self.limit is None else f"{self.ratio / self.limit:.3f}"
        sign = ">=" if self.at_least else "<="
        return f"{self.name:34}{self.ratio:8.4f}{limit:>9}{beyond:>9}  {sign} {self.bound:.4f}  {self.verdict}"

    @property
    def verdict(self) -> str:
        return "ok" if self.holds else "FAILED"


class Batch(PhaseBench):
    """A workload and the models that run it."""

    def __init__(self, pair: ModelPair, subject, workload: Workload, device: str):
        self.counted: Profile = profile(subject, workload, dtype=str(pair.stock.dtype).removeprefix("torch."))
        stock, self.device = pair.stock, device
        inputs = prompt(stock.config, self.counted.rows, device=device, dtype=stock.dtype)
        super().__init__(pair, inputs, workload.new_tokens)

    def flop_limit(self, phase: str) -> float:
        """FLOP ratio of what the kernels compute: the causal half of attention, or with padding its full square."""
        which = 0 if self.prompt.attention_mask is not None and phase == PREFILL else 1
        return self._count(phase, PMOD)[which] / self._count(phase, STOCK)[which]

    def byte_limit(self) -> float:
        read = {name: bytes_read(self.counted, self.pair, name, self.steps) for name in (STOCK, PMOD)}
        return read[PMOD] / read[STOCK]

    def time_ratio(self, phase: str, rounds: int) -> float:
        """Median over rounds. A batch of one row also runs once to warm up; larger batches come after it."""
        calls = {name: self.call(phase, name) for name in (STOCK, PMOD)}
        timings = interleaved(calls, device=self.device, warmup=int(self.counted.stock.batch == 1), repeats=rounds)
        return timings[PMOD].ratio(timings[STOCK])

    def _count(self, phase: str, name: str) -> tuple[int, int]:
        return phase_flops(self.counted, phase, name, self.steps)


class RepeatedRows(Batch):
    """A batch whose cache is one row's, repeated: decoding does not care, and 16 prefills are saved."""

    def filled_cache(self, name: str):
        rows = len(self.prompt.input_ids)
        single = PhaseBench(self.pair, self.one_row, self.steps)
        cache = single.filled_cache(name)
        cache.batch_repeat_interleave(rows)
        return cache

    @cached_property
    def one_row(self):
        return prompt(self.pair.stock.config, self.counted.rows[:1], device=self.device, dtype=self.pair.stock.dtype)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Each row as it is measured."""
    batch = batches(options.hidden_size, options.layers, options)
    rounds = options.rounds

    def wanted(name: str) -> bool:
        return any(name.startswith(start) for start in options.only.split(","))

    one, four = batch(), batch(batch_size=4)
    if wanted("prefill b1"):
        limit = one.flop_limit(PREFILL)
        yield Row("prefill b1", one.time_ratio(PREFILL, rounds), 1.05 * limit, limit)
    if wanted("prefill b4"):
        limit = four.flop_limit(PREFILL)
        yield Row("prefill b4", four.time_ratio(PREFILL, rounds), 1.07 * limit, limit)
    if wanted("prefill b4 unequal"):
        unequal = batch(image_sizes=UNEQUAL)
        limit = unequal.flop_limit(PREFILL)
        yield Row("prefill b4 unequal, padded", unequal.time_ratio(PREFILL, rounds), 1.07 * limit, limit)
    for number, kind in ((1, Batch), (16, RepeatedRows)):
        if wanted(f"decode b{number}"):
            decoding = batch(kind, batch_size=number)
            limit = decoding.byte_limit()
            ratio = decoding.time_ratio(DECODE, rounds)
            yield Row(f"decode b{number}", ratio, min(1.0, 1.05 * limit), limit)
    for phase in (TRAIN, CHECKPOINTED):
        if wanted(phase):
            limit = one.flop_limit(phase)
            yield Row(f"{phase} b1", one.time_ratio(phase, rounds), 1.07 * limit, limit)
    if any(f"method {name}".startswith(start) for name in METHODS for start in options.only.split(",")):
        for found in overheads(one, one.counted.rows, rounds, options.device, lambda name: wanted(f"method {name}")):
            name = f"method {found.method} {found.share} (+{found.ranking:.4f})"
            yield Row(name, found.ratio, BOUNDS[found.share] * found.limit, found.limit)
    if wanted("memory"):
        yield from memory(batches(64, 32, options), options.device)
    if wanted("start"):
        yield Row("start to first token", start_ratio(rounds), 1.1)


def batches(hidden_size: int, layers: int, options: argparse.Namespace) -> Callable[..., Batch]:
    """Makes batches for one pair of models of random weights: keywords are those of `Workload`."""
    subject = scaled(load_subject("llava-next-7b"), hidden_size=hidden_size, layers=layers)
    for config in (subject.stock, subject.pmod):  # a vocabulary of the 7B's proportion to its width
        config.text_config.vocab_size, config.image_token_id = 8 * hidden_size, 8 * hidden_size - 1
    pair = random_pair(subject, device=options.device, dtype=options.dtype, attention="sdpa")

    def batch(kind: type[Batch] = Batch, **workload) -> Batch:
        return kind(pair, subject, Workload(new_tokens=16, **workload), options.device)

    return batch


def memory(batch: Callable[..., Batch], device: str) -> Iterator[Row]:
    """What a prefill holds beyond the weights. Bytes are counted, so that a narrow model of all layers tells enough."""
    one = batch()
    held = {name: cache_bytes(one.filled_cache(name)) for name in (STOCK, PMOD)}
    pmod, stock = predicted_cache(one.counted)
    yield Row("memory: KV cache", held[PMOD] / held[STOCK], pmod / stock, pmod / stock)

    def peak(name: str, rows: int) -> int:
        filled = batch(batch_size=rows)
        _ = filled.embeds  # made by the vision tower, which is not what is weighed
        return peak_bytes(filled.call(PREFILL, name), device)

    yield Row("memory: peak of a prefill", peak(PMOD, 1) / peak(STOCK, 1), 1.0)
    room, most = peak(STOCK, 4), 8
    while peak(PMOD, most) > room:
        most -= 1
    yield Row("memory: largest batch", most / 4, 1.6, at_least=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose names begin so, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"{'p-MoD over stock':34}{'ratio':>8}{'limit':>9}{'/ limit':>9}  bound")
    failed = False
    with threads(1):
        for row in rows(options):
            print(row, flush=True)
            failed |= not row.holds
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
