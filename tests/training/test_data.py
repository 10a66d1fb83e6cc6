"""Fine-tuning on rows of a file: what the run reads, leaves out and saves, and going on where it stopped."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from pmod_cli.checkpoints import convert, load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from pmod_cli.training.calibration import STARTS
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import calibration_batches, finetune
from pmod_cli.training.run_data import SKIPPED, open_data
from tests.factories import KINDS

COLOURS = ("red", "green", "blue", "black", "yellow", "purple")


@pytest.fixture
def rows(tmp_path):
    """24 rows: three of four with an image."""
    folder = tmp_path / "images"
    folder.mkdir()
    made = []
    for number in range(24):
        colour = COLOURS[number % 6]
        row = {
            "conversations": [
                {"from": "human", "value": "what colour?" + " is it" * (number % 5)},
                {"from": "gpt", "value": colour},
            ]
        }
        if number % 4:
            Image.new("RGB", (32 + 8 * (number % 3), 32), colour).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
            row["conversations"][0]["value"] += "\n<image>"
        made.append(row)
    (tmp_path / "rows.json").write_text(json.dumps(made))
    return tmp_path / "rows.json"


@pytest.fixture(scope="module", params=KINDS)
def routed(request, stock_model, tmp_path_factory):
    target = tmp_path_factory.mktemp("routed") / "model"
    convert(stock_model(request.param, "llama"), target, PmodSettings())
    return target


def settings_of(model, rows, *more):
    own = [f"model.name={model}", "data.kind=llava", f"data.path={rows}", f"data.images={rows.parent / 'images'}"]
    own += ["data.template=vicuna_v1", "train.batch_size=2", "train.learning_rate=1e-3", "train.log_steps=1"]
    return load_settings(None, [*own, "train.report_to=none", "data.group_by_modality=true", *more])


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_an_epoch_of_rows_with_and_without_images(routed, rows, tmp_path):
    report = finetune(settings_of(routed, rows), tmp_path / "run")
    assert report.status == "finished"
    assert report.step == 12  # 18 rows with image and 6 without, two a step, never mixed
    log = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    assert sum(line.get("vision_tokens", 0) == 0 for line in log if "loss" in line) == 3
    images = AutoProcessor.from_pretrained(tmp_path / "run").image_processor
    assert hasattr(images, "image_grid_pinpoints") or images.do_pad  # LLaVA-1.5 is used as it was trained


def test_a_stopped_run_goes_on_with_the_rows_it_has_not_seen(routed, rows, tmp_path):
    """Stopped within the second epoch, whose order is another one."""
    import os
    import signal

    settings = settings_of(routed, rows, "train.epochs=2", "train.save_steps=1000")
    finetune(settings, tmp_path / "whole")

    def stop(step):
        if step.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)

    assert finetune(settings, tmp_path / "parts", on_step=stop).status == "interrupted"
    assert finetune(settings, tmp_path / "parts").status == "finished"
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_that_goes_on_with_more_rows_says_so(routed, rows, tmp_path):
    import os
    import signal

    def stop(step):
        if step.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    settings, said = settings_of(routed, rows, "data.group_by_modality=false"), []
    assert finetune(settings, tmp_path / "run", on_step=stop).max_steps == 12
    rows.write_text(json.dumps(json.loads(rows.read_text())[:4]))
    assert finetune(settings, tmp_path / "run", on_note=said.append).max_steps == 2
    assert ["have 4 rows, and had 24 when this run began" in note for note in said] == [True]


def test_bad_rows_end_the_run_before_it_starts_or_are_left_out(routed, rows, tmp_path):
    (rows.parent / "images" / "5.png").unlink()
    with pytest.raises(
        PmodError, match=r"1 of 24 rows looked at in .*rows.json cannot be used:\n  row 5: no such image"
    ):
        finetune(settings_of(routed, rows), tmp_path / "run")
    report = finetune(settings_of(routed, rows, "data.on_bad_row=skip"), tmp_path / "run")  # as the error says
    assert report.status == "finished"
    skipped = [json.loads(line) for line in (tmp_path / "run" / SKIPPED).read_text().splitlines()]
    assert [line["row"] for line in skipped] == [5]


def test_a_bad_row_that_is_the_only_one_of_its_kind_is_left_out_too(routed, rows, tmp_path):
    """Nobody knows of a broken line whether it has an image, and all other rows have one."""
    pictured = [json.dumps(row) for row in json.loads(rows.read_text()) if "image" in row]
    lines = rows.with_suffix(".jsonl")
    lines.write_text("\n".join([*pictured[:2], '{"image": "5.png', *pictured[2:]]))
    settings = settings_of(routed, lines, "data.on_bad_row=skip")
    found = open_data(settings, AutoProcessor.from_pretrained(routed), tmp_path).rows
    assert torch.equal(found[2]["input_ids"], found[3]["input_ids"])
    assert [json.loads(line)["row"] for line in (tmp_path / SKIPPED).read_text().splitlines()] == [2]


@pytest.mark.parametrize("start", STARTS)
def test_routers_start_from_rows_with_images_wherever_these_stand(routed, rows, start):
    """As many rows as are asked for, behind rows of text. Of text alone the run is refused."""
    made = json.loads(rows.read_text())
    text, pictured = ([row for row in made if ("image" in row) == wanted] * 4 for wanted in (False, True))
    rows.write_text(json.dumps(text))
    settings = settings_of(routed, rows, f"model.router_start={start}", "model.calibration_images=10")
    with pytest.raises(PmodError, match="none of the 24 rows has an image"):
        finetune(settings, rows.parent / "run")
    found = []
    for behind in ([], text):
        rows.write_text(json.dumps(behind + pictured))
        data = open_data(settings, AutoProcessor.from_pretrained(routed), rows.parent)
        found.append(list(calibration_batches(data, 10, "cpu")))
    for alone, mixed in zip(*found, strict=True):
        assert all(torch.equal(mixed[name], alone[name]) for name in alone)
    model = load_model(routed)[0]
    assert all(abs(value) <= 1 for value in STARTS[start](model, found[1]).values())
