"""Several processes that answer one benchmark together, and agree on what is known and what failed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=7)  # a process that finishes early waits for the slowest; a dead one ends its launcher
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: 0 scores and writes the report.
        size: Number of processes, over all machines.
        local_rank: Place among those of this machine: the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks, on each of them."""
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Processes()


def join() -> Processes:
    """Meet the other processes that torchrun or accelerate has started, over gloo on any device.

    Only answers and errors travel between processes, never tensors of the model.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return Processes(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextmanager
def hidden_launcher() -> Iterator[None]:
    """lmms-eval divides the questions itself where it sees a launcher's variables; here they are divided already."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
