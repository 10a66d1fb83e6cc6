"""The methods by name: what ranks the vision tokens, how many each layer keeps, and what becomes of a dropped one.

Nothing here needs torch. Other packages add theirs with `METHODS.register(name)(Method(...))` or an entry point of the
group `pmod_cli.methods`.
"""

from dataclasses import dataclass

from .registry import Registry

METHODS = Registry("method", "pmod_cli.methods")


@dataclass(frozen=True)
class Method:
    """One way to process fewer vision tokens.

    Attributes:
        selection: What ranks them, a name in `SELECTIONS`.
        schedule: Retention schedule where the settings name none, a name in `SCHEDULES`.
        returns: Whether a token that a layer dropped may be chosen again by a later one.
        keep_keys: Whether a skipped token still gives its keys and values to the others.
        lead: How many layers in front of the one that drops tokens they are ranked.
        routers: Whether layers that choose have a router, whose weights scale the MLP.
    """

    selection: str
    schedule: str
    returns: bool = False
    keep_keys: bool = False
    lead: int = 0
    routers: bool = False


for _name, _method in {
    "pmod": Method("router", "cosine", returns=True, routers=True),
    "fastv": Method("fastv", "late", lead=1),
    "pyramiddrop": Method("pyramiddrop", "pyramid"),
    "vtw": Method("vtw", "withdrawn"),
    "shortv": Method("shortv", "withdrawn", returns=True, keep_keys=True),
    "divprune": Method("divprune", "constant"),
    "attention": Method("attention", "cosine", returns=True),
    "random": Method("random", "constant"),
    "uniform": Method("uniform", "constant"),
}.items():
    METHODS.register(_name)(_method)
