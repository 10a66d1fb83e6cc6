"""Damaged checkpoints: a sentence and exit code 2 with nothing written, or a target that loads whole."""

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.cli import main
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from tests.checkpoints.mutations import mutate
from tests.checkpoints.originals import twins

SECONDS = 30


@pytest.fixture(scope="module")
def sources(tmp_path_factory, stock_model):
    """A checkpoint of each layout and kind of file."""
    root = tmp_path_factory.mktemp("fuzz")
    twins(root / "original", "llava_next", weights="sharded")
    twins(root / "pickled" / "original", "llava", weights="pickle")
    every_second = PmodSettings(schedule="list", values=(1.0, 0.4, 1.0, 0.4))
    sharded = Options(max_shard_bytes=60_000)
    convert(stock_model(), root / "pmod", every_second, sharded)
    convert(stock_model("llava"), root / "published", every_second, replace(sharded, to="published"))
    return [
        (stock_model(max_shard_size="60KB"), "pmod"),
        (stock_model("llava", "mistral"), "pmod"),
        (root / "original", "pmod"),
        (root / "pickled" / "original", "pmod"),
        (root / "pmod", "remote-code"),
        (root / "published", "pmod"),
    ]


def convert_damaged(source: Path, to: str, folder: Path, seed: int, capsys) -> bool:
    """True if the damage was refused. What is accepted has to load whole: then it was no damage to the model."""
    damaged, target = folder / "source", folder / "out" / "target"
    shutil.copytree(source, damaged)
    if (source.parent / "clip").is_dir():
        shutil.copytree(source.parent / "clip", folder / "clip")
    done = mutate(damaged, seed)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"seed {seed} hangs: {done}"))
    signal.alarm(SECONDS)
    try:
        code = main(["convert", str(damaged), "-o", str(target), "--to", to])
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {done}") from error
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    if code:
        assert code == 2, f"seed {seed}: {done}: {err}"
        assert out == "", f"seed {seed}: {done}"
        assert "error: " in err, f"seed {seed}: {done}: {err}"
        assert not list(folder.glob("out/*")) + list(folder.glob("out/.*")), f"seed {seed}: {done}"
        return True
    try:
        load_model(target)
    except (PmodError, ValueError, TypeError) as error:
        raise AssertionError(f"seed {seed}: {done}: accepted, but it does not load") from error
    return False


def run(seeds, sources, tmp_path, capsys):
    refused = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        refused += convert_damaged(*sources[seed % len(sources)], folder, seed, capsys)
        shutil.rmtree(folder)
    return refused


def test_a_hundred_mutations(sources, tmp_path, workdir, capsys):
    assert run(range(100), sources, tmp_path, capsys) > 50


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_two_thousand_mutations(block, sources, tmp_path, workdir, capsys):
    refused = run(range(1000 + 100 * block, 1100 + 100 * block), sources, tmp_path, capsys)
    with capsys.disabled():
        print(f"{refused} of 100 refused, the others load", end=" ")
    assert refused > 50
