"""Ctrl-C before a command has begun: while Python still imports what it needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.cli import VERBS

# `python -m pmod_cli WORDS`, which gets Ctrl-C when it begins to import a module.
PROGRAM = """
import os, runpy, signal, sys

module, sys.argv = sys.argv[1], ["pmod", *sys.argv[2:]]
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("pmod_cli", run_name="__main__", alter_sys=True)
"""
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("module", "verb"),
    [
        ("typer", ""),
        ("pmod_cli.cli", ""),
        ("rich.console", "env"),
        *((f"pmod_cli.commands.{verb}", verb) for verb in VERBS),
    ],
)
def test_no_traceback(module, verb):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *([verb] if verb else []), "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr.startswith("error: interrupted\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (130, "")
