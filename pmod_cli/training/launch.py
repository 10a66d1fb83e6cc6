"""The processes of a run, on this machine and others: how many, and how torch's or accelerate's launcher starts them.

The launcher starts ``pmod_cli.commands.finetune_runs`` once a process. What it is told, and what it has to say, are
files of a folder that lives as long as the launch: ``job.json``, ``report.json``, ``error-RANK.json``. Imports
no torch.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import INTERRUPTED, RUN_FAILED, PmodError

if TYPE_CHECKING:
    from pmod_cli.training.summary import FinetuneReport


@dataclass(frozen=True)
class Distributed:
    """The processes of a run.

    Args:
        processes: on all machines together; one a GPU.
        machines: each is given the same command, but for ``machine_rank``.
        machine_rank: number of this machine, from 0.
        main_ip: address of machine 0.
        main_port: free port of machine 0.
        accelerate_config: a file that ``accelerate config`` wrote; it then says all of this, and the engine.

    Raises:
        PmodError: numbers that do not fit each other.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    main_ip: str | None = None
    main_port: int = 29500
    accelerate_config: Path | None = None

    def __post_init__(self) -> None:
        if self.processes % self.machines:
            raise PmodError(
                f"`num_processes={self.processes}` counts those of all machines: expected a multiple of "
                f"`num_machines={self.machines}`"
            )
        if self.machine_rank >= self.machines:
            raise PmodError(f"`machine_rank={self.machine_rank}`: expected less than `num_machines={self.machines}`")
        if self.machines > 1 and self.main_ip is None:
            raise PmodError("`num_machines` needs `main_process_ip`, the address of machine 0")
        if self.accelerate_config is not None and not self.accelerate_config.is_file():
            raise PmodError(f"no such file: {self.accelerate_config}", hint="accelerate config --config_file FILE")

    @property
    def is_launch(self) -> bool:
        """Whether a launcher is needed."""
        return self.processes > 1 or self.accelerate_config is not None

    @property
    def here(self) -> int:
        """Processes of this machine."""
        return self.processes // self.machines


WORKER = "pmod_cli.commands.finetune_runs"
PATIENCE = 600  # seconds that a save may take after a signal


def launcher_arguments(distributed: Distributed, folder: Path) -> list[str]:
    """What the launcher is told, the worker's job in ``folder`` included."""
    worker = ["-m", WORKER, str(folder)]
    if distributed.accelerate_config is not None:
        return ["--config_file", str(distributed.accelerate_config), *worker]
    where = ["--standalone"]
    if distributed.machines > 1:
        where = ["--nnodes", str(distributed.machines), "--node-rank", str(distributed.machine_rank)]
        where += ["--master-addr", str(distributed.main_ip), "--master-port", str(distributed.main_port)]
    quiet = ",".join(f"{rank}:3" for rank in range(1, distributed.here))
    logs = ["--log-dir", str(folder / "logs"), *(["--redirects", quiet] if quiet else [])]
    return [*where, "--nproc-per-node", str(distributed.here), "--shutdown-timeout", str(PATIENCE), *logs, *worker]


def launch(distributed: Distributed, job: dict[str, Any], on_command: Callable[[str], None]) -> "FinetuneReport":
    """Start the processes, wait for them, and return what the first one of this machine reports.

    Args:
        job: what each of them is told.
        on_command: is told the command that is run.

    Raises:
        PmodError: what a process raised, or the last lines of one that died otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="pmod-launch-") as scratch:
        folder = Path(scratch)
        (folder / "job.json").write_text(json.dumps(job))
        program = "torchrun" if distributed.accelerate_config is None else "accelerate launch"
        arguments = launcher_arguments(distributed, folder)
        on_command(f"{program} {shlex.join(arguments)}")
        failure = _torchrun(arguments) if distributed.accelerate_config is None else _accelerate(arguments)
        return _outcome(folder, failure)


def _torchrun(arguments: list[str]) -> str | None:
    """Run the processes as ``torchrun`` does. Returns how they failed, if they did."""
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the launcher's own account of what a process says better
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would set, with a warning
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return f"process {rank} ended with exit code {failure.exitcode}"
    except (SignalException, KeyboardInterrupt):
        return "interrupted"
    return None


def _accelerate(arguments: list[str]) -> str | None:
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", *arguments])
    return f"accelerate launch ended with exit code {done.returncode}" if done.returncode else None


def _outcome(folder: Path, failure: str | None) -> "FinetuneReport":
    errors = sorted(folder.glob("error-*.json"), key=lambda path: int(path.stem[6:]))
    if errors:
        said = json.loads(errors[0].read_text())
        raise PmodError(said["what"], hint=said["hint"], code=said["code"])
    report = folder / "report.json"
    if report.is_file():
        return read_report(report)
    if failure == "interrupted":
        raise PmodError("interrupted", hint="run the same command again to go on", code=INTERRUPTED)
    lines = _last_lines(folder / "logs")
    raise PmodError(f"{failure or 'no process reported'}{lines}", hint="PMOD_DEBUG=1 shows more", code=RUN_FAILED)


def _last_lines(logs: Path) -> str:
    """The end of what the other processes said."""
    shown = []
    for path in sorted(logs.rglob("stderr.log")):
        lines = path.read_text(errors="replace").strip().splitlines()[-5:]
        shown += [f"\n  {path.parent.name}: {line}" for line in lines]
    return "".join(shown)


def write_report(report: "FinetuneReport", path: Path) -> None:
    """As JSON; ``read_report`` reads it back."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**asdict(report), "path": str(report.path)}))
    temporary.replace(path)


def read_report(path: Path) -> "FinetuneReport":
    """What ``write_report`` wrote."""
    from pmod_cli.training.parts import PartCount
    from pmod_cli.training.summary import FinetuneReport, Summary

    found = json.loads(path.read_text())
    parameters = {part: PartCount(**numbers) for part, numbers in found["parameters"].items()}
    summary = Summary(**found["summary"]) if found["summary"] else None
    return FinetuneReport(**{**found, "path": Path(found["path"]), "parameters": parameters, "summary": summary})
