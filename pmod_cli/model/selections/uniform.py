"""A control: K tokens evenly spaced over the row. A router has to beat it."""

import torch
from torch import Tensor, nn

from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection

GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly however many are taken


@SELECTIONS.register("uniform")
class UniformSelection(Selection):
    """Ranks the K evenly spaced tokens of the layer first.

    Among them, and among the rest, the order is itself spread evenly: a later layer that holds the choice and keeps
    fewer or more tokens gets tokens from all over the row.
    """

    finite = True
    looks_ahead = False

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Above 1 for the K evenly spaced vision tokens, below 1 for the others, `(B, N)`."""
        ordinal, device = routing.ordinals, hidden_states.device
        num_vision = torch.tensor([max(row[0], 1) for row in routing.known_counts], device=device)[:, None]
        kept = torch.tensor(routing.kept(layer.ratio), device=device)[:, None]
        before = ordinal * kept // num_vision  # chosen ones in front of a token
        chosen = (ordinal + 1) * kept // num_vision > before
        return chosen + (torch.where(chosen, before, ordinal - before) * GOLDEN).frac() / 2
