"""Killed at any moment, a conversion leaves no broken target and the next run succeeds; of two at once one runs."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pmod_cli.checkpoints import Options, convert
from pmod_cli.checkpoints.convert import PROVENANCE
from pmod_cli.checkpoints.files import read_tensors
from pmod_cli.errors import PmodError
from pmod_cli.model import PmodSettings
from tests.checkpoints.originals import twins
from tests.conftest import ROOT

SHARDS = {"linked": None, "streamed": 20_000}  # bytes: many small shards are many moments to be killed at
CODE = """
import sys
from pathlib import Path
import transformers.models.llava.processing_llava  # heavy, and none of it writes
from pmod_cli.checkpoints import Options, convert
size = int(sys.argv[3]) or None
print("ready", flush=True)
convert(Path(sys.argv[1]), Path(sys.argv[2]), options=Options(max_shard_bytes=size), overwrite=True)
"""


@pytest.fixture(scope="module")
def sources(stock_model, tmp_path_factory):
    """`linked`: shards that get a second name. `streamed`: the original layout, whose shards are written anew."""
    folder = tmp_path_factory.mktemp("kills") / "original"
    twins(folder, "llava_next", layers=4)
    return {"linked": stock_model(max_shard_size="20KB"), "streamed": folder}


def kill_and_convert_again(path: str, source: Path, target: Path, seed: int) -> bool:
    """Kill a conversion at a random moment; True if it had finished. A second run has to end whole."""
    command = [sys.executable, "-c", CODE, str(source), str(target), str(SHARDS[path] or 0)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})
    assert run.stdout.readline() == b"ready\n"
    time.sleep(random.Random(seed).uniform(0, {"linked": 0.06, "streamed": 0.15}[path]))
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    finished = target.exists()
    if finished:
        read_tensors(target)
        assert (target / PROVENANCE).exists()
    convert(source, target, options=Options(max_shard_bytes=SHARDS[path]), overwrite=True)
    read_tensors(target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return finished


@pytest.mark.parametrize("path", SHARDS)
def test_killed_at_any_moment(path, sources, tmp_path):
    for seed in range(3):
        kill_and_convert_again(path, sources[path], tmp_path / "pmod", seed)


@pytest.mark.soak
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("path", SHARDS)
def test_killed_at_any_moment_soak(path, existing, sources, tmp_path):
    """50 kills each: of a first conversion, and of one that replaces an older one, which then stays whole."""
    source, finished = sources[path], 0
    for seed in range(50):
        target = tmp_path / str(seed) / "pmod"
        target.parent.mkdir()
        if existing:
            convert(source, target, PmodSettings(shift=0.4))
        finished += kill_and_convert_again(path, source, target, seed)
    assert finished < 50 or existing, "every run finished before it was killed: nothing was tested"


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
