"""The documents name files that exist: who moves a file changes them too."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "pmod_cli"
BASES = [ROOT, PACKAGE, *(folder for folder in PACKAGE.iterdir() if folder.is_dir())]
NAMED = re.compile(r"`((?:\w+/)+\w+\.py)`")  # with a folder; a bare name may be a file of the user


def missing(text: str) -> list[str]:
    return [name for name in NAMED.findall(text) if not any((base / name).is_file() for base in BASES)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page):
    assert missing(page.read_text(encoding="utf-8")) == []


def test_a_file_that_is_gone_is_found():
    assert missing("see `model/layer.py`, `layouts/shapes.py` and `model/nowhere.py`") == ["model/nowhere.py"]
