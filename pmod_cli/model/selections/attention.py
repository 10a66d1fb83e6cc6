"""The layer's own text-to-vision attention, chosen anew in every layer: an upper bound, which no router has to learn.

Queries are the text tokens behind the last image, the last 64 of them at most; their attention in this layer is
averaged over heads and queries. Not a published method: it costs the keys of every token in every layer.
"""

import torch
from torch import Tensor, nn

from ..attention_rows import attention_rows
from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection

MOST_QUERIES = 64


@SELECTIONS.register("attention")
class AttentionSelection(Selection):
    """Ranks by the mean attention of the text behind the image."""

    finite = attends = True

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Mean attention of the last text tokens to every token, `(B, N)`."""
        num_queries = min(MOST_QUERIES, max(tail for *_, tail in routing.known_counts) or 1)
        queries = routing.last - torch.arange(num_queries, device=hidden_states.device)  # (B, Q)
        asks = ((queries > routing.last_vision) | (queries == routing.last)).unsqueeze(-1)
        shares = attention_rows(hidden_states, routing, layer, queries.clamp(min=0))
        return (shares * asks).sum(dim=1) / asks.sum(dim=1)
