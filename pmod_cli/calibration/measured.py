"""What a run has measured, kept until its result is written: stopped and repeated, a run measures what is missing.

The key of a measurement is made of all that it depends on, so that an old one is found only where the same would be
measured again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmod_cli.core import output

SQLITE = b"SQLite format 3\0"  # what such a file begins with


class Measured:
    """A file of measurements by key.

    Args:
        path: The file. Where it cannot be written nothing is kept, and a warning says so.

    Attributes:
        found: How many measurements of an earlier run were asked for again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, 0
        self._own: set[str] = set()  # keys of what this run has measured

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known under this key, else what `measure` gives. Values are of JSON."""
        for (value,) in self._run("SELECT value FROM measured WHERE key = ?", key):
            self.found += key not in self._own
            return json.loads(value)
        value = measure()
        self._own.add(key)
        self._run("INSERT OR REPLACE INTO measured VALUES (?, ?)", key, json.dumps(value))
        return value

    def forget(self) -> None:
        """Removes the file: what was measured is part of a result now."""
        if self._open is not None:
            self._open.close()
            self.path.unlink(missing_ok=True)

    @cached_property
    def _open(self) -> sqlite3.Connection | None:
        """The file, made when the first measurement is asked for: a run that is refused leaves none."""
        try:
            return _table(self.path)
        except (OSError, sqlite3.Error) as error:
            self._warn(error)
            return None

    def _run(self, statement: str, *values: str) -> list[tuple]:
        """The rows that it finds; what it writes is there after a kill, or not at all."""
        if self._open is None:
            return []
        try:
            with self._open:
                return self._open.execute(statement, values).fetchall()
        except sqlite3.Error as error:  # such as a full disk
            self._warn(error)
            self._open = None
            return []

    def _warn(self, error: Exception) -> None:
        output.warn(f"{self.path} cannot be used ({error}): should this run be stopped, it starts over")


def _table(path: Path) -> sqlite3.Connection:
    """The open file; one that is no database is begun anew."""
    path.parent.mkdir(exist_ok=True)
    if path.exists() and path.read_bytes()[: len(SQLITE)] not in (SQLITE, b""):
        path.unlink()
    connection = sqlite3.connect(path, timeout=60)
    with connection:
        connection.execute("CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value TEXT)")
    return connection


def digest(*parts: Any, tensors: Iterable[Tensor] = ()) -> str:
    """One name for values of JSON and the bits of tensors."""
    found = hashlib.sha256(json.dumps(parts).encode())
    for tensor in tensors:
        found.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().to("cpu").reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
