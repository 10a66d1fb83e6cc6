"""Writing that can be killed at any moment: what is there afterwards is the old state or the new one, never a part.

A file is written under a temporary name beside its target, synced and renamed. A folder is filled in a staging folder
beside its target. The writer holds a lock on the staging folder, which the system drops when the writer dies: so a
second writer is refused, while the leftovers of a dead run are told from the work of a live one, and removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmod_cli.core.errors import PmodError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` with `data`."""
    write_files({path: data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Replace each path with its bytes; none of them before all are on the disk."""
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
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
        _sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text`, UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON; NaN is an error."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def staged_directory(target: Path, *, overwrite: bool = False, wait: bool = False) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: Folder to write. Its parents are made.
        overwrite: Replace an existing target. It is moved aside for the moment of the swap; a swap that was killed
            half-way is finished or undone by the next call for the same target.
        wait: Where another run is writing `target`, wait for its end, instead of refusing.

    Raises:
        PmodError: `target` exists and `overwrite` is false, or another run is writing it and `wait` is false.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, lock = _claim(target, wait)
    try:
        _recover(target)
        refuse_existing(target, overwrite)
        yield staging
        _sync_tree(staging)
        _swap(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)  # not after a swap: the name may be another writer's by then
        raise
    finally:
        os.close(lock)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raises PmodError where `target` exists and `overwrite` is false."""
    if target.exists() and not overwrite:
        raise PmodError(f"{target} exists", hint="replace it with --overwrite, or choose another folder with --out")


def _claim(target: Path, wait: bool) -> tuple[Path, int]:
    """The staging folder of `target`, empty and locked: a target has one, so it has one writer."""
    staging = target.with_name(f".{target.name}.staging")
    while True:
        staging.mkdir(exist_ok=True)
        try:
            lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its writer has just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(lock)
            raise PmodError(f"another run is writing {target}", hint="wait for it, or choose another folder") from None
        if staging.exists() and staging.stat().st_ino == os.fstat(lock).st_ino:  # not renamed or removed meanwhile
            _empty(staging)
            return staging, lock
        os.close(lock)


def _empty(folder: Path) -> None:
    """Remove what a dead run left."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _swap(staging: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.replaced")
    if target.exists():
        target.rename(old)
    staging.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover(target: Path) -> None:
    """Undo or finish a swap that was killed."""
    old = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(target)


def _sync_tree(folder: Path) -> None:
    """Bring to the disk what was written; a file with a second name was there before and is left alone."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.stat().st_nlink == 1:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
