"""Files that can be written by a process that is killed: what is there afterwards is the old file or the new one.

A file is written under a temporary name beside its target, synced and renamed. The temporary name is always the same,
under a lock, so that a rerun replaces what a killed run left. Whole folders: see `folders`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pmod_cli.core.locks import locked

LONGEST_NAME = 255  # bytes, on every file system in use


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data`."""
    write_files({path: data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Replace each path with its bytes; none of them before all are on the disk."""
    temporaries = {path: _beside(path, "tmp") for path in files}
    with ExitStack() as held:
        for path in sorted(files):  # in one order, so that two writers never wait for each other
            held.enter_context(locked(_beside(path, "lock"), wait=None))
        try:
            for path, data in files.items():
                with open(temporaries[path], "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for path, temporary in temporaries.items():
                temporary.replace(path)
        finally:
            for temporary in temporaries.values():
                temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        sync_folder(folder)


def _beside(path: Path, ending: str) -> Path:
    """A hidden name beside `path`, the same at every time; of a name that leaves no room for more, a digest."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.{ending}"
    return path.with_name(name)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text`, UTF-8. A path in it that is no UTF-8 is escaped, in JSON in JSON's own way."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON; NaN is an error."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))  # a byte of a path that is no UTF-8


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
