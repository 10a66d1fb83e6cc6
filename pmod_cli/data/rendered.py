"""A conversation as text, and as tokens: what every template makes, and what becomes of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from pmod_cli.data.conversation import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label cross-entropy skips


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: with the processor's marks in the places of images and videos.
        learned: [start, end) character ranges that are learned.
        broken_at: from here on the text cannot be cut into rounds; None where all of it can.
        always_learned: tokens that are learned wherever they stand.
        overlapping: whether a token is learned that lies in a range in part, as in transformers; or that begins there.
        begins: whether the tokenizer's beginning-of-sequence token has to be put before it.
    """

    text: str
    learned: list[tuple[int, int]]
    broken_at: int | None = None
    always_learned: frozenset[int] = field(default_factory=frozenset)
    overlapping: bool = False
    begins: bool = False


@dataclass(frozen=True)
class Encoded:
    """A conversation as N tokens, each image and each video one token yet.

    Attributes:
        ids: int64 (N,), -1 in the places of images and videos.
        labels: int64 (N,), -100 where nothing is learned.
        images: positions of the images.
        videos: positions of the videos.
    """

    ids: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    videos: np.ndarray


def encode(
    rendered: Rendered,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None = None,
    marks: Sequence[str] = (IMAGE,),
) -> Encoded:
    """Tokens and labels of a conversation.

    The pieces between images and videos are tokenized each for itself, as in the published code.

    Args:
        tokenizer: a fast one, since it has to tell where in the text each token comes from.
        limit: ``max_length`` of the run. A text that breaks only beyond it keeps the labels before.
        marks: of an image, and of a video where the model takes any; else a ``<video>`` is text.
    """
    split = re.split(f"({'|'.join(map(re.escape, marks))})", rendered.text)  # pieces and marks in turn
    pieces, found_marks = split[::2], split[1::2]
    offsets = accumulate((len(piece) + len(mark) for piece, mark in zip(pieces, found_marks, strict=False)), initial=0)
    ids, starts, ends = [], [], []
    places: dict[str, list[int]] = {mark: [] for mark in marks}
    if rendered.begins:
        ids += tokenizer("").input_ids
        starts += [-1] * len(ids)
        ends += starts
    # A tokenizer may not tell where in an empty text a token comes from.
    found = tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for number, (piece_ids, piece_offsets, offset) in enumerate(
        zip(found.input_ids, found.offset_mapping, offsets, strict=True)
    ):
        if number:
            places[found_marks[number - 1]].append(len(ids))
            ids.append(-1)
            starts.append(offset - 1)
            ends.append(offset - 1)
        ids += piece_ids
        starts += [offset + start for start, _ in piece_offsets]
        ends += [offset + end for _, end in piece_offsets]
    ids, starts, ends = (np.array(each, dtype=np.int64) for each in (ids, starts, ends))
    bounds = [edge for span in rendered.learned for edge in span]
    place = np.searchsorted(bounds, starts, side="right")
    learned = place % 2 == 1
    if rendered.overlapping:
        learned |= (ends > starts) & (np.searchsorted(bounds, ends - 1, side="right") != place)
    if rendered.always_learned:
        learned |= np.isin(ids, list(rendered.always_learned))
    learned[ids == -1] = False
    if rendered.broken_at is not None:
        whole = int((starts < rendered.broken_at).sum())
        learned[whole if limit is not None and whole >= limit else 0 :] = False
    images, videos = [*places.values(), []][:2]
    labels = np.where(learned, ids, IGNORED)
    return Encoded(ids, labels, np.array(images, dtype=np.int64), np.array(videos, dtype=np.int64))
