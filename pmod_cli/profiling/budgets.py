"""What a method costs under the four conventions in use, and its settings at a budget. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import ImageTokens, Sizes
from pmod_cli.model.methods import METHODS
from pmod_cli.model.settings import PmodSettings
from pmod_cli.profiling.count import formulas
from pmod_cli.profiling.count.workload import Routed, Row, Workload, cached_tokens

PROMPT = Workload(image_sizes=((672, 672),), text_tokens=58)
"""The paper's prompt, on which a budget is solved unless another one is given."""
HARDLY_TEXT = Workload(text_tokens=1)
"""A budget that is not met here, where vision tokens are nearly all, is met on no prompt."""
PRECISION = 0.01  # of the budget, where the method is not made of whole steps larger than that


@dataclass(frozen=True)
class MethodCost:
    """A method's cost as papers name it, each a share of the stock model's on the same prompt.

    Args:
        first_layer: Vision tokens that enter layer 0.
        mean_tokens: Vision tokens of a layer, those that are not routed too, mean over the layers.
        flops: FLOPs of the decoder's prefill: layers with attention products, what ranks the tokens, and lm_head. This
            is what a budget means.
        selector: The part of `flops` that ranks the tokens, routers left out.
        kv_bytes: KV cache after the prefill, text included.
    """

    first_layer: float
    mean_tokens: float
    flops: float
    selector: float
    kv_bytes: float

    def as_dict(self) -> dict[str, float]:
        """For a result file."""
        return asdict(self)


def cost_of(sizes: Sizes, settings: PmodSettings, rows: Sequence[Row] | None = None) -> MethodCost:
    """Count what settings cost on a prompt.

    Args:
        sizes: The model.
        settings: What each layer keeps, and what ranks the tokens.
        rows: The prompt; None is `PROMPT`.
    """
    rows = PROMPT.rows(sizes) if rows is None else rows
    routed = Routed.by(settings, sizes.decoder.layers)
    stock, found = formulas.prefill(sizes, rows).decoder, formulas.prefill(sizes, rows, routed)
    slots = cached_tokens(rows, routed)
    return MethodCost(
        first_layer=routed.of_all(rows, routed.before * routed.retention[0]),
        mean_tokens=routed.mean_tokens(rows),
        flops=found.decoder / stock,
        selector=found.selector / stock,
        kv_bytes=sum(slots) / (len(slots) * max(row.tokens for row in rows)),
    )


def cost_of_fewer(sizes: Sizes, vision: int, whole: int, text: int) -> MethodCost:
    """What the stock model costs on a prompt that has fewer vision tokens than it could: of smaller pictures.

    Args:
        sizes: The model.
        vision: Vision tokens of the prompt.
        whole: Those of the same prompt with whole pictures.
        text: Its text tokens.
    """
    share = vision / whole if whole else 1.0
    few, all_of_them = (formulas.prefill(sizes, prompt_of(count, text)).decoder for count in (vision, whole))
    return MethodCost(share, share, few / all_of_them, 0.0, (vision + text) / (whole + text))


def solve(method: str, budget: float, sizes: Sizes, rows: Sequence[Row] | None = None) -> PmodSettings:
    """The settings of a method that come nearest to a budget.

    Args:
        method: A name in `METHODS`.
        budget: Share of the stock decoder's prefill FLOPs, see `MethodCost.flops`.
        sizes: The model.
        rows: The prompt; None is `PROMPT`.

    Raises:
        PmodError: No such method, the model cannot have it, or it does not reach the budget.
    """
    settings, flops = nearest(method, budget, sizes, rows)
    if flops > (1 + PRECISION) * budget:
        raise PmodError(
            f"{method} cannot cost {budget:g} of the stock model: it comes as near as {flops:.3f}",
            hint=f"a budget of {flops + 0.01:.2f} or more",
        )
    return settings


def nearest(method: str, budget: float, sizes: Sizes, rows: Sequence[Row] | None = None) -> tuple[PmodSettings, float]:
    """As `solve`, but what comes nearest is taken however far it is; and its share of the stock model's FLOPs.

    Raises:
        PmodError: No such method, or the model cannot have it.
    """
    if method not in METHODS:
        raise PmodError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if METHODS[method].in_tower and (reason := _without_class_token(sizes)):
        raise PmodError(f"{method} cannot run on {sizes.family.title}: {reason}")
    rows = PROMPT.rows(sizes) if rows is None else rows
    found, faults = [], []

    def flops_at(mean: float) -> float:
        try:
            settings = PmodSettings(method=method, mean=mean)
            flops = cost_of(sizes, settings, rows).flops
        except ValueError as error:  # less than the schedule can have
            faults.append(error)
            return 0.0
        found.append((abs(flops - budget), flops, mean, settings))
        return flops

    dearest_within(flops_at, budget, 0.0, 1.0, steps=20)
    flops_at(1.0)  # which halving never reaches: less would drop a token, a tenth of a short prompt
    if not found:
        raise PmodError(f"the method {method} has settings at no budget: {faults[-1]}")
    _, flops, _, settings = min(found, key=lambda one: one[:3])
    return settings, flops


@dataclass(frozen=True)
class PromptBudget:
    """A method whose settings meet a budget on every prompt.

    Args:
        sizes: The model.
        method: A name in `METHODS`.
        share: Of the stock decoder's prefill FLOPs on the same prompt; or settings, which cost as much there.
    """

    sizes: Sizes
    method: str
    share: float | PmodSettings

    def settings(self, vision: int, text: int) -> PmodSettings:
        """For a prompt of so many tokens. Prompts of about one shape get the same, so that they share a batch."""
        return _for_prompt(self, vision, text)[0]

    def flops(self, vision: int, text: int) -> float:
        """What the settings cost there, a share of the stock model's."""
        return cost_of(self.sizes, self.settings(vision, text), prompt_of(vision, text)).flops

    def is_met(self, vision: int, text: int) -> bool:
        """Whether the settings cost the budget to `PRECISION`; a short prompt has few tokens, and large steps."""
        return _for_prompt(self, vision, text)[1]


def prompt_of(vision: int, text: int, base: int | None = None) -> list[Row]:
    """A prompt of which no more is known than how many vision and text tokens it has.

    Args:
        vision: Its vision tokens.
        text: Its text tokens.
        base: Of the vision tokens of one picture, those of the base image; None: it does not matter which they are.
    """
    base = vision if base is None else min(base, vision)
    image = ImageTokens(0, 0, tiles=0, base=base, high_resolution=vision - base, patches_per_tile=0)
    return [Row((image,) if vision else (), text)]


@lru_cache(maxsize=2**16)
def _for_prompt(budget: PromptBudget, vision: int, text: int) -> tuple[PmodSettings, bool]:
    sizes, share, rows = budget.sizes, budget.share, prompt_of(vision, text)
    share = cost_of(sizes, share, rows).flops if isinstance(share, PmodSettings) else share
    settings, flops = nearest(budget.method, share, sizes, rows)
    away = abs(flops - share)
    with suppress(ValueError):  # a mean that the schedule cannot have
        rounded = replace(settings, mean=float(f"{settings.mean:.3g}"))
        off = abs(cost_of(sizes, rounded, rows).flops - share)
        if off <= max(PRECISION / 2 * share, away):
            settings, away = rounded, off
    return settings, away <= PRECISION * share


def dearest_within(cost: Callable[[float], float], budget: float, low: float, high: float, steps: int = 40) -> float:
    """The largest setting between two that costs no more than a budget.

    Args:
        cost: Rises with the setting.
        low: A setting within the budget.
        high: One that is not.
        steps: How often the distance between them is halved.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _without_class_token(sizes: Sizes) -> str | None:
    """Why the tower of a model cannot rank patches by a class token; `model/tower.py` asks the model itself."""
    if not getattr(sizes.tower, "class_token", 0):
        return "it ranks by the class token of a CLIP tower, and this one has none"
    if sizes.family.video_tokens is not None:
        return "it ranks patches, and those of video frames are pooled"
    return None
