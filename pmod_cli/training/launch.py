"""A run of several processes, on this machine and others: started by torch's or accelerate's launcher.

The launcher starts ``pmod_cli.commands.finetune_worker`` once a process. What it is told, and what it has to say, are
files of a folder that lives as long as the launch: ``job.json``, ``report.json``, ``error-RANK.json``.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pmod_cli.core.errors import INTERRUPTED, RUN_FAILED, PmodError
from pmod_cli.training.distributed import Distributed
from pmod_cli.training.parts import Part
from pmod_cli.training.summary import FinetuneReport, Summary

WORKER = "pmod_cli.commands.finetune_worker"
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


def launch(distributed: Distributed, job: dict[str, Any], on_command: Callable[[str], None]) -> FinetuneReport:
    """Start the processes, wait for them, and return what the first one of this machine reports.

    Args:
        distributed: the processes.
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


def _outcome(folder: Path, failure: str | None) -> FinetuneReport:
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


def write_report(report: FinetuneReport, path: Path) -> None:
    """As JSON; ``read_report`` reads it back."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**asdict(report), "path": str(report.path)}))
    temporary.replace(path)


def read_report(path: Path) -> FinetuneReport:
    """What ``write_report`` wrote."""
    found = json.loads(path.read_text())
    parameters = {part: Part(**numbers) for part, numbers in found["parameters"].items()}
    summary = Summary(**found["summary"]) if found["summary"] else None
    return FinetuneReport(**{**found, "path": Path(found["path"]), "parameters": parameters, "summary": summary})
