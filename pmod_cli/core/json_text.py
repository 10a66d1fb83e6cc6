"""JSON, strictly, and JSON lines: the one reader of files that come from elsewhere.

A line ends at a line feed and nowhere else. `str.splitlines()` also cuts at U+2028, U+2029 and U+0085, which JSON
writes as they are: a line with one of them would be read as two halves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pmod_cli.core.errors import PmodError

DEEPEST = "nested too deeply"


def loads(data: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """One JSON value of finite numbers and of text that can be written again.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested so deeply that Python's parser gives up; it holds `NaN`, a number
            beyond what a float holds, or half of a surrogate pair.
    """
    try:
        if not isinstance(data, str):  # json's own decoding lets halves of surrogate pairs pass
            data = str(data, "utf-8-sig")
        value = json.loads(data, object_pairs_hook=object_pairs_hook, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError(DEEPEST) from None
    if any(mark in data for mark in ("\\ud", "\\uD")):
        json.dumps(value, ensure_ascii=False, default=str).encode()  # UnicodeEncodeError is a ValueError
    return value


def lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of each line that is not blank."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield number, line.removesuffix(b"\r")


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines.

    Raises:
        PmodError: a line is no JSON; the file cannot be read.
    """
    values = []
    try:
        for number, line in lines(path.read_bytes().removeprefix(b"\xef\xbb\xbf")):
            try:
                values.append(loads(line))
            except ValueError as error:
                raise PmodError(f"{path}, line {number}: not JSON: {error}") from error
    except OSError as error:
        raise PmodError(f"{path} cannot be read: {error.strerror or error}") from error
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any float")
    return value
