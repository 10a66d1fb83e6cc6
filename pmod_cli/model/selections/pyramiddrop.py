"""PyramidDrop (Xing et al. 2024, arXiv 2410.17247): in stages, the tokens that the last instruction token attends to.

At the first layer r of each stage the attention of that layer is computed ahead of it (Section 3.2, Equation 3: queries
and keys of layer r on what layer r - 1 gives), averaged over heads, over the tokens that are left. What a stage drops
is gone for all later ones.

The published code numbers the positions anew after each stage (`positions: renumbered`); here they stay true. It ranks
the first of several images alone and counts `int(N * ratio)`, as here. In training it takes the mean over all positions
before an answer; here the last token of the row.
"""

from torch import Tensor, nn

from ..attention_rows import attention_rows
from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection


@SELECTIONS.register("pyramiddrop")
class PyramidDropSelection(Selection):
    """Ranks by the attention of the last token in the layer that comes next."""

    finite = attends = True

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Attention of the last real token to every token that is left, `(B, N)`."""
        return attention_rows(hidden_states, routing, layer, routing.last)[:, 0]
