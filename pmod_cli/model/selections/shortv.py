"""ShortV (Yuan et al. 2025, arXiv 2504.00502): in some layers vision tokens are frozen.

A frozen token passes unchanged, without query, output projection and MLP (Section 3.2), but its keys and values are
computed and seen. So no token is dropped and the KV cache stays whole: `keep_keys`. A later layer may process it.

Which layers freeze is the schedule: a ratio of 0. The paper ranks layers by the KL divergence that freezing one of them
causes, and its list for LLaVA-1.5-7B is mostly the last ones: the schedule `withdrawn` freezes from the end. The layer
between may keep a part, evenly spaced. The published code overwrites the mask, so padded rows are wrong there; it takes
one image alone.
"""

from ..registry import SELECTIONS
from ..selections.uniform import UniformSelection


@SELECTIONS.register("shortv")
class FrozenSelection(UniformSelection):
    """Evenly spaced tokens, in a layer that freezes a part."""
