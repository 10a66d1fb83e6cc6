"""SIGKILL at random moments: what is left goes on, and ends in the very weights of an unbroken run."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmod_cli.checkpoints import convert
from pmod_cli.model import PmodSettings
from pmod_cli.training import folder

ROOT = Path(__file__).parent.parent.parent
STEPS = 8


def command(model: Path, out: Path) -> list[str]:
    words = [sys.executable, "-m", "pmod_cli", "finetune", "-m", model, "-o", out, "--device", "cpu", "--seed", 3]
    words += ["--max-steps", STEPS, "--batch-size", 1, "--learning-rate", "1e-2", "--report-to", "none"]
    for setting in ("data.turns=1", "train.log_steps=1", "train.save_steps=1", "model.router_start=zero"):
        words += ["--set", setting]
    return [str(word) for word in words]


def start(words: list[str], cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_somewhere(process: subprocess.Popen, moment: random.Random) -> bool:
    """Kill it while or after some step, or while it publishes. False where it had finished by then."""
    wanted = moment.randint(1, STEPS)
    for line in process.stderr:
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= wanted:
            break
    time.sleep(moment.uniform(0, 0.2))
    finished = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return not finished


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_at_random_moments(stock_model, tmp_path, kills):
    convert(stock_model("llava_next", "llama"), tmp_path / "model", PmodSettings())
    whole = start(command(tmp_path / "model", tmp_path / "whole"), tmp_path)
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    moment, done, run = random.Random(kills), 0, 0
    while done < kills:
        out, run = tmp_path / f"broken{run}", run + 1
        while done < kills and kill_somewhere(start(command(tmp_path / "model", out), tmp_path), moment):
            done += 1
        last = start(command(tmp_path / "model", out), tmp_path)
        _, said = last.communicate(timeout=300)
        assert last.returncode == 0, said
        one, other = weights(tmp_path / "whole"), weights(out)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert not (out / folder.STATE).exists()
        assert not list(out.glob("*.tmp"))
