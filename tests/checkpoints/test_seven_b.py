"""At 7B shape (14 GB, random bfloat16): linking takes seconds and little memory; renaming keeps up with `cp`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import seven_b
from tests.usage import usage

pytestmark = [pytest.mark.soak]


def measured(command: list[str], cwd: Path) -> tuple[float, float]:
    """(wall seconds, peak resident memory in MB) of a command that has to succeed."""
    took = usage(cwd, *command)
    return took.seconds, took.peak / 1e6


@pytest.fixture
def disk(tmp_path):
    """A folder that is emptied at once: pytest would keep 42 GB of the last three runs."""
    if shutil.disk_usage(tmp_path).free < 45e9:
        pytest.skip("needs 45 GB of free disk")
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


def convert(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "pmod_cli", "convert", *map(str, arguments), "--quiet"]


def test_hugging_face_layout(disk):
    seven_b.write(disk / "llava", original=False)
    measured(convert("llava", "-o", "warm"), disk)
    seconds, megabytes = measured(convert("llava", "-o", "pmod"), disk)
    print(json.dumps({"seconds": round(seconds, 2), "peak_mb": round(megabytes)}))
    assert seconds <= 3
    assert megabytes <= 600


@pytest.mark.parametrize("alias", ["qwen2.5-vl-7b", "qwen3-vl-8b", "llava-onevision-7b", "llava-next-video-7b"])
def test_every_family(tmp_path, alias):
    """Linking reads headers alone, so that files with holes are as good as whole ones."""
    seven_b.write_sparse(tmp_path / "stock", alias)
    measured(convert("stock", "-o", "warm"), tmp_path)
    seconds, megabytes = measured(convert("stock", "-o", "pmod"), tmp_path)
    print(json.dumps({"alias": alias, "seconds": round(seconds, 2), "peak_mb": round(megabytes)}))
    assert seconds <= 3
    assert megabytes <= 600


def test_original_layout_beside_cp(disk):
    """Interleaved, two rounds; the first also warms the page cache for both alike."""
    source = seven_b.write(disk / "original", original=True)
    subprocess.run(["sync"], check=True)
    rates = []
    for _ in range(2):
        copied, _ = measured(["bash", "-c", "cp -r original copy && sync"], disk)
        shutil.rmtree(disk / "copy")
        ours, megabytes = measured(convert(source, "-o", "pmod"), disk)
        shutil.rmtree(disk / "pmod")
        rates.append(copied / ours)
        print(json.dumps({"cp_seconds": round(copied, 1), "ours": round(ours, 1), "peak_mb": round(megabytes)}))
        assert megabytes <= 1500
    assert max(rates) >= 0.8
