"""A look at the data before the first step: a sample, or every row."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import BadRow
from pmod_cli.data.dataset import Rows
from pmod_cli.data.vision import vision_ids

SAMPLE = 64  # rows looked at before every run


class Fault(NamedTuple):
    """A row that cannot be used: its number from 0, why, and what its ``id`` says, if it has one."""

    row: int
    reason: str
    id: str | None = None

    def __str__(self) -> str:
        return f"row {self.row}{'' if self.id is None else f' (id {self.id})'}: {self.reason}"


@dataclass
class DataReport:
    """What was found.

    Attributes:
        name: of the file or data set.
        rows: of the data set.
        checked: rows looked at, from the first to the last at equal distances.
        with_images: of those, rows with images or videos.
        cut: rows longer than ``max_length``.
        without_labels: rows that teach nothing, since they do not come out even in the template or were cut.
        tokens: sum over the good rows, after cutting.
        vision_tokens: those of them that stand for images and videos.
        longest: tokens of the longest row before cutting.
        longest_vision: its vision tokens.
        bad: the bad rows, all of them.
    """

    name: str
    rows: int
    checked: int = 0
    with_images: int = 0
    cut: int = 0
    without_labels: int = 0
    tokens: int = 0
    vision_tokens: int = 0
    longest: int = 0
    longest_vision: int = 0
    bad: list[Fault] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """How many."""
        return len(self.bad)

    @property
    def tokens_per_row(self) -> float:
        """Mean over the good rows."""
        return self.tokens / max(self.checked - self.num_bad, 1)

    @property
    def vision_tokens_per_row(self) -> float:
        """Mean over the good rows, with and without images."""
        return self.vision_tokens / max(self.checked - self.num_bad, 1)

    def longest_after(self, max_length: int | None) -> int:
        """Tokens of the longest row after cutting to ``max_length``."""
        return min(self.longest, max_length or self.longest)

    def add(self, other: "DataReport") -> None:
        """Take in what was found in later rows."""
        for name in ("checked", "with_images", "cut", "without_labels", "tokens", "vision_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        both = (self.longest, self.longest_vision), (other.longest, other.longest_vision)
        self.longest, self.longest_vision = max(both)
        self.bad += other.bad


def check_rows(
    rows: Rows,
    sample: int | None = SAMPLE,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Read rows, decode their images and tokenize them; nothing is raised for a bad row.

    Args:
        sample: number of rows to look at; None looks at all.
        workers: processes beside this one; None takes one a core where there are many rows to look at.
        on_progress: is told of rows done, and of how many.
    """
    count = len(rows) if sample is None else min(sample, len(rows))
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(np.int64))
    parts = np.array_split(chosen, max(1, len(chosen) // 256))
    if workers is None:
        workers = (os.cpu_count() or 1) if len(parts) >= 8 else 0
    report = DataReport(rows.source.name, len(rows))
    with ProcessPoolExecutor(workers) if workers else nullcontext() as pool:
        for found in (pool.map if pool else map)(partial(_look, rows), parts):
            report.add(found)
            if on_progress is not None:
                on_progress(report.checked, len(chosen))
    return report


def refuse_bad(report: DataReport, *, skip: bool = False) -> None:
    """Raises PmodError, naming the bad rows of a report, where there are any.

    Args:
        skip: bad rows are left out: refuse only where no good one was found.
    """
    if report.num_bad and (not skip or report.num_bad == report.checked):
        hint = "leave bad ones out with `data.on_bad_row=skip`"
        if skip:
            hint = "none is good: do the names of images start from `data.images`?"
        looked = "" if report.checked == report.rows else "look at all rows with `check_data=True`; "
        raise PmodError(describe_bad(report), hint=looked + hint)


def describe_bad(report: DataReport) -> str:
    """Which rows cannot be used, and why; the first ones."""
    lines = [str(fault) for fault in report.bad[:5]]
    if report.num_bad > len(lines):
        lines.append(f"and {report.num_bad - len(lines)} more")
    head = f"{report.num_bad} of {report.checked} rows looked at in {report.name} cannot be used:"
    return "\n  ".join([head, *lines])


def _look(rows: Rows, chosen: np.ndarray) -> DataReport:
    found, marks = DataReport(rows.source.name, len(rows)), vision_ids(rows.encoder.processor)
    for row in chosen.tolist():
        found.checked += 1
        try:
            conversation = rows.source[row]
            tokens = rows.encoder.check(conversation, rows.source.images)
        except BadRow as fault:
            found.bad.append(Fault(row, fault.what, rows.source.id_of(row)))
            continue
        found.with_images += bool(conversation.images or conversation.videos)
        found.cut += tokens.is_cut
        found.without_labels += not tokens.teaches
        vision = int(np.isin(tokens.ids, marks).sum())
        found.tokens += len(tokens.ids)
        found.vision_tokens += vision
        found.longest, found.longest_vision = max((found.longest, found.longest_vision), (tokens.whole, vision))
    return found
