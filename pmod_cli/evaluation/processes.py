"""Several processes that answer one benchmark together, and agree on what is known and what failed.

They are started by `launch`, on one machine, or by torchrun or accelerate, on any number of machines.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pmod_cli.core.errors import RUN_FAILED, PmodError, explain

PATIENCE = timedelta(days=7)  # a process that finishes early waits for the slowest; a dead one ends its launcher
SAID = ".error.json"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: 0 scores and writes the report.
        size: Number of processes, over all machines.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Is this the one that scores and reports?"""
        return self.rank == 0

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
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@contextmanager
def hidden_launcher() -> Iterator[None]:
    """lmms-eval divides the questions itself where it sees a launcher's variables; here they are divided already."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def launch(count: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(processes, *arguments)` in `count` new processes and return what that of rank 0 returns.

    As `torchrun --standalone`, without a second command line. A process that dies takes the others with it, and all
    die with this one.

    Args:
        function: Of a module, and its arguments such that they can be pickled.

    Raises:
        PmodError: a process failed or was killed; what the first one said.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is told below
    with TemporaryDirectory(prefix="pmod-processes-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="spawn",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            return elastic_launch(config, _called)(function, arguments, logs)[0]
        except SignalException as stopped:
            raise KeyboardInterrupt from stopped
        except ChildFailedError as failed:
            raise _told(failed.failures, Path(logs), count) from failed


def _told(failures: dict[int, Any], logs: Path, count: int) -> PmodError:
    """The first cause. Where a process dies, the others fail too: they lose the connection, or are ended."""
    hint = "run the same command again: what was answered is not asked again"
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            what = f"process {rank} of {count} was ended by {failure.signal_name()}"
            return PmodError(what, hint=hint, code=RUN_FAILED)
    for file in sorted(logs.glob(f"*{SAID}"), key=lambda file: file.stat().st_mtime_ns):
        return PmodError(**json.loads(file.read_text(encoding="utf-8")))
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    return PmodError(f"process {rank} of {count} failed: {said}", hint=hint, code=RUN_FAILED)


def _called(function: Callable[..., Any], arguments: tuple[Any, ...], logs: str) -> Any:
    """In the new process. What is known of an error goes to the one that launched it, which tells it once."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan goes on writing to the folder
    try:
        return function(join(), *arguments)
    except Exception as error:
        if (known := explain(error)) is not None:
            said = {"what": known.what, "hint": known.hint, "code": known.code}
            Path(logs, f"{os.environ['RANK']}{SAID}").write_text(json.dumps(said), encoding="utf-8")
        raise
