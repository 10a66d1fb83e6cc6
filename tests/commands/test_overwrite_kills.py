"""`--overwrite` of convert, finetune and eval, killed at system calls and at random moments: the old folder or the new
one is there, nothing else, and the same command then ends in the new one, with nothing beside it."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmod_cli.core.markers import SUCCESSOR
from tests.conftest import ROOT

CALLS = "rename,renameat2,unlink,unlinkat,rmdir,mkdir,fsync,fchmodat,flock,link,linkat"
LAST = 40  # system calls of a run that belong to the swap and what follows it: half of the kills are among them
GROUP = 3  # kills before the command is let through
# Imports once what is heavy; each line is a command in a process of its own, which may wait until it is traced.
SERVER = """
import json, os, sys, time
from pathlib import Path
import torch, torch._dynamo, lmms_eval.evaluator, matplotlib.backends.backend_agg, transformers.trainer
import transformers.models.llava_next.processing_llava_next, transformers.models.clip.modeling_clip
import pmod_cli.model.modeling, transformers.models.llama.modeling_llama
import pmod_cli.checkpoints, pmod_cli.training.run, pmod_cli.evaluation.runner
from pmod_cli import cli
from pmod_cli.commands import convert, eval, finetune
torch.set_num_threads(1)
for line in sys.stdin:
    words, place, traced = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(place)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        while traced and "TracerPid:\\t0" in Path("/proc/self/status").read_text():
            time.sleep(0.002)
        os._exit(cli.main(words))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
VERBS = {
    "convert": (["--shift", "0.4"], ["--shift", "0.6"]),
    "finetune": (["--seed", "1"], ["--seed", "2"]),
    "eval": (["--limit", "2"], ["--limit", "3"]),
}
COMMON = {
    "convert": "convert {stock} -o out -q",
    "finetune": "finetune -m {routed} -o out -q --device cpu --max-steps 2 --batch-size 1 --report-to none "
    "--set data.turns=1 --set model.router_start=zero --set train.save_steps=1",
    "eval": "eval -t tiny_doc,tiny_presence -m {stock} --against none --dtype fp32 -o out -q",
}


class Commands:
    """Runs commands one by one, each in a process of its own, in the folder `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)

    def run(self, words: list[str], *, after: float | None = None, call: tuple[str, int] | None = None) -> bool:
        """Whether it ended well; killed `after` some seconds or before a `call`, it did not.

        Args:
            call: name of a system call and which of that name; the 0th is none, and all are listed in a file.
        """
        self.server.stdin.write(json.dumps([words, str(self.place), call is not None]) + "\n")
        pid = int(self.server.stdout.readline())
        tracer = None
        if call is not None:
            kill = ["-e", f"inject={call[0]}:signal=KILL:when={call[1]}"] if call[1] else []
            command = ["strace", "-f", "-qq", "-o", str(self.place / "calls"), "-e", f"trace={CALLS}", *kill]
            tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True)
        elif after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it has ended before
                os.kill(pid, signal.SIGKILL)
        status = int(self.server.stdout.readline())
        if tracer is not None:
            tracer.communicate()
        assert status == 0 or os.WIFSIGNALED(status), (self.place / "log").read_text()
        return status == 0

    def calls(self, words: list[str]) -> list[tuple[str, int]]:
        """System calls of an unbroken run before which it may be killed: the name, and which of that name it is."""
        assert self.run(words, call=("", 0))
        lines = [line.split(maxsplit=1) for line in (self.place / "calls").read_text().splitlines()]
        names = [found[1] for pid, call in lines if pid == lines[0][0] and (found := re.match(r"(\w+)\(", call))]
        return [(name, names[: place + 1].count(name)) for place, name in enumerate(names)]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    if shutil.which("strace") is None:
        pytest.skip("needs strace; it is not installed")
    if Path("/proc/sys/kernel/yama/ptrace_scope").exists() and os.geteuid():
        pytest.skip("needs the right to trace another process")
    commands = Commands(tmp_path_factory.mktemp("kills"))
    yield commands
    commands.server.stdin.close()
    commands.server.wait()
    commands.server.stdout.close()


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if Path(name).name != SUCCESSOR}


def same(found: dict[str, bytes], new: dict[str, bytes]) -> bool:
    """As whole as another run of the same command: all its files, and weights and answers to the bit."""
    if found.keys() != new.keys() or found.get("config.yaml") != new.get("config.yaml"):
        return False
    weights = [name for name in new if name.endswith(".safetensors")]
    return all(found[name] == new[name] for name in weights) and scores(found) == scores(new)


def scores(found: dict[str, bytes]) -> list[tuple]:
    """Of an evaluation: by task and model, how many questions and what score; else empty."""
    tasks = json.loads(found["results.json"])["tasks"] if "results.json" in found else []
    return [
        (task["name"], model, score["questions"], score["score"])
        for task in tasks
        for model, score in task["scores"].items()
    ]


def kill_often(verb: str, commands: Commands, stock: Path, kills: int, seed: int) -> dict[str, int]:
    place, out, draw = commands.place, commands.place / "out", random.Random(seed)
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if verb == "finetune":
        assert commands.run(["convert", str(stock), "-o", "routed", "-q"])
    old_words, new_words = (
        [*COMMON[verb].format(stock=stock, routed=place / "routed").split(), *more] for more in VERBS[verb]
    )
    assert commands.run(new_words)
    new = files(out)
    shutil.rmtree(out)
    assert commands.run(old_words)
    shutil.copytree(out, place / "old")
    old, again = files(out), [*new_words, "--overwrite"]
    calls = commands.calls(again)
    started = time.monotonic()
    assert commands.run(again)
    seconds = time.monotonic() - started
    count = {"kills": 0, "at a call": 0, "left the old": 0, "left the new": 0, "ended first": 0, "calls": len(calls)}
    rounds = 0
    while count["kills"] < kills:
        shutil.rmtree(out)
        shutil.copytree(place / "old", out)
        for _ in range(min(GROUP, kills - count["kills"])):
            rounds += 1
            if rounds % 5 < 3:
                ended = commands.run(again, call=draw.choice(calls[-LAST:] if draw.random() < 0.5 else calls))
                count["at a call"] += not ended
            else:
                ended = commands.run(again, after=draw.uniform(0, 0.8 * seconds))
            count["kills"] += not ended
            count["ended first"] += ended
            found = files(out)
            is_old = found == old
            assert is_old or same(found, new), (sorted(found), (place / "log").read_text())
            count["left the old" if is_old else "left the new"] += not ended
        assert commands.run(again)
        assert same(files(out), new)
        assert not (out / SUCCESSOR).exists()
        beside = {path.name for path in place.iterdir()} - {"old", "routed", "log", "calls", ".pmod", "out"}
        assert not beside, "something is left beside the folder"
        assert (
            {path.name for path in (place / ".pmod").iterdir()} <= {"current"} if (place / ".pmod").exists() else True
        )
        print(f"{verb} --overwrite: {count}", flush=True)
    return count


@pytest.mark.soak
@pytest.mark.parametrize("verb", VERBS)
def test_overwriting_killed_fifty_times(verb, commands, stock_model):
    count = kill_often(verb, commands, stock_model(), kills=50, seed=1)
    assert count["at a call"] >= 15
