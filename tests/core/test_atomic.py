"""Old state or new state, never a part; leftovers of dead runs go, those of live runs stay."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pmod_cli.core.atomic import staged_directory, write_files, write_json
from pmod_cli.core.errors import PmodError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with staged_directory(target) as staging:
        (staging / "a").write_text("a")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(target.parent) == ["target"]


def test_a_failure_leaves_nothing(tmp_path):
    def write() -> None:
        with staged_directory(tmp_path / "target") as staging:
            (staging / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert names(tmp_path) == []


def test_existing_target(tmp_path):
    target = tmp_path / "target"
    with staged_directory(target) as staging:
        (staging / "old").touch()
    with pytest.raises(PmodError, match="exists"), staged_directory(target):
        pass
    with staged_directory(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    code = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pmod_cli.core.atomic import staged_directory
with staged_directory(Path(sys.argv[1])) as staging:
    (staging / "part").write_text("part")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "tar[get"
    subprocess.run([sys.executable, "-c", code, str(target)])
    assert len(names(tmp_path)) == 1
    with staged_directory(target) as staging:
        (staging / "whole").touch()
    assert names(tmp_path) == ["tar[get"]


def test_a_target_has_one_writer(tmp_path):
    with staged_directory(tmp_path / "target") as first:
        (first / "a").touch()
        with pytest.raises(PmodError, match="another run is writing"), staged_directory(tmp_path / "target"):
            pass
        with staged_directory(tmp_path / "other"):
            pass
    assert names(tmp_path / "target") == ["a"]
    assert names(tmp_path) == ["other", "target"]


def test_a_writer_may_wait_for_another(tmp_path):
    """The second finds the first one's folder, and neither takes the other's staging away."""
    target = tmp_path / "target"

    def second() -> None:
        with staged_directory(target, overwrite=True, wait=True) as staging:
            assert (target / "first").exists()
            (staging / "second").touch()

    with ThreadPoolExecutor() as pool:
        with staged_directory(target) as staging:
            waiting = pool.submit(second)
            time.sleep(0.2)
            assert not waiting.done()
            (staging / "first").touch()
        waiting.result(timeout=20)
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_swap_killed_half_way_is_undone(tmp_path):
    (tmp_path / ".target.replaced").mkdir()
    (tmp_path / ".target.replaced" / "old").touch()
    with pytest.raises(PmodError, match="exists"), staged_directory(tmp_path / "target"):
        pass
    assert names(tmp_path / "target") == ["old"]


def test_of_several_files_all_are_replaced_or_none(tmp_path):
    write_files({tmp_path / "a": b"old", tmp_path / "b": b"old"})
    with pytest.raises(FileNotFoundError):
        write_files({tmp_path / "a": b"new", tmp_path / "none" / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    write_files({tmp_path / "a": b"new", tmp_path / "b": b"newer"})
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"new", b"newer"]


def test_json_is_replaced_or_kept(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["state.json"]
