"""Files that can be written by a process that is killed: what is there afterwards is the old file or the new one.

A file is written under a temporary name beside its target, synced and renamed. The temporary name is always the same,
under a lock, so that a rerun replaces what a killed run left. Whole folders: see `folders`.

There is one kind of lock: a file beside what it guards, held by one process at a time. It is filelock's `flock` on a
plain file. The system drops it when its holder dies, however that happens, so what a dead run left is told from the
work of a live one. A plain file can be locked on network file systems too, where a folder cannot. Processes that the
holder forks do not keep it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


class Busy(Exception):
    """Another process, or another part of this one, holds the lock."""


@contextmanager
def locked(path: Path, *, wait: float | None = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which is gone afterwards; a killed holder leaves it, and the next one removes it.

    Args:
        path: In a folder that exists.
        wait: Seconds to wait for another holder; None waits as long as it takes.

    Raises:
        Busy: it is still held after that time.
        OSError: the folder is missing, or takes no files.
    """
    import filelock

    if not path.parent.is_dir():  # filelock would make it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    path.touch()  # filelock takes a folder without room for new files, such as /proc, for one that is busy
    lock = filelock.FileLock(path, timeout=-1 if wait is None else wait)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Busy(path) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile finds that it is gone, and repeats
        lock.release()


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
        sync(folder)


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


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE on Linux, RENAME_SWAP on macOS
_MISSING = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # of this kernel or this file system


def exchange(one: Path, other: Path) -> bool:
    """Swap two existing paths of one file system. False where there is no such call; then nothing has changed.

    Raises:
        OSError: the swap was refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_HERE, first, _HERE, second, _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(first, second, _EXCHANGE)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in _MISSING:
        return False
    raise OSError(number, os.strerror(number), str(other))
