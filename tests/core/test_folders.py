"""A folder is the old one or the new one, and nothing goes that is not ours or that somebody still needs."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pmod_cli.core import folders
from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import check_replaceable, held, replace, staged_directory, successor
from pmod_cli.core.markers import MARKER, mark
from tests.conftest import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


def make(target: Path, *files: str, overwrite: bool = False) -> Path:
    with staged_directory(target, "data", overwrite=overwrite) as staging:
        for name in files:
            (staging / name).write_text(name)
    return target


def dies(code: str, *arguments: object) -> None:
    """Run Python that ends by SIGKILL: `die()`."""
    start = "import os, signal, sys\nfrom pathlib import Path\nfrom pmod_cli.core import folders\n"
    start += "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\ntarget = Path(sys.argv[1])\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", start + code, *map(str, arguments)], env=environment)
    assert done.returncode == -signal.SIGKILL


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with staged_directory(target, "data") as staging:
        (staging / "a").write_text("a")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["target"]


def test_a_failure_leaves_nothing(tmp_path):
    def write() -> None:
        with staged_directory(tmp_path / "target", "data") as staging:
            (staging / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert names(tmp_path) == []


@pytest.mark.parametrize("swap", ["exchange", "two renames"])
def test_existing_target(tmp_path, monkeypatch, swap):
    if swap == "two renames":
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    target = make(tmp_path / "target", "old")
    with pytest.raises(PmodError, match="exists"):
        make(target)
    make(target, "new", overwrite=True)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]


def test_the_target_is_never_missing(tmp_path):
    """Where the system exchanges names, a reader that looks all the time always finds it."""
    target, missing = make(tmp_path / "target", "file"), []
    with ThreadPoolExecutor() as pool:
        writers = pool.submit(lambda: [make(target, "file", overwrite=True) for _ in range(20)])
        while not writers.done():
            if not (target / "file").exists():
                missing.append(time.monotonic())
        writers.result()
    assert not missing


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    target = tmp_path / "tar[get"
    dies("with folders.staged_directory(target, 'data') as staging:\n (staging / 'part').touch()\n die()", target)
    assert names(tmp_path) == [".tar[get.lock", ".tar[get.staging"]
    make(target, "whole")
    assert names(tmp_path) == ["tar[get"]


def test_a_target_has_one_writer(tmp_path):
    with staged_directory(tmp_path / "target", "data") as first:
        (first / "a").touch()
        with pytest.raises(PmodError, match="another run is writing"):
            make(tmp_path / "target")
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(PmodError, match="another run is writing"):
            make(tmp_path / "link" / "target")
        make(tmp_path / "other")
    assert names(tmp_path / "target") == ["a"]
    assert names(tmp_path) == ["link", "other", "target"]


def test_a_writer_may_wait_for_another(tmp_path):
    """The second finds the first one's folder, and neither takes the other's staging away."""
    target = tmp_path / "target"

    def second() -> None:
        with staged_directory(target, "data", overwrite=True, wait=True) as staging:
            assert (target / "first").exists()
            (staging / "second").touch()

    with ThreadPoolExecutor() as pool:
        with staged_directory(target, "data") as staging:
            waiting = pool.submit(second)
            time.sleep(0.2)
            assert not waiting.done()
            (staging / "first").touch()
        waiting.result(timeout=20)
    assert names(target) == ["second"]
    assert names(tmp_path) == ["target"]


def test_the_lock_of_a_killed_process_is_free_though_its_children_live(tmp_path):
    """As the processes of a data loader do for some seconds."""
    code = "import time\nends = os.pipe()\nwith folders.held(target):\n if os.fork(): os.read(ends[0], 1), die()\n"
    code += " os.write(ends[1], b'x'), time.sleep(20)"
    started = time.monotonic()
    dies(code, tmp_path / "target")
    with held(tmp_path / "target"):
        pass
    assert time.monotonic() - started < 18


BETWEEN_RENAMES = """
folders.exchange = lambda one, other: False
rename = Path.rename
Path.rename = lambda path, to: rename(path, to) if path.name == target.name else die()
with folders.staged_directory(target, "data", overwrite=True) as staging:
    (staging / "new").touch()
"""
AFTER_THE_SWAP = """
folders._restore = lambda target: folders.staging_of(target).exists() and die()
with folders.staged_directory(target, "data", overwrite=True) as staging:
    (staging / "new").touch()
"""


def test_a_swap_killed_half_way_is_undone(tmp_path):
    target = make(tmp_path / "target", "old")
    dies(BETWEEN_RENAMES, target)
    assert not target.exists()
    folders.heal(target)  # any reader
    assert names(target) == ["old"]
    make(target, "new", overwrite=True)
    assert names(tmp_path) == ["target"]


def test_a_swap_killed_at_its_end_is_finished(tmp_path):
    target = make(tmp_path / "target", "old")
    dies(AFTER_THE_SWAP, target)
    assert "new" in names(target)
    with held(target):
        pass
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]


def test_a_successor_of_a_killed_run_is_kept(tmp_path):
    """Training state of hours; while what is left of an old folder, under the same name, goes."""
    target = make(tmp_path / "target", "old")
    dies("with folders.held(target): (folders.successor(target, 'data') / 'hours').touch(); die()", target)
    with held(target) as real:
        staging = successor(real, "data")
        assert (staging / "hours").exists()
        with pytest.raises(PmodError, match="pmod was stopped while it made"):
            successor(real, "evaluation")
        mark(staging, "data", ["hours"])
        replace(staging, real)
    assert names(target) == ["hours"]
    assert names(tmp_path) == ["target"]


def test_what_is_not_ours_stays(tmp_path):
    """A folder without a marker, one of another kind, a foreign file in one of ours, a file, a foreign staging."""
    strange = tmp_path / "strange"
    (strange / "sub").mkdir(parents=True)
    (strange / "sub" / "thesis.txt").write_text("x")
    with pytest.raises(PmodError, match=f"lacks {MARKER}"):
        make(strange, overwrite=True)
    ours = make(tmp_path / "ours", "a")
    with pytest.raises(PmodError, match="was written by pmod, not by pmod finetune"):
        check_replaceable(ours, "run")
    (ours / "thesis.txt").write_text("x")
    with pytest.raises(PmodError, match=r"did not write: thesis.txt"):
        make(ours, overwrite=True)
    make(ours / "nested", "b")
    (ours / "thesis.txt").rename(ours / "nested" / "thesis.txt")
    with pytest.raises(PmodError, match=r"did not write: nested/thesis.txt"):
        make(ours, overwrite=True)
    assert (ours / "nested" / "thesis.txt").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(PmodError, match="is a file"):
        make(tmp_path / "file", overwrite=True)
    (tmp_path / ".new.staging").mkdir()
    (tmp_path / ".new.staging" / "thesis.txt").write_text("x")
    with pytest.raises(PmodError, match="in the way"):
        make(tmp_path / "new")
    assert (tmp_path / ".new.staging" / "thesis.txt").read_text() == "x"
    assert (strange / "sub" / "thesis.txt").read_text() == "x"


def test_what_comes_into_a_folder_meanwhile_stays_too(tmp_path):
    target = make(tmp_path / "target", "old")

    def overwrite() -> None:
        with staged_directory(target, "data", overwrite=True):
            (target / "thesis.txt").write_text("x")

    with pytest.raises(PmodError, match=r"thesis.txt"):
        overwrite()
    assert names(target) == ["old", "thesis.txt"]


def test_a_source_is_not_replaced(tmp_path):
    """By any of its names: the folder itself, one above it, a symlink to it, a symlink into it."""
    runs = make(tmp_path / "runs", "a")
    model = make(runs / "model", "weights")
    (tmp_path / "link").symlink_to(model)
    other = make(tmp_path / "other")
    (other / "weights").symlink_to(model / "weights")
    for source, target in ((model, model), (model, runs), (tmp_path / "link", model), (other, model)):
        with pytest.raises(PmodError, match="this run reads"):
            check_replaceable(target, "data", [tmp_path / "unrelated", source])
    check_replaceable(model, "data", [runs])  # replacing a folder in a source leaves the source


def test_weights_get_the_access_of_other_files(tmp_path):
    with staged_directory(tmp_path / "target", "data") as staging:
        (staging / "weights").write_text("w")
        (staging / "weights").chmod(0o600)
        (staging / "plain").write_text("p")
    assert (tmp_path / "target" / "weights").stat().st_mode == (tmp_path / "target" / "plain").stat().st_mode


def test_a_folder_whose_parent_takes_no_files(tmp_path, monkeypatch):
    """As that of a mounted disk: it can be written, not replaced."""
    target = tmp_path / "disk"
    target.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    with held(target), pytest.raises(PmodError, match="another run"), held(target):
        pass
    assert names(tmp_path) == ["disk"]
    assert names(target) == []


def test_a_refused_exchange_changes_nothing(tmp_path, monkeypatch):
    def refuse(one, other):
        raise OSError(errno.EPERM, "no", str(other))

    target = make(tmp_path / "target", "old")
    monkeypatch.setattr(folders, "exchange", refuse)
    with pytest.raises(OSError, match="no"):
        make(target, "new", overwrite=True)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["target"]
    shutil.rmtree(target)
