"""The default of --model: $PMOD_MODEL, then what was written last in this directory."""

import os
import subprocess
import sys

import pytest

from pmod_cli.commands.common import default_model, record_current
from pmod_cli.core.errors import PmodError
from tests.conftest import ROOT


def test_nothing_written_yet(workdir):
    assert default_model() is None


def test_current_is_relative_inside_the_directory(workdir):
    (workdir / "runs" / "one").mkdir(parents=True)
    record_current(workdir / "runs" / "one")
    assert (workdir / ".pmod" / "current").read_text() == "runs/one\n"
    assert default_model().samefile("runs/one")


def test_environment_wins(workdir, monkeypatch):
    (workdir / "a").mkdir()
    (workdir / "b").mkdir()
    record_current(workdir / "a")
    monkeypatch.setenv("PMOD_MODEL", str(workdir / "b"))
    assert default_model() == workdir / "b"


def test_a_checkpoint_that_is_gone_is_named(workdir):
    record_current(workdir / "gone")
    with pytest.raises(PmodError, match=r"current names the checkpoint gone"):
        default_model()


def test_a_directory_that_cannot_be_written_gives_a_warning(workdir, capsys):
    (workdir / ".pmod").write_text("a file, so that nobody can write into it, root included")
    record_current(workdir / "runs")
    assert "cannot be written here" in capsys.readouterr().err
    assert (workdir / ".pmod").is_file()


def test_what_a_killed_command_left_goes_with_the_next(workdir):
    code = "import os\nfrom pathlib import Path\nfrom pmod_cli.commands.common import record_current\n"
    code += "os.fsync = lambda _: os.abort()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code + "record_current(Path('runs'))"], env=environment)
    assert not (workdir / ".pmod" / "current").exists()
    assert list((workdir / ".pmod").iterdir())
    record_current(workdir / "runs")
    assert [path.name for path in (workdir / ".pmod").iterdir()] == ["current"]
