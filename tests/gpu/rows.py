"""What a step reports: one row a number, written the moment it is known."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field

from pmod_cli.profiling.measure.clock import Timing


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        name: What was measured; with the step the row's key in a comparison.
        value: The number; a ratio is p-MoD over stock. None where there is none.
        unit: Of the value: `ratio`, `x`, `s`, `GiB`, `tests`, ...
        goal: The number that is aimed at; None without one.
        at_least: The goal is a floor.
        limit: What FLOPs or bytes allow, where the value is a ratio.
        seconds: Medians by model.
        spread: Half the distance of the quartiles over the median, by model.
        samples: Seconds of every call, by model.
        note: What a reader must know.
    """

    name: str
    value: float | None
    unit: str = "ratio"
    goal: float | None = None
    at_least: bool = False
    limit: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without goal or number."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def timed_row(
    name: str, timings: dict[str, Timing], *, stock: str, pmod: str, limit: float, beyond: float, **more
) -> Row:
    """The ratio of two models' times; its goal is `beyond` times its limit, or 1 where that is less.

    Args:
        name: Of the row.
        timings: By model.
        stock: Key of the stock model.
        pmod: Key of p-MoD.
        limit: Ratio that FLOPs or bytes allow.
        beyond: How far above the limit is still good.
        more: Other fields of the row.
    """
    return Row(
        name,
        timings[pmod].ratio(timings[stock]),
        goal=min(1.0, beyond * limit),
        limit=limit,
        seconds={key: timing.median() for key, timing in timings.items()},
        spread={key: timing.spread for key, timing in timings.items()},
        samples={key: [sample.seconds / timing.per for sample in timing.samples] for key, timing in timings.items()},
        **more,
    )


def faster_row(row: Row, goal: float | None) -> Row:
    """How many times faster p-MoD was, from the row of the ratio."""
    return Row(f"{row.name}: times faster", 1 / row.value, "x", goal, at_least=True)


def number_row(name: str, numbers: list[float], unit: str, **more) -> Row:
    """The median of several numbers."""
    return Row(name, statistics.median(numbers), unit, samples={"all": list(numbers)}, **more)


def emit(row: Row) -> None:
    """To the parent process, which writes it down at once."""
    sys.__stdout__.write(json.dumps(asdict(row) | {"met": row.met}) + "\n")
    sys.__stdout__.flush()
