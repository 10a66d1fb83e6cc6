"""The settings that a budget buys: which layer chooses and by what, and what each layer keeps.

Every step is decided by the divergence of the answers from the stock model's, with the layers as they would run:

1. one layer chooses, those up to some depth keep one ratio, and those behind it see no image: which two layers, and
   which of the targets its router is regressed on?
2. each layer in turn gets five other ratios while the rest stay; dynamic programming takes the best sum within the
   budget; the result counts if the joint divergence falls, and then the step is repeated from there
3. does a second layer that chooses anew help?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from pmod_cli.calibration.bench import Bench, Schedule
from pmod_cli.calibration.budget import Budget, best_ratios
from pmod_cli.calibration.replay import Stream

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75)  # ratios that a layer is tried at, beside all and what it has
SCARCE = (0.003, 0.02, 0.1)  # nats: divergences at which images may be hidden from a layer on
CHOOSERS = 10  # layers that are tried as the first that chooses
MORE_CHOOSERS = 4  # places that are tried for another one
ROUNDS = 3
LEAST_RATIO = 0.02  # below this, fewer layers keep more
BETTER, NOISE = 0.97, 5e-4  # a step counts if it lowers the divergence to this share of it, and by this many nats


@dataclass(frozen=True)
class Found:
    """Settings with their routers.

    Attributes:
        schedule: Ratios and layers that choose.
        routers: By layer.
        target: What each router is regressed on.
        correlation: Of each router's logits with its target, on pictures left out of the fit.
        divergence: KL to the stock model, nats an answer token, on the samples of the search.
        steps: What was tried: a line each, with its divergence.
        thinned: By layer and ratio, the divergence with that layer alone changed; of the last round.
    """

    schedule: Schedule
    routers: dict[int, nn.Module] = field(default_factory=dict)
    target: dict[int, str] = field(default_factory=dict)
    correlation: dict[int, float] = field(default_factory=dict)
    divergence: float = 0.0
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

    def run(self, known: Sequence[Found] = ()) -> Found:
        """All steps. The result is at least as good as what is `known` within the budget."""
        if self.spends_nothing:
            return Found(self.whole)
        found = min([self._first_choice(), *known], key=lambda each: each.divergence)
        for _ in range(ROUNDS if found.divergence > NOISE else 0):
            better = self._other_ratios(found)
            if better is None:
                break
            found = better
        found = self._another_choice(found)
        return replace(found, steps=tuple(self.steps))

    @property
    def spends_nothing(self) -> bool:
        """Whether the budget is the whole model: then nothing changes."""
        return self.budget.total(self.whole.ratios, routers=0) <= self.budget.share + 1e-9

    def given(self, ratios: Sequence[float]) -> Found:
        """The best layer to choose, and router, for ratios that are given."""
        first = next((layer for layer, ratio in enumerate(ratios) if ratio < 1), None)
        if first is None:
            return Found(self.whole)
        tried = sorted({first, max(0, first - 1), max(0, first - 2), first // 2})
        options = [(chooser, [Schedule(tuple(ratios), (chooser,))]) for chooser in tried]
        return replace(self._best_of(options), steps=tuple(self.steps))

    def _first_choice(self) -> Found:
        ends = {self.layers}
        for most in SCARCE:
            ends.add(next((layer for layer, loss in enumerate(self.hidden) if loss <= most), self.layers))
        return self._best_of(self._options(ends, LEAST_RATIO) or self._options(ends, 0.0))

    def _options(self, ends: set[int], least: float) -> list[tuple[int, list[Schedule]]]:
        """Layers that may choose first, with a schedule for each depth that images may be hidden from."""
        options = []
        for chooser in self._choosers(max(ends)):
            schedules = []
            for end in sorted(ends):
                ratio = self._ratio(chooser, end)
                if ratio is not None and ratio >= least:
                    ratios = (1.0,) * chooser + (ratio,) * (end - chooser) + (0.0,) * (self.layers - end)
                    schedules.append(Schedule(ratios, (chooser,)))
            if schedules:
                options.append((chooser, schedules))
        return options

    def _choosers(self, end: int) -> list[int]:
        """Layers that may choose first: evenly spaced among those that the budget allows to be whole below them."""
        possible = [c for c in range(1, end) if self._ratio(c, min(end, self._last_needed(c))) is not None]
        step = max(1, math.ceil(len(possible) / CHOOSERS))
        return sorted({*possible[::step], *possible[-1:]}) or [0]

    def _last_needed(self, chooser: int) -> int:
        """The earliest depth that images may be hidden from."""
        return max(chooser + 1, next((i for i, loss in enumerate(self.hidden) if loss <= SCARCE[-1]), self.layers))

    def _ratio(self, chooser: int, end: int) -> float | None:
        """What layers `chooser` to `end` may keep, where those below keep all and those behind nothing."""
        if end <= chooser:
            return None
        return self.budget.solve([(chooser, 1.0), (end - chooser, None), (self.layers - end, 0.0)])

    def _best_of(self, options: Sequence[tuple[int, Sequence[Schedule]]]) -> Found:
        """Of layers that choose with schedules: all by the first target, then the best two by the others."""
        tried: list[Found] = []
        streams: list[Stream] | None = None
        for chooser, schedules in options:  # ascending: each starts where the one before stopped
            self.bench.apply(self.whole)
            streams = self.bench.streams_at(chooser, streams)
            tried += [self._with_router(Found(schedule), chooser, self.targets[0], streams) for schedule in schedules]
        for best in sorted(tried, key=lambda found: found.divergence)[:2]:
            chooser = best.schedule.select_at[0]
            self.bench.apply(self.whole)
            streams = self.bench.streams_at(chooser)
            tried += [self._with_router(Found(best.schedule), chooser, name, streams) for name in self.targets[1:]]
        return min(tried, key=lambda found: found.divergence)

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
        divergence = self.bench.divergence(streams)
        if divergence < min((before for _, before in self.steps), default=float("inf")):
            self.note(f"KL {divergence:.4f}: {name}")
        self.steps.append((name, divergence))
        return replace(found, divergence=divergence)

    def _other_ratios(self, found: Found) -> Found | None:
        """One round of step 2; None where nothing is better."""
        chooser = found.schedule.select_at[0]
        self.bench.apply(self.whole)
        start = self.bench.streams_at(chooser)
        self.bench.apply(found.schedule, found.routers)
        thinned = self.bench.thinned(start, chooser, (*LEVELS, 1.0))
        ratios = found.schedule.ratios
        losses = [{1.0: 0.0} for _ in range(chooser)]
        for layer in range(chooser, self.layers):
            losses.append({ratios[layer]: found.divergence, **thinned[layer]})
        best = replace(found, thinned=thinned)
        for reach in (len(LEVELS), 1):  # all ratios, then only the nearest ones: sums hold for small changes
            near = [_near(layer, ratios[i], reach) for i, layer in enumerate(losses)]
            chosen = best_ratios(near, self.budget)
            if chosen is None or tuple(chosen) == ratios:
                continue
            for other in {tuple(chosen): 0, tuple(self._filled(chosen)): 0}:
                schedule = replace(found.schedule, ratios=other)
                measured = self._measured(replace(best, schedule=schedule), describe(schedule), start)
                best = min(best, measured, key=lambda each: each.divergence)
        return best if _is_better(best, found) else None

    def _filled(self, ratios: Sequence[float]) -> list[float]:
        """The ratios between 0 and 1 raised by one factor, up to the budget."""
        low, high = 1.0, 4.0
        for _ in range(20):
            middle = (low + high) / 2
            over = self.budget.total([min(1.0, ratio * middle) for ratio in ratios]) > self.budget.share
            low, high = (low, middle) if over else (middle, high)
        return [round(min(1.0, ratio * low) - 5e-7, 6) if 0 < ratio < 1 else ratio for ratio in ratios]

    def _another_choice(self, found: Found) -> Found:
        """Step 3, at a few places behind the layer that chooses."""
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
    """Small differences are those of the samples: then the simpler settings stay."""
    return found.divergence < min(BETTER * before.divergence, before.divergence - NOISE)


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
