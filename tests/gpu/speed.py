"""Steps that time p-MoD beside stock on the same weights: prefill, decode and training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from pmod_cli.profiling.count.training import TrainingSetup, training_flops
from pmod_cli.profiling.measure.phases import (
    CHECKPOINTED,
    DECODE,
    PMOD,
    PREFILL,
    STOCK,
    ModelPair,
    forward_and_backward,
)
from tests.bench.__main__ import Batch, RepeatedRows
from tests.gpu.machine import Machine
from tests.gpu.rows import Row, emit, faster_row, timed_row

NEXT, LLAVA = "llava-next-7b", "llava-1.5-7b"
PAIR = {"stock": STOCK, "pmod": PMOD}
TOKENS = 16  # decoded in one timed call
RANK = 64
TARGETS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def prefill(machine: Machine) -> None:
    """From merged embeddings to the logits of the last position."""
    for alias, batches, beyond in ((NEXT, (1, 4), 1.08), (LLAVA, (1, 16), 1.08)):
        subject = machine.subject(alias)
        pair = machine.pair(subject)
        for rows in batches:
            batch = machine.batch(pair, subject, rows)
            timings = machine.time(machine.both(batch, PREFILL))
            row = timed_row(f"{alias} b{rows}", timings, **PAIR, limit=batch.flop_limit(PREFILL), beyond=beyond)
            emit(row)
            emit(faster_row(row, 1.7 if alias == NEXT else None))
            machine.clear()
        del pair
        machine.clear()


def decode(machine: Machine) -> None:
    """One token of every row, as transformers runs it and as one replayed CUDA graph over a static cache."""
    for alias, batches in ((NEXT, (1, 16)), (LLAVA, (64,))):  # 64 rows of NeXT's stock cache are more than a card has
        subject = machine.subject(alias)
        pair = machine.pair(subject)
        for rows in batches:
            batch = machine.batch(pair, subject, rows, TOKENS, RepeatedRows if rows > 1 else Batch)
            limit = batch.byte_limit()
            beyond = 1.05 if rows >= 16 else 1 / limit
            timings = machine.time(machine.both(batch, DECODE), per=TOKENS)
            emit(timed_row(f"{alias} b{rows}, eager", timings, **PAIR, limit=limit, beyond=beyond))
            machine.clear()
            loops = {name: _graphed(machine, pair[name], batch, name) for name in (STOCK, PMOD)}
            timings = machine.time(loops, per=TOKENS)
            how = "static cache, no graph on a CPU" if machine.cpu else "CUDA graph"
            emit(timed_row(f"{alias} b{rows}, graph", timings, **PAIR, limit=limit, beyond=beyond, note=how))
            del loops, batch
            machine.clear()
        del pair
        machine.clear()


@torch.inference_mode()
def _graphed(machine: Machine, model: PreTrainedModel, batch: Batch, name: str) -> Callable[[], None]:
    """`TOKENS` steps over a static cache, which begin at the end of the prompt each time."""
    held = batch.filled_cache(name)
    length = batch.prompt.input_ids.shape[1]
    cache = _as_static(held, model, length + TOKENS + 8)
    del held
    ids = torch.full((len(batch.prompt.input_ids), 1), 5, device=machine.device)
    marks = [layer.cumulative_length.clone() for layer in cache.layers]

    def rewind() -> None:
        for layer, mark in zip(cache.layers, marks, strict=True):
            layer.cumulative_length.copy_(mark)

    def step() -> Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits

    replay = step
    if not machine.cpu:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay

    @torch.inference_mode()
    def loop() -> None:
        rewind()
        for _ in range(TOKENS):
            replay()

    loop.reads = (ids, model)  # a graph reads addresses: what lay there would be freed with this frame
    return loop


def _as_static(held, model: PreTrainedModel, room: int) -> StaticCache:
    """A static cache that holds what a dynamic one does: each layer its own tokens, and as much room behind them."""
    from pmod_cli.model.cache import RoutedDynamicLayer, RoutedStaticLayer

    cache = StaticCache(config=model.config.text_config, max_cache_len=room)
    for index, source in enumerate(held.layers):
        if isinstance(source, RoutedDynamicLayer):
            layer = cache.layers[index] = RoutedStaticLayer(max_cache_len=room)
            layer.expect(None, source.skipped)
        cache.layers[index].update(source.keys, source.values)
        source.keys = source.values = None
    return cache


def train(machine: Machine) -> None:
    """Forward and backward with gradient checkpointing: LoRA, and all weights but the tower's, without an optimizer."""
    subject = machine.subject(NEXT)
    pair = machine.pair(subject)
    batch = machine.batch(pair, subject, 1)
    row = timed_row(
        "all weights, 7B shape", machine.time(machine.both(batch, CHECKPOINTED)), **PAIR,
        limit=batch.flop_limit(CHECKPOINTED), beyond=1.10, note="no optimizer step",
    )  # fmt: skip
    emit(row)
    emit(Row("all weights: share of stock's time", row.value, goal=0.65, note="the paper's GPU hours: 0.777"))
    machine.clear()
    adapted = _adapted(pair)
    calls = {name: _lora_step(adapted[name], batch) for name in (STOCK, PMOD)}
    limit = _lora_limit(batch)
    row = timed_row(f"LoRA r{RANK}, 7B shape", machine.time(calls), **PAIR, limit=limit, beyond=1.10)
    emit(row)
    emit(Row("LoRA: share of stock's time", row.value, goal=0.65, note="the paper's GPU hours: 0.777"))


def _adapted(pair: ModelPair) -> dict[str, PreTrainedModel]:
    """Each with adapters of its own over the shared weights, all of which are frozen, routers too."""
    models = {}
    for name in (STOCK, PMOD):
        config = LoraConfig(r=RANK, target_modules=rf".*\.language_model\.layers\.\d+\.\w+\.({TARGETS})")
        models[name] = get_peft_model(pair[name], config)
    return models


def _lora_step(model, batch: Batch) -> Callable[[], None]:
    decoder = model.get_base_model().model.language_model
    return lambda: forward_and_backward(model, decoder, batch.prompt, checkpointed=True)


def _lora_limit(batch: Batch) -> float:
    """FLOP ratio of a step with adapters, attention causal in each of its four passes."""
    counted = batch.counted
    frozen = frozenset({"vision_tower", "projector"})
    setup = TrainingSetup(checkpointing=True, lora_rank=RANK, frozen=frozen, lora_targets=tuple(TARGETS.split("|")))
    stock = training_flops(counted.sizes, counted.rows, setup).step - 2 * counted.stock.attention_products
    ours = training_flops(counted.sizes, counted.rows, setup, counted.routed).step
    return (ours - 2 * counted.pmod.attention_products) / stock
