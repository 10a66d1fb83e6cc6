"""lmms-eval's own program with our model, as a user of lmms-eval calls it: `python -m lmms_eval --model pmod`."""

import json
import os
import subprocess
import sys

import pytest

from pmod_cli.checkpoints import convert
from pmod_cli.evaluation.benchmarks import TINY_TASKS
from pmod_cli.model import PmodSettings
from tests.conftest import ROOT


@pytest.mark.parametrize("kind", [pytest.param("stock", marks=pytest.mark.slow), "pmod"])
def test_the_program_of_lmms_eval(stock_model, workdir, kind):
    path = stock_model()
    if kind == "pmod":
        convert(stock_model(), workdir / "tiny-pmod", PmodSettings())
        path = workdir / "tiny-pmod"
    command = [sys.executable, "-m", "lmms_eval", "--model", "pmod", "--model_args", f"pretrained={path},dtype=float32"]
    options = f"--tasks tiny_doc --include_path {TINY_TASKS} --limit 4 --batch_size 2 --log_samples --output_path out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, *options.split()], cwd=workdir, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (results,) = (workdir / "out").rglob("*_results.json")
    assert 0 <= json.loads(results.read_text())["results"]["tiny_doc"]["anls,none"] <= 1
    (samples,) = (workdir / "out").rglob("*_samples_tiny_doc.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    assert len(answers) == 4
    assert any(answer not in ("", [""]) for answer in answers)
