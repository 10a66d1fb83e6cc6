"""docs/reproduce.md without a GPU: the paper's recipes read data in the layout of the real ones, with tiny parts."""

import json

import pytest

from pmod_cli import cli
from tests import reproduce
from tests.checkpoints.test_from_parts import parts  # noqa: F401 - a fixture
from tests.conftest import ROOT

ROWS = 14


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    reproduce.make_data(root, ROWS)
    return root


def commands(data, made):
    folder = made[0]
    given = [f"model.llm={folder / 'llm'}", f"model.vision_tower={folder / 'clip'}"]
    return dict(reproduce.steps(data, [*given, f"model.projector={folder / 'mm_projector.bin'}"], "h100"))


@pytest.mark.parametrize("recipe", reproduce.FILES)
def test_every_row_of_the_real_layout_is_read(recipe, data, parts, capsys):  # noqa: F811
    words = commands(data, parts)[f"rows of {recipe}"]
    assert cli.main([*words, "--json", "--set", "data.max_length=null"]) == 0  # tiny patches make more tokens
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["checked"], found["num_bad"], found["without_labels"]) == (ROWS, ROWS, 0, 0)
    text = reproduce.FOLDERS[recipe].count("") * ROWS // len(reproduce.FOLDERS[recipe])
    assert found["with_images"] == ROWS - text
    assert found["tokens"] > 20 * ROWS


def test_a_row_whose_picture_is_gone_is_named(data, parts, capsys):  # noqa: F811
    row = json.loads((data / reproduce.FILES["llava-1.5-7b"]).read_text())[3]
    picture = data / row["image"]
    picture.rename(picture.with_suffix(".away"))
    try:
        assert cli.main([*commands(data, parts)["rows of llava-1.5-7b"]]) == 2
    finally:
        picture.with_suffix(".away").rename(picture)
    assert f"row 3 (id {row['id']}): no such image: {row['image']}" in capsys.readouterr().err
    (line,) = (data / "bad_rows.jsonl").read_text().splitlines()
    assert (json.loads(line)["row"], json.loads(line)["id"]) == (3, row["id"])


def test_plans_are_those_that_the_page_prints(data, parts, capsys):  # noqa: F811
    """Hours and memory of the table in docs/reproduce.md, for one machine of eight A100."""
    page = (ROOT / "docs" / "reproduce.md").read_text()
    run = dict(reproduce.steps(data, [], "a100-80gb"))["plan of llava-next-7b"]
    assert cli.main([*run, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (line,) = (line for line in page.splitlines() if line.startswith("| `llava-next-7b` |"))
    assert f"{plan['pmod']['hours']:.1f}" in line
    assert f"{plan['pmod']['memory_bytes'] / 2**30:.1f} GiB" in line
    assert f"{plan['steps']:,}" in line


def test_every_command_of_the_script_can_be_parsed(data):
    from tests.test_cli import parse

    for _, words in reproduce.steps(data, ["model.llm=x"], "h100"):
        parse(" ".join(("pmod", *words)))
