"""`pmod visualize` on rows that share pictures, and beside files that it reads itself."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pmod_cli import checkpoints, cli, visualization
from pmod_cli.model import PmodSettings
from tests.commands.test_visualize import SETTINGS, names

OPTIONS = ["-m", "routed", "--device", "cpu", "--max-new-tokens", "0", "--quiet"]


@pytest.fixture
def ready(workdir, stock_model):
    """A directory with a p-MoD checkpoint of four layers and two pictures."""
    checkpoints.convert(stock_model(), workdir / "routed", SETTINGS)
    for seed, name in enumerate("ab"):
        noise = np.random.default_rng(seed).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(workdir / f"{name}.png")
    return workdir


def call(*arguments: str) -> int:
    return cli.main(["visualize", *arguments, *([] if arguments[0].endswith(".npz") else OPTIONS)])


def test_rows_of_one_picture_have_their_own_boxes(ready):
    boxes = [[0, 0, 10, 10]], [[30, 20, 50, 40]]
    (ready / "rows.json").write_text(json.dumps([{"image": "a.png", "boxes": each} for each in boxes]))
    assert call("rows.json", "-o", "drawn", "--npz") == 0
    saved = [visualization.load_npz(ready / "drawn" / f"{name}-pmod.npz").regions for name in ("a", "a-2")]
    assert [[list(box) for box in each] for each in saved] == list(boxes)


def test_a_picture_is_drawn_though_one_beside_it_in_another_row_is_broken(ready, capsys):
    (ready / "broken.png").write_text("no picture")
    rows = [{"image": "a.png"}, {"image": ["a.png", "broken.png"]}, {"image": ["a.png", "b.png"]}]
    (ready / "rows.json").write_text(json.dumps(rows[:2]))
    assert call("rows.json", "-o", "drawn") == 3
    assert names(ready / "drawn") == ["a-pmod.png", "statistics.json"]
    assert "broken.png is not an image" in capsys.readouterr().err
    (ready / "rows.json").write_text(json.dumps(rows[1:2]))
    assert call("rows.json", "-o", "none") == 2
    assert not (ready / "none").exists()


def test_every_prompt_over_the_same_pictures_tells_its_own_reason(ready, capsys):
    """Two rows ask with more marks than pictures, and are told apart."""
    asked = [{"from": "human", "value": f"<image>\nWhat is {'<image> ' * number}this?"} for number in (1, 2)]
    rows = [{"image": "a.png"}, *({"image": "a.png", "conversations": [turn]} for turn in asked)]
    (ready / "rows.json").write_text(json.dumps(rows))
    assert call("rows.json", "-o", "drawn") == 3
    said = capsys.readouterr().err
    assert said.count("a.png:") == 2, said


def test_what_is_read_is_never_replaced(ready, capsys):
    for name in "AB":
        assert call("a.png", "-o", f"{name}.png", "--npz") == 0
    (ready / "clip").mkdir()
    shutil.copy("a.png", "clip/1.png")
    (ready / "statistics.json").write_text(json.dumps([{"image": "a.png"}, {"image": "b.png"}]))
    (ready / "taken" / "statistics.json").mkdir(parents=True)
    before = {path: path.read_bytes() for path in ready.rglob("*.*") if path.is_file()}
    for words, said in (
        (["A.npz", "--against", "B.npz", "-o", "B.png", "--npz"], "B.npz is what this run reads"),
        (["clip", "--video", "-o", "clip/1.png"], "clip/1.png is what this run reads"),
        (["statistics.json", "-o", "."], "statistics.json is what this run reads"),
        (["a.png", "b.png", "-o", "taken"], "taken/statistics.json is a folder"),
    ):
        capsys.readouterr()
        assert call(*words) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in ready.rglob("*.*") if path.is_file()} == before


def test_the_caption_says_what_is_dropped_in_front_of_the_decoder(ready, stock_model, capsys):
    settings = PmodSettings(schedule="list", values=(1.0, 0.5, 0.3, 0.15), before="divprune:0.33")
    checkpoints.convert(stock_model(), ready / "dropped", settings)
    words = ["visualize", "a.png", "-m", "dropped", "--device", "cpu", "--max-new-tokens", "0", "--json"]
    assert cli.main(words) == 0
    (drawn,) = json.loads(capsys.readouterr().out)["images"]
    assert drawn["layers"][0]["kept_tokens"] == int(0.33 * drawn["vision_tokens"])
    assert "divprune leaves 33 % in front of the decoder, and retention is of these" in drawn["notes"]
