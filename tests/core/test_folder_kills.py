"""A folder is replaced by a process that is killed before a system call: the old one is there or the new one."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.core.folders import heal
from pmod_cli.core.markers import MARKER
from tests.conftest import ROOT

CALLS = "rename,renameat2,unlink,unlinkat,rmdir,mkdir,fsync,flock"
FOLDER = """
import sys
from pathlib import Path
from pmod_cli.core import folders
import filelock
target, how, begin = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
if how == "two renames":
    folders.exchange = lambda one, other: False
begin.rmdir()
with folders.staged_directory(target, "data", overwrite=True) as staging:
    (staging / "file").write_text("new")
    (staging / "sub").mkdir()
    (staging / "sub" / "file").write_text("new")
"""


def overwrite(target: Path, how: str, call: tuple[str, int]) -> list[tuple[str, int]]:
    """Replace a folder in a new process, killed before a system call; the calls it has made by then."""
    begin, log = target.with_name("begin"), target.with_name("calls")
    begin.mkdir()
    kill = ["-e", f"inject={call[0]}:signal=KILL:when={call[1]}"] if call[1] else []
    command = ["strace", "-qq", "-o", log, "-e", f"trace={CALLS}", *kill, sys.executable, "-c", FOLDER]
    done = subprocess.run([*command, target, how, begin], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode in (0, -signal.SIGKILL)
    lines = [found[1] for line in log.read_text().splitlines() if (found := re.match(r"(\w+)\(", line))]
    log.unlink()
    first = next(place for place, line in enumerate(lines) if line == "rmdir")
    return [(name, lines[: place + 1].count(name)) for place, name in enumerate(lines)][first + 1 :]


def kill_at_each_call(target: Path, how: str, every: int) -> int:
    """How many calls it was killed at. Two renames leave a moment without the folder, which any reader ends."""
    overwrite(target, how, ("", 0))  # there is nothing yet
    whole = overwrite(target, how, ("", 0))
    for call in whole[::every]:
        (target / "file").write_text("old")
        (target / "sub" / "file").write_text("old")
        overwrite(target, how, call)
        assert target.exists() or how == "two renames"
        heal(target)
        assert len({(target / name).read_text() for name in ("file", "sub/file")}) == 1, call
        overwrite(target, how, ("", 0))
        assert (target / "sub" / "file").read_text() == "new"
        assert [path.name for path in target.parent.iterdir()] == [target.name], call
        assert sorted(path.name for path in target.iterdir()) == [MARKER, "file", "sub"]
    return len(whole[::every])


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace; it is not installed")
@pytest.mark.parametrize("how", ["exchange", "two renames"])
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_a_folder_whose_replacement_is_killed_at_a_system_call(tmp_path, how, every):
    count = kill_at_each_call(tmp_path / "target", how, every)
    print(f"{how}: killed before each of {count} system calls")
    assert count > 4
