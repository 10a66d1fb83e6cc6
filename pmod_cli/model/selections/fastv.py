"""FastV (Chen et al. 2024, arXiv 2403.06764): the tokens that the last token of the prompt attends to most.

Asked once, in layer K - 1 of 0 ... L - 1; layers K and later hold the choice. Its score (Section 4.1) is the attention
of the layer, averaged over heads.

The published code differs from its paper, and this file follows the code: it ranks by the attention of the last token
alone, not by what all tokens give. Of its four variants this is the one with a cache, which ranks once. It does not do
what is a flaw there: layer K - 1 runs once, not twice, each row of a batch has its own ranking, padding and several
images are seen. K tokens are `trunc(V * ratio)`, where the variants round or cut.
"""

from torch import Tensor, nn

from ..attention_rows import attention_rows
from ..registry import SELECTIONS
from ..routing import Routing
from ..selection import Selection


@SELECTIONS.register("fastv")
class FastVSelection(Selection):
    """Ranks by the attention of the last token."""

    finite = attends = True

    def scores(self, hidden_states: Tensor, routing: Routing, layer: nn.Module) -> Tensor:
        """Attention of the last real token to every token, `(B, N)`."""
        return attention_rows(hidden_states, routing, layer, routing.last)[:, 0]
