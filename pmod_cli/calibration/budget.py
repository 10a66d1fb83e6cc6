"""What a schedule costs as a share of the stock model, and the best schedule that a budget allows. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import retention_schedule
from pmod_cli.profiling.budgets import PROMPT, dearest_within
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.workload import Routed, Row


@dataclass(frozen=True)
class Budget:
    """A share of the stock model that a schedule may cost.

    Args:
        sizes: The model.
        share: In 0 ... 1.
        of: `flops`, of the decoder's prefill with attention and lm_head; or `retention`, the mean ratio.
        target_tokens: Which vision tokens are routed.
        prompt: The prompt that is counted; None is the one of `profile`.
        logits: Where lm_head counts: on every position, as `profile` has it, or on the last, as `generate` computes it.
    """

    sizes: Sizes
    share: float
    of: Literal["flops", "retention"] = "flops"
    target_tokens: str = "vision_all"
    prompt: Row | None = None
    logits: Literal["every", "last"] = "every"

    @cached_property
    def row(self) -> Row:
        """The prompt that is counted."""
        return self.prompt or PROMPT.rows(self.sizes)[0]

    def cost(self, ratio: float) -> float:
        """Of one layer at this ratio, as a share of the whole stock model's."""
        if self.of == "retention":
            return ratio / self.sizes.decoder.layers
        return self._flops([ratio], [False]).layers / self._stock

    def total(self, ratios: Sequence[float], routers: int = 1) -> float:
        """Of a schedule, routers and lm_head included, as a share of the stock model's."""
        costs = {ratio: self.cost(ratio) for ratio in set(ratios)}
        return self.fixed(routers) + sum(costs[ratio] for ratio in ratios)

    def fixed(self, routers: int = 1) -> float:
        """What no ratio changes: lm_head and routers."""
        if self.of == "retention":
            return 0.0
        plain, routed = (self._flops([1.0], [router]) for router in (False, True))
        return (plain.lm_head + routers * (routed.layers - plain.layers)) / self._stock

    def solve(self, groups: Sequence[tuple[int, float | None]], routers: int = 1) -> float | None:
        """The ratio of the open layers that spends the budget; None where even 0 is too much.

        Args:
            groups: Numbers of layers and their ratios; None is the open one.
            routers: Layers that choose.
        """
        fixed = self.fixed(routers) + sum(count * self.cost(ratio) for count, ratio in groups if ratio is not None)
        count = sum(count for count, ratio in groups if ratio is None)
        if fixed + count * self.cost(0.0) > self.share:
            return None
        if fixed + count * self.cost(1.0) <= self.share:
            return 1.0
        return dearest_within(lambda ratio: fixed + count * self.cost(ratio), self.share, 0.0, 1.0)

    def kept_cache(self, ratios: Sequence[float]) -> float:
        """Share of the stock model's K/V that a schedule keeps of the same prompt, its text included."""
        row = self.row
        kept = [row.kept(self.target_tokens, ratio) + row.text_tokens for ratio in ratios]
        return sum(kept) / (len(kept) * row.tokens)

    def cosine(self) -> list[float] | None:
        """The paper's schedule, its shift solved for the budget; None where no shift reaches it."""
        layers = self.sizes.decoder.layers

        def ratios(shift: float) -> list[float]:
            return retention_schedule("cosine", layers, shift=shift)

        least, most = -1.0, 1.5
        if self.total(ratios(least)) > self.share:
            return None
        return ratios(dearest_within(lambda shift: self.total(ratios(shift)), self.share, least, most))

    def check(self, *, cosine: bool = False) -> None:
        """Raises PmodError where no schedule is that cheap: layer 0 has to be whole for something to choose by.

        Args:
            cosine: Whether the paper's schedule has to be.
        """
        least = self.total([1.0, *[0.0] * (self.sizes.decoder.layers - 1)])
        if not least <= self.share <= 1:
            name = "budget" if self.of == "flops" else "target_retention"
            raise PmodError(
                f"`{name}={self.share:g}` cannot be met: this model reaches {least:.3f} to 1",
                hint=f"`{name}={min(1.0, math.ceil(100 * least) / 100):.2f}`, or more",
            )
        if cosine and self.cosine() is None:
            raise PmodError(
                f"no shift of the cosine costs as little as {self.share:g}",
                hint="leave `schedule` out, or choose a larger budget",
            )

    @cached_property
    def _stock(self) -> float:
        return self._prefill(None).decoder

    def _flops(self, ratios: Sequence[float], routers: Sequence[bool]) -> formulas.Prefill:
        """Of a decoder of these layers alone: a prefill is the sum of its layers."""
        return self._prefill(Routed(ratios, self.target_tokens, routers))

    def _prefill(self, routed: Routed | None) -> formulas.Prefill:
        return formulas.prefill(self.sizes, [self.row], routed, logits=1 if self.logits == "last" else None)


def best_ratios(losses: Sequence[Mapping[float, float]], budget: Budget, routers: int = 1) -> list[float] | None:
    """The ratio of each layer whose losses add up to the least within the budget: exact, by dynamic programming.

    Layer after layer it keeps the pairs (cost, loss) that no other pair beats in both. Costs are counted in whole units
    of 1e-9 of the stock model, rounded up, so no schedule over the budget passes.

    Args:
        losses: For each layer, the loss of each ratio that it may have.
        budget: What all layers together may cost.
        routers: Layers that choose.

    Returns:
        Length L; None where no choice is within the budget.
    """
    unit = 1e9
    capacity = int(np.floor((budget.share - budget.fixed(routers)) * unit + 1e-3))
    prices = {ratio: int(np.ceil(budget.cost(ratio) * unit)) for ratio in {r for layer in losses for r in layer}}
    cost: np.ndarray = np.zeros(1, dtype=np.int64)
    loss: np.ndarray = np.zeros(1)
    steps: list[tuple[list[float], np.ndarray, np.ndarray]] = []
    for layer in losses:
        ratios = list(layer)
        costs = (cost[None] + np.array([prices[r] for r in ratios], dtype=np.int64)[:, None]).ravel()
        sums = (loss[None] + np.array([layer[r] for r in ratios])[:, None]).ravel()
        order = np.lexsort((sums, costs))
        order = order[costs[order] <= capacity]
        if not len(order):
            return None
        best = np.minimum.accumulate(sums[order])
        kept = order[np.concatenate([[True], sums[order][1:] < best[:-1]])]
        steps.append((ratios, kept // len(cost), kept % len(cost)))
        cost, loss = costs[kept], sums[kept]
    place = len(loss) - 1  # costs ascend and losses fall: the last is the best
    chosen = []
    for ratios, which, before in reversed(steps):
        chosen.append(ratios[which[place]])
        place = before[place]
    return chosen[::-1]
