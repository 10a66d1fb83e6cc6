"""The folder of a run: what lies where, one run at a time, and no run over another one's results."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.files import read_json
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.processes import ALONE, Processes
from pmod_cli.evaluation.report import SCHEMA_VERSION
from pmod_cli.evaluation.suite import Benchmark

RESULTS = "results.json"
LOCK = ".lock"
WRITTEN = ("journal", "answers", "changed", RESULTS, "results.md", "results.csv")


class RunFolder:
    """A context that holds the folder's lock, which the system drops where the run dies.

    Args:
        path: The folder; made where it is not there.
        processes: Those of the run. The one of rank 0 locks and prepares; the others wait, and fail where it fails.
    """

    def __init__(self, path: Path, processes: Processes = ALONE) -> None:
        self.path, self._processes = path, processes
        self.identity: dict[str, Any] = {}
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def prepare(self, identity: Mapping[str, Any], benchmarks: Iterable[Benchmark], overwrite: bool) -> None:
        """Lock the folder, and check that what it holds is this run's.

        Raises:
            PmodError: another run is at work there, or has left results of other models, settings or tasks.
        """
        self.identity, error = dict(identity), None
        if self._processes.rank == 0:
            try:
                self._prepare(benchmarks, overwrite)
            except (PmodError, OSError) as cause:
                error = cause
        if (error := self._processes.gather(error)[0]) is not None:
            raise error

    def log(self, rank: int) -> Path:
        """What lmms-eval says, and the tracebacks."""
        return self.path / ("lmms-eval.log" if rank == 0 else f"lmms-eval.{rank}.log")

    def journal(self, label: str) -> Path:
        """Answers as they are made, by process."""
        return self.path / "journal" / label

    def answers(self, label: str, benchmark: str) -> Path:
        """The records of a finished benchmark."""
        return self.path / "answers" / label / f"{benchmark}.jsonl"

    def changed(self, label: str, benchmark: str) -> Path:
        """The questions that two models answer differently."""
        return self.path / "changed" / label / f"{benchmark}.jsonl"

    def _prepare(self, benchmarks: Iterable[Benchmark], overwrite: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PmodError(
                f"another run is writing to {self.path}", hint="wait for it, or choose another folder with -o"
            ) from None
        if overwrite:
            for name in WRITTEN:
                shutil.rmtree(self.path / name) if (self.path / name).is_dir() else (self.path / name).unlink(True)
        elif (self.path / RESULTS).exists():
            self._refuse_another_run(read_json(self.path / RESULTS), benchmarks)

    def _refuse_another_run(self, before: Mapping[str, Any], benchmarks: Iterable[Benchmark]) -> None:
        held = f"{self.path} holds another run"
        hint = "replace it with --overwrite, or choose another folder with -o"
        if before.get("schema_version") != SCHEMA_VERSION:
            raise PmodError(f"{held}, of schema version {before.get('schema_version')}", hint=hint)
        known = before.get("identity", {})
        if differs := [name for name, value in self.identity.items() if known.get(name) != value]:
            raise PmodError(f"{held}, with other {', '.join(differs)}", hint=hint)
        asked = {benchmark.name for benchmark in benchmarks}
        if others := [task["name"] for task in before["tasks"] if task["name"] not in asked]:
            raise PmodError(f"{held}, of {', '.join(others)} too", hint=f"add them to --tasks, or {hint}")
