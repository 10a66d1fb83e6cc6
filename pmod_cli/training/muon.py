"""Muon: momentum whose every update is made orthogonal, for the matrices of the tiny model.

``torch.optim.Muon`` does the same in bfloat16 and one matrix at a time; on a CPU without bfloat16 arithmetic that costs
more than the model's own step. This one works in float32 and on all matrices of one shape at once.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by five Newton–Schulz steps (Jordan et al. 2024), scaled for tall matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95):
        """Takes 2D parameters only; ``lr`` is the spectral size of a step."""
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                size = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(parameters, list(updates.unbind()), alpha=-size)

    def _momentum(self, parameter: nn.Parameter, beta: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - beta)
        return torch.lerp(parameter.grad, state["momentum"], beta)


def orthogonal(matrices: Tensor) -> Tensor:
    """Replace the singular values of float32 (M, rows, columns) by values near 1 (between about 0.7 and 1.2)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x
