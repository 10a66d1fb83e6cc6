"""What each patch shows, and the loss that makes its projected feature the embedding of these words.

The language model then sees writing laid out in two dimensions, in its own words, and has only to learn to look.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from pmod_cli.data.documents import CELL, COLOURS, SHAPES, Document, Mark
from pmod_cli.data.glyphs import CHARACTERS

BLANK, BAR, TEXT = "blank", "bar", "text"  # TEXT is writing too small to read, in the base view
WORDS = (*CHARACTERS, *COLOURS, *SHAPES, BAR, TEXT, BLANK)
INK = 200  # a pixel is paper where all its channels are above
LEAST = 0.1  # share of ink in a patch from which on it shows something; a patch with less, and some, has no target
NONE, UNKNOWN = -1, -2


class Alignment(nn.Module):
    """The loss, for the words of one tokenizer and the embeddings of one language model, which stay as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, settings: Mapping):
        """``embeddings`` (rows, D); ``settings``: ``sharpness`` and ``distance``."""
        super().__init__()
        self.settings = settings
        self.words = torch.stack([embeddings[token_of(tokenizer, word)].detach().float() for word in WORDS])

    def forward(self, features: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and share of patches whose words are the nearest.

        Args:
            features: (P, D), projected.
            shown: int64 (P, 2), indices into ``WORDS``: two, one and ``NONE``, or ``UNKNOWN`` twice.
        """
        known = shown[:, 0] >= 0
        features, shown = features.float()[known], shown[known]
        wanted = F.one_hot(shown.clamp(min=0), len(WORDS)).float()
        wanted = (wanted * (shown >= 0)[..., None]).sum(1)
        count = wanted.sum(1, keepdim=True)
        near = F.normalize(features, dim=1) @ F.normalize(self.words, dim=1).T
        told = -(wanted / count * F.log_softmax(self.settings["sharpness"] * near, dim=1)).sum(1)
        targets = wanted @ self.words / count.sqrt()
        far = (features - targets).square().sum(1) / targets.square().sum(1).mean()
        # A patch is rather blank than not: without a weight, blanks would be most of the loss.
        weight = torch.where(shown[:, 0] == WORDS.index(BLANK), 0.2, 1.0)
        loss = told + self.settings["distance"] * far
        with torch.no_grad():
            order = near.argsort(1, descending=True)[:, :2]
            found = F.one_hot(order, len(WORDS)).float()
            right = torch.where(count == 1, found[:, 0], found.sum(1)).mul(wanted).sum(1) == count[:, 0]
            drawn = shown[:, 0] != WORDS.index(BLANK)
        return (loss * weight).sum() / weight.sum(), right[drawn].float().mean()


def token_of(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The one token of a word: as an answer begins with it, or else as it stands behind a space."""
    for text in (word, f" {word}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) == 1:
            return ids[0]
    raise ValueError(f"{word!r} is no token of this tokenizer")


def shown(documents: Sequence[Document], tile: int) -> Tensor:
    """int64 (P, 2): what every patch of the base view and of the tiles of each image shows, as the tower sees them."""
    return torch.from_numpy(np.concatenate([_shown(document, tile) for document in documents]))


def _shown(document: Document, tile: int) -> np.ndarray:
    side, (width, height) = tile // CELL, document.image.size
    base = _grid(document, side, side, is_base=True).reshape(-1, 2)
    fine = _grid(document, height // CELL, width // CELL, is_base=False)
    tiles = fine.reshape(height // tile, side, width // tile, side, 2).swapaxes(1, 2).reshape(-1, 2)
    return np.concatenate([base, tiles])


def _grid(document: Document, rows: int, columns: int, is_base: bool) -> np.ndarray:
    """int64 (rows, columns, 2)."""
    width, height = document.image.size
    ink = (np.asarray(document.image) < INK).any(2).reshape(rows, height // rows, columns, width // columns)
    ink = ink.mean((1, 3))
    grid = np.full((rows, columns, 2), NONE)
    covered = np.zeros((rows, columns))
    for mark in document.marks:
        words = [WORDS.index(word) for word in _words(mark, width, is_base)]
        x0, y0, x1, y1 = mark.box
        across = _overlap(x0 * columns / width, x1 * columns / width, columns)
        share = _overlap(y0 * rows / height, y1 * rows / height, rows)[:, None] * across
        grid[share > covered] = (words + [NONE])[:2]
        covered = np.maximum(covered, share)
    is_drawn = (covered > 0) & (ink >= LEAST)
    grid[~is_drawn] = UNKNOWN
    grid[ink == 0] = WORDS.index(BLANK), NONE
    return grid


def _overlap(start: float, end: float, cells: int) -> np.ndarray:
    """float (cells,): how much of each unit-long cell lies between start and end."""
    places = np.arange(cells)
    return (np.minimum(end, places + 1) - np.maximum(start, places)).clip(0)


def _words(mark: Mark, width: int, is_base: bool) -> list[str]:
    """A colour with its shape; a bar with the tens of its value, as its length tells them; a glyph."""
    if mark.shows in COLOURS:
        return [mark.shows, mark.belongs]
    if mark.shows == BAR:
        start, _, end, _ = mark.box
        return [BAR] if is_base else [BAR, str(min(9, 10 * (end - start) // (width - start)))]
    return [TEXT] if is_base else [mark.shows]
