"""A small file that is a link out of its folder brings nothing along; the Hugging Face cache is made of links."""

import shutil
from pathlib import Path

import pytest

from pmod_cli.checkpoints.conversion import convert
from pmod_cli.core.errors import PmodError
from tests.checkpoints.originals import twins


@pytest.fixture
def copied(stock_model, tmp_path) -> Path:
    return shutil.copytree(stock_model("llava"), tmp_path / "source")


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["notes.txt", "generation_config.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(copied, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    link(copied / name, Path("..", "secret"))
    with pytest.raises(PmodError, match=f"{name} is a symbolic link out of its folder"):
        convert(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_of_the_original_layout_too(tmp_path, name):
    twins(tmp_path / "source", "llava")
    (tmp_path / "secret").write_text("{}")
    link(tmp_path / "source" / name, tmp_path / "secret")
    with pytest.raises(PmodError, match=f"{name} is a symbolic link out of its folder"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_snapshot_of_the_hugging_face_cache_is_all_links(copied, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in copied.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"blob-{path.name}"))
    (tmp_path / "named").symlink_to(snapshot)
    report = convert(tmp_path / "named", tmp_path / "out")
    assert "tokenizer.json" in report.written
    (snapshot / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(PmodError, match="out of its folder"):
        convert(snapshot, tmp_path / "again")


def test_a_link_within_the_folder_stays(copied, tmp_path):
    (copied / "notes.txt").write_text("a")
    link(copied / "more.txt", Path("notes.txt"))
    convert(copied, tmp_path / "out")
    assert (tmp_path / "out" / "more.txt").read_text() == "a"
