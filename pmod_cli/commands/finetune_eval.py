"""`pmod finetune --eval TASKS`: the finished run is scored, and its model card says how."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from pmod_cli.core import output
from pmod_cli.core.errors import INTERRUPTED, PARTIAL, PmodError

EVAL = "eval"  # in the run folder


def evaluate(out: Path, tasks: list[str], device: str, *, limit: int | None = None, quiet: bool = False) -> None:
    """Score the checkpoint in `out`, as a user would, into `out/eval`; the scores go into its summary and model card.

    A run folder that was scored in part goes on: `pmod eval` keeps a journal of its answers.

    Raises:
        PmodError: scoring failed. The training did not: its checkpoint is there.
    """
    words = ["eval", "--tasks", ",".join(tasks), "--model", str(out), "-o", str(out / EVAL), "--device", device]
    words += [] if limit is None else ["--limit", str(limit)]
    again = f"pmod {shlex.join(words)}"
    output.note(f"$ {again}")
    words += ["--quiet"] if quiet else []
    done = subprocess.run([sys.executable, "-m", "pmod_cli", *words], stdout=subprocess.PIPE, text=True)
    table = out / EVAL / "results.md"
    if done.returncode or not table.is_file():
        raise PmodError(
            f"{out} is trained, but scoring it failed",
            hint=again,
            code=INTERRUPTED if done.returncode == INTERRUPTED else PARTIAL,
        )
    if done.stdout.strip():
        output.note(done.stdout.rstrip())
    from pmod_cli.training.summary import add_scores

    found = json.loads((out / EVAL / "results.json").read_text(encoding="utf-8"))
    kept = ("score", "metric", "questions", "low", "high")
    scores = {
        task["name"]: {model: {key: score[key] for key in kept} for model, score in task["scores"].items()}
        for task in found["tasks"]
    }
    add_scores(out, table.read_text(encoding="utf-8"), scores)
