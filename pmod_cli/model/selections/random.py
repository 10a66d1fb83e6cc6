"""A control: K tokens drawn at random, the same for every row of a batch. A router has to beat it."""

import torch
from torch import Tensor, nn

from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection


@SELECTIONS.register("random")
class RandomSelection(Selection):
    """Ranks the V vision tokens of a row by numbers drawn for the layer and the seed."""

    finite = True
    looks_ahead = False

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """One draw for each ordinal of a vision token, `(B, N)` in 0 ... 1."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.self_attn.layer_idx)
        longest = max(num_vision for num_vision, *_ in routing.known_counts)
        return torch.rand(longest, generator=generator).to(hidden_states.device)[routing.ordinals]
