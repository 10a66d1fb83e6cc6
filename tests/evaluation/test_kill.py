"""Killed by SIGKILL at random moments, one process or two: no answer is lost, none given twice, none differs."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from pmod_cli.evaluation.outcome import TIMES
from pmod_cli.evaluation.results.folder import ResultsFolder
from tests.evaluation import forks

QUESTIONS = 30  # of each of the two tasks
BATCH = 2
KILLS_OF_A_RUN = 3


class Run:
    """The command in `processes` processes, as torchrun starts them."""

    def __init__(self, model: Path, folder: Path, processes: int) -> None:
        self.folder, self.processes = folder, processes
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = f"eval -t tiny_doc,tiny_presence --limit {QUESTIONS} -b {BATCH} --against none --dtype fp32 -q"
        self.arguments = [*words.split(), "-m", str(model), "-o", folder.name]

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.processes)}
        self.running = []
        for rank in range(self.processes):
            environment = launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if self.processes > 1 else {}
            self.running.append(forks.start(self.arguments, self.folder.parent, environment))

    def kill(self, which: list[int]) -> bool:
        """SIGKILL for these; the others are what is left of a launcher that ends them too. False: it had ended."""
        alive = all(process.is_alive() for process in self.running)
        for place in which:
            self.running[place].kill()
            self.running[place].join()
        for process in self.running:
            process.kill()
            process.join()
        return alive

    def wait(self) -> None:
        for process in self.running:
            process.join(240)
            said = "".join(log.read_text() for log in self.folder.parent.glob("log*"))
            assert process.exitcode == 0, said

    def journal(self) -> list[str]:
        """Keys of all whole lines."""
        keys = []
        for path in self.folder.glob("journal/*/*.jsonl"):
            for line in path.read_bytes().split(b"\n"):
                try:
                    keys.append(json.loads(line)["key"])
                except ValueError:
                    continue  # cut by a kill
        return keys


def outcome(folder: Path) -> tuple[dict, dict]:
    """Scores and records without times."""
    results = json.loads((folder / "results.json").read_text())
    scores = {
        task["name"]: [
            {name: value for name, value in entry.items() if name not in TIMES} for entry in task["scores"].values()
        ]
        for task in results["tasks"]
    }
    records = {
        path.name: [
            {name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in path.read_text().splitlines()
        ]
        for path in folder.glob("answers/*/*.jsonl")
    }
    return scores, records


@pytest.fixture(scope="module")
def unbroken(stock_model, tmp_path_factory):
    run = Run(stock_model(), tmp_path_factory.mktemp("unbroken") / "run", processes=1)
    started = time.monotonic()
    run.start()
    run.wait()
    whole = outcome(run.folder)
    assert len({record["answer"] for records in whole[1].values() for record in records}) > 5
    assert len(run.journal()) == 2 * QUESTIONS
    return whole, time.monotonic() - started


def kill_and_compare(model, place: Path, processes: int, kills: int, seed: int, unbroken) -> dict[str, int]:
    """Kill runs of one folder, `KILLS_OF_A_RUN` times each, until there were enough kills; compare each at its end."""
    draw, (whole, seconds) = random.Random(seed), unbroken
    count = {"kills": 0, "runs": 0, "while_answering": 0}
    while count["kills"] < kills:
        run = Run(model, place / str(count["runs"]) / "run", processes)
        for number in range(min(KILLS_OF_A_RUN, kills - count["kills"])):
            before = len(run.journal())
            run.start()
            if number % 2:  # at any moment of a run's life, or
                time.sleep(draw.uniform(0, seconds))
            else:  # at any number of answers, its end and what comes after it included
                goal, end = draw.randint(before, 2 * QUESTIONS), time.monotonic() + 60
                while len(run.journal()) < goal and time.monotonic() < end:
                    time.sleep(0.002)
                time.sleep(draw.uniform(0, 0.05 if goal < 2 * QUESTIONS else 1.0))
            victims = draw.choice([[place] for place in range(processes)] + [list(range(processes))])
            count["kills"] += run.kill(victims)
            keys = run.journal()
            assert len(keys) == len(set(keys)), "a question was answered twice"
            assert len(keys) >= before, "an answer was lost"
            count["while_answering"] += before < len(keys) < 2 * QUESTIONS
            if number == 0 and processes > 1 and draw.random() < 0.5:
                processes_before = run.processes
                run.processes = 1  # the rerun may have another number of processes
                run.start()
                run.kill([0])
                run.processes = processes_before
        before = len(run.journal())
        run.start()
        run.wait()
        assert outcome(run.folder) == whole
        keys = run.journal()
        assert len(keys) == len(set(keys)) == 2 * QUESTIONS, "a question was answered twice, or not at all"
        results = json.loads((run.folder / "results.json").read_text())
        assert sum(entry["answers_found"] for task in results["tasks"] for entry in task["scores"].values()) == before
        assert not list(run.folder.rglob("*.tmp"))
        shutil.rmtree(run.folder)
        count["runs"] += 1
    return count


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_three_times(stock_model, tmp_path, unbroken, processes):
    count = kill_and_compare(stock_model(), tmp_path, processes, kills=3, seed=processes, unbroken=unbroken)
    assert count["kills"] >= 3


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_thirty_times(stock_model, tmp_path, unbroken, processes):
    count = kill_and_compare(stock_model(), tmp_path, processes, kills=30, seed=10 + processes, unbroken=unbroken)
    print(f"{processes} processes: {count}")
    assert count["while_answering"] >= 5, count


def test_a_dead_process_ends_its_run(stock_model, workdir):
    """`--num-processes 2`: one of the two is killed; the command says so, and leaves nobody behind."""
    run = Run(stock_model(), workdir / "run", processes=1)
    command = forks.start([*run.arguments, "--num-processes", "2"], workdir)
    deadline = time.monotonic() + 120
    while not run.journal() and time.monotonic() < deadline and command.is_alive():
        time.sleep(0.01)
    assert run.journal(), (workdir / "log").read_text()
    workers = _children(command.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    command.join(60)
    said = (workdir / "log").read_text()
    assert command.exitcode == 1, said
    assert "of 2 was ended by SIGKILL" in said
    assert "what was answered is not asked again" in said
    assert "Traceback" not in said
    assert not [worker for worker in workers if _runs(worker)]


def test_what_a_process_refuses_is_said_once(stock_model, workdir):
    run = Run(stock_model(), workdir / "run", processes=1)
    with ResultsFolder(workdir / "run") as held:
        held.prepare({}, [])
        command = forks.start([*run.arguments, "--num-processes", "2"], workdir)
        command.join(120)
    said = (workdir / "log").read_text()
    assert command.exitcode == 2, said
    assert said.count("another run is writing run") == 1
    assert "Traceback" not in said


def _children(parent: int) -> list[int]:
    """Processes that were started by another one and run Python, in the order of their numbers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = status.read_text().split(" ", 1)
            words = rest.rpartition(")")[2].split()
        except OSError:
            continue
        command = (status.parent / "cmdline").read_bytes() if status.parent.exists() else b""
        if int(words[1]) == parent and b"spawn_main" in command:
            found.append(int(number))
    return sorted(found)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
