"""The notebooks of docs/ run from the first cell to the last, and print what stands in them."""

import re

import pytest

from pmod_cli.model import METHODS, SELECTIONS
from tests import notebooks

NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture
def _registered_here():
    before = {registry: set(registry) for registry in (SELECTIONS, METHODS)}
    yield
    for registry, names in before.items():
        for name in set(registry) - names:
            registry.unregister(name)


@pytest.mark.slow
@pytest.mark.usefixtures("workdir", "_registered_here")
@pytest.mark.parametrize("path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_does_what_stands_in_it(path):
    notebook = notebooks.read(path)
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for found, expected in zip(notebooks.run(notebook), stored, strict=True):
        assert _kinds(found) == _kinds(expected)
        printed, written = notebooks.printed(found), notebooks.printed(expected)
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", written), "run `make notebooks`"
        # Another build of torch may round another way, and keep another token.
        assert _numbers(printed) == pytest.approx(_numbers(written), rel=0.1, abs=0.5), "run `make notebooks`"


def _kinds(outputs: list[dict]) -> list[list[str]]:
    return [sorted(output.get("data", {"text": None})) for output in outputs]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


@pytest.mark.slow
@pytest.mark.usefixtures("workdir")
def test_a_cell_that_fails_is_an_error():
    cell = {"cell_type": "code", "source": ["print(1)\n", "1 / 0"]}
    with pytest.raises(ZeroDivisionError):
        notebooks.run({"cells": [cell]})
