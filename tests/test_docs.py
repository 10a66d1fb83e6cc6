"""The documents name files that exist, and their programs run: who moves a thing changes them too."""

import re
from pathlib import Path

import pytest

from pmod_cli.checkpoints import bundled_path, convert
from pmod_cli.checkpoints.aliases import builtin_config
from pmod_cli.data.documents import draw, seed_of

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "pmod_cli"
BASES = [ROOT, PACKAGE, *(folder for folder in PACKAGE.iterdir() if folder.is_dir())]
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:\w+/)+\w+\.py)`")  # with a folder; a bare name may be a file of the user


def missing(text: str) -> list[str]:
    return [name for name in NAMED.findall(text) if not any((base / name).is_file() for base in BASES)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page):
    assert missing(page.read_text(encoding="utf-8")) == []


def test_a_file_that_is_gone_is_found():
    assert missing("see `model/layer.py`, `layouts/shapes.py` and `model/nowhere.py`") == ["model/nowhere.py"]


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """What the programs of the documents find: a picture, models under the names that they use, a configuration."""
    folder = tmp_path_factory.mktemp("described")
    for name in ("my-pmod", "tiny-llava-next-pmod"):
        convert(bundled_path(), folder / "checkpoints" / name)
    draw("doc", seed_of("test", 0)).image.save(folder / "img.png")
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/ask.md", "docs/profile.md", "docs/visualize.md"])
def test_its_programs_run(page, described, monkeypatch):
    monkeypatch.chdir(described)
    programs = PROGRAM.findall((ROOT / page).read_text(encoding="utf-8"))
    assert programs
    for program in programs:
        exec(program, {"config": builtin_config("llava-next-7b")})
