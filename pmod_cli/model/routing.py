"""Which tokens a p-MoD layer processes: token weights, and one routing object per prefill.

Shapes, here and in `layer.py`: B rows, N tokens of the padded batch, V routed vision tokens of a row, K of them kept,
M tokens that a layer gathers from each row, D hidden size.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import kept_tokens

EVERYTHING = -1  # in the place of a layer that chooses: all that was not dropped in front of the decoder


def token_weights(logits: Tensor, plain: Tensor, norm: tuple[str, float, float]) -> Tensor:
    """Weights w = scale * activation(logit) + bias of the routed tokens; 1 for all others (paper, Eq. 3 and Table 4).

    Args:
        logits: `(B, N)`, the routers' output, float32 or float64.
        plain: `(B, N)` bool, the tokens that are not routed. Softmax leaves them out.
        norm: (activation, scale, bias), see `PmodSettings.weight_norm`.
    """
    activation, scale, bias = norm
    if activation == "softmax":
        active = logits.masked_fill(plain, torch.finfo(logits.dtype).min).softmax(dim=-1)
    else:
        active = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda x: x}[activation](logits)
    return (scale * active + bias).masked_fill_(plain, 1.0)


@dataclass(frozen=True)
class Gathered:
    """The tokens of one layer.

    Attributes:
        index: `(B, M)` int64, positions in the row: those of kept tokens ascending, then those of fillers, ascending.
        valid: `(B, M)` bool, or None if all are: False marks the fillers of rows that keep fewer than M tokens.
    """

    index: Tensor
    valid: Tensor | None


class Lengths(NamedTuple):
    """What a retention ratio leaves.

    Tokens of the longest row, M; with fillers also which slots are none, `(B, M)` bool, and what moves their positions
    behind all others, `(B, M)` int64.
    """

    longest: int
    valid: Tensor | None
    behind: Tensor | None


@dataclass
class Routing:
    """What all layers of one prefill share. Built once, where image features are merged; costs one host sync.

    While a graph is traced, tensors have no values: `counts` is None then, lengths are symbols of the graph, and a
    batch of several rows is taken to have fillers.

    Attributes:
        target: `(B, N)` bool, the routed vision tokens.
        plain: `(B, N)` bool, all others.
        counts: Per row (V, others, tail): routed tokens, other real tokens, and tokens behind the last routed one.
        padded: Whether the batch has padding.
        rank_base: `(B, N)` float, +inf for tokens that every layer keeps, -inf for padding, 0 for routed ones.
        recorder: Receives what each layer kept; see `capture.py`.
        weights: `(B, N)`, router weights of the layer that is about to choose; None if it has no router.
        position_embeddings: Rotary tables of the layer that is about to choose, `(1 or B, N, d)` each.
        units: `(B, N)` int64, the image or frame of each routed token, where K is taken of each apart; else None.
        ranks: `(B, N)` float32, what a selection that works in the vision tower has found; else None.
        standing: `(B, N)` float, `rank_base` for the layer that is about to choose: -inf also for dropped tokens.
        thinned: `(B, N)` bool, all vision tokens where some were dropped in front of the decoder; else None.
    """

    target: Tensor
    plain: Tensor
    counts: list[tuple[int, int, int]] | None
    padded: bool
    rank_base: Tensor
    recorder: Any = None
    weights: Tensor | None = None
    position_embeddings: tuple[Tensor, Tensor] | None = None
    standing: Tensor | None = None
    units: Tensor | None = None
    ranks: Tensor | None = None
    _unit_sizes: Tensor | None = None  # (B, units) int64: V of each image or frame
    thinned: Tensor | None = None
    _sizes: Tensor | None = None  # (B, 2) int64: V and others, where a graph is traced
    _lengths: dict[float, Lengths] = field(default_factory=dict)
    _rotary: tuple[Tensor, Tensor] | None = None  # the prefill's cosines, and both its tables in one
    _orders: dict[int, Tensor] = field(default_factory=dict)  # (B, N) by layer: rankings that later layers hold
    _plans: dict[tuple[int, float], Gathered] = field(default_factory=dict)  # of held choices, by layer and ratio
    _elsewhere: dict[torch.device, "Routing"] = field(default_factory=dict)  # of the same prefill, by device

    @classmethod
    def build(cls, vision: Tensor, attention_mask: Tensor | None, **options: Any) -> "Routing":
        """The routing of a prefill.

        Args:
            vision: `(B, N)` bool, the vision tokens that are to be routed.
            attention_mask: `(B, N)`, nonzero for real tokens, or None if nothing is padded.
            options: `recorder`, `units`.

        Raises:
            ValueError: A quota for each image is asked for while a graph is traced, or the mask is not 2D of the
                batch's shape: from a 4D one, padding cannot be read.
        """
        if attention_mask is None:
            valid = torch.ones_like(vision)
        elif not isinstance(attention_mask, Tensor) or attention_mask.shape != vision.shape:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"routing needs the 2D attention mask {tuple(vision.shape)} of the prefill, found {shape}")
        else:
            valid = attention_mask.to(device=vision.device, dtype=torch.bool)
        target = vision & valid
        plain = ~target
        num_target = target.sum(dim=1)
        sizes = torch.stack([num_target, valid.sum(dim=1) - num_target], dim=1)
        rank_base = torch.zeros(vision.shape, device=vision.device).masked_fill_(plain, float("inf"))
        shared = {
            "target": target,
            "plain": plain,
            "rank_base": rank_base.masked_fill_(~valid, float("-inf")),
            **options,
        }
        if torch.compiler.is_compiling():
            if options.get("units") is not None:
                raise ValueError("quota 'per_image' is not compiled: its number of images is known at run time alone")
            return cls(counts=None, padded=True, _sizes=sizes, **shared)
        length = vision.shape[1]
        last = torch.where(target, torch.arange(1, length + 1, device=vision.device), 0).amax(dim=1)
        counts = torch.cat([sizes, length - last[:, None]], dim=1).tolist()
        padded = any(routed + others < length for routed, others, _ in counts)
        routing = cls(counts=[tuple(row) for row in counts], padded=padded, **shared)
        if routing.units is not None:
            units = routing.units.masked_fill(plain, 0)
            most = int(units.max()) + 1
            routing._unit_sizes = units.new_zeros(len(units), most).scatter_add_(1, units, target.to(units.dtype))
        return routing

    def to(self, device: Any, **options: Any) -> "Routing":
        """The same on another device: what accelerate asks of all that goes to a layer, where layers are spread.

        Rankings that later layers hold are shared, as they may lie on another device than the layer that chose.
        """
        device = torch.device(device)
        if device == self.target.device:
            return self
        if device not in self._elsewhere:
            tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
            moved = {name: value.to(device, **options) for name, value in tensors.items()}
            afresh: dict[str, Any] = {"weights": None, "position_embeddings": None, "standing": None, "_rotary": None}
            self._elsewhere[device] = replace(self, **{**moved, **afresh, "_lengths": {}, "_plans": {}})
        return self._elsewhere[device]

    @property
    def known_counts(self) -> list[tuple[int, int, int]]:
        """`counts`, where no graph is traced."""
        assert self.counts is not None
        return self.counts

    @property
    def any_target(self) -> bool:
        """Whether there is something to route; taken for granted while a graph is traced."""
        return self.counts is None or any(num_vision for num_vision, *_ in self.counts)

    @property
    def tail(self) -> int:
        """Tokens behind the last routed one, in the row where they are fewest: kept by every layer, so croppable."""
        return min(tail for *_, tail in self.known_counts)

    def kept(self, ratio: float) -> list[int]:
        """K of each row at a retention ratio."""
        if self._unit_sizes is not None:
            return self._quotas(ratio).sum(dim=1).tolist()
        return [kept_tokens(num_vision, ratio) for num_vision, *_ in self.known_counts]

    def prepare(self, ratios: Iterable[float]) -> None:
        """Counts, once, what each ratio keeps: layers then compute with tensors alone, and compile whole.

        Args:
            ratios: Retention ratios of the routed layers.
        """
        ratios = [ratio for ratio in dict.fromkeys(ratios) if ratio not in self._lengths]
        if not ratios:
            return
        batch, length = self.target.shape
        if self._sizes is not None:
            # The product in float32, as in `kept_tokens`.
            shares = torch.tensor(ratios, dtype=torch.float32, device=self.target.device)
            ends = self._sizes[:, 1:] + (self._sizes[:, :1].float() * shares).long()  # (B, ratios)
            longest = ends.amax(dim=0).tolist()
            for symbol in longest:  # two or more: of one token alone, no graph says whether it is a decoded one
                torch._check(symbol >= 2)
                torch._check(symbol <= length)
            equal = batch == 1
            ends = ends.T
        else:
            rows = [[row[1] + kept for row, kept in zip(self.known_counts, self.kept(r), strict=True)] for r in ratios]
            longest = [max(*row, 1) for row in rows]  # of no token no layer can compute: then a filler stands there
            equal = all(min(row) == most for row, most in zip(rows, longest, strict=True))
            ends = None if equal else torch.tensor(rows, device=self.target.device)  # (ratios, B), copied at once
        for place, (ratio, most) in enumerate(zip(ratios, longest, strict=True)):
            if equal:
                self._lengths[ratio] = Lengths(most, None, None)
            else:
                valid = torch.arange(most, device=self.target.device) < ends[place, :, None]
                self._lengths[ratio] = Lengths(most, valid, ~valid * length)

    @property
    def alive(self) -> Tensor:
        """`(B, N)` bool: tokens that the layer which is about to choose may process: text, and what was not dropped."""
        return (self.rank_base if self.standing is None else self.standing) > -torch.inf

    @property
    def last(self) -> Tensor:
        """`(B, 1)` int64: the last real token of each row."""
        places = torch.arange(self.target.shape[1], device=self.target.device)
        return torch.where(self.rank_base > -torch.inf, places, 0).amax(dim=1, keepdim=True)

    @property
    def last_vision(self) -> Tensor:
        """`(B, 1)` int64: the last vision token of each row, though dropped in front of the decoder; -1 without one."""
        vision = self.target if self.thinned is None else self.thinned
        places = torch.arange(vision.shape[1], device=vision.device)
        return torch.where(vision, places, -1).amax(dim=1, keepdim=True)

    @property
    def ordinals(self) -> Tensor:
        """`(B, N)` int64: 0 ... V-1 at the vision tokens of a row, anything else elsewhere."""
        return (self.target.cumsum(dim=1) - 1).clamp_(min=0)

    def gather_plan(self, order: Tensor, ratio: float) -> Gathered:
        """The tokens that a layer processes: all text and, per row, the K best-ranked vision tokens.

        Rows that keep fewer than the longest are filled up with their next-ranked tokens, padding last. Fillers stand
        behind the kept tokens, where causal attention hides them without a mask.

        Args:
            order: `(B, N)` int64, positions from the best-ranked token to the last, see `Selection.order`.
            ratio: Retention ratio of the layer.
        """
        self.prepare([ratio])
        longest, valid, behind = self._lengths[ratio]
        if self._unit_sizes is not None:
            order = self._best_of_each_unit(order, ratio)
        index = order[:, :longest]
        if valid is None:
            return Gathered(index.sort(dim=1).values, None)
        return Gathered((index + behind).sort(dim=1).values - behind, valid)

    def _quotas(self, ratio: float) -> Tensor:
        """`(B, units)` int64: K of each image or frame, with the product in float32 as in `kept_tokens`."""
        assert self._unit_sizes is not None
        share = torch.tensor(ratio, dtype=torch.float32, device=self.target.device)
        return (self._unit_sizes.float() * share).long()

    def _best_of_each_unit(self, order: Tensor, ratio: float) -> Tensor:
        """A ranking with the K best of each image or frame in front of all other vision tokens."""
        assert self.units is not None
        assert self._unit_sizes is not None
        vision, padding = self.target.gather(1, order), (self.rank_base == -torch.inf).gather(1, order)
        unit = torch.where(vision, self.units.gather(1, order), self._unit_sizes.shape[1])  # the rest stands last
        grouped = unit.argsort(dim=1, stable=True)  # by unit, the best of each first
        starts = torch.nn.functional.pad(self._unit_sizes.cumsum(dim=1), (1, 0))  # (B, units + 1)
        places = torch.arange(order.shape[1], device=order.device)
        rank = torch.empty_like(order).scatter_(1, grouped, places - starts.gather(1, unit.gather(1, grouped)))
        quota = torch.nn.functional.pad(self._quotas(ratio), (0, 1)).gather(1, unit)
        behind = (vision & (rank >= quota)).byte() + 2 * padding.byte()
        return order.gather(1, behind.argsort(dim=1, stable=True))

    def hold(self, layer: int, order: Tensor) -> None:
        """Keeps the ranking of a layer that chooses, for the layers up to the next one."""
        self._orders[layer] = order

    def held_plan(self, layer: int, ratio: float) -> Gathered:
        """The tokens of a layer that holds the choice of `layer`; layers of one ratio share one plan."""
        key = (layer, ratio)
        if key not in self._plans:
            self._plans[key] = self.gather_plan(self._orders[layer].to(self.target.device), ratio)
        return self._plans[key]

    def without(self, index: Tensor, valid: Tensor | None, counts: list[tuple[int, int, int]]) -> "Routing":
        """The routing of what is left when all other vision tokens are dropped in front of the decoder.

        They keep their places and pass every layer as they are, and count as padding: no layer processes them.

        Args:
            index: `(B, M)` int64, the places of what is left.
            valid: `(B, M)` bool, which of them are no fillers; None if none is one.
            counts: As in this object, of what is left.
        """
        left = torch.zeros_like(self.target)
        left.scatter_(1, index, torch.ones_like(index, dtype=torch.bool) if valid is None else valid)
        target = self.target & left
        base = self.rank_base.masked_fill(~left, -torch.inf)
        fewer = Routing(target, ~target, counts, self.padded, base, self.recorder, thinned=self.target)
        fewer.ranks = self.ranks
        fewer.hold(EVERYTHING, base.argsort(dim=1, descending=True, stable=True))
        return fewer

    def stand(self, layer: int, ratio: float) -> None:
        """Says what a later layer may choose from: what is kept at `ratio` by the choice of `layer`."""
        index, valid = (plan := self.held_plan(layer, ratio)).index, plan.valid
        base = self.rank_base.gather(1, index)
        if valid is not None:
            base = base.masked_fill(~valid, -torch.inf)
        self.standing = torch.full_like(self.rank_base, -torch.inf).scatter_(1, index, base)

    def rotary_tables(self, tables: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the gathered tokens, `(B, M, d)` each.

        Args:
            tables: Those of the prefill, `(1 or B, N, d)`: the same two for every layer, so they are joined once.
            index: `(B, M, 1)`, places in the row.
        """
        cosines, sines = tables
        if self._rotary is None or self._rotary[0] is not cosines:
            self._rotary = cosines, torch.cat(tables, dim=-1)
        joined = self._rotary[1].expand(len(index), -1, -1)
        return joined.gather(1, index.expand(-1, -1, joined.shape[-1])).split([cosines.shape[-1], sines.shape[-1]], -1)

    def renumbered(self, kept: Tensor) -> Tensor:
        """`(B, M)` int64: the places whose rotary tables kept tokens get where positions have no gaps.

        Args:
            kept: `(B, M)` bool, in the order of the row; what is False gets any place.
        """
        ranks = (kept.cumsum(dim=1) - 1).clamp_(min=0)
        return self.real_places.gather(1, ranks)

    @property
    def real_places(self) -> Tensor:
        """`(B, N)` int64: the places of the real tokens in order, then those of padding."""
        return (self.rank_base == -torch.inf).byte().argsort(dim=1, stable=True)
