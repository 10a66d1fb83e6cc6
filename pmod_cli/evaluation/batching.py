"""Questions are prepared in background threads, so that the model does not wait for images to be decoded and cut."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

WINDOW = 8  # batches that are prepared and sorted by length together, while the window before them is answered
MOST_ROWS = 128  # of a window: prepared pixels of LLaVA-NeXT take 7 MB a question
MOST_WORKERS = 4

Prepared = TypeVar("Prepared")


def windows(
    requests: Sequence[Instance], prepare: Callable[[int], Prepared], batch_size: int
) -> Iterator[tuple[dict, list[Prepared]]]:
    """Generation settings and prepared questions, a window at a time; all questions of a window share the settings.

    The length of a prompt is known once its image is decoded and cut into tiles. So a window is what can be sorted by
    length: larger than a batch, smaller than a benchmark.

    Args:
        prepare: From the place of a request in `requests` to the prepared question; called in a thread.
        batch_size: Rows of a batch.
    """
    by_settings: dict[str, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        by_settings[repr(request.args[1])].append(place)
    rows = max(batch_size, min(WINDOW * batch_size, MOST_ROWS))
    parts = [group[at : at + rows] for group in by_settings.values() for at in range(0, len(group), rows)]
    pool = ThreadPoolExecutor(_workers(), thread_name_prefix="prepare")
    try:
        ahead = [pool.submit(prepare, place) for place in parts[0]] if parts else []
        for number, part in enumerate(parts):
            now = ahead
            ahead = [pool.submit(prepare, place) for place in parts[number + 1]] if number + 1 < len(parts) else []
            yield requests[part[0]].args[1], [future.result() for future in now]
    finally:
        pool.shutdown(cancel_futures=True)


def _workers() -> int:
    """Threads of this process: the cores are shared with the other processes of the machine, one answers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
