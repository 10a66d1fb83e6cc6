"""Where rows come from: a JSON or JSONL file with a folder of images, or a Hugging Face data set."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pmod_cli.core import json_text
from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.core.paths import expanded
from pmod_cli.data.conversation import PICTURES, BadRow, Conversation, from_llava, from_messages, from_row, length_of
from pmod_cli.data.index import open_index


class RowSource(Protocol):
    """Rows that are read one by one.

    Attributes:
        name: the file or data set, for messages.
        images: the folder that image names start from, if they are names.
        lengths: int32, words of each row, negative where it has no image.
    """

    name: str

    @property
    def images(self) -> Path | None:
        """See above."""

    @property
    def lengths(self) -> np.ndarray:
        """See above."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, row: int) -> Conversation:
        """One row; BadRow where it cannot be understood."""

    def id_of(self, row: int) -> str | None:
        """What the row's ``id`` says, where it has one."""


class LlavaFile:
    """Rows of a JSON array or a JSONL file; see ``pmod_cli.data.conversation.from_row`` for their layouts.

    Args:
        images: the folder of its images; by default the file's own.
        answered: whether each row has to hold an answer.

    Raises:
        PmodError: no such file or folder, or not JSON.
    """

    def __init__(self, path: Path, images: Path | None, *, answered: bool = True) -> None:
        self.answered = answered
        if images is not None and not images.is_dir():
            raise PmodError(
                f"no such image folder: {images}",
                hint="name the folder that the rows name their images from",
            )
        self.name, self.path = str(path), path
        self.images = images or path.parent
        self._index = open_index(path, _llava_length)
        self._file: tuple[int, int] | None = None

    @property
    def lengths(self) -> np.ndarray:
        """See `RowSource`."""
        return self._index["length"]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> Conversation:
        start, size, _ = self._index[row].tolist()
        try:
            return from_row(json_text.loads(os.pread(self._descriptor(), size, start)), answered=self.answered)
        except UnicodeEncodeError:
            raise BadRow("a text holds half of a character, such as \\ud800") from None
        except ValueError as error:
            raise BadRow(f"not JSON: {error}") from None

    def id_of(self, row: int) -> str | None:
        """See `RowSource`."""
        start, size, _ = self._index[row].tolist()
        try:
            return _id(json_text.loads(os.pread(self._descriptor(), size, start)))
        except ValueError:
            return None

    def _descriptor(self) -> int:
        """Each process opens the file for itself."""
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return self._file[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


class HubRows:
    """Rows of a Hugging Face data set, mapped from disk by ``datasets``.

    Its columns are ``messages``, or ``conversations`` as LLaVA has them, ``images`` or ``image``, and ``videos`` or
    ``video`` with the names of files or of folders of frames.

    Args:
        path: name of the data set on the hub, a folder of one, or one written by ``save_to_disk``; ``name:split``
            takes another split than ``train``.
        answered: whether each row has to hold an answer.

    Raises:
        PmodError: no such data set, or without these columns.
    """

    def __init__(self, path: str, *, answered: bool = True) -> None:
        self.name, self.images, self.answered = path, None, answered
        rows = _load(path)
        self._said = next((name for name in ("messages", "conversations") if name in rows.column_names), "")
        if not self._said:
            raise PmodError(
                f"the data set {path} has the columns {', '.join(rows.column_names)}; expected messages or "
                "conversations, and images",
                hint="rename the columns, or use data.kind llava",
            )
        for one, several in (("image", "images"), ("video", "videos")):
            if one in rows.column_names and several not in rows.column_names:
                rows = rows.rename_column(one, several)
        self._rows = _undecoded(rows)
        # ``map`` keeps its result in the cache of ``datasets``.
        words = self._rows.select_columns([self._said]).map(_words, remove_columns=[self._said])
        self.lengths = np.asarray(words.with_format("numpy")["words"], dtype=np.int32) * _kinds(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Conversation:
        found = self._rows[row]
        images = found.get("images") or ()
        images = [_payload(image) for image in (images if isinstance(images, list | tuple) else (images,))]
        said = {self._said: found[self._said], "videos": found.get("videos")}
        if self._said == "messages":
            return from_messages({**said, "images": images}, answered=self.answered)
        names = [f"image {number}" for number in range(len(images))]  # in whose places the pictures are put
        return replace(from_llava({**said, "images": names}, answered=self.answered), images=tuple(images))

    def id_of(self, row: int) -> str | None:
        """See `RowSource`."""
        return _id(self._rows.select_columns(["id"])[row]) if "id" in self._rows.column_names else None


def _id(row: Any) -> str | None:
    """The ``id`` of a row, if it is a text or a number; no longer than a line of a message holds."""
    found = row.get("id") if isinstance(row, Mapping) else None
    return str(found)[:60] if isinstance(found, str | int) else None


def _llava_length(row: Any) -> int:
    if not isinstance(row, Mapping):
        return length_of(row, "conversations", "value", images=False)
    pictured = any(row.get(key) for key in ("image", "images", "video", "videos"))
    if "conversations" in row:
        return length_of(row, "conversations", "value", pictured)
    said = row.get("messages") or row.get("prompt")
    parts = [turn.get("content") for turn in said if isinstance(turn, Mapping)] if isinstance(said, list) else []
    own = (
        part.get("type")
        for content in parts
        if isinstance(content, list)
        for part in content
        if isinstance(part, Mapping)
    )
    pictured = pictured or any(kind in PICTURES for kind in own)
    return length_of({"messages": said}, "messages", "content", pictured)


def _words(row: Mapping) -> dict[str, int]:
    said, text = ("messages", "content") if "messages" in row else ("conversations", "value")
    return {"words": length_of(row, said, text, images=True)}


def _kinds(rows: Any) -> np.ndarray:
    """1 for each row with an image or a video, -1 for each without; they themselves are not read."""
    import pyarrow.compute as compute

    pictured: np.ndarray = np.zeros(len(rows), dtype=bool)
    for name in {"images", "videos"} & set(rows.column_names):
        found = []
        for batch in rows.select_columns([name]).with_format("arrow").iter(4096):
            column = batch[name]
            is_list = "list" in str(column.type)
            counts = compute.list_value_length(column) if is_list else compute.is_valid(column)
            found.append(counts.fill_null(0).to_numpy() if is_list else counts.to_numpy())
        pictured |= np.concatenate(found) > 0
    return np.where(pictured, 1, -1).astype(np.int32)


def _load(path: str) -> Any:
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    folder, _, split = path.partition(":")
    if Path(path).is_file():
        raise PmodError(f"{path} is no file of rows: expected .json, .jsonl, or the folder of a data set")
    try:
        if Path(folder, "dataset_dict.json").is_file():  # several that were saved together, a folder each
            folder, split = str(Path(folder, split or "train")), ""
            if not Path(folder).is_dir():
                raise PmodError(f"no such split: {folder}", hint=f"`data.path={path.partition(':')[0]}:SPLIT`")
        if Path(folder, "dataset_info.json").is_file():
            rows = load_from_disk(folder)
            if split and split != str(rows.split):
                raise PmodError(
                    f"{folder} holds one data set without splits, and not {split}", hint=f"`data.path={folder}`"
                )
            return rows
        return load_dataset(folder, split=split or "train")
    except DatasetNotFoundError as error:
        hint = "expected its name on the hub; one that is gated or private wants a login: hf auth login"
        raise PmodError(f"no such data set: {path} ({error})", hint=hint) from None
    except (ConnectionError, DatasetsError, FileNotFoundError, ValueError) as error:
        why = first_line(error.__cause__ or error)  # a broken file is the cause of an error that does not name it
        raise PmodError(f"the data set {path} cannot be read: {why}", hint="see docs/data.md") from None


def _undecoded(rows: Any) -> Any:
    """Pictures as encoded bytes: they are decoded with our own care, and not at all where only lengths are wanted."""
    from datasets import Image, List, Video

    for name, kind in (("images", Image), ("videos", Video)):
        feature = rows.features.get(name)
        if isinstance(feature, kind):
            rows = rows.cast_column(name, kind(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, kind):
            rows = rows.cast_column(name, List(kind(decode=False)))
    return rows


def _payload(image: Any) -> Any:
    """The encoded bytes of an image that is not decoded yet."""
    if not isinstance(image, Mapping):
        return image
    if image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path")
    try:
        return Path(path or "").read_bytes()
    except OSError as error:
        raise BadRow(f"cannot read the image {path}: {error.strerror}") from None


def open_source(kind: str, path: str, images: str | None, *, answered: bool = True) -> RowSource:
    """The rows of ``data.kind`` llava or hub; ``answered``: whether each has to hold an answer."""
    if kind == "hub":
        return HubRows(path, answered=answered)
    folder = None if images is None else expanded(images)
    return LlavaFile(expanded(path), folder, answered=answered)
