"""Which tokens a p-MoD layer processes: token weights, and one routing object per prefill.

Shapes, here and in `layer.py`: B rows, N tokens of the padded batch, V routed vision tokens of a row, K of them kept,
M tokens that a layer gathers from each row, D hidden size.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import kept_tokens

SELECTIONS = ("router", "random", "uniform")


def token_weights(logits: Tensor, target: Tensor, norm: tuple[str, float, float]) -> Tensor:
    """Weights w = scale * activation(logit) + bias of the routed tokens; 1 for all others (paper, Eq. 3 and Table 4).

    Args:
        logits: `(B, N)`, the routers' output, float32 or float64.
        target: `(B, N)` bool, the tokens that are routed. Softmax runs over them alone.
        norm: (activation, scale, bias), see `PmodSettings.weight_norm`.
    """
    activation, scale, bias = norm
    if activation == "softmax":
        masked = logits.masked_fill(~target, torch.finfo(logits.dtype).min)
        active = masked.softmax(dim=-1)
    else:
        active = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "none": lambda x: x}[activation](logits)
    return torch.where(target, scale * active + bias, 1.0)


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
    """What a retention ratio leaves: tokens of the longest row (M), and fillers, `(B, M)` bool, or None without any."""

    longest: int
    filler: Tensor | None


@dataclass
class Routing:
    """What all layers of one prefill share. Built once, where image features are merged; costs one host sync.

    Attributes:
        target: `(B, N)` bool, the routed vision tokens.
        counts: Per row (V, others, tail): routed tokens, other real tokens, and tokens behind the last routed one.
        padded: Whether the batch has padding.
        rank_base: `(B, N)` float, +inf for tokens that every layer keeps, -inf for padding, 0 for routed ones.
        selection: How the K tokens are chosen: one of `SELECTIONS`; all but `router` are controls of the same K.
        seed: Of the random control.
        recorder: Receives what each layer kept; see `capture.py`.
    """

    target: Tensor
    counts: list[tuple[int, int, int]]
    padded: bool
    rank_base: Tensor
    selection: str = "router"
    seed: int = 0
    recorder: object | None = None
    _lengths: dict[float, "Lengths"] = field(default_factory=dict)

    @classmethod
    def build(cls, vision: Tensor, attention_mask: Tensor | None, **options) -> "Routing":
        """Args:
            vision: `(B, N)` bool, the vision tokens that are to be routed.
            attention_mask: `(B, N)`, nonzero for real tokens, or None if nothing is padded.
            options: `selection`, `seed`, `recorder`.

        Raises:
            ValueError: The mask is not 2D of the batch's shape: from a 4D one, padding cannot be read.
        """
        if attention_mask is None:
            valid = torch.ones_like(vision)
        elif not isinstance(attention_mask, Tensor) or attention_mask.shape != vision.shape:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"routing needs the 2D attention mask {tuple(vision.shape)} of the prefill, found {shape}")
        else:
            valid = attention_mask.to(device=vision.device, dtype=torch.bool)
        target = vision & valid
        positions = torch.arange(1, vision.shape[1] + 1, device=vision.device)
        last = torch.where(target, positions, 0).amax(dim=1)
        num_target = target.sum(dim=1)
        counts = torch.stack([num_target, valid.sum(dim=1) - num_target, vision.shape[1] - last], dim=1).tolist()
        rank_base = torch.zeros(vision.shape, device=vision.device).masked_fill_(~target, float("inf"))
        return cls(
            target=target,
            counts=[tuple(row) for row in counts],
            padded=any(routed + others < vision.shape[1] for routed, others, _ in counts),
            rank_base=rank_base.masked_fill_(~valid, float("-inf")),
            **options,
        )

    @property
    def tail(self) -> int:
        """Tokens behind the last routed one, in the row where they are fewest: kept by every layer, so croppable."""
        return min(tail for *_, tail in self.counts)

    def kept(self, ratio: float) -> list[int]:
        """K of each row at a retention ratio."""
        return [kept_tokens(num_vision, ratio) for num_vision, *_ in self.counts]

    def prepare(self, ratios: Iterable[float]) -> None:
        """Counts on the host, once, what each ratio keeps: layers then compute with tensors alone, and compile whole.

        Args:
            ratios: Retention ratios of the routed layers.
        """
        for ratio in ratios:
            if ratio not in self._lengths:
                rows = [others + kept for (_, others, _), kept in zip(self.counts, self.kept(ratio), strict=True)]
                longest, filler = max(*rows, 1), None  # of no token no layer can compute: then a filler stands there
                if min(rows) < longest:
                    ends = torch.tensor(rows, device=self.target.device)[:, None]
                    filler = torch.arange(longest, device=self.target.device) >= ends
                self._lengths[ratio] = Lengths(longest, filler)

    def gather_plan(self, weights: Tensor, ratio: float, layer: int) -> Gathered:
        """The tokens that a layer processes: all text and, per row, the K routed tokens of largest weight.

        Ties go to the lowest position. Rows that keep fewer than the longest are filled up with their next-ranked
        tokens, padding last. Fillers stand behind the kept tokens, where causal attention hides them without a mask.

        Args:
            weights: `(B, N)` float, see `token_weights`.
            ratio: Retention ratio of the layer.
            layer: Its index; seeds the random control.
        """
        self.prepare([ratio])
        longest, filler = self._lengths[ratio]
        scores = self._scores(weights, ratio, layer) + self.rank_base
        order = scores.argsort(dim=1, descending=True, stable=True)  # (B, N): text, routed by weight, padding
        index = order[:, :longest]
        if filler is None:
            return Gathered(index.sort(dim=1).values, None)
        behind = filler * self.target.shape[1]
        return Gathered((index + behind).sort(dim=1).values - behind, ~filler)

    def _scores(self, weights: Tensor, ratio: float, layer: int) -> Tensor:
        """What routed tokens are ranked by: router weights, or a control's score of the routed token's ordinal."""
        if self.selection == "router":
            return weights.detach()
        ordinal = (self.target.cumsum(dim=1) - 1).clamp_(min=0)  # (B, N), 0 ... V-1 at routed tokens
        longest = max(num_vision for num_vision, *_ in self.counts)
        if self.selection == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            draw = torch.rand(longest, generator=generator).to(weights.device)
            return draw[ordinal] if longest else weights
        num_vision = torch.tensor([max(row[0], 1) for row in self.counts], device=weights.device)[:, None]
        kept = torch.tensor(self.kept(ratio), device=weights.device)[:, None]
        return ((ordinal + 1) * kept // num_vision > ordinal * kept // num_vision).to(weights.dtype)
