"""The methods by name: what ranks the vision tokens, how many each layer keeps, and what becomes of a dropped one.

Nothing here needs torch. Other packages add theirs with `METHODS.register(name)(Method(...))` or an entry point of the
group `pmod_cli.methods`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .registry import SELECTIONS, Registry, guarded
from .schedule import SCHEDULES

Cost = Callable[[Any, int, int, int], int]
"""FLOPs of one choice on one row: `(sizes, tokens, vision tokens, kept ones)`; `sizes.decoder` has `hidden`, `heads`,
`kv_heads` and `head_size`, `sizes.tower` what is known of the vision tower. Two FLOPs a multiply-add, matrix products
alone."""


def cost_of_rows(most: int | None = None) -> Cost:
    """What the attention of some text tokens costs: keys of all tokens, queries and products of those that ask.

    Args:
        most: How many text tokens ask at most; None: one.
    """

    def cost(sizes: Any, tokens: int, vision: int, kept: int) -> int:
        decoder = sizes.decoder
        asking = 1 if most is None else max(1, min(most, tokens - vision))
        width = decoder.heads * decoder.head_size
        keys = tokens * decoder.hidden * decoder.kv_heads * decoder.head_size
        return 2 * (keys + asking * decoder.hidden * width + asking * tokens * width)

    return cost


def cost_of_distances(sizes: Any, tokens: int, vision: int, kept: int) -> int:
    """What the distances between all vision tokens cost."""
    return 2 * vision * vision * sizes.decoder.hidden


def cost_of_pivots(sizes: Any, tokens: int, vision: int, kept: int) -> int:
    """What DART costs: the keys of all tokens, and the similarity of eight pivots to each."""
    decoder = sizes.decoder
    return 2 * (tokens * decoder.hidden * decoder.kv_heads * decoder.head_size + 8 * tokens * decoder.hidden)


def cost_in_tower(sizes: Any, tokens: int, vision: int, kept: int) -> int:
    """What VisionZip costs: one row of attention for each tile, and products of the keys left with those of targets."""
    tower = sizes.tower
    targets = max(1, round(kept / max(1, vision) * tower.patches * 10 / 64))
    return 2 * vision * (tower.hidden + targets * tower.hidden // tower.heads)


@dataclass(frozen=True)
class Method:
    """One way to process fewer vision tokens.

    Attributes:
        selection: What ranks them, a name in `SELECTIONS`.
        schedule: Retention schedule where the settings name none, a name in `SCHEDULES`.
        returns: Whether a token that a layer dropped may be chosen again by a later one.
        keep_keys: Whether a skipped token still gives its keys and values to the others.
        lead: How many layers in front of the one that drops tokens they are ranked.
        in_tower: Whether they are ranked in the vision tower, by a class token.
        routers: Whether layers that choose have a router, whose weights scale the MLP.
        cost: What a choice costs; None: nothing that counts, or, with routers, what the router costs.
    """

    selection: str
    schedule: str
    returns: bool = False
    keep_keys: bool = False
    lead: int = 0
    in_tower: bool = False
    routers: bool = False
    cost: Cost | None = None


def _take_method(method: Any, what: str) -> Method:
    if not isinstance(method, Method):
        raise TypeError(f"expected a Method, found {method!r:.60}")
    for name, known in ((method.selection, SELECTIONS), (method.schedule, SCHEDULES)):
        if name not in known:
            raise ValueError(f"there is no {known.what} {name!r:.80}")
    return method if method.cost is None else replace(method, cost=guarded(method.cost, what, int))


METHODS = Registry("method", "pmod_cli.methods", _take_method)
for _name, _method in {
    "pmod": Method("router", "cosine", returns=True, routers=True),
    "fastv": Method("fastv", "late", lead=1, cost=cost_of_rows()),
    "pyramiddrop": Method("pyramiddrop", "pyramid", cost=cost_of_rows()),
    "dart": Method("dart", "late", cost=cost_of_pivots),
    "vtw": Method("vtw", "withdrawn"),
    "shortv": Method("shortv", "withdrawn", returns=True, keep_keys=True),
    "divprune": Method("divprune", "constant", cost=cost_of_distances),
    "visionzip": Method("visionzip", "constant", in_tower=True, cost=cost_in_tower),
    "attention": Method("attention", "cosine", returns=True, cost=cost_of_rows(64)),
    "random": Method("random", "constant"),
    "uniform": Method("uniform", "constant"),
}.items():
    METHODS.register(_name)(_method)


def droppers() -> list[str]:
    """Methods without routers: they drop tokens of a stock model, and are asked for with a share of its FLOPs."""
    return [name for name in METHODS if not METHODS[name].routers]
