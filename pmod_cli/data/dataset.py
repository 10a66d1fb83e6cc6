"""Conversation rows as tokens, labels and pixels: ``build_dataset`` is what the trainer calls.

A row is a dictionary of ``input_ids`` and ``labels`` int64 (N,), and where it has images or videos what its processor
makes of them: ``pixel_values`` float32 (images, [tiles,] 3, side, side) of a LLaVA, with ``image_sizes`` int64
(images, 2), height before width, where it cuts tiles; (patches, numbers of a patch) of a Qwen-VL, with
``image_grid_thw`` int64 (images, 3); and the same of videos.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from pmod_cli.core.errors import PmodError
from pmod_cli.data.conversation import BadRow, Conversation
from pmod_cli.data.pictures import open_image, open_video, padding_processor, pads_to_square, reduced
from pmod_cli.data.rendered import IGNORED, Encoded, encode
from pmod_cli.data.sources import RowSource, open_source
from pmod_cli.data.templates import renderer
from pmod_cli.data.vision import frames_of, image_lengths, image_tensors, marks_of, refusals, video_tensors

if TYPE_CHECKING:
    from transformers import ProcessorMixin

GIVE_UP = 100  # bad rows one after the other
SLOTS = 64  # DataLoader workers that count for themselves


class DataSettings(Protocol):
    """The keys of a recipe's ``data`` section that are read here; ``training.run_settings`` says what they mean."""

    images: str | None
    max_length: int | None
    video_fps: float
    video_frames: int

    @property
    def kind(self) -> str:
        """``llava`` or ``hub``."""

    @property
    def path(self) -> str | None:
        """Of the file, or name of the data set."""

    @property
    def template(self) -> str:
        """One of ``templates.TEMPLATES``, or ``auto``."""

    @property
    def on_bad_row(self) -> str:
        """``error`` or ``skip``."""


def build_dataset(data: DataSettings, processor: "ProcessorMixin", *, skipped: Path | None = None) -> "Rows":
    """The rows of a recipe with ``data.kind`` llava or hub.

    ``Collator`` makes batches of them, and ``ModalityBatches(rows.lengths, …)`` is a sampler for
    ``data.group_by_modality``. Save ``rows.encoder.processor`` with the model, not ``processor``: for LLaVA-1.5 it pads
    images to a square.

    Args:
        skipped: with ``on_bad_row: skip``, the JSONL file that left-out rows are written to.

    Raises:
        PmodError: missing file, folder or columns, not JSON, or a template that does not fit the tokenizer.
    """
    if data.path is None:
        raise PmodError(f"`data.path` is not given: expected the file or data set of data.kind {data.kind}")
    source = open_source(data.kind, data.path, data.images)
    encoder = RowEncoder(processor, data.template, data.max_length, data.video_fps, data.video_frames)
    return Rows(source, encoder, skip_bad=data.on_bad_row == "skip", skipped=skipped)


class RowEncoder:
    """Turns a conversation into tokens, labels and pixels.

    Args:
        processor: of a model; LLaVA-1.5's then pads images to a square, unless ``as_is``.
        template: one of ``pmod_cli.data.templates.TEMPLATES``.
        max_length: tokens of a row, vision tokens included; longer rows are cut.
        video_fps: frames of a video that are taken a second.
        video_frames: of one video at most.
        as_is: images are made what this processor makes of them, also where it crops: for a model that is asked
            with it, and not trained.

    Raises:
        PmodError: a template that does not fit the tokenizer.
    """

    def __init__(
        self,
        processor: "ProcessorMixin",
        template: str = "auto",
        max_length: int | None = None,
        video_fps: float = 2.0,
        video_frames: int = 32,
        *,
        as_is: bool = False,
    ) -> None:
        self.processor = processor if as_is else padding_processor(processor)
        self.render = renderer(template, processor)
        self.max_length = max_length
        self.frames = frames_of(processor, video_fps, video_frames)

    def __call__(self, conversation: Conversation, folder: Path | None = None) -> dict[str, torch.Tensor]:
        """One row, as described at the top of this file.

        Raises:
            BadRow: an image or a video that cannot be used, turns that the template cannot hold, or images that end
                behind ``max_length``.
        """
        return self.encode(conversation, folder)[0]

    def encode(
        self, conversation: Conversation, folder: Path | None = None
    ) -> "tuple[dict[str, torch.Tensor], Tokens]":
        """The same, and the tokens with what is known about them."""
        images = [self._open(image, folder) for image in conversation.images]
        videos, tensors = self._videos(conversation, folder)
        tokens = self.tokens(conversation, [image.size[::-1] for image in images], videos)
        if images:
            with refusals(BadRow):
                tensors = image_tensors(self.processor, images) | tensors
        return {"input_ids": torch.from_numpy(tokens.ids), "labels": torch.from_numpy(tokens.labels)} | tensors, tokens

    def check(self, conversation: Conversation, folder: Path | None = None) -> "Tokens":
        """As calling it, every image decoded, without making pixels of them."""
        sizes = [self._open(image, folder).size[::-1] for image in conversation.images]
        return self.tokens(conversation, sizes, self._videos(conversation, folder)[0])

    def tokens(
        self, conversation: Conversation, sizes: list[tuple[int, int]], videos: Sequence[np.ndarray] = ()
    ) -> "Tokens":
        """Tokens and labels of a row.

        Args:
            sizes: height and width of each of its images.
            videos: the tokens of each of its videos.
        """
        text = encode(
            self.render(conversation.turns), self.processor.tokenizer, self.max_length, marks_of(self.processor)
        )
        with refusals(BadRow):
            lengths = image_lengths(self.processor, sizes)
        images: list[np.ndarray] = [
            np.full(length, self.processor.image_token_id, dtype=np.int64) for length in lengths
        ]
        for what, places, count in (("images", text.images, len(images)), ("videos", text.videos, len(videos))):
            if len(places) != count:
                raise BadRow(f"the template has places for {len(places)} of its {count} {what}")
        ids, labels, behind = _filled(text, [*images, *videos])
        if self.max_length is None or len(ids) <= self.max_length:
            return Tokens(ids, labels, len(ids))
        if behind > self.max_length:
            raise BadRow(f"its images end at token {behind}, behind data.max_length {self.max_length}")
        return Tokens(ids[: self.max_length], labels[: self.max_length], len(ids))

    def _videos(self, conversation: Conversation, folder: Path | None) -> tuple[list[np.ndarray], dict]:
        """The tokens of each video, and the tensors of all."""
        if not conversation.videos:
            return [], {}
        if getattr(self.processor, "video_processor", None) is None:
            raise BadRow("it has a video, and this model takes images alone")
        videos = [open_video(source, folder, self.frames) for source in conversation.videos]
        with refusals(BadRow):
            return video_tensors(self.processor, videos)

    def _open(self, image: Any, folder: Path | None) -> Any:
        return reduced(open_image(image, folder), padded=pads_to_square(self.processor))


def _filled(text: Encoded, inserted: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and labels with `inserted` in the places of images, then of videos; and their number up to the last."""
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    last = behind = 0
    for place, tokens in sorted(zip([*text.images, *text.videos], inserted, strict=True), key=lambda pair: pair[0]):
        ids += [text.ids[last:place], tokens]
        labels += [text.labels[last:place], np.full(len(tokens), IGNORED, dtype=np.int64)]
        last = place + 1
        behind = sum(map(len, ids))
    return np.concatenate([*ids, text.ids[last:]]), np.concatenate([*labels, text.labels[last:]]), behind


@dataclass(frozen=True)
class Tokens:
    """``ids`` and ``labels`` int64 (N,), and how many tokens the row had before it was cut."""

    ids: np.ndarray
    labels: np.ndarray
    whole: int

    @property
    def is_cut(self) -> bool:
        """Whether the row was longer than ``max_length``."""
        return self.whole > len(self.ids)

    @property
    def teaches(self) -> bool:
        """Whether any token has a label."""
        return bool((self.labels != IGNORED).any())


class Rows(Dataset):
    """A data set of rows; a bad one is an error, or replaced by the next good one of the same kind.

    So is always a row that teaches nothing (see ``pmod_cli.data.templates``): a batch of such rows alone has no loss.

    Attributes:
        source: where the rows come from.
        encoder: what makes tensors of them.
        lengths: int32, words of each row, negative where it has no image.
    """

    def __init__(self, source: RowSource, encoder: RowEncoder, *, skip_bad: bool, skipped: Path | None = None) -> None:
        self.source, self.encoder = source, encoder
        self.skip_bad, self.skipped = skip_bad, skipped
        self.lengths = source.lengths
        self._listed = _rows_in(skipped)  # by the processes that an interrupted run had before
        # Shared memory, since rows are read in DataLoader workers, others in each epoch: which rows were left out, and
        # one line of (skipped, cut, without labels) for each worker.
        self._left_out = torch.zeros(len(source), dtype=torch.bool).share_memory_()
        self._counts = torch.zeros(SLOTS, 3, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The row, or in its place the next good one that has an image, or has none, as this one; else any good one.

        Raises:
            BadRow: naming file and row, if bad rows are not skipped.
            PmodError: too many bad rows one after the other.
        """
        tried = 0
        for candidate in self._in_place_of(index):
            try:
                row, tokens = self.encoder.encode(self.source[candidate], self.source.images)
            except BadRow as fault:
                if not self.skip_bad:
                    own = self.source.id_of(candidate)
                    named = f"row {candidate}{'' if own is None else f' (id {own})'}"
                    raise BadRow(f"{named} of {self.source.name}: {fault.what}") from None
                self._note(candidate, fault)
            else:
                self._count(1, tokens.is_cut)
                if tokens.teaches:
                    return row
                self._count(2, True)
            tried += 1
            if tried == GIVE_UP:
                break
        raise PmodError(
            f"{tried} rows from row {index} on of {self.source.name} cannot be used, one after the other",
            hint="look at them with `check_data=True`",
        )

    def _in_place_of(self, index: int) -> Iterator[int]:
        """The row itself, then the following ones of its kind, round the end of the data set, then the others."""
        with_image = self.lengths[index] > 0
        for kind in (with_image, not with_image):
            for step in range(len(self)):
                candidate = (index + step) % len(self)
                if (self.lengths[candidate] > 0) == kind:
                    yield candidate

    def counts(self) -> dict[str, int]:
        """Since the run began, over all workers of this process: rows left out, rows cut, rows that teach nothing."""
        return dict(zip(("skipped", "cut", "without_labels"), self._counts.sum(dim=0).tolist(), strict=True))

    def _note(self, row: int, fault: BadRow) -> None:
        if self._left_out[row]:
            return
        self._left_out[row] = True
        self._count(0, True)
        if self.skipped is not None and row not in self._listed:
            with open(self.skipped, "a", encoding="utf-8") as file:  # one short write: lines of workers do not mix
                noted = {"row": row, "id": self.source.id_of(row), "file": self.source.name, "reason": fault.what}
                file.write(json.dumps(noted) + "\n")

    def _count(self, column: int, happened: bool) -> None:
        if happened:
            worker = get_worker_info()
            self._counts[(worker.id + 1) % SLOTS if worker else 0, column] += 1


def _rows_in(skipped: Path | None) -> set[int]:
    """Numbers of the rows that a file of left-out rows names; a killed process may have left half a line."""
    found = set()
    if skipped is not None and skipped.is_file():
        for line in skipped.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                found.add(json.loads(line)["row"])
    return found
