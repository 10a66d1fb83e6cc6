"""The word that each patch shows, and the loss that makes its projected feature the embedding of this word.

The language model then sees writing laid out in two dimensions, in its own words, and has only to learn to look. Where
there are two words to say, as of a red circle, patches say them in turn: ``red circle red``, as text would.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from pmod_cli.data.documents import CELL, COLOURS, SHAPES, Document, Mark
from pmod_cli.data.glyphs import CHARACTERS

BLANK, BAR, LONGEST, TEXT = "blank", "bar", "longest", "text"  # TEXT is too small to read, in the base view
WORDS = (*CHARACTERS, *COLOURS, *SHAPES, BAR, LONGEST, TEXT, BLANK)
INK = 200  # a pixel is paper where all its channels are above
LEAST = 0.1  # share of ink in a patch from which on it shows something; a patch with less, and some, has no target
UNKNOWN = -1


class Alignment(nn.Module):
    """The loss, for the words of one tokenizer and the embeddings of one language model, which stay as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, settings: Mapping):
        """``embeddings`` (rows, D); ``settings``: ``sharpness`` and ``distance``."""
        super().__init__()
        self.settings = settings
        self.words = torch.stack([embeddings[token_of(tokenizer, word)].detach().float() for word in WORDS])

    def forward(self, features: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and share of drawn patches whose word is the nearest.

        Args:
            features: (P, D), projected.
            shown: int64 (P,), indices into ``WORDS``, or ``UNKNOWN``.
        """
        known = shown != UNKNOWN
        features, shown = features.float()[known], shown[known]
        near = F.normalize(features, dim=1) @ F.normalize(self.words, dim=1).T
        told = F.cross_entropy(self.settings["sharpness"] * near, shown, reduction="none")
        targets = self.words[shown]
        far = (features - targets).square().sum(1) / targets.square().sum(1).mean()
        # Most patches are blank: without a weight, they would be most of the loss.
        drawn = shown != WORDS.index(BLANK)
        weight = torch.where(drawn, 1.0, 0.2)
        loss = told + self.settings["distance"] * far
        right = (near.argmax(1) == shown)[drawn].float().mean()
        return (loss * weight).sum() / weight.sum(), right


def token_of(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The one token of a word: as an answer begins with it, or else as it stands behind a space."""
    for text in (word, f" {word}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) == 1:
            return ids[0]
    raise ValueError(f"{word!r} is no token of this tokenizer")


def shown(documents: Sequence[Document], tile: int) -> Tensor:
    """int64 (P,): the word of every patch of the base view and of the tiles of each image, as the tower sees them."""
    return torch.from_numpy(np.concatenate([_shown(document, tile) for document in documents]))


def _shown(document: Document, tile: int) -> np.ndarray:
    side, (width, height) = tile // CELL, document.image.size
    base = _grid(document, side, side, band=None).reshape(-1)
    fine = _grid(document, height // CELL, width // CELL, band=tile)
    tiles = fine.reshape(height // tile, side, width // tile, side).swapaxes(1, 2).reshape(-1)
    return np.concatenate([base, tiles])


def _grid(document: Document, rows: int, columns: int, band: int | None) -> np.ndarray:
    """int64 (rows, columns); ``band`` is the height of a tile, and None for the base view."""
    width, height = document.image.size
    ink = (np.asarray(document.image) < INK).any(2).reshape(rows, height // rows, columns, width // columns)
    ink = ink.mean((1, 3))
    grid = np.full((rows, columns), UNKNOWN)
    is_odd = np.arange(columns) % 2 == 1
    covered = np.zeros((rows, columns))
    longest = _longest(document.marks, band or height)
    for mark in sorted(document.marks, key=lambda mark: mark not in longest):  # where two share a patch, it shows
        words = [WORDS.index(word) for word in _words(mark, width, band is None, mark in longest)]
        in_turn = np.broadcast_to(np.where(is_odd, words[-1], words[0]), grid.shape)
        x0, y0, x1, y1 = mark.box
        across = _overlap(x0 * columns / width, x1 * columns / width, columns)
        share = _overlap(y0 * rows / height, y1 * rows / height, rows)[:, None] * across
        grid = np.where(share > covered, in_turn, grid)
        covered = np.maximum(covered, share)
    grid[ink < LEAST] = UNKNOWN
    grid[ink == 0] = WORDS.index(BLANK)
    return grid


def _overlap(start: float, end: float, cells: int) -> np.ndarray:
    """float (cells,): how much of each unit-long cell lies between start and end."""
    places = np.arange(cells)
    return (np.minimum(end, places + 1) - np.maximum(start, places)).clip(0)


def _longest(marks: Sequence[Mark], band: int) -> list[Mark]:
    """The longest bar of each band of the image, since a tile shows nothing of the bars of another."""
    best: dict[int, Mark] = {}
    for mark in marks:
        place = mark.box[1] // band
        if mark.shows == BAR and (place not in best or mark.box[2] > best[place].box[2]):
            best[place] = mark
    return list(best.values())


def _words(mark: Mark, width: int, is_base: bool, is_longest: bool) -> list[str]:
    """The words of a mark, which its patches show in turn along a row, as text would have them: a colour and its shape;
    a bar, or that it is the longest in view, and in tiles the tens of its value; a glyph."""
    if mark.shows in COLOURS:
        return [mark.shows, mark.belongs]
    if mark.shows == BAR:
        start, _, end, _ = mark.box
        bar = LONGEST if is_longest else BAR
        return [bar] if is_base else [bar, str(min(9, 10 * (end - start) // (width - start)))]
    return [TEXT] if is_base else [mark.shows]
