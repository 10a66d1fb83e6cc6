"""A limit to what one piece of work may take, where its input comes from elsewhere."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/statm")


@contextmanager
def at_most(extra: int) -> Iterator[None]:
    """Let this process take `extra` bytes of address space more than it has; beyond that is a MemoryError.

    The limit holds for all threads while the block lasts, so it is for short work. Where the system does not tell how
    much the process has (macOS), there is no limit.
    """
    if not _STATUS.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_STATUS.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + extra
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
