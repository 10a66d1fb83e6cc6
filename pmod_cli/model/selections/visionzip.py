"""VisionZip (Yang et al. 2024, arXiv 2412.04467): what the class token attends to, and means of the rest.

In the tower (Sections 3.2 and 3.3), in the layer that the projector reads: the patches of largest class-token attention
are *dominant*. Of the others every n-th is *contextual*: each patch that is left is assigned to the contextual one of
most similar key, and the mean of those assigned is added to it. The class token itself is fed too.

The published code adds that mean to the target and does not average the two, sums attention over heads, and takes keys
averaged over heads; so does this file. There the class token comes first, then dominant, then contextual tokens, with
positions anew (`positions: renumbered`); here each stands at its patch, the class token at the first patch that is
dropped. With anyres, tokens that stand on padding go with it, where the published code keeps padding; their places are
filled by attention, and newlines are dropped first.
"""

import torch
from torch import Tensor, nn

from ..registry import SELECTIONS
from ..routing import Routing
from ..schedule import kept_tokens
from ..selection import Selection
from ..tower import TowerLayer


@SELECTIONS.register("visionzip")
class VisionZipSelection(Selection):
    """Ranks by what the tower has picked. `contextual` is their share of all that is fed: 10 of 64, as published."""

    finite = True
    looks_ahead = False
    contextual = 10 / 64

    def in_tower(self, layer: TowerLayer, share: float, packed: bool) -> tuple[Tensor, Tensor]:
        """Patches with the merged ones and the class token among them, `(T, P, D)`, and their ranks, `(T, P)`."""
        states, (tiles, length) = layer.states[:, 1:], layer.states.shape[:2]
        kept = max(1, kept_tokens(length - 1, share))
        targets = min(kept - 1, max(1, round(kept * self.contextual)))
        keys = layer.keys.view(tiles, length, layer.heads, -1)
        asking = layer.queries[:, 0].view(tiles, layer.heads, -1)  # the class token's
        logits = torch.einsum("thd,tnhd->thn", asking, keys) * layer.scale
        attention = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).sum(dim=1)[:, 1:]
        order = attention.argsort(dim=1, descending=True, stable=True)
        dominant, left = order[:, : kept - targets - 1], order[:, kept - targets - 1 :].sort(dim=1).values
        dominant = dominant.sort(dim=1).values if packed else dominant
        step = max(1, left.shape[1] // max(1, targets))
        chosen = torch.zeros_like(left[0], dtype=torch.bool)
        chosen[: targets * step : step] = True
        contextual, merged = left[:, chosen], left[:, ~chosen]
        fed = [layer.states[:, :1], _at(states, dominant)]
        if targets:
            metric = torch.nn.functional.normalize(keys[:, 1:].mean(dim=2), dim=-1)
            nearest = (_at(metric, merged) @ _at(metric, contextual).transpose(1, 2)).argmax(dim=-1)
            zeros = torch.zeros_like(_at(states, contextual))
            mean = zeros.scatter_reduce(
                1,
                nearest.unsqueeze(-1).expand(-1, -1, states.shape[-1]),
                _at(states, merged),
                "mean",
                include_self=False,
            )
            fed.append(_at(states, contextual) + mean)
        if packed:
            places = torch.arange(kept, device=order.device).expand(tiles, -1)
        else:
            places = torch.cat([dominant, contextual], dim=1)
            spare = torch.ones_like(attention).scatter(1, places, 0.0).argmax(dim=1, keepdim=True)
            places = torch.cat([spare, places], dim=1)
        ranks = torch.arange(kept, 0, -1, device=order.device).expand(tiles, -1).to(attention.dtype)
        ranks = (attention / layer.heads - 1).scatter(1, places, ranks)  # the rest by attention, in -1 ... 0
        return states.scatter(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]), torch.cat(fed, dim=1)), ranks

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """The ranks that the tower gave, `(B, N)`."""
        if routing.ranks is None:
            raise ValueError(
                "visionzip ranks in the vision tower: it needs images, not features that are merged already"
            )
        return routing.ranks


def _at(values: Tensor, places: Tensor) -> Tensor:
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
