"""Damaged selections and pictures through `pmod visualize` and finetune's opener: a sentence, or a picture."""

import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from pmod_cli.cli import main
from pmod_cli.data.conversation import BadRow
from pmod_cli.data.pictures import open_image
from pmod_cli.visualization.archive import npz_bytes
from tests.visualization.hostile import picture, selection
from tests.visualization.records import anyres_record, padded_record

SECONDS = 10
MEMORY = 2 << 30  # bytes that one input may take


def held_bytes() -> int:
    """Addresses of this process; 0 where there is no such file, as on macOS, which holds nobody to such a limit."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.is_file() else 0


@contextmanager
def bounds(what: str):
    """No input takes longer than SECONDS, nor MEMORY bytes of addresses more than the process has already."""

    def hang(*_) -> None:
        raise AssertionError(f"{what} hangs")

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = held_bytes()
    old = signal.signal(signal.SIGALRM, hang)
    if held:
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)  # of the clock: the machine may be busy
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        yield
        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - started < SECONDS, f"{what} hangs"
    except MemoryError as error:
        raise AssertionError(f"{what} takes more than {MEMORY >> 20} MB") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def selections(seeds, folder, capsys) -> int:
    """How many of the damaged selections are refused; the others are drawn, with page, arrays and JSON."""
    good = [npz_bytes(make(60, 90, regions=((1.0, 2.0, 30.0, 40.0),))) for make in (anyres_record, padded_record)]
    refused = 0
    for seed in seeds:
        draw = random.Random(seed)
        done, data = selection(good[seed % 2], draw)
        (folder / "bad.npz").write_bytes(data)
        mode = draw.choice(["kept", "weights", "depth", "schedule", "grid"])
        extra = draw.choice([[], ["--html"], ["--npz"], ["--json"]])
        what = f"seed {seed}: {done}, {mode}, {extra}"
        try:
            with bounds(what):
                code = main(["visualize", str(folder / "bad.npz"), "--mode", mode, "-o", str(folder / "a.png"), *extra])
        except Exception as error:
            raise AssertionError(what) from error
        out, err = capsys.readouterr()
        assert code in (0, 2), f"{what}: {err}"
        assert code == 0 or ("error: " in err and not out and "out of memory" not in err), f"{what}: {err}"
        refused += code == 2
    return refused


def pictures(seeds) -> int:
    """How many of the damaged pictures are refused; the others are RGB."""
    refused = 0
    for seed in seeds:
        kind, data = picture(random.Random(seed))
        try:
            with bounds(f"seed {seed}: {kind}"):
                assert open_image(data).mode == "RGB"
        except BadRow:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {kind}") from error
    return refused


def test_forty_selections(tmp_path, capsys):
    assert 20 < selections(range(40), tmp_path, capsys) < 40


def test_a_hundred_pictures():
    assert 20 < pictures(range(100)) < 100


@pytest.mark.soak
@pytest.mark.parametrize("block", range(5))
def test_five_hundred_selections(block, tmp_path, capsys):
    refused = selections(range(1000 + 100 * block, 1100 + 100 * block), tmp_path, capsys)
    with capsys.disabled():
        print(f"{refused} of 100 refused, the others drawn", end=" ")
    assert 50 < refused < 100


@pytest.mark.soak
def test_a_thousand_pictures(capsys):
    refused = pictures(range(1000, 2000))
    with capsys.disabled():
        print(f"{refused} of 1000 refused, the others opened", end=" ")
    assert 200 < refused < 1000
