"""The step `memory`: what is held and what the card takes."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from pmod_cli.core.errors import PmodError
from pmod_cli.core.text import GIB
from pmod_cli.profiling.latency_report import predicted_cache
from pmod_cli.profiling.measure.clock import peak_bytes
from pmod_cli.profiling.measure.latency import cache_bytes
from pmod_cli.profiling.measure.phases import PMOD, PREFILL, STOCK
from tests.bench.__main__ import Batch
from tests.gpu.machine import Machine
from tests.gpu.rows import Row, emit
from tests.gpu.speed import NEXT

TOY_CARD = 4  # rows of the stock model that a toy card holds


def memory(machine: Machine) -> None:
    """KV cache held against counted, peak of a prefill, and the largest batch that can be prefilled."""
    subject = machine.subject(NEXT)
    pair = machine.pair(subject)
    one = machine.batch(pair, subject, 1)
    counted = dict(zip((PMOD, STOCK), predicted_cache(one.counted), strict=True))
    for name in (STOCK, PMOD):
        held = cache_bytes(one.filled_cache(name))
        if held != counted[name]:
            raise PmodError(f"KV cache of {name}: {held} bytes are held, and {counted[name]} were counted")
        emit(Row(f"KV cache, {name}: held over counted", held / counted[name], goal=1.0, note=f"{held / GIB:.3f} GiB"))
    machine.clear()
    peaks = {name: peak_bytes(one.call(PREFILL, name), machine.device) for name in (STOCK, PMOD)}
    note = ", ".join(f"{name} {peak / GIB:.2f} GiB" for name, peak in peaks.items())
    emit(Row("peak of a prefill beyond the weights, b1", peaks[PMOD] / peaks[STOCK], goal=1.0, note=note))
    machine.clear()
    largest = {name: _largest(machine, one, name, peaks) for name in (STOCK, PMOD)}
    note = ", ".join(f"{name} {rows}" for name, rows in largest.items())
    emit(Row("largest batch", largest[PMOD] / largest[STOCK], "x", goal=1.7, at_least=True, note=note))


def _largest(machine: Machine, one: Batch, name: str, peaks: dict[str, int]) -> int:
    """Most rows of which a prefill and its cache fit. On a CPU a card is counted that holds `TOY_CARD` stock rows."""
    if machine.cpu:
        room = _peak(machine, one, STOCK, TOY_CARD)
        rows = int(room / peaks[name])
        while _peak(machine, one, name, rows) <= room:
            rows += 1
        while _peak(machine, one, name, rows) > room:
            rows -= 1
        return rows
    low, high = 0, 2 * int(torch.cuda.mem_get_info()[0] / peaks[name])  # of a few rows, so it is no limit
    while high - low > max(1, high // 50):  # a prefill of a full card takes seconds: to two in a hundred
        rows = (low + high) // 2
        low, high = (rows, high) if _fits(machine, one, name, rows) else (low, rows)
    return low


def _peak(machine: Machine, one: Batch, name: str, rows: int) -> int:
    return peak_bytes(lambda: _prefill(one, name, rows), machine.device)


def _fits(machine: Machine, one: Batch, name: str, rows: int) -> bool:
    try:
        _prefill(one, name, rows)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        machine.clear()
    return True


@torch.inference_mode()
def _prefill(one: Batch, name: str, rows: int) -> DynamicCache:
    """A prefill of one row's embeddings, many times over."""
    cache = DynamicCache()
    vision = {} if name == STOCK else {"vision_mask": one.prompt.vision_mask.expand(rows, -1)}
    model = one.pair[name]
    model(
        inputs_embeds=one.embeds.expand(rows, -1, -1), past_key_values=cache, use_cache=True, logits_to_keep=1, **vision
    )
    return cache
