"""What a command takes, as a user runs it: CPU seconds and peak memory, beside what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

# A small process between this one and the command: Linux counts what the parent held before `exec` as the child's.
BETWEEN = """
import json, resource, subprocess, sys, time

began = time.monotonic()
code = subprocess.run(sys.argv[2:]).returncode
took = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = took.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as file:
    json.dump([code, time.monotonic() - began, took.ru_utime + took.ru_stime, peak], file)
"""


class Usage(NamedTuple):
    """Of a command that ended well."""

    out: str
    err: str
    seconds: float
    """On the clock."""
    cpu_seconds: float
    peak: int
    """Bytes of resident memory."""


def usage(folder: Path, *command: object) -> Usage:
    """Runs a command in `folder`; it has to succeed."""
    note = folder / ".usage.json"
    between = [sys.executable, "-c", BETWEEN, str(note), *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(between, cwd=folder, env=environment, capture_output=True, text=True)
    code, seconds, cpu_seconds, peak = json.loads(note.read_text())
    note.unlink()
    assert code == 0, done.stderr
    return Usage(done.stdout, done.stderr, seconds, cpu_seconds, peak)
