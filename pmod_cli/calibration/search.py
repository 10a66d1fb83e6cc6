"""The settings that a budget buys: which layer chooses and by what, and what each layer keeps.

Every step is decided by the divergence of the answers from the stock model's, with the layers as they would run, and on
pictures that the routers were not fitted on (`bench.CrossFitted`):

1. one layer chooses, those below it are whole, and those behind it keep less by one of a few shapes that spend the
   budget: level, falling, or the paper's cosine; which layer, which shape, and from where on is no image needed?
2. which of the targets is its router regressed on?
3. neighbouring layers in turn get other ratios while the rest stay; dynamic programming takes the best sum within the
   budget, and the way there counts as far as the joint divergence falls; then the step is repeated from there
4. does a second layer that chooses anew help?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from pmod_cli.calibration.bench import Bench, CrossFitted, Schedule
from pmod_cli.calibration.budget import Budget, best_ratios
from pmod_cli.calibration.replay import Stream
from pmod_cli.profiling.budgets import dearest_within

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75)  # ratios that layers are tried at, beside all and what they have
TOGETHER = 2  # neighbouring layers that are tried at once: one alone changes less than the samples differ
PARTS = (0.5, 1.0)  # of the way to the best sum that are tried
SCARCE = (0.003, 0.02, 0.1)  # nats: divergences at which images may be hidden from a layer on
CHOOSERS = (0, 1, 2, 3, 5, 8, 12, 17, 24)  # layers that are tried as the one that chooses, closer where more is spent
CLOSER = 3  # of these layers, that are tried with every shape
FALLS_TO = (0.0, 0.3, 0.15)  # ratios that the last layer of a falling shape has, the likeliest last
MORE_CHOOSERS = 3  # places that are tried for another one
ROUNDS = 2
LEAST_RATIO = 0.02  # below this, fewer layers keep more
NOISE = 5e-4  # nats: a step that gains less changes nothing


@dataclass(frozen=True)
class Found:
    """Settings with their routers.

    Attributes:
        schedule: Ratios and layers that choose.
        routers: By layer.
        target: What each router is regressed on.
        correlation: Of each router's logits with its target, on pictures left out of the fit.
        divergence: KL to the stock model, nats an answer token, on the samples of the search; of each picture by
            routers that were fitted on others.
        rows: The share of each picture in it.
        steps: What was tried: a line each, with its divergence.
        thinned: By layer and ratio, the divergence with that layer and the next one alone changed, `TOGETHER` of them;
            of the last round.
    """

    schedule: Schedule
    routers: dict[int, CrossFitted] = field(default_factory=dict)
    target: dict[int, str] = field(default_factory=dict)
    correlation: dict[int, float] = field(default_factory=dict)
    divergence: float = 0.0
    rows: Tensor | None = None
    steps: tuple[tuple[str, float], ...] = ()
    thinned: dict[int, dict[float, float]] = field(default_factory=dict)


class Search:
    """Looks for the best settings within a budget.

    Args:
        bench: Samples to decide by.
        budget: What the schedule may cost.
        hidden: For each layer, the divergence with images hidden from it on; see `Bench.hidden`.
        targets: Targets to compare, the likeliest first.
        note: Told each time that something better is found.
    """

    def __init__(
        self,
        bench: Bench,
        budget: Budget,
        hidden: Sequence[float],
        targets: Sequence[str],
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        budget.check()
        self.bench, self.budget, self.hidden, self.targets, self.note = bench, budget, hidden, targets, note
        self.layers = len(hidden)
        self.whole = Schedule((1.0,) * self.layers)
        self.steps: list[tuple[str, float]] = []

    def run(self) -> Found:
        """All steps."""
        if self.spends_nothing:
            return Found(self.whole)
        found = self._by_target(self._best_of(self._options(LEAST_RATIO) or self._options(0.0)))
        if self.of_cosine is not None:
            found = min(found, self.of_cosine, key=lambda each: each.divergence)
        for _ in range(ROUNDS if found.divergence > NOISE else 0):
            before, found = found, self._other_ratios(found)
            if found.schedule == before.schedule:
                break
        found = self._another_choice(found)
        return replace(found, steps=tuple(self.steps))

    @cached_property
    def of_cosine(self) -> Found | None:
        """The best layer to choose, and router, for the paper's cosine; None where no shift of it is that cheap."""
        ratios = None if self.spends_nothing else self.budget.cosine()
        if ratios is None:
            return None
        first = next(layer for layer, ratio in enumerate(ratios) if ratio < 1)
        tried = {first, max(0, first - 1), first // 2}
        found = self._best_of({chooser: [Schedule(tuple(ratios), (chooser,))] for chooser in tried})
        return replace(self._by_target(found), steps=tuple(self.steps))

    @property
    def spends_nothing(self) -> bool:
        """Whether the budget is the whole model: then nothing changes."""
        return self.budget.total(self.whole.ratios, routers=0) <= self.budget.share + 1e-9

    def _options(self, least: float) -> dict[int, list[Schedule]]:
        """Schedules that spend the budget, by the layer that chooses; the likeliest first."""
        ends = {next((i for i, loss in enumerate(self.hidden) if loss <= most), self.layers) for most in SCARCE}
        options: dict[int, list[Schedule]] = {}
        for chooser in CHOOSERS:
            for end in sorted(ends | {self.layers}, reverse=True):
                if end <= chooser or end <= self.layers // 2 < chooser:
                    continue
                hidden = self.layers - end
                ratio = self.budget.solve([(chooser, 1.0), (end - chooser, None), (hidden, 0.0)])
                if ratio is None or ratio < least:
                    continue
                shapes = [(1.0,) * chooser + (ratio,) * (end - chooser) + (0.0,) * hidden]
                if end == self.layers:
                    shapes += [found for low in FALLS_TO if (found := self._falling(chooser, low)) is not None]
                options.setdefault(chooser, []).extend(Schedule(ratios, (chooser,)) for ratios in reversed(shapes))
        return options

    def _falling(self, chooser: int, low: float) -> tuple[float, ...] | None:
        """All below `chooser`, then along a line from some ratio to `low`; None where none spends the budget."""
        behind = self.layers - chooser

        def ratios(top: float) -> tuple[float, ...]:
            line = (top + (low - top) * (place + 0.5) / behind for place in range(behind))
            return (1.0,) * chooser + tuple(min(1.0, ratio) for ratio in line)

        def cost(top: float) -> float:
            return self.budget.total(ratios(top))

        if cost(low) > self.budget.share:
            return None
        return ratios(dearest_within(cost, self.budget.share, low, 2.0))

    def _best_of(self, options: Mapping[int, Sequence[Schedule]]) -> Found:
        """Of schedules by the layer that chooses: the first of each layer, then the others of the best layers."""
        tried = self._tried({chooser: schedules[:1] for chooser, schedules in options.items()})
        best = sorted(tried, key=lambda found: found.divergence)[:CLOSER]
        tried += self._tried({found.schedule.select_at[0]: options[found.schedule.select_at[0]][1:] for found in best})
        return min(tried, key=lambda found: found.divergence)

    def _tried(self, options: Mapping[int, Sequence[Schedule]]) -> list[Found]:
        """Schedules by the layer that chooses, with routers of the first target."""
        tried: list[Found] = []
        streams: list[Stream] | None = None
        for chooser, schedules in sorted(options.items()):  # each starts where the one before stopped
            self.bench.apply(self.whole)
            streams = self.bench.streams_at(chooser, streams)
            tried += [self._with_router(Found(schedule), chooser, self.targets[0], streams) for schedule in schedules]
        return tried

    def _by_target(self, best: Found) -> Found:
        """The same with a router of another target, where that is better.

        Most of `attention` is what the image reads of itself, so where it wins it often wins by chance: it alone
        has to be better by more than its error.
        """
        chooser, schedule = best.schedule.select_at[0], best.schedule
        self.bench.apply(self.whole)
        streams = self.bench.streams_at(chooser)
        for name in self.targets[1:]:
            other = self._with_router(Found(schedule), chooser, name, streams)
            better = _is_better(other, best) if name == "attention" else other.divergence < best.divergence
            best = other if better else best
        return best

    def _with_router(self, found: Found, chooser: int, target: str, streams: Sequence[Stream]) -> Found:
        """The settings with a router fitted for `chooser`, measured from streams in front of it."""
        router, correlation, _ = self.bench.fit(found.schedule, chooser, target, streams)
        made = replace(
            found,
            routers={**found.routers, chooser: router},
            target={**found.target, chooser: target},
            correlation={**found.correlation, chooser: correlation},
        )
        return self._measured(made, f"{target} at {chooser}: {describe(found.schedule)}", streams)

    def _measured(self, found: Found, name: str, streams: Sequence[Stream]) -> Found:
        self.bench.apply(found.schedule, found.routers)
        divergence, rows, _ = self.bench.judged(streams)
        if divergence < min((before for _, before in self.steps), default=float("inf")):
            self.note(f"KL {divergence:.4f}: {name}")
        self.steps.append((name, divergence))
        return replace(found, divergence=divergence, rows=rows)

    def _other_ratios(self, found: Found) -> Found:
        """One round of step 3; where nothing is better, the same with what was measured."""
        chooser, ratios = found.schedule.select_at[0], found.schedule.ratios
        self.bench.apply(self.whole)
        start = self.bench.streams_at(chooser)
        self.bench.apply(found.schedule, found.routers)
        thinned = self.bench.thinned(start, chooser, (*LEVELS, 1.0), together=TOGETHER)
        losses = [{1.0: 0.0} for _ in range(chooser)]
        for first, changed in thinned.items():
            layers = range(first, min(first + TOGETHER, self.layers))
            of_each = {ratio: (loss - found.divergence) / len(layers) for ratio, loss in changed.items()}
            losses += [{**of_each, ratios[layer]: 0.0} for layer in layers]
        steps: dict[tuple[float, ...], None] = {}  # each once, in this order
        for reach in (len(LEVELS), 1):  # all ratios, then only the nearest ones: sums hold for small changes
            near = [_near(layer, ratios[i], reach) for i, layer in enumerate(losses)]
            chosen = best_ratios(near, self.budget) or ratios
            for part in PARTS:
                between = [now + part * (then - now) for now, then in zip(ratios, chosen, strict=True)]
                steps[tuple(self._filled(between))] = None
        best = found = replace(found, thinned=thinned)
        for step in steps:
            schedule = replace(found.schedule, ratios=step)
            measured = self._measured(replace(best, schedule=schedule), describe(schedule), start)
            best = min(best, measured, key=lambda each: each.divergence)
        return best if _is_better(best, found) else found

    def _filled(self, ratios: Sequence[float]) -> list[float]:
        """The ratios between 0 and 1 with one factor, up to the budget."""
        low, high = 0.5, 4.0
        for _ in range(20):
            middle = (low + high) / 2
            over = self.budget.total([min(1.0, ratio * middle) for ratio in ratios]) > self.budget.share
            low, high = (low, middle) if over else (middle, high)
        return [round(min(1.0, ratio * low) - 5e-7, 6) if 0 < ratio < 1 else ratio for ratio in ratios]

    def _another_choice(self, found: Found) -> Found:
        """Step 4, at a few places behind the layer that chooses."""
        chooser = found.schedule.select_at[-1]
        last = max((i for i, ratio in enumerate(found.schedule.ratios) if ratio > 0), default=chooser)
        places = range(chooser + 1, last + 1)
        best, before = found, found
        for place in places[:: max(1, math.ceil(len(places) / MORE_CHOOSERS))]:
            self.bench.apply(before.schedule, before.routers)
            streams = self.bench.streams_at(place)
            schedule = replace(before.schedule, select_at=(*before.schedule.select_at, place))
            if self.budget.total(schedule.ratios, len(schedule.select_at)) > self.budget.share + 1e-4:
                continue
            made = self._with_router(replace(before, schedule=schedule), place, before.target[chooser], streams)
            best = min(best, made, key=lambda each: each.divergence)
        return best if _is_better(best, found) else found


def _is_better(found: Found, before: Found) -> bool:
    """Whether the divergence falls by more than its standard error over the pictures; else simpler settings stay."""
    assert found.rows is not None  # both were measured, on the same pictures
    assert before.rows is not None
    gains = (before.rows - found.rows) * len(before.rows)
    error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(gains.mean()) > max(NOISE, error)


def describe(schedule: Schedule) -> str:
    """A schedule in one line: `0-7 1.00, 8-19 0.30, 20-31 0.00`."""
    parts, start = [], 0
    for layer in range(1, len(schedule.ratios) + 1):
        if layer == len(schedule.ratios) or schedule.ratios[layer] != schedule.ratios[start]:
            layers = f"{start}" if layer - start == 1 else f"{start}-{layer - 1}"
            parts.append(f"{layers} {schedule.ratios[start]:.2f}")
            start = layer
    return ", ".join(parts)


def _near(losses: dict[float, float], now: float, reach: int) -> dict[float, float]:
    """The ratios up to `reach` steps away from the present one."""
    ladder = sorted(losses)
    place = ladder.index(now)
    return {ratio: losses[ratio] for ratio in ladder[max(0, place - reach) : place + reach + 1]}
