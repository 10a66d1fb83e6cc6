"""The one kind of lock: a file beside what it guards, held by one process at a time.

It is filelock's `flock` on a plain file. The system drops it when its holder dies, however that happens, so what a dead
run left is told from the work of a live one. A plain file can be locked on network file systems too, where a folder
cannot. Processes that the holder forks do not keep it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
