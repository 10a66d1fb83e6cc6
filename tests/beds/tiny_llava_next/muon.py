"""Muon as in torch, all matrices of one shape at a time."""

from __future__ import annotations

from collections import defaultdict

import torch


class StackedMuon(torch.optim.Muon):
    """torch's Muon (tested to give the same), with thirty times fewer kernels: a small model waits for them."""

    @torch.no_grad()
    def step(self) -> None:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = self._orthogonal(self._momentum(parameters, group), group)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                torch._foreach_add_(parameters, list(updates.float().unbind()), alpha=-rate)

    def _momentum(self, parameters: list[torch.Tensor], group: dict) -> torch.Tensor:
        """Gradients after Nesterov momentum, float32 (P, rows, columns)."""
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        held = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(held, gradients, 1 - group["momentum"])
        return torch.stack(torch._foreach_lerp(gradients, held, group["momentum"]))

    @staticmethod
    def _orthogonal(updates: torch.Tensor, group: dict) -> torch.Tensor:
        """The nearest orthogonal matrices, about, by Newton and Schulz in bfloat16."""
        tall = updates.shape[1] > updates.shape[2]
        x = (updates.mT if tall else updates).bfloat16()
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, gram, x, beta=a)
        return x.mT if tall else x
