"""What tests of rows share."""

import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size, colour in [("a", (64, 64), "red"), ("b", (70, 41), "green"), ("c", (41, 70), "blue")]:
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
    return folder
