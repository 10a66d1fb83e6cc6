"""Batches of synthetic documents for pre-training: stills of one size, pairs of pictures or films, one kind a batch.

The collator gives the same tokens, labels and pixels (tested), but takes many times as long.
"""

from dataclasses import replace
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLProcessor

from pmod_cli.data.documents import CELL, COLOURS, TASKS, Box, Document, Look, Mark, Turn, draw, field_of, seed_of
from pmod_cli.data.several import PER_SECOND, draw_several
from tests.beds.tiny_llava_next import batches as llava_next
from tests.beds.tiny_llava_next.batches import Batch


def document_of(task: str, split: str, index: int, size: tuple[int, int] = (96, 96)) -> Document:
    """Document ``index`` of a task of one or of several pictures; ``size`` (width, height) is that of a still one."""
    return draw(task, seed_of(split, index), size) if task in TASKS else draw_several(task, seed_of(split, index))


def with_looks(document: Document) -> Document:
    """The document with a look-up more for each question about an object: from the word that names it to the object.

    What it tells there is asked: its colour, its shape, its field or its picture.
    """
    objects = {mark.box: mark for mark in document.marks if mark.shows in COLOURS}

    def looking(turn: Turn) -> Turn:
        found = objects.get(turn.region)
        if found is None:
            return turn
        word = found.shows if turn.answer == found.belongs else found.belongs
        return replace(turn, looks=(Look(word, found.box, turn.answer),))

    return replace(document, turns=[looking(turn) for turn in document.turns])


class TinyBatches(llava_next.TinyBatches):
    """Draws a group of documents of a step; the same step and group give the same batch."""

    def __init__(self, processor: Qwen3VLProcessor, recipe: dict):
        super().__init__(processor, recipe | {"image": {"tile": 0, **recipe["image"]}})
        self.processor = processor
        image = recipe["image"]
        self.patch, self.merge, self.temporal = image["patch"], image["merge"], image["temporal"]

    def group(self, step: int, group: dict) -> list[Document]:
        """The documents of one group of a step: ``rows`` of the tasks of ``mix`` in turn, all of one size."""
        numbers = range(step * group["rows"], (step + 1) * group["rows"])
        size = tuple(Random(step).choice(group.get("sizes", [(96, 96)])))
        mix = group["mix"]
        return [with_looks(document_of(mix[n % len(mix)], "train", n, size)) for n in numbers]

    def __call__(self, documents: list[Document]) -> Batch:
        """Tokens, pixels, positions and grounding targets of some documents, all films or none."""
        rows = [Row(self, document) for document in documents]
        batch = self.padded(rows)
        length = batch.labels.shape[1]
        positions = np.zeros((3, len(rows), length), dtype=np.int64)
        for b, row in enumerate(rows):
            positions[:, b, : len(row.ids)] = np.concatenate(row.positions, axis=1)
        seen = batch.patches >= 0
        batch.patches[seen] = torch.arange(int(seen.sum()))
        kind = "video" if documents[0].is_film else "image"
        films = "_videos" if documents[0].is_film else ""
        grids = [grid for document in documents for grid in self.grids(document)]
        inputs = {
            "input_ids": batch.inputs["input_ids"],
            "position_ids": torch.from_numpy(positions),
            f"pixel_values{films}": torch.cat([self.pixels(document) for document in documents]),
            f"{kind}_grid_thw": torch.tensor(grids),
        }
        return replace(batch, inputs=inputs)

    def grids(self, document: Document) -> list[list[int]]:
        """Time, rows and columns of patches of each picture, or of the film."""
        width, height = document.image.width // document.pictures, document.image.height
        grid = [height // self.patch, width // self.patch]
        return [[document.pictures // self.temporal, *grid]] if document.is_film else [[1, *grid]] * document.pictures

    def pixels(self, document: Document) -> Tensor:
        """The patches of a document in the order of the model, float32 (P, channels x frames x side x side)."""
        frames = np.stack([np.asarray(image) for image in document.images])
        t, m, side = self.temporal, self.merge, self.patch
        frames = frames.reshape(-1, t, *frames.shape[1:]) if document.is_film else frames[:, None].repeat(t, 1)
        n, _, height, width, channels = frames.shape
        frames = (frames.astype(np.float32) / 255 - 0.5) / 0.5
        cut = frames.reshape(n, t, height // side // m, m, side, width // side // m, m, side, channels)
        return torch.from_numpy(cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * t * side * side))


class Row(llava_next.Row):
    """One document as tokens, built turn by turn, with their positions in three parts."""

    def _open(self, batches: TinyBatches, document: Document) -> None:
        self.positions: list[np.ndarray] = []
        self.at = 0  # the position of the next token of text
        self.begin, self.end = (batches.encode(token) for token in ("<|im_start|>", "<|im_end|>"))
        start, end = batches.encode("<|vision_start|>"), batches.encode("<|vision_end|>")
        self.columns, rows = document.image.width // document.pictures // CELL, document.image.height // CELL
        self.together = batches.temporal if document.is_film else 1  # pictures that share their tokens
        self.starts: list[int] = []
        places = batches.encode("<|video_pad|>" if document.is_film else "<|image_pad|>") * (rows * self.columns)
        self._say(self.begin + self.encode("user") + start * document.is_film)
        for number in range(document.pictures // self.together):
            if document.is_film:
                seconds = self.together * (number + 0.5) / PER_SECOND - 0.5 / PER_SECOND
                self._say(self.encode(f"<{seconds:.1f} seconds>"))
            self._say(start)
            self.starts.append(len(self.ids))
            self._look(places, rows)
            self._say(end)
        self._say(end * document.is_film)

    def _point(self, mark: Mark, token: int) -> None:
        super()._point(mark, token)
        if mark.place:
            self.words["above"][token] = self.encode(mark.place)[0]
        elif mark.shows in COLOURS:
            field = self.encode(field_of(mark.box))
            self.words["row"][token], self.words["column"][token] = field

    def _answer(self, turn: Turn) -> None:
        """What a question's one look-up has told goes from its word to the tokens that the answer is said from."""
        start = len(self.ids) - 1
        super()._answer(turn)
        if len(turn.looks) != 1 or turn.region is None:
            return
        (look,) = turn.looks
        told = self.encode(look.tells)
        word = max(i for i in range(start) if self.ids[i] == self.encode(look.word)[0])
        if len(told) > 1:
            self.words["more"][word] = told[1]
        for i in range(len(self.encode(turn.answer))):
            self.looks["takes"].append((start + i, [word]))
            self.words["seeks"][start + i] = told[min(i, len(told) - 1)]

    def _ask(self, turn: Turn, is_first: bool) -> None:
        again = [] if is_first else self.begin + self.encode("user")
        self._say(again + self.encode(turn.question) + self.end + self.begin + self.encode("assistant"))

    def _say(self, ids: list[int]) -> None:
        super()._say(ids)
        self.positions.append(np.tile(np.arange(self.at, self.at + len(ids)), (3, 1)))
        self.at += len(ids)

    def _look(self, ids: list[int], rows: int) -> None:
        """The tokens of one picture: one time, and a row and a column each."""
        before = self.at
        self._say(ids)
        self.patches[-len(ids) :] = [0] * len(ids)
        down, across = np.divmod(np.arange(len(ids)), self.columns)
        self.positions[-1] = before + np.stack([np.zeros_like(down), down, across])
        self.at = before + max(rows, self.columns)

    def _tokens(self, box: Box) -> list[int]:
        """The tokens that a box covers by half at least, in its picture."""
        number = box[0] // (self.columns * CELL)
        x0, y0, x1, y1 = (round(side / CELL) for side in box)
        x0, x1 = x0 - number * self.columns, x1 - number * self.columns
        start = self.starts[number // self.together]
        return [start + y * self.columns + x for y in range(y0, max(y1, y0 + 1)) for x in range(x0, max(x1, x0 + 1))]
