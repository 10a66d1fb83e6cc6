"""Batches of synthetic documents for pre-training, with where each answer and each drawn thing lies among the tokens.

The collator gives the same tokens, labels and pixels (tested), but takes twenty times as long.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlavaNextProcessor

from pmod_cli.data.collator import IGNORED
from pmod_cli.data.documents import CELL, Box, Document, Mark, Turn, draw, seed_of

TEXT, NEWLINE = -1, -2
PROBED = ("shows", "belongs", "above", "tells", "row", "column", "more", "seeks")  # columns of words of a batch
LOOKS = ("up", "first", "last", "takes")


@dataclass(frozen=True)
class LookUps:
    """Q tokens that have to find something in their image.

    Attributes:
        tokens: int64 (Q, 2), row and position.
        looked_at: bool (Q, N), the vision tokens where it stands.
    """

    tokens: Tensor
    looked_at: Tensor

    def to(self, device: str) -> "LookUps":
        """The same on another device."""
        return LookUps(self.tokens.to(device), self.looked_at.to(device))


@dataclass(frozen=True)
class Batch:
    """B rows of N tokens, padded on the right, so that a causal decoder needs no mask.

    Attributes:
        inputs: what the model takes: input_ids int64 (B, N), pixel_values float32 (B, tiles, 3, side, side),
            image_sizes int64 (B, 2).
        patches: int64 (B, N), which patch of the row's views a vision token is, counted through all of them; NEWLINE
            where it ends a row of patches, TEXT where it is none.
        labels: int64 (B, N), -100 outside answers.
        weights: float32 (B, N), how much each label counts.
        shows, belongs, above: int64 (B, N), word ids of the fields of ``Mark`` on vision tokens, -100 elsewhere.
        tells: int64 (B, N), the first word id of ``Look.tells`` on a word of a question, -100 elsewhere.
        row, column: int64 (B, N), word ids of the row and the column of the field that an object stands in, on its
            vision tokens; -100 elsewhere, and everywhere where a bed does not ask for them.
        more: int64 (B, N), the second word id of ``Look.tells``, as ``tells``.
        seeks: int64 (B, N), on the tokens that an answer is said from, what the question's look-up has told them.
        up, first, last: the look-ups from a label to the one above it, those that come before the answer's, and the
            answer's.
        takes: the look-ups from the tokens that an answer is said from to the word of the question that has been told.
    """

    inputs: dict[str, Tensor]
    patches: Tensor
    labels: Tensor
    weights: Tensor
    shows: Tensor
    belongs: Tensor
    above: Tensor
    tells: Tensor
    row: Tensor
    column: Tensor
    more: Tensor
    seeks: Tensor
    up: LookUps
    first: LookUps
    last: LookUps
    takes: LookUps

    def to(self, device: str) -> "Batch":
        """The same on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "inputs"}
        return replace(self, inputs={name: value.to(device) for name, value in self.inputs.items()}, **moved)


class TinyBatches:
    """Draws batch number ``step`` of a split; the same step gives the same batch."""

    def __init__(self, processor: LlavaNextProcessor, recipe: Mapping):
        self.tokenizer = processor.tokenizer
        self.recipe = recipe
        self.tile = recipe["image"]["tile"]
        self.encode = lru_cache(maxsize=None)(self._encode)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def documents(self, step: int, mix: Sequence[str]) -> list[Document]:
        """The training documents of one step, of the tasks of ``mix`` in turn."""
        documents = []
        for index in range(step * self.recipe["batch_size"], (step + 1) * self.recipe["batch_size"]):
            seed = seed_of("train", index)
            wide = Random(seed).random() < self.recipe["wide"]
            documents.append(draw(mix[index % len(mix)], seed, (96, 48) if wide else (96, 96)))
        return documents

    def steps(self, steps: range, mix: Sequence[str], workers: int = 0) -> Iterator[Batch]:
        """The batches of some steps in order, drawn ahead by ``workers`` processes; the same for any number."""
        loader = DataLoader(_Steps(self, mix), batch_size=None, sampler=steps, num_workers=workers)
        return iter(loader)

    def __call__(self, documents: list[Document]) -> Batch:
        """Tokens, pixels and grounding targets of some documents."""
        rows = [Row(self, document) for document in documents]
        sizes = torch.tensor([document.image.size[::-1] for document in documents])
        return self.padded(rows, pixel_values=self.pixels([d.image for d in documents]), image_sizes=sizes)

    def padded(self, rows: Sequence["Row"], **pixels: Tensor) -> Batch:
        """The columns of some rows of tokens, one length, and what the model takes of their images."""
        multiple = self.recipe["pad_to_multiple_of"]
        length = -(-max(len(row.ids) for row in rows) // multiple) * multiple
        pad = self.tokenizer.pad_token_id

        def column(name: str, fill: float) -> Tensor:
            values = [row.words[name] if name in PROBED else getattr(row, name) for row in rows]
            return torch.tensor([each + [fill] * (length - len(each)) for each in values])

        def look_ups(name: str) -> LookUps:
            looks = [(b, position, tokens) for b, row in enumerate(rows) for position, tokens in row.looks[name]]
            looked_at = torch.zeros(len(looks), length, dtype=torch.bool)
            for q, (_, _, tokens) in enumerate(looks):
                looked_at[q, tokens] = True
            return LookUps(torch.tensor([look[:2] for look in looks]).view(-1, 2), looked_at)

        return Batch(
            inputs={"input_ids": column("ids", pad), **pixels},
            patches=column("patches", TEXT),
            labels=column("labels", IGNORED),
            weights=column("weights", 0.0),
            **{name: column(name, IGNORED) for name in PROBED},
            **{name: look_ups(name) for name in LOOKS},
        )

    def pixels(self, images: list[Image.Image]) -> Tensor:
        """The base view and the tiles of each image, float32 (B, tiles, 3, side, side), short rows padded with zeros.

        Image sides must be multiples of the tile, so that nothing is resized but the base view.
        """
        views = [self._views(image) for image in images]
        batch = np.zeros((len(views), max(map(len, views)), *views[0].shape[1:]), dtype=np.float32)
        for row, view in zip(batch, views, strict=True):
            row[: len(view)] = view
        return torch.from_numpy(batch)

    def _views(self, image: Image.Image) -> np.ndarray:
        side = self.tile
        columns, rows = image.width // side, image.height // side
        tiles = np.asarray(image).reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        base = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))[None]
        views = np.concatenate([base, tiles]).astype(np.float32)
        return ((views / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class _Steps:
    """The batch of each step, for a loader."""

    batches: TinyBatches
    mix: Sequence[str]

    def __getitem__(self, step: int) -> Batch:
        return self.batches(self.batches.documents(step, self.mix))


class Row:
    """One document as tokens, built turn by turn."""

    def __init__(self, batches: "TinyBatches", document: Document):
        self.encode, self.weight_of = batches.encode, batches.recipe["weights"]
        self.eos = batches.tokenizer.eos_token_id
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []
        self.patches: list[int] = []
        self.words: dict[str, list[int]] = {name: [] for name in PROBED}
        self.looks: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in LOOKS}
        self._open(batches, document)
        for mark in document.marks:
            for token in self._tokens(mark.box):
                self._point(mark, token)
                if mark.above:
                    self.words["above"][token] = self.encode(mark.above)[0]
                    label = [other for other in document.marks if other.belongs == mark.above and other.shows.isalpha()]
                    self.looks["up"].append((token, [place for other in label for place in self._tokens(other.box)]))
        for i, turn in enumerate(document.turns[: batches.recipe["turns"]]):
            asked = len(self.ids)
            self._ask(turn, is_first=i == 0)
            for look in turn.looks:
                position = self.ids.index(self.encode(look.word)[0], asked)
                self.looks["first"].append((position, self._tokens(look.box)))
                self.words["tells"][position] = self.encode(look.tells)[0]
            self._answer(turn)

    def _open(self, batches: "TinyBatches", document: Document) -> None:
        """All that comes before the first question."""
        self.columns, rows = document.image.width // CELL, document.image.height // CELL
        self._say([batches.tokenizer.bos_token_id, *self.encode("USER:")])
        side = batches.tile // CELL  # patches to a tile
        self.start = len(self.ids) + side**2  # where the tiles' tokens start, after the base view's
        self._say(self.encode("<image>") * (side**2 + rows * (self.columns + 1)))
        self.patches[self.start - side**2 :] = _places(side, self.columns, rows)

    def _point(self, mark: Mark, token: int) -> None:
        """What a token shows, and what it takes its neighbours to tell."""
        self.words["shows"][token] = self.encode(mark.shows)[0]
        self.words["belongs"][token] = self.encode(mark.belongs)[0]

    def _ask(self, turn: Turn, is_first: bool) -> None:
        self._say(self.encode(("" if is_first else "USER: ") + turn.question) + self.encode("ASSISTANT:"))

    def _say(self, ids: list[int]) -> None:
        self.ids += ids
        self.weights += [0.0] * len(ids)
        self.patches += [TEXT] * len(ids)
        for values in (self.labels, *self.words.values()):
            values += [IGNORED] * len(ids)

    def _answer(self, turn: Turn) -> None:
        ids = self.encode(turn.answer)
        boxes = _slices(turn.region, len(ids)) if turn.region else []
        self.looks["last"] += [(len(self.ids) - 1 + i, self._tokens(box)) for i, box in enumerate(boxes)]
        kind = "number" if turn.answer.isdigit() else "yes_no" if turn.answer in ("yes", "no") else "word"
        start = len(self.ids)
        self._say([*ids, self.eos])
        self.labels[start:] = self.ids[start:]
        self.weights[start:] = [self.weight_of[kind]] * len(ids) + [self.weight_of["end"]]

    def _tokens(self, box: Box) -> list[int]:
        """The tile tokens a box covers by half at least; each row of patches ends in one newline token."""
        x0, y0, x1, y1 = (round(side / CELL) for side in box)
        return [
            self.start + y * (self.columns + 1) + x
            for y in range(y0, max(y1, y0 + 1))
            for x in range(x0, max(x1, x0 + 1))
        ]


@cache
def _places(side: int, columns: int, rows: int) -> list[int]:
    """``Batch.patches`` of an image: the base view, then the rows of its tiles, each with a newline at its end."""
    across = columns // side
    cell = [
        [
            side**2 * (1 + y // side * across + x // side) + y % side * side + x % side if x < columns else NEWLINE
            for x in range(columns + 1)
        ]
        for y in range(rows)
    ]
    return [*range(side**2), *(place for row in cell for place in row)]


def _slices(box: Box, count: int) -> list[Box]:
    """A box cut into ``count`` equal parts from left to right: one for each digit of a number."""
    x0, y0, x1, y1 = box
    step = (x1 - x0) // count
    return [(x0 + i * step, y0, x0 + (i + 1) * step, y1) for i in range(count)]
