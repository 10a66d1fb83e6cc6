"""Killed at any moment, a conversion leaves no broken target and the next run succeeds; of two at once one runs."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmod_cli.checkpoints import Options, convert
from pmod_cli.checkpoints.conversion import PROVENANCE
from pmod_cli.checkpoints.files import read_tensors
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from tests.checkpoints.originals import twins
from tests.conftest import ROOT

SHARDS = {"linked": None, "streamed": 20_000}  # bytes: many small shards are many moments to be killed at
# Imports once what is heavy and writes nothing; then each line is a conversion in a process of its own.
SERVER = """
import os, sys
from pathlib import Path
import transformers.models.llava.processing_llava
from pmod_cli.checkpoints import Options, convert
for line in sys.stdin:
    source, target, size = line.rstrip().split("\\t")
    pid = os.fork()
    if pid == 0:
        convert(Path(source), Path(target), options=Options(max_shard_bytes=int(size) or None), overwrite=True)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Converter:
    """Runs conversions one by one, each in a process of its own, and kills them."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)

    def run(self, path: str, source: Path, target: Path, kill_after: float | None = None) -> float:
        """Seconds that it ran; killed after `kill_after`, if it has not ended by then."""
        self.server.stdin.write(f"{source}\t{target}\t{SHARDS[path] or 0}\n")
        pid, started = int(self.server.stdout.readline()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = int(self.server.stdout.readline())
        assert status == 0 or (os.WIFSIGNALED(status) and kill_after is not None)
        return time.monotonic() - started


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    converter = Converter()
    yield converter
    converter.server.stdin.close()
    converter.server.wait()
    converter.server.stdout.close()


@pytest.fixture(scope="module")
def sources(stock_model, tmp_path_factory):
    """`linked`: shards that get a second name. `streamed`: the original layout, whose shards are written anew."""
    folder = tmp_path_factory.mktemp("kills") / "original"
    twins(folder, "llava_next", layers=4)
    return {"linked": stock_model(max_shard_size="20KB"), "streamed": folder}


def kill_at_moments(path: str, source: Path, folder: Path, converter: Converter, seeds: range) -> int:
    """How many runs had finished before they were killed. Every other target exists before, and stays whole."""
    converter.run(path, source, folder / "first")
    whole = converter.run(path, source, folder / "second")
    finished = 0
    for seed in seeds:
        target = folder / str(seed) / "pmod"
        target.parent.mkdir()
        if seed % 2:
            convert(source, target, PmodSettings(shift=0.4), Options(max_shard_bytes=SHARDS[path]))
        converter.run(path, source, target, random.Random(seed).uniform(0, 1.2 * whole))
        if target.exists():
            read_tensors(target)
            assert (target / PROVENANCE).exists()
            finished += (target / "config.json").read_text().find('"shift": 0.4') < 0
        convert(source, target, options=Options(max_shard_bytes=SHARDS[path]), overwrite=True)
        read_tensors(target)
        assert [path.name for path in target.parent.iterdir()] == [target.name]
    return finished


@pytest.mark.parametrize("path", SHARDS)
def test_killed_at_any_moment(path, sources, tmp_path, converter):
    kill_at_moments(path, sources[path], tmp_path, converter, range(3))


@pytest.mark.soak
@pytest.mark.parametrize("path", SHARDS)
def test_killed_at_any_moment_soak(path, sources, tmp_path, converter):
    finished = kill_at_moments(path, sources[path], tmp_path, converter, range(50))
    print(f"{path}: {50 - finished} of 50 were killed before they had finished")
    assert 0 < finished < 45


def test_of_two_at_once_one_is_refused(sources, tmp_path):
    target = tmp_path / "pmod"
    refused = []

    def again(written: int) -> None:
        with pytest.raises(PmodError, match="another run is writing"):
            convert(sources["streamed"], target, overwrite=True)
        refused.append(written)

    convert(sources["streamed"], target, progress=lambda written: refused or again(written))
    assert refused
    read_tensors(target)
    assert [path.name for path in tmp_path.iterdir()] == ["pmod"]
