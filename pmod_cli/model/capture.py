"""Records which tokens each layer keeps, for pictures and tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSelection:
    """What one routed layer did in one prefill.

    Attributes:
        kept: `(B, N)` bool, tokens that went through the layer: text and the K kept vision tokens. Padding is False.
        weight: `(B, N)` float32 (float64 in a float64 model), router weights; 1 at tokens that are not routed, and in
            a layer without a router.
        logit: `(B, N)`, the router's output before normalisation; 0 in a layer without a router.
        K: `(B,)` int64, kept vision tokens of each row.
    """

    kept: Tensor
    weight: Tensor
    logit: Tensor
    K: Tensor


@dataclass
class SelectionRecord:
    """Selections of the last prefill by layer index, and `vision_mask`, `(B, N)` bool: routed tokens."""

    layers: dict[int, LayerSelection] = field(default_factory=dict)
    vision_mask: Tensor | None = None

    def add(self, layer: int, routing: Any, gathered: Any, weight: Tensor | None, logit: Tensor | None) -> None:
        """Called by a routed layer while it runs.

        Args:
            layer: Its index.
            gathered: None where it processes every token.
            weight: `(B, N)`; None, as the logits, where it has no router.
        """
        if weight is None or logit is None:
            weight, logit = torch.ones_like(routing.rank_base), torch.zeros_like(routing.rank_base)
        if gathered is None:
            kept = routing.rank_base >= 0
        else:
            kept = torch.zeros_like(routing.target)
            valid = torch.ones_like(gathered.index, dtype=torch.bool) if gathered.valid is None else gathered.valid
            kept.scatter_(1, gathered.index, valid)
        self.vision_mask = routing.target if routing.thinned is None else routing.thinned
        self.layers[layer] = LayerSelection(
            kept, weight.detach().clone(), logit.detach().clone(), (kept & routing.target).sum(dim=1)
        )


@contextmanager
def capture_selection(model: nn.Module) -> Iterator[SelectionRecord]:
    """Collects the selection of every prefill that runs inside the block (the last one stays).

    Args:
        model: A p-MoD model, with or without its language-model head.

    Raises:
        ValueError: The model has no routed decoder.
    """
    decoder = next((module for module in model.modules() if hasattr(module, "selection_recorder")), None)
    if decoder is None:
        raise ValueError(f"{type(model).__name__} is not a p-MoD model: it has no routed decoder")
    record = SelectionRecord()
    decoder.selection_recorder = record
    try:
        yield record
    finally:
        decoder.selection_recorder = None
