"""A stock model to p-MoD settings and routers, without training: half of the pictures choose, the other half judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pmod_cli.calibration.asked import Asked, AskedBatch
from pmod_cli.calibration.bench import TARGETS, Bench, Schedule
from pmod_cli.calibration.budget import Budget
from pmod_cli.calibration.measured import Measured
from pmod_cli.calibration.regression import FOLDS
from pmod_cli.calibration.replay import Replay
from pmod_cli.calibration.samples import by_picture, read_samples
from pmod_cli.calibration.search import Found, Search
from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import IMAGE
from pmod_cli.data.vision import films_are_equal
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.budgets import prompt_of
from pmod_cli.profiling.count.workload import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

FEWEST = 8  # samples
FEWEST_PICTURES = 4  # two that choose, each ranked by a router that was fitted on the other, and two that judge
RANDOM_SEEDS = 3
COSINE, CONVERTED, UNIFORM, RANDOM = "cosine, calibrated", "cosine, converted", "uniform", "random"


@dataclass(frozen=True)
class CalibrationSettings:
    """What is asked for.

    Attributes:
        data: As `read_samples` takes it.
        images: Folder of the images that a file names.
        questions: Asked instead of the data's own.
        samples: Pictures with their questions; every second picture judges.
        budgets: Shares of the stock model, one result each.
        of: What they are shares of.
        prompt: What FLOPs are counted on: the prompt of `profile`, or the mean prompt of the data.
        logits: Where lm_head counts: on every position, or on the last alone, as `generate` computes it.
        schedule: `search`, or `cosine`: the paper's, with only the rest calibrated.
        template: Conversation template, as `data.template` of a recipe.
        seed: Of everything that is drawn.

    Raises:
        PmodError: too few samples, or a share out of range.
    """

    data: str = "tiny"
    images: Path | None = None
    questions: tuple[str, ...] = ()
    samples: int = 64
    budgets: tuple[float, ...] = (0.54,)
    of: Literal["flops", "retention"] = "flops"
    prompt: Literal["profile", "data"] = "profile"
    logits: Literal["every", "last"] = "every"
    schedule: Literal["search", "cosine"] = "search"
    template: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < FEWEST:
            raise PmodError(f"`samples={self.samples}` are too few to calibrate on: expected {FEWEST} or more")
        if marked := [question for question in self.questions if IMAGE in question]:
            raise PmodError(
                f"`question={marked[0][:60]}` holds {IMAGE}: the picture stands in front of the first question",
                hint="leave it out",
            )
        name = "budget" if self.of == "flops" else "target_retention"
        for share in self.budgets:
            if not 0 < share <= 1:
                raise PmodError(f"`{name}={share:g}`: expected a share above 0 and at most 1, such as 0.54")


@dataclass(frozen=True)
class Judged:
    """A model on the samples that judge.

    Attributes:
        name: `stock`, `calibrated`, or a control.
        flops: Share of the stock decoder's prefill.
        retention: Mean ratio.
        kv: Share of the stock model's K/V.
        divergence: KL to the stock model, nats an answer token.
        unchanged: Samples whose answers stay as they are, token by token.
        pictures: All samples that judge; of a picture with several rows each counts.
    """

    name: str
    flops: float
    retention: float
    kv: float
    divergence: float
    unchanged: float
    pictures: int


@dataclass(frozen=True)
class Calibration:
    """What a budget gave.

    Attributes:
        share: The budget.
        found: Settings and routers.
        tokens: Vision and text tokens of the prompt that FLOPs are counted on.
        judged: The calibrated model first, then the controls at the same budget.
        hidden: For each layer, the divergence with images hidden from it on, on the samples of the search.
    """

    share: float
    found: Found
    tokens: tuple[int, int]
    judged: list[Judged]
    hidden: list[float] = field(default_factory=list)


def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    sizes: Sizes,
    settings: CalibrationSettings,
    note: Callable[[str], None] = lambda line: None,
    measured: Measured | None = None,
) -> list[Calibration]:
    """Settings and routers for each budget. The model's weights stay as they are; its decoder is routed in place.

    Args:
        model: A LLaVA in eval mode, with SDPA attention. Routers and settings that it has are ignored.
        processor: Its processor.
        sizes: Its sizes.
        settings: What is asked for.
        note: Told what is done.
        measured: Keeps what is measured, for a run that is stopped.

    Raises:
        PmodError: a budget that cannot be met, or data that cannot be read.
    """
    if settings.prompt == "profile":  # a wrong budget is refused before anything is read
        budgets = _budgets(sizes, settings)
    samples = read_samples(
        settings.data,
        settings.samples,
        images=settings.images,
        questions=settings.questions,
        seed=settings.seed,
        films=not films_are_equal(processor) and not settings.questions,
    )
    groups = by_picture(samples)
    if len(groups) < FEWEST_PICTURES:
        raise PmodError(
            f"{settings.data} has {len(groups)} different pictures in {len(samples)} samples: expected "
            f"{FEWEST_PICTURES} or more, since those that judge are not those that choose",
            hint="name data with more pictures",
        )
    replay = Replay(model)
    replay.keep_all()
    asked = Asked(model, processor, settings.template)
    if settings.prompt == "data":
        vision, text = asked.mean_prompt(samples)
        note(f"FLOPs are counted on a prompt of {vision} vision and {text} text tokens, the mean of the data")
        budgets = _budgets(sizes, settings, prompt_of(vision, text)[0])
    shown = (
        f"{len(groups)} pictures" if len(groups) == len(samples) else f"{len(samples)} rows on {len(groups)} pictures"
    )
    note(f"{shown} of {settings.data}: the stock model answers")
    samples = asked.answered(samples, own=True)

    def batches_of(chosen: Sequence[Sequence[int]]) -> list[AskedBatch]:
        return asked.batches([samples[place] for group in chosen for place in group])

    # Neither the halves nor the folds of one of them have a picture in common.
    folds = [(fold, batch) for fold in range(FOLDS) for batch in batches_of(groups[::2][fold::FOLDS])]
    batches = [batch for _, batch in folds]
    of_batches = [fold for fold, _ in folds]
    chooses = Bench(replay, batches, TARGETS, folds=of_batches, seed=settings.seed, measured=measured)
    judges = Bench(replay, batches_of(groups[1::2]), (), measured=measured)
    note("where it reads")
    hidden = chooses.hidden()
    results = []
    for budget in budgets:
        note(f"budget {budget.share:g}")
        results.append(_calibration(budget, settings, chooses, judges, hidden, note))
    return results


def _budgets(sizes: Sizes, settings: CalibrationSettings, prompt: Row | None = None) -> list[Budget]:
    """Those asked for.

    Raises:
        PmodError: one of them cannot be met.
    """
    budgets = [Budget(sizes, share, settings.of, prompt=prompt, logits=settings.logits) for share in settings.budgets]
    for budget in budgets:
        budget.check(cosine=settings.schedule == "cosine")
    return budgets


def _calibration(
    budget: Budget,
    settings: CalibrationSettings,
    chooses: Bench,
    judges: Bench,
    hidden: list[float],
    note: Callable[[str], None],
) -> Calibration:
    tokens = (budget.row.vision_tokens, budget.row.text_tokens)
    search = Search(chooses, budget, hidden, TARGETS, note)
    if settings.schedule == "cosine" and not search.spends_nothing:
        assert search.of_cosine is not None  # such a budget was refused before anything was computed
        found = search.of_cosine
    else:
        found = search.run()
    if not found.routers:  # the budget is the whole model
        rows = [_judged("calibrated", budget, judges, found.schedule)]
        return Calibration(budget.share, found, tokens, rows, hidden)
    rows = [_judged("calibrated", budget, judges, found.schedule, found.routers)]
    if (cosine := search.of_cosine) is not None:
        if settings.schedule != "cosine":
            rows.append(_judged(COSINE, budget, judges, cosine.schedule, cosine.routers))
        every = Schedule(cosine.schedule.ratios)
        rows.append(_judged(CONVERTED, budget, judges, every, judges.zero_routers(every)))
    for name, seeds in ((UNIFORM, 1), (RANDOM, RANDOM_SEEDS)):
        drawn = []
        for seed in range(seeds):
            drawn.append(_judged(name, budget, judges, found.schedule, found.routers, selection=name, seed=seed))
        rows.append(_mean(drawn))
    return Calibration(budget.share, found, tokens, rows, hidden)


def _judged(
    name: str, budget: Budget, bench: Bench, schedule: Schedule, routers: dict | None = None, **selection: Any
) -> Judged:
    bench.apply(schedule, routers, **selection)
    flops = replace(budget, of="flops")
    divergence, rows, same = bench.judged()
    return Judged(
        name,
        flops.total(schedule.ratios, len(routers or {})),
        schedule.retention,
        flops.kept_cache(schedule.ratios),
        divergence,
        same,
        len(rows),
    )


def _mean(rows: Sequence[Judged]) -> Judged:
    """One row of several draws."""
    first, count = rows[0], len(rows)
    return Judged(
        first.name,
        first.flops,
        first.retention,
        first.kv,
        sum(row.divergence for row in rows) / count,
        sum(row.unchanged for row in rows) / count,
        first.pictures,
    )


def router_values(found: Found) -> dict[int, tuple]:
    """Weight and bias of each router as float32 arrays, for `pmod_cli.checkpoints.Calibrated`."""
    return {
        layer: tuple(
            tensor.detach().to("cpu", torch.float32).numpy() for tensor in (fitted.whole.weight, fitted.whole.bias)
        )
        for layer, fitted in found.routers.items()
    }
