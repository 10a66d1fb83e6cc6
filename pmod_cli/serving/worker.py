"""The one thread that runs the model: requests that have come together are prefilled together and join the batch.

Between two tokens rows leave that are done, and rows come that wait. So a request is never kept waiting for the end of
another one, and whoever is alone is answered at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pmod_cli.core.errors import explain
from pmod_cli.evaluation.prompts import Prompt
from pmod_cli.serving.generation import Answerer, Batch, BatchRow, Sampling
from pmod_cli.serving.metrics import Metrics
from pmod_cli.serving.text_stream import TextStream

FAILED = "the model failed on this request"


@dataclass(frozen=True)
class Piece:
    """More of an answer, or its end.

    Attributes:
        text: what comes next; may be empty.
        finished: `stop` or `length` with the last piece.
        new_tokens: of the whole answer, with the last piece.
        error: a sentence, where there will be no answer.
    """

    text: str = ""
    finished: str | None = None
    new_tokens: int = 0
    error: str | None = None


@dataclass(eq=False)
class Ticket:
    """A request on its way through the worker.

    Attributes:
        prompt: what is asked.
        sampling: how tokens are chosen.
        stop: strings that end the answer.
        deliver: takes the pieces; called in the thread of the worker, so it must not block.
        left: set by whoever has no use for the answer any more.
    """

    prompt: Prompt
    sampling: Sampling
    stop: Sequence[str]
    deliver: Callable[[Piece], Any]
    left: bool = False
    came: float = field(default_factory=time.perf_counter)


class Worker:
    """Answers tickets in a thread of its own.

    Args:
        answerer: The model; nobody else may use it meanwhile.
        max_batch: Rows of the batch.
        metrics: What is counted.
    """

    def __init__(self, answerer: Answerer, *, max_batch: int, metrics: Metrics) -> None:
        self._answerer, self._max_batch, self._metrics = answerer, max_batch, metrics
        self._waiting: deque[Ticket] = deque()
        self._news = threading.Condition()  # of tickets that come or go, and of the end
        self._batch: Batch | None = None
        self._of: dict[BatchRow, tuple[Ticket, TextStream]] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Puts a ticket in the queue."""
        with self._news:
            self._waiting.append(ticket)
            self._metrics.waiting.set(len(self._waiting))
            self._news.notify()

    def withdraw(self, ticket: Ticket) -> None:
        """Forgets a ticket: what waits for a place would hold its pixels until then, whoever has left."""
        ticket.left = True
        with self._news:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._metrics.waiting.set(len(self._waiting))

    def close(self) -> None:
        """Answers what is in the queue, and ends the thread."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    @property
    def bytes_waiting(self) -> int:
        """What the prompts take that wait: pixels, nearly all of it."""
        with self._news:
            return sum(ticket.prompt.nbytes for ticket in self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (new := self._take()) or self._batch is not None:
            for group in _alike(new):
                self._admit(group)
            if self._batch is not None:
                self._step(self._batch)

    def _room(self) -> int:
        return self._max_batch - len(self._of)

    def _take(self) -> list[Ticket]:
        """What waits, as far as there is room; where nothing runs, waits for a ticket, or for the end."""
        with self._news:
            while not (self._waiting or self._batch or self._closing):
                self._news.wait()
            new = [self._waiting.popleft() for _ in range(min(self._room(), len(self._waiting)))]
            self._metrics.waiting.set(len(self._waiting))
        return new

    def _admit(self, tickets: Sequence[Ticket]) -> None:
        """Prefills some tickets together; where that fails, each alone, so that it fails for its own reason."""
        rows = [BatchRow(ticket.prompt, ticket.sampling) for ticket in tickets]
        try:
            batch = self._answerer.prefill(rows)
        except Exception as error:
            if len(tickets) == 1:
                self._fail(tickets, error)
                return
            for ticket in tickets:
                self._admit([ticket])
            return
        if self._batch is None:
            self._batch = batch
        else:
            try:
                self._batch.join(batch)
            except Exception as error:  # layers may be joined in part
                self._fail_all(error, tickets)
                return
        for ticket in tickets:
            ticket.prompt.drop_pixels()  # an answer takes minutes, and a picture may take hundreds of megabytes
        self._metrics.prefill_rows.observe(len(rows))
        for row, ticket in zip(rows, tickets, strict=True):
            self._of[row] = ticket, TextStream(self._answerer.processor.tokenizer, ticket.stop)
            self._metrics.prompt_tokens.inc(ticket.prompt.length)
            self._metrics.first_token.observe(time.perf_counter() - ticket.came)
        self._deliver(self._batch, rows)

    def _step(self, batch: Batch) -> None:
        """Gives every row a token."""
        try:
            batch.step()
        except Exception as error:
            self._fail_all(error)
            return
        self._metrics.step_rows.observe(len(batch.rows))
        self._deliver(batch, batch.rows)

    def _deliver(self, batch: Batch, rows: Sequence[BatchRow]) -> None:
        """Lets rows go that are done, and hands out what the newest tokens say."""
        try:
            said, done = self._said(rows), batch.drop_finished()
        except Exception as error:  # memory may run out here too, and the thread has to live
            self._fail_all(error)
            return
        self._metrics.new_tokens.inc(len(rows))
        for row in done:
            ticket, _ = self._of.pop(row)
            self._metrics.duration.observe(time.perf_counter() - ticket.came)
        if not batch.rows:
            self._batch = None
        self._count()
        for ticket, news in said:
            ticket.deliver(news)

    def _said(self, rows: Sequence[BatchRow]) -> list[tuple[Ticket, Piece]]:
        """What the newest tokens say, and to whom; rows that end are marked."""
        said = []
        for row in rows:
            ticket, text = self._of[row]
            more = "" if row.ids[-1] in self._answerer.end_ids else text.add(row.ids[-1])
            if text.stopped:
                row.finished = "stop"
            if ticket.left:
                row.finished = "left"
            elif row.finished:
                said.append((ticket, Piece(more + text.end(), row.finished, len(row.ids))))
            elif more:
                said.append((ticket, Piece(more)))
        return said

    def _count(self) -> None:
        layers = [] if self._batch is None else self._batch.cache.layers
        self._metrics.running.set(len(self._of))
        self._metrics.kv_bytes.set(sum(each.nbytes for layer in layers for each in (layer.keys, layer.values)))

    def _fail_all(self, error: Exception, more: Sequence[Ticket] = ()) -> None:
        """Gives the batch up: nobody knows what is left of it."""
        self._fail([*(ticket for ticket, _ in self._of.values()), *more], error)
        self._of.clear()
        self._batch = None
        self._count()

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        known = explain(error)
        for ticket in tickets:
            ticket.deliver(Piece(error=known.what if known else f"{FAILED}: {type(error).__name__}"))


def _alike(tickets: Sequence[Ticket]) -> list[list[Ticket]]:
    """Groups for one prefill each: no prompt is filled up by more than a quarter: padding costs as tokens do."""
    groups: list[list[Ticket]] = []
    for ticket in sorted(tickets, key=lambda each: -each.prompt.length):
        if groups and groups[-1][0].prompt.length <= 1.25 * ticket.prompt.length:
            groups[-1].append(ticket)
        else:
            groups.append([ticket])
    return groups
