"""Steps that check rather than time: tests marked gpu, the tiny recipe, the engines, the report as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from pmod_cli.checkpoints import convert
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from pmod_cli.profiling.measure.phases import PMOD
from pmod_cli.training import folder
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune
from tests.factories import save_stock
from tests.gpu.machine import Machine
from tests.gpu.rows import Row, emit
from tests.gpu.speed import NEXT

ROOT = Path(__file__).parent.parent.parent
SO_FAR = "PMOD_GPU_SO_FAR"  # the file of the results so far, which the last step reads
CPU_SCORES = {"doc": 0.994, "chart": 0.986, "attribute": 0.953, "presence": 0.927}
"""Lower ends of the 95 % intervals of docs/results-void.md, "Fine-tuned p-MoD beside the stock model": of the
first tiny model. The present one was not asked 1,000 questions after recipe tiny."""
STEPS, BREAK = 5, 3
QUICK = ["--set", "model.router_start=zero"]  # calibration alone takes longer than two steps
BILLION = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
ENGINES = {"fsdp2": None, "zero2": "deepspeed", "zero3": "deepspeed", "qlora": "bitsandbytes"}
"""Engine, and the package that it needs."""


def parity(machine: Machine) -> None:
    """All tests marked gpu; a failure's name and message are in the note."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "tests.xml"
        files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
        words = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": _path()}
        )
        if done.returncode not in (0, 1):
            raise PmodError(f"pytest ended with exit code {done.returncode}")
        cases = xml.parse(report).getroot().iter("testcase")
        found, notes = Counter(), []
        for case in cases:
            kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
            found[kind] += 1
            if kind != "passed":
                why = next(child.get("message", "") for child in case if child.tag == kind)
                notes.append(f"{case.get('name')}: {why.splitlines()[0][:100] if why else kind}")
    emit(Row("tests that failed", found["failure"] + found["error"], "tests", goal=0, note="; ".join(notes[:5])))
    emit(Row("tests that passed", found["passed"], "tests", note=f"{found['skipped']} skipped"))
    if found["failure"] + found["error"]:
        raise PmodError(f"{found['failure'] + found['error']} tests failed")


def tiny(machine: Machine) -> None:
    """`pmod finetune --recipe tiny` and `pmod eval --tasks tiny`, as a user types them."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        train = ["--set", "train.report_to=none"]
        train += ["--set", "train.max_steps=2", "--set", "train.batch_size=2", *QUICK] if machine.cpu else []
        ask = ["--limit", "2", "-b", "4"] if machine.cpu else ["-b", "256"]
        device = ["--device", machine.device]
        _pmod(["convert", "tiny-llava-next"], place)
        emit(
            Row(
                "finetune --recipe tiny",
                _pmod(["finetune", "--recipe", "tiny", *device, *train, "-o", "run"], place),
                "s",
            )
        )
        words = ["eval", "--tasks", "tiny", "-m", "run", "--against", "none", *device, *ask, "-o", "scores"]
        emit(Row("eval --tasks tiny", _pmod(words, place), "s"))
        for name, score in _scores(place / "scores").items():
            goal = next((low for task, low in CPU_SCORES.items() if task in name), None)
            note = "a few questions after two steps" if machine.cpu else "goal: lower end of the CPU's interval"
            emit(Row(f"score of {name}", score, "score", goal=goal, at_least=True, note=note))


def _scores(path: Path) -> dict[str, float]:
    """Score of each task by name, 0 ... 1."""
    results = json.loads((path / "results.json").read_text())
    scores = {task["name"]: (task["scale"], list(task["scores"].values())) for task in results["tasks"]}
    return {name: entries[0]["score"] / scale for name, (scale, entries) in scores.items()}


def engines(machine: Machine) -> None:
    """Five steps of a model of one billion weights, broken off once and gone on with; beside one process alone."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        shape = {"layers": 4} if machine.cpu else {"layers": 20, **BILLION}
        convert(save_stock(place / "stock", **shape), place / "model", PmodSettings())
        begin = time.perf_counter()
        alone = _losses_of(machine, place, "alone")
        emit(Row("alone", time.perf_counter() - begin, "s", note=f"losses {_shown(alone)}"))
        failed = []
        for engine, package in ENGINES.items():
            missing = package is not None and find_spec(package) is None
            if missing or (machine.cpu and engine != "fsdp2"):
                why = f"{package} is not installed" if missing else "needs a GPU"
                emit(Row(f"{engine}: largest difference of losses", None, "", note=f"skipped: {why}"))
                continue
            try:
                losses = _losses_of(machine, place, engine)
            except subprocess.CalledProcessError as error:
                failed.append(engine)
                emit(
                    Row(
                        f"{engine}: largest difference of losses",
                        None,
                        "",
                        note=f"FAILED: exit code {error.returncode}",
                    )
                )
                continue
            worst = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
            goal = None if engine == "qlora" else 1e-2  # four bits change the model
            emit(Row(f"{engine}: largest difference of losses", worst, "", goal=goal, note=f"losses {_shown(losses)}"))
    if failed:
        raise PmodError(f"{', '.join(failed)} failed")


def _losses_of(machine: Machine, place: Path, engine: str) -> list[float]:
    """Runs `train_once` in a process of its own and reads its losses."""
    words = [sys.executable, "-m", "tests.gpu.checks", engine, machine.device, str(place)]
    subprocess.run(words, cwd=ROOT, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": _path()})
    lines = map(json.loads, (place / engine / folder.LOG).read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def train_once(engine: str, device: str, place: Path) -> None:
    """One run, interrupted after `BREAK` steps and gone on with; engines see themselves as one process of one."""
    overrides = [f"model.name={place / 'model'}", "data.turns=1", f"train.max_steps={STEPS}", "train.batch_size=2"]
    overrides += ["train.learning_rate=1e-3", "train.seed=1", "train.warmup_steps=0", "train.report_to=none"]
    overrides += ["train.log_steps=1"]
    if engine == "qlora":
        overrides += ["model.quantize=nf4", "lora.enabled=true", "lora.rank=8"]
    elif engine != "alone":
        overrides += [f"train.engine={engine}"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    settings = load_settings(None, overrides)

    def stop(step) -> None:
        if step.step == BREAK:
            os.kill(os.getpid(), signal.SIGINT)

    first = finetune(settings, place / engine, device=device, on_step=stop)
    second = finetune(settings, place / engine, device=device)
    if (first.status, second.status, second.step) != ("interrupted", "finished", STEPS):
        raise PmodError(f"{engine}: {first.status} at {first.step}, then {second.status} at {second.step}")


def report(machine: Machine) -> None:
    """`pmod profile --report latency` for the first step's prefill, held against that step."""
    words = [
        "profile",
        "--report",
        "latency",
        "--random-weights",
        "-m",
        NEXT,
        "--phases",
        "prefill",
        "--against",
        "stock",
    ]
    words += ["--device", machine.device, "--repeats", str(machine.rounds), "--json"]
    words += ["--hidden-size", "64", "--layers", "3", "--image-size", "336x336"] if machine.cpu else []
    with tempfile.TemporaryDirectory() as scratch:
        done = _run(words, Path(scratch))
    phases = json.loads(done)["latency"]["phases"]
    ours = next(entry["ratio_to_stock"] for entry in phases if entry["model"] == PMOD)
    emit(Row("prefill b1, as a user calls it", ours))
    first = _first_step()
    if first is None:
        emit(Row("beside step prefill", None, "", note="step prefill did not run"))
    else:
        emit(Row("difference from step prefill", abs(ours / first - 1), "", goal=0.05, note=f"there {first:.4f}"))


def _first_step() -> float | None:
    path = os.environ.get(SO_FAR)
    steps = json.loads(Path(path).read_text())["steps"] if path else {}
    rows = steps.get("prefill", {}).get("rows", [])
    return next((row["value"] for row in rows if row["name"] == f"{NEXT} b1"), None)


def _pmod(words: list[str], place: Path) -> float:
    """Runs a command as a user does; seconds that it took."""
    begin = time.perf_counter()
    _run(words, place)
    return time.perf_counter() - begin


def _run(words: list[str], place: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": _path(), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pmod_cli", *words]
    done = subprocess.run(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise PmodError(f"pmod {' '.join(words)} ended with exit code {done.returncode}")
    return done.stdout


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4f}" for loss in losses)


if __name__ == "__main__":
    train_once(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
