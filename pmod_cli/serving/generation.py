"""Generation in a batch that rows join and leave, each answered as it would be alone.

Rows of any age decode together: keys and values are moved to the end of each cache layer, a row with fewer of them is
filled up in front, and what is a filler is masked. A layer of a p-MoD model holds fewer tokens than the sequence has,
each layer its own number, so every layer has its own count for each row. Positions are in the keys already, so slots
may move.

Shapes: B rows, N tokens of the padded prefill, S slots of a cache layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.prompts import Prompt, collate, special_ids
from pmod_cli.families.configs import context_of
from pmod_cli.model.cache import CACHE_NAME, RoutedDynamicLayer

MAX_NEW_TOKENS = 512  # where nobody sets a limit
COLDEST = 1e-3  # temperature: logits that are divided by less overflow, and this one draws the likeliest as well


@dataclass(frozen=True)
class Sampling:
    """How the next token of a row is chosen.

    Attributes:
        max_new_tokens: length limit of the answer.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that is drawn from.
        seed: of the draws; None: another each time.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class BatchRow:
    """One answer in the making.

    Attributes:
        prompt: what is asked.
        sampling: how its tokens are chosen.
        ids: of the answer so far, the token that ends it included.
        finished: `stop` or `length` once the answer has ended; set from outside, it ends the answer.
        slots: by layer, how many slots of the cache the prompt took.
    """

    prompt: Prompt
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    finished: str | None = None
    slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Makes the generator of the draws, on the CPU: equal seeds draw equal tokens on all devices."""
        self._draws = torch.Generator()
        if self.sampling.seed is None:
            self._draws.seed()
        else:
            self._draws.manual_seed(self.sampling.seed)

    def slots_now(self, layer: int) -> int:
        """Slots that the row takes in a layer: of the prompt, and of all its own tokens but the newest."""
        return self.slots[layer] + max(len(self.ids) - 1, 0)

    def draw(self, logits: Tensor) -> int:
        """A token drawn from logits `(vocabulary,)`."""
        scores, temperature = logits.cpu()[None], max(self.sampling.temperature, COLDEST)
        for warp in (TemperatureLogitsWarper(temperature), TopPLogitsWarper(self.sampling.top_p)):
            scores = warp(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._draws))


class Batch:
    """Rows that are decoded together, one token a step."""

    def __init__(self, answerer: Answerer, rows: list[BatchRow], cache: Cache, real: Tensor, deltas: Tensor) -> None:
        """See `Answerer.prefill`, which makes batches.

        Args:
            answerer: Holds the model.
            rows: B rows.
            cache: Keys and values of what has been processed.
            real: `(B, S)` bool, real tokens of the sequence, padding in front.
            deltas: `(B, 1)` int64, what the position of a later token is ahead of the number of tokens before it.
        """
        self.answerer, self.rows, self.cache, self.real, self.deltas = answerer, rows, cache, real, deltas
        self.newest = real.new_zeros((len(rows), 1), dtype=torch.int64)  # (B, 1), chosen and not yet processed

    @torch.inference_mode()
    def step(self) -> None:
        """Gives every row its next token."""
        self._process(self.newest)

    @torch.inference_mode()
    def extend(self, row: BatchRow, ids: Sequence[int], *, without: int = 0) -> None:
        """Puts more text behind the one row of the batch, and chooses the first token of the answer to it.

        Args:
            row: Takes the place of the row whose tokens are in the cache.
            ids: The text.
            without: Tokens at the end of the cache that are taken out first.

        Raises:
            ValueError: They reach into vision tokens, of which a layer keeps only some.
        """
        if without:
            self.cache.crop(-without)
            self.real = self.real[:, : self.real.shape[1] - without]
        self.rows = [row]
        self._process(torch.tensor([list(ids)], device=self.real.device))
        row.slots = _widths(self.cache)

    def _process(self, ids: Tensor) -> None:
        """Runs the model on `(B, T)` tokens behind those in the cache, and chooses what comes next."""
        before = self.real.sum(dim=1, keepdim=True)
        self.real = F.pad(self.real, (0, ids.shape[1]), value=True)
        positions = before + self.deltas + torch.arange(ids.shape[1], device=ids.device)  # (B, T)
        result = self.answerer.forward(
            input_ids=ids,
            attention_mask=self._mask(),
            position_ids=self.answerer.shaped(positions),
            **{CACHE_NAME: self.cache},
        )
        self.choose(result.logits[:, -1])

    def _mask(self) -> Tensor | None:
        """`(B, S)`; None where nothing is padded, so that kernels need none."""
        return self.real.long() if self.padded else None

    @property
    def padded(self) -> bool:
        """Whether a row is shorter than another one."""
        return len({row.prompt.length + len(row.ids) for row in self.rows}) > 1

    def choose(self, logits: Tensor) -> None:
        """Adds a token to each row from logits `(B, vocabulary)`, and says which rows are finished."""
        logits = self.answerer.penalised(logits.float(), self.rows)
        chosen = logits.argmax(dim=-1).tolist()  # waits for the device
        for place, row in enumerate(self.rows):
            if row.sampling.temperature:
                chosen[place] = row.draw(logits[place])
            row.ids.append(chosen[place])
            if chosen[place] in self.answerer.end_ids:
                row.finished = row.finished or "stop"
            elif len(row.ids) >= row.sampling.max_new_tokens:
                row.finished = row.finished or "length"
        self.newest = torch.tensor(chosen, device=logits.device).unsqueeze(1)

    @torch.inference_mode()
    def join(self, other: Batch) -> None:
        """Takes over the rows of another batch, which is of no use afterwards.

        Raises:
            PmodError: A layer's cache cannot be joined, such as one of a sliding window.
        """
        for layer, (mine, its) in enumerate(zip(self.cache.layers, other.cache.layers, strict=True)):
            _check(mine)
            slots = max(row.slots_now(layer) for row in (*self.rows, *other.rows))
            mine.keys, mine.values = (
                torch.cat([_in_front(ours, slots), _in_front(theirs, slots)])
                for ours, theirs in ((mine.keys, its.keys), (mine.values, its.values))
            )
            if isinstance(mine, RoutedDynamicLayer):
                mine.shift = _both_shifts(mine.shift, its.shift, len(self.rows), len(other.rows))
        longest = max(self.real.shape[1], other.real.shape[1])
        self.real = torch.cat([_in_front(each.real[..., None], longest)[..., 0] for each in (self, other)])
        self.deltas, self.newest = (
            torch.cat([getattr(self, name), getattr(other, name)]) for name in ("deltas", "newest")
        )
        self.rows = [*self.rows, *other.rows]
        self._mark()

    @torch.inference_mode()
    def drop_finished(self) -> list[BatchRow]:
        """Takes finished rows out of the batch and returns them; the memory that only they needed is free again."""
        done = [row for row in self.rows if row.finished]
        places = [place for place, row in enumerate(self.rows) if not row.finished]
        if not done or not places:
            self.rows = [self.rows[place] for place in places]
            return done
        self.rows, index = [self.rows[place] for place in places], torch.tensor(places, device=self.real.device)
        longest = max(row.prompt.length + len(row.ids) - 1 for row in self.rows)
        self.real = self.real[index, self.real.shape[1] - longest :]
        self.deltas, self.newest = self.deltas[index], self.newest[index]
        self.cache.batch_select_indices(index)
        for layer, cached in enumerate(self.cache.layers):
            slots = max(row.slots_now(layer) for row in self.rows)
            # A copy: a view would hold the memory of what was cut off.
            cached.keys, cached.values = cached.keys[:, :, -slots:].clone(), cached.values[:, :, -slots:].clone()
        self._mark()
        return done

    def align(self) -> None:
        """Behind a prefill of several rows: moves the fillers of every layer in front of its real slots."""
        counts = []
        for layer in self.cache.layers:
            _check(layer)
            slots, valid = layer.keys.shape[-2], getattr(layer, "valid", None)
            if valid is not None:
                order = valid[:, :slots].byte().argsort(dim=1, stable=True)[:, None, :, None]  # fillers first
                layer.keys = layer.keys.gather(2, order.expand_as(layer.keys))
                layer.values = layer.values.gather(2, order.expand_as(layer.values))
                counts.append(valid[:, :slots].sum(dim=1))
            elif getattr(layer, "skipped", 0):  # all rows keep equally many
                counts.append(self.real.new_full((len(self.rows),), slots, dtype=torch.int64))
            else:  # the whole sequence, padded in front already
                counts.append(self.real.sum(dim=1))
        for row, slots in zip(self.rows, torch.stack(counts, dim=1).tolist(), strict=True):  # waits for the device once
            row.slots = slots
        self._mark()

    def _mark(self) -> None:
        """Tells the routed layers which of their slots are fillers, and how many tokens have none."""
        marks: dict[tuple[int, ...], Tensor | None] = {}
        for index, layer in enumerate(self.cache.layers):
            if not isinstance(layer, RoutedDynamicLayer):
                continue
            widths, slots = tuple(row.slots_now(index) for row in self.rows), layer.keys.shape[-2]
            if widths not in marks:
                empty = slots - torch.tensor(widths, device=self.real.device)
                places = torch.arange(slots, device=self.real.device)
                marks[widths] = None if min(widths) == slots else places >= empty.unsqueeze(1)
            layer.valid, layer.skipped, layer.croppable = marks[widths], self.real.shape[1] - slots, 0


class Answerer:
    """A model and its processor, ready to answer.

    Args:
        model: Any stock or p-MoD model in eval mode.
        processor: Its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.end_ids, self.pad_id = special_ids(model, processor)
        penalty = model.generation_config.repetition_penalty
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty not in (None, 1.0) else None
        self._has_deltas = hasattr(model.model, "rope_deltas")  # positions of three parts (Qwen-VL)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer that the model takes at most, where its configuration says it."""
        return context_of(self.model.config)

    @torch.inference_mode()
    def prefill(self, rows: list[BatchRow]) -> Batch:
        """Processes the prompts of B rows as one left-padded batch, and chooses the first token of each."""
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in collate([row.prompt for row in rows], self.pad_id).items()
        }
        real = inputs.pop("attention_mask").bool()
        padded = len({row.prompt.length for row in rows}) > 1
        sees = self._has_deltas and any(name.startswith("pixel_values") for name in inputs)
        # Where a picture shifts the positions, the model itself finds them.
        positions = {} if sees else {"position_ids": self.shaped((real.cumsum(dim=1) - 1).clamp_(min=0))}
        result = self.forward(**inputs, attention_mask=real.long() if padded or sees else None, **positions)
        deltas = self.model.model.rope_deltas.clone() if sees else real.new_zeros((len(rows), 1), dtype=torch.int64)
        batch = Batch(self, rows, result[CACHE_NAME], real, deltas)
        if len(rows) > 1:
            batch.align()
        else:
            rows[0].slots = _widths(batch.cache)
        batch.choose(result.logits[:, -1])
        return batch

    def forward(self, **inputs: Any) -> Any:
        """The model's forward as `generate` calls it: with a cache, and the logits of the last token alone."""
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    def shaped(self, positions: Tensor) -> Tensor:
        """Positions `(B, T)` of text as the model takes them."""
        return positions.expand(3, -1, -1) if self._has_deltas else positions

    def penalised(self, logits: Tensor, rows: Sequence[BatchRow]) -> Tensor:
        """Logits `(B, vocabulary)` under the repetition penalty of the checkpoint, if it has one."""
        if self._penalty is None:
            return logits
        said = [row.prompt.inputs["input_ids"].tolist() + row.ids for row in rows]
        each = [self._penalty(torch.tensor([ids], device=logits.device), logits[[i]]) for i, ids in enumerate(said)]
        return torch.cat(each)


def _widths(cache: Cache) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def _check(layer: Any) -> None:
    if type(layer) not in (DynamicLayer, RoutedDynamicLayer):
        raise PmodError(
            f"a cache layer of the kind {type(layer).__name__} cannot be answered in batches", hint="`max_batch=1`"
        )


def _in_front(states: Tensor, slots: int) -> Tensor:
    """`(..., S, d)` with fillers in front: S becomes `slots`; more than that many are cut off in front."""
    return F.pad(states, (0, 0, slots - states.shape[-2], 0))


def _both_shifts(mine: Any, its: Any, own: int, others: int) -> Any:
    """The rotations of a layer with renumbered positions, `(B, 1, d)` each, of two batches; None: no rotation."""
    if mine is None and its is None:
        return None
    like = (mine or its)[0]

    def of(shift: Any, rows: int) -> Any:
        return shift or (like.new_ones(rows, *like.shape[1:]), like.new_zeros(rows, *like.shape[1:]))

    return tuple(torch.cat(pair) for pair in zip(of(mine, own), of(its, others), strict=True))
