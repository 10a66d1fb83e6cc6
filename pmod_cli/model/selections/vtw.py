"""VTW (Lin et al. 2024, arXiv 2405.05803): all vision tokens leave in front of layer K, text goes on alone.

Nothing is scored. Where the mean retention is no whole number of layers, the layer in front of K keeps a part, evenly
spaced: so a budget can be met. The published code has no such layer. It takes the span of the last row for a whole
batch, and refuses padding; here each row has its own. Its search for K is not part of the method here: K follows from
the schedule.
"""

from ..registry import SELECTIONS
from ..selections.uniform import UniformSelection


@SELECTIONS.register("vtw")
class WithdrawalSelection(UniformSelection):
    """Evenly spaced tokens, in the one layer that keeps a part."""
