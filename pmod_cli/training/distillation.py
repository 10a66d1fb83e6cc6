"""Learning from the stock model that a p-MoD model was made of: the same weights, without adapters, every layer plain.

The parts that are trained whole beside adapters have their old weights too while adapters are off, so the teacher costs
a forward pass and no memory for a second model.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def stock_logits(adapted: nn.Module, inputs: dict) -> Tensor:
    """What the stock model says, as its lm_head gives it.

    peft takes adapters that are off for frozen ones, and all for trained ones when they are on again, frozen routers
    too. FSDP2 looks once, in its first forward pass, at what is trained. So all parameters stay what they were.

    Args:
        adapted: A model with adapters (peft).
        inputs: Of the model; `labels` are left out.
    """
    body = adapted.get_base_model().model
    trained = {parameter: parameter.requires_grad for parameter in adapted.parameters()}

    def as_before() -> None:
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)

    with ExitStack() as stack:
        stack.callback(as_before)
        stack.enter_context(adapted.disable_adapter())
        as_before()
        body.routes = False  # a stock model has no such switch, and does not read it
        try:
            return adapted(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        finally:
            body.routes = True


def divergence(taught: Tensor, learned: Tensor, tokens: Tensor | int | None = None) -> Tensor:
    """KL of what is taught to what is learned, nats a token.

    Args:
        taught: `(A, vocabulary)` logits of the teacher at the answers' tokens.
        learned: The same of the model that is trained.
        tokens: What to divide the sum by, as the loss of the answers is: answer tokens of the whole step. None is A.
    """
    total = F.kl_div(learned.float().log_softmax(-1), taught.float().log_softmax(-1), log_target=True, reduction="sum")
    return total / (max(1, len(taught)) if tokens is None else tokens)
