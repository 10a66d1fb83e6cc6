"""The questions of the tiny tasks are drawn by one process; another one says that it waits for it."""

import threading

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.core.folders import held
from pmod_cli.evaluation import tiny_data


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_data, "_cache", lambda: tmp_path)
    target = tmp_path / f"tiny-tasks-{tiny_data._version()}" / "doc-2"
    said, waits = [], threading.Event()

    def wait(folder):
        said.append(folder)
        waits.set()

    drawing = threading.Thread(target=tiny_data.folder, args=("doc", 2), kwargs={"on_wait": wait})
    with held(target):
        drawing.start()
        assert waits.wait(60)
        assert not target.exists()
    drawing.join(60)
    assert said == [target]
    assert (target / "dataset_dict.json").is_file()
    assert tiny_data.folder("doc", 2, on_wait=wait) == target
    assert len(said) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tiny_data, "_cache", lambda: tmp_path / "file" / "pmod")
    with pytest.raises(PmodError, match="which cannot be written: Not a directory") as caught:
        tiny_data.folder("doc", 2)
    assert "set HF_HOME" in caught.value.hint
