"""Where the time of one forward goes, by part of the model, from hooks around its modules."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

REST = "norms, routing, residuals"


def breakdown(model: PreTrainedModel, call: Callable[[], object], device: str) -> dict[str, float]:
    """Share of the time of `call` in each part; they add up to 1.

    Args:
        model: The model that `call` runs.
        call: One forward; run once untimed by the hooks' own cost, then once timed.
        device: Where it runs; on a GPU each hook waits for it, so that shares, not times, are meant.
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
    return {
        "vision tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "attention": [layer.self_attn for layer in layers],
        "MLP": [layer.mlp for layer in layers],
        "router": [layer.router for layer in layers if getattr(layer, "router", None) is not None],
        "lm_head": [model.lm_head],
    }
