"""`python -m tests.gpu`: measures and checks everything that a GPU is needed for, in one run of at most 8 minutes.

    python -m tests.gpu -o DIR                 # gpu.json, gpu.md and gpu.log go to DIR (default: $OUT, else .)
    python -m tests.gpu --steps prefill,decode # a part
    python -m tests.gpu --cpu                  # all steps at toy size on a CPU
    python -m tests.gpu --compare OLD NEW      # two files gpu.json

Each step is a process with a time limit: an error or a hang of the device ends that step alone. What it reports is in
gpu.json at once. Exit code 1: a step failed. A goal that is missed is a result, not a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from pmod_cli.core.atomic import write_text
from tests.gpu.table import compare, markdown

TOTAL = 8 * 60  # seconds
LEAST = 10  # a step is not begun with less
CPU_PATIENCE = 5  # how many times longer a step may take on a CPU, which may have other work


class Step(NamedTuple):
    """A function of a module, and the seconds that it may take on a GPU."""

    module: str
    limit: int


STEPS = {  # in order of worth
    "prefill": Step("speed", 100),
    "decode": Step("speed", 100),
    "memory": Step("memory", 100),
    "train": Step("speed", 90),
    "kernels": Step("kernels", 60),
    "parity": Step("checks", 120),
    "tiny": Step("checks", 120),
    "engines": Step("checks", 150),
    "report": Step("checks", 60),
    "calibrate": Step("calibration", 450),  # wants a run of its own: --steps calibrate
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--cpu", action="store_true", help="toy size, on a CPU")
    parser.add_argument("-o", "--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the process of one step
    options = parser.parse_args()
    if options.compare:
        changes = list(compare(*(json.loads(path.read_text()) for path in options.compare)))
        print("\n".join(changes) or "nothing changed")
        return 0
    if options.only:
        return _inside(options.only, options.cpu)
    names = options.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"no step is called {unknown[0]}: expected some of {','.join(STEPS)}")
    try:
        run = Run(options.out, options.cpu)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be a folder of results: {error.strerror}")
    return run.all(names)


def _inside(name: str, cpu: bool) -> int:
    """In the process of a step: stdout is for its rows, so everything else that prints goes to stderr."""
    sys.stdout = sys.stderr
    import torch

    from tests.gpu.machine import Machine

    machine = Machine(cpu)
    if cpu:
        torch.set_num_threads(1)  # CPU seconds are what is timed
    if name == "machine":
        sys.__stdout__.write(json.dumps(machine.about()) + "\n")
        return 0
    getattr(import_module(f"tests.gpu.{STEPS[name].module}"), name)(machine)
    return 0


class Run:
    """One run and its files.

    Args:
        out: Folder of gpu.json, gpu.md and gpu.log.
        cpu: At toy size, on a CPU.
    """

    def __init__(self, out: Path, cpu: bool):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.cpu, self.begin = out, cpu, time.monotonic()
        self.found: dict = {"date": time.strftime("%Y-%m-%d"), "toy": cpu, "machine": {}, "steps": {}}

    def all(self, names: list[str]) -> int:
        """Every step in turn, each within its own limit and what is left of the whole."""
        with (self.out / "gpu.log").open("w") as log:
            about = subprocess.run(self._words("machine"), stdout=subprocess.PIPE, stderr=log, text=True)
            if about.returncode:
                print(f"there is no device: see {self.out / 'gpu.log'}", file=sys.stderr)
                return 2
            self.found["machine"] = json.loads(about.stdout)
            for name in names:
                patience = CPU_PATIENCE if self.cpu else 1
                left = TOTAL * patience - (time.monotonic() - self.begin)
                self._step(name, min(STEPS[name].limit * patience, left), log)
        print(markdown(self.found))
        return int(any(step["status"] != "done" for step in self.found["steps"].values()))

    def _step(self, name: str, limit: float, log) -> None:
        step = self.found["steps"][name] = {"status": "running", "seconds": 0.0, "rows": []}
        if limit < LEAST:
            step |= {"status": "left out", "error": "no time was left"}
            return self._write()
        self._write()
        print(f"{name} …", file=sys.stderr, flush=True)
        begin, late = time.monotonic(), threading.Event()
        environment = {**os.environ, "PMOD_GPU_SO_FAR": str(self.out / "gpu.json")}
        process = subprocess.Popen(
            self._words(name), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=environment
        )

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        for line in process.stdout:
            step["rows"].append(json.loads(line))
            step["seconds"] = time.monotonic() - begin
            self._write()
        code = process.wait()
        timer.cancel()
        status = "done" if code == 0 else "out of time" if late.is_set() else "failed"
        step |= {"status": status, "seconds": time.monotonic() - begin}
        if status == "failed":
            step["error"] = _last_line(self.out / "gpu.log")
        self._write()

    def _words(self, name: str) -> list[str]:
        return [sys.executable, "-m", "tests.gpu", "--only", name, *(["--cpu"] if self.cpu else [])]

    def _write(self) -> None:
        write_text(self.out / "gpu.json", json.dumps(self.found, indent=1) + "\n")
        write_text(self.out / "gpu.md", markdown(self.found))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


if __name__ == "__main__":
    sys.exit(main())
