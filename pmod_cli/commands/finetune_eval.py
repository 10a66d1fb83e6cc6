"""`pmod finetune --eval TASKS`: the finished run is scored, and its model card says how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pmod_cli import output
from pmod_cli.errors import PARTIAL, PmodError
from pmod_cli.extras import require

EVAL = "eval"  # in the run folder


def check_tasks(tasks: list[str]) -> None:
    """Refuse, before the training, tasks that could not be scored after it.

    Raises:
        PmodError: an unknown task; the [eval] extra is not installed.
    """
    if tasks:
        require("eval", "lmms_eval")
        from pmod_cli.evaluation.suite import resolve

        resolve(tasks)


def evaluate(out: Path, tasks: list[str], device: str) -> None:
    """Score the checkpoint in `out`, as a user would, into `out/eval`, and put the table into the model card.

    Raises:
        PmodError: scoring failed. The training did not: its checkpoint is there.
    """
    words = ["eval", "--tasks", ",".join(tasks), "--model", str(out), "-o", str(out / EVAL), "--device", device]
    output.note(f"$ pmod {' '.join(words)}")
    done = subprocess.run([sys.executable, "-m", "pmod_cli", *words], stdout=subprocess.PIPE, text=True)
    table = out / EVAL / "results.md"
    if done.returncode or not table.is_file():
        raise PmodError(
            f"{out} is trained, but scoring it failed",
            hint=f"pmod {' '.join(words)}",
            code=PARTIAL,
        )
    output.note(done.stdout.rstrip())
    from pmod_cli.training.summary import add_scores

    add_scores(out, table.read_text(encoding="utf-8"))
