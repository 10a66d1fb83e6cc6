"""Where each row of a JSON or JSONL file begins, found once, so that rows are read one by one.

``llava_v1_5_mix665k.json`` is one array of a gigabyte. The file is parsed once, in a stream. The places of its rows, 20
bytes each, are kept in the Hugging Face cache and mapped into memory: what a run holds does not grow with the data.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pmod_cli.core import json_text
from pmod_cli.core.atomic import write_bytes
from pmod_cli.core.errors import PmodError

ROW = np.dtype([("start", "<i8"), ("size", "<i8"), ("length", "<i4")])
VERSION = 4  # of ROW and of how it is filled
CHUNK = 1 << 22  # bytes read at a time
LONGEST_ROW = 1 << 28  # bytes


def open_index(path: Path, length_of: Callable[[object], int]) -> np.ndarray:
    """One record of ``ROW`` for each row of a JSON array or a JSONL file: first byte, number of bytes, length.

    Args:
        length_of: the length of a parsed row; its code is not part of the cache's key, ``VERSION`` is.

    Raises:
        PmodError: no such file, or not JSON; a broken line of a JSONL file is a row as any other, of length -1.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise PmodError(
            f"cannot read the data file {path}: {error.strerror}",
            hint="name a JSON or JSONL file",
        ) from None
    if path.is_dir():
        raise PmodError(
            f"{path} is a folder, expected a JSON or JSONL file",
            hint="name the file itself",
        )
    name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {VERSION}"
    cached = _folder() / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there, or damaged
        return np.load(cached, mmap_mode="r")
    index = np.fromiter(_rows(path, length_of), dtype=ROW)
    if not len(index):
        raise PmodError(f"the data file {path} has no rows")
    with suppress(OSError):  # a read-only or full cache: the index is built again the next time
        cached.parent.mkdir(parents=True, exist_ok=True)
        written = BytesIO()
        np.save(written, index)
        write_bytes(cached, written.getvalue())
    return index


def _folder() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "pmod", "rows")


def _rows(path: Path, length_of: Callable[[object], int]) -> Iterator[tuple[int, int, int]]:
    with open(path, "rb") as file:
        first = file.read(1)
        while first.isspace() or first == b"\xef":  # a byte order mark is three bytes
            if first == b"\xef":
                file.seek(2, os.SEEK_CUR)
            first = file.read(1)
        if first == b"[":
            yield from _array_rows(path, file, length_of)
        elif first == b"{":
            file.seek(-1, os.SEEK_CUR)
            yield from _line_rows(path, file, length_of)
        elif first:
            raise PmodError(f"the data file {path} is neither a JSON array nor JSONL: it begins with {first!r}")


def _line_rows(path: Path, file: BinaryIO, length_of: Callable[[object], int]) -> Iterator[tuple[int, int, int]]:
    start, any_good = file.tell(), False
    for line in file:
        if not line.isspace():
            try:
                length, any_good = length_of(json_text.loads(line)), True
            except ValueError:
                length = -1
            yield start, len(line), length
        start += len(line)
    if not any_good:
        raise PmodError(
            f"the data file {path} is neither a JSON array nor JSONL: no line of it is JSON by itself",
            hint="rows stand in an array, or each on a line of its own",
        )


def _array_rows(path: Path, file: BinaryIO, length_of: Callable[[object], int]) -> Iterator[tuple[int, int, int]]:
    """Rows of an array whose ``[`` has been read.

    Read as Latin-1, a character is a byte, and what structures JSON is the same as in UTF-8.
    """
    decoder = json.JSONDecoder()
    text, place, base, row = "", 0, file.tell(), 0  # text begins at byte ``base``; ``place`` is in text

    def more() -> bool:
        nonlocal text, place, base
        chunk = file.read(max(CHUNK, len(text) - place))
        if chunk:
            base, text, place = base + place, text[place:] + chunk.decode("latin-1"), 0
        return bool(chunk)

    def skip(characters: str) -> str:
        """Move behind ``characters``; the next one, or nothing at the end of the file."""
        nonlocal place
        while True:
            while place < len(text) and text[place] in characters:
                place += 1
            if place < len(text) or not more():
                return text[place : place + 1]

    expected = ""
    while (here := skip(" \t\r\n")) != "]":
        if expected and here != expected:
            raise PmodError(
                f"the data file {path} is broken at byte {base + place}: expected ',' or ']' after row {row}"
            )
        if expected:
            place += 1
            skip(" \t\r\n")
        while True:
            try:
                value, end = decoder.raw_decode(text, place)
                if end < len(text) or not more():  # a number may go on in the next chunk
                    break
            except RecursionError:
                where = f"row {row}, which begins at byte {base + place}"
                raise PmodError(f"the data file {path} is broken in {where}: {json_text.DEEPEST}") from None
            except ValueError as error:
                if len(text) - place > LONGEST_ROW or not more():
                    reason = getattr(error, "msg", str(error))
                    raise PmodError(
                        f"the data file {path} is broken in row {row}, which begins at byte {base + place}: {reason}",
                        hint="the file may be cut off; fetch it again",
                    ) from None
        yield base + place, end - place, length_of(_as_utf8(value))
        place, row, expected = end, row + 1, ","
    place += 1
    if skip(" \t\r\n"):
        raise PmodError(
            f"the data file {path} goes on at byte {base + place}, behind its array: expected the end",
            hint="rows stand in one array, or each on a line of its own",
        )


def _as_utf8(value: object) -> object:
    """What was read as Latin-1, as the UTF-8 that it is. Quick where all is ASCII."""
    if isinstance(value, str) and not value.isascii():
        try:
            return value.encode("latin-1").decode()
        except UnicodeError:  # escaped in the file, so right already
            return value
    if isinstance(value, list):
        return [_as_utf8(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_utf8(item) for key, item in value.items()}
    return value
