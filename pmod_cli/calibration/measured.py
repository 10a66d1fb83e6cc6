"""What a run has measured, kept until its result is written: stopped and repeated, a run measures what is missing.

The key of a measurement is made of all that it depends on, so that an old one is found only where the same would be
measured again.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pmod_cli.core import output


class Measured:
    """A file of measurements by key.

    Args:
        path: The file; None keeps nothing. Where it cannot be written, nothing is kept either, and a warning says so.

    Attributes:
        found: How many measurements were there already, and asked for again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.found, self._open = path, 0, None
        if path is None:
            return
        try:
            path.parent.mkdir(exist_ok=True)
            self._open = self._table(path)
        except (OSError, sqlite3.Error) as error:
            output.warn(f"{path} cannot be used ({error}): should this run be stopped, it starts over")

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """What is known under this key, else what `measure` gives. Values are of JSON."""
        if self._open is None:
            return measure()
        row = self._open.execute("SELECT value FROM measured WHERE key = ?", (key,)).fetchone()
        if row is not None:
            self.found += 1
            return json.loads(row[0])
        value = measure()
        with self._open:  # a commit: after a kill it is there or not
            self._open.execute("INSERT OR REPLACE INTO measured VALUES (?, ?)", (key, json.dumps(value)))
        return value

    def forget(self) -> None:
        """Removes the file: what was measured is part of a result now."""
        if self._open is not None and self.path is not None:
            self._open.close()
            self._open = None
            self.path.unlink(missing_ok=True)

    @staticmethod
    def _table(path: Path) -> sqlite3.Connection:
        """The open file; one that is damaged is begun anew."""
        for attempt in range(2):
            connection = sqlite3.connect(path, timeout=60)
            try:
                with connection:
                    connection.execute("CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value TEXT)")
                return connection
            except sqlite3.DatabaseError:
                connection.close()
                if attempt:
                    raise
                path.unlink(missing_ok=True)
        raise AssertionError


def digest(*parts: Any, tensors: Iterable[Tensor] = ()) -> str:
    """One name for values of JSON and the bits of tensors."""
    found = hashlib.sha256(json.dumps(parts).encode())
    for tensor in tensors:
        found.update(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
