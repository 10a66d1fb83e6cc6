"""What a calibration asks, and about which pictures."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pmod_cli import checkpoints
from pmod_cli.calibration.asked import Asked
from pmod_cli.calibration.bench import Bench
from pmod_cli.calibration.calibration import CalibrationSettings, calibrate
from pmod_cli.calibration.regression import FOLDS
from pmod_cli.calibration.samples import Sample, by_picture, read_samples
from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes


def test_pictures_are_asked_about_as_the_model_and_the_result_see_them(stock_model):
    """A LLaVA-1.5 of the hub crops, and so does the checkpoint that is written, which has the same processor."""
    model, processor = checkpoints.load_model(stock_model("llava"))
    wide = Image.new("RGB", (128, 32), "white")
    wide.paste("red", (0, 0, 16, 32))
    (batch,) = Asked(model, processor).batches([Sample("wide", (wide,), ("<image>\nwhat?",), ("white",))])
    seen = processor(images=[wide], text="<image>", return_tensors="pt")
    assert torch.equal(batch.inputs["pixel_values"], seen["pixel_values"])


def _write_rows(folder: Path, shown: list[list[str]]) -> Path:
    """A LLaVA file with one row for each list of names; a picture's first letter is its content."""
    rows = []
    for number, names in enumerate(shown):
        for name in names:
            Image.new("RGB", (40, 40), f"#{ord(name[0]):02x}0000").save(folder / name)
        question = "<image>\n" * len(names) + f"question {number}?"
        rows.append({"image": names, "conversations": [{"from": "human", "value": question}]})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_no_picture_is_on_both_sides_or_in_two_folds(tmp_path: Path):
    """Three rows a picture; one picture under two names, and two that a row shows together, count as one."""
    names = [f"{letter}.png" for letter in "abcdefgh"]
    path = _write_rows(tmp_path, [[name] for name in names * 3] + [["a-again.png"], ["g.png", "h.png"]])
    samples = read_samples(str(path), 26, seed=1)
    assert len({sample.questions for sample in samples}) == 26
    groups = by_picture(samples)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    shown = [{name[0] for place in group for name in samples[place].images} for group in groups]
    assert sorted(map(sorted, shown)) == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"], ["g", "h"]]
    assert sorted(len(group) for group in groups) == [3, 3, 3, 3, 3, 4, 7]


def test_a_row_without_a_question_is_passed_over(tmp_path: Path):
    path = _write_rows(tmp_path, [["a.png"], ["b.png"]])
    said = {"image": "a.png", "conversations": [{"from": "system", "value": "<image>"}]}
    path.write_text(json.dumps([said, *json.loads(path.read_text())]))
    assert len(read_samples(str(path), 2)) == 2
    with pytest.raises(PmodError, match="has 2 pictures to ask about"):
        read_samples(str(path), 3)


def test_rows_that_cannot_be_asked_about_are_counted_by_reason(tmp_path: Path):
    path = _write_rows(tmp_path, [["a.png"], ["b.png"]])
    film = {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat moves?"}]}
    late = [{"from": "human", "value": "Hello."}, {"from": "human", "value": "<image>\nWhat is it?"}]
    rows = [*json.loads(path.read_text()), film, film, {"image": "a.png", "conversations": late}]
    path.write_text(json.dumps(rows))
    assert len(read_samples(str(path), 2)) == 2
    with pytest.raises(PmodError, match=r"passed over: .*2 rows with a film"):
        read_samples(str(path), 3)
    with pytest.raises(PmodError, match=r"passed over: .*1 row with images behind the first question"):
        read_samples(str(path), 3)
    path.write_text(json.dumps([film]))
    with pytest.raises(PmodError, match=r"has 0 pictures to ask about, and .* passed over: 1 row with a film"):
        read_samples(str(path), 1)


def test_a_picture_is_asked_about_once_before_any_is_asked_about_again(tmp_path: Path):
    path = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abcdefgh" for _ in range(4)])
    for seed in range(4):
        images = [sample.images[0] for sample in read_samples(str(path), 20, seed=seed)]
        assert len(set(images[:8])) == len(set(images[8:16])) == 8
        assert len(set(images[16:])) == 4
        assert len({sample.images for sample in read_samples(str(path), 8, seed=seed, questions=["what?"])}) == 8
    with pytest.raises(PmodError, match="has 8 pictures to ask about, and `samples=9` were asked for"):
        read_samples(str(path), 9, questions=["what?"])


def test_with_one_row_a_picture_the_draw_and_the_halves_are_those_of_the_rows(tmp_path: Path):
    path = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abcdefghijkl"])
    samples = read_samples(str(path), 10, seed=3)
    order = random.Random(3).sample(range(12), 12)[:10]
    assert [sample.questions for sample in samples] == [(f"<image>\nquestion {row}?",) for row in order]
    assert by_picture(samples) == [[place] for place in range(10)]
    assert by_picture(read_samples("tiny", 64, films=True)) == [[place] for place in range(64)]


def test_the_halves_of_a_calibration_show_other_pictures(stock_model, tmp_path: Path, monkeypatch):
    """And so do its folds. A picture is told by its colour."""
    path = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abcdefgh" for _ in range(2)])
    shown: list[dict[int, set[float]]] = []

    class Seen(Bench):
        def __init__(self, replay, batches, targets, *, folds=(), **options):
            super().__init__(replay, batches, targets, folds=folds, **options)
            shown.append({})
            for fold, batch in zip(folds or (0,) * len(batches), batches, strict=True):
                colours = batch.inputs["pixel_values"].flatten(start_dim=1)[:, 0].tolist()
                shown[-1].setdefault(fold, set()).update(colours)

    monkeypatch.setattr("pmod_cli.calibration.calibration.Bench", Seen)
    model, processor = checkpoints.load_model(stock_model())
    settings = CalibrationSettings(data=str(path), samples=16, budgets=(0.6,), schedule="cosine")
    (found,) = calibrate(model, processor, Sizes.of(model.config), settings)
    chooses, judges = shown
    assert [len(chooses[fold]) for fold in range(FOLDS)] == [1] * FOLDS
    assert len(set.union(*chooses.values())) == len(judges[0]) == 4
    assert not judges[0] & set.union(*chooses.values())
    assert found.judged[0].pictures == 8
    few = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abc" * 6])
    with pytest.raises(PmodError, match="has 3 different pictures in 16 samples: expected 4 or more"):
        calibrate(model, processor, Sizes.of(model.config), replace(settings, data=str(few)))


def test_a_picture_that_the_processor_refuses_is_named(tmp_path: Path):
    model, processor = checkpoints.load_model(checkpoints.resolve("tiny-qwen3-vl").path)
    Image.new("RGB", (2, 600)).save(tmp_path / "line.png")
    sample = Sample("pictures", ("line.png",), ("<image>\nwhat?",), folder=tmp_path)
    with pytest.raises(PmodError, match=r"pictures, line\.png: .* aspect ratio"):
        Asked(model, processor).answered([sample])
