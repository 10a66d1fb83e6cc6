"""A file is the old one or the new one; what killed runs left goes with the next good one."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pmod_cli.core.atomic import write_bytes, write_files, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_of_several_files_all_are_replaced_or_none(tmp_path):
    write_files({tmp_path / "a": b"old", tmp_path / "b": b"old"})
    with pytest.raises(FileNotFoundError):
        write_files({tmp_path / "a": b"new", tmp_path / "none" / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    write_files({tmp_path / "a": b"new", tmp_path / "b": b"newer"})
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"new", b"newer"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux")
def test_a_folder_that_takes_no_files_is_not_waited_for():
    code = "from pathlib import Path; from pmod_cli.core.atomic import write_text; write_text(Path('/proc/a'), 'a')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "No such file or directory: '/proc/.a.lock'" in done.stderr


def test_json_is_replaced_or_kept(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert names(tmp_path) == ["state.json"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from pmod_cli.core.atomic import write_text
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path(sys.argv[1]), "half")
"""
    path = tmp_path / "picture.png"
    write_text(path, "old")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(path)])
        assert path.read_text() == "old"
    assert len(names(tmp_path)) > 1
    write_text(path, "new")
    assert names(tmp_path) == ["picture.png"]
    assert path.read_text() == "new"


def test_writers_of_one_file_take_turns(tmp_path):
    path = tmp_path / "file"
    texts = [str(number) * 50_000 for number in range(8)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda text: write_text(path, text), texts))
    assert path.read_text() in texts
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("length", [244, 250, 255])
def test_the_longest_name_is_written_and_leaves_nothing_beside_it(tmp_path, length):
    path = tmp_path / ("x" * length)
    write_bytes(path, b"first")
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [found.name for found in tmp_path.iterdir() if not found.name.endswith(".lock")] == [path.name]


def test_json_holds_a_path_that_is_no_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"file": "b\udcff.png"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"file": "b\udcff.png"}
