"""p-MoD's own selection: the tokens of largest router weight (paper, Section 3.2)."""

from torch import Tensor, nn

from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection


@SELECTIONS.register("router")
class RouterSelection(Selection):
    """Ranks by the weights that the layer's router has just given."""

    finite = True
    looks_ahead = False

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """The layer's router weights, `(B, N)`."""
        if routing.weights is None:
            raise ValueError(f"layer {layer.self_attn.layer_idx} has no router to choose by")
        return routing.weights
