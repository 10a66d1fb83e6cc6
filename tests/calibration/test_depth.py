"""What each layer is for, held to plain full forward passes; and the report as a user asks for it."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pmod_cli.calibration.asked import Asked, AskedBatch
from pmod_cli.calibration.depth import WAYS, measure_depth
from pmod_cli.calibration.replay import Replay
from pmod_cli.calibration.samples import read_samples
from pmod_cli.checkpoints import bundled_path, load_model
from pmod_cli.cli import main
from tests import factories
from tests.factories import DECODERS, KINDS
from tests.model.models import ROUTED_FROM_START, pmod_twin

LAYERS = 4


def batches_of(model, kind: str, count: int = 4) -> list[AskedBatch]:
    """Rows of unlike lengths in one batch, so that there is padding and K differs by row."""
    samples = [
        type(each)(each.task, (each.images[0].resize((64, 40 + 12 * i)),), each.questions, each.answers)
        for i, each in enumerate(read_samples("tiny", count))
    ]
    return Asked(model, factories.processor(kind)).batches(samples)


@torch.no_grad()
def plain_losses(model, batches: list[AskedBatch]) -> dict[str, float]:
    """Of whole forward passes, mean over the answer tokens of each task."""
    losses: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        logits, labels = model(**{**batch.inputs, "labels": None}).logits, batch.inputs["labels"]
        for row, task in enumerate(batch.tasks):
            answer = labels[row, 1:] != -100
            loss = torch.nn.functional.cross_entropy(
                logits[row, :-1][answer].double(), labels[row, 1:][answer], reduction="none"
            )
            losses.setdefault(task, []).append(loss)
    return {task: float(torch.cat(parts).mean()) for task, parts in losses.items()}


def without(stock, layer: int, way: str):
    """A model that is built to skip, for whole forward passes."""
    ratios = [
        0.0 if way != "skipped" and (i == layer or (way == "hidden_from" and i > layer)) else 1.0 for i in range(4)
    ]
    settings = {"schedule": "list", "values": ratios} | ({"select_at": [layer]} if min(ratios) < 1 else {})
    model = pmod_twin(stock, settings)
    if way == "skipped":
        model.model.language_model.layers[layer].forward = lambda hidden_states, **_: hidden_states
    return model


@pytest.mark.parametrize(("kind", "decoder"), [(kind, DECODERS[0]) for kind in KINDS] + [(KINDS[0], DECODERS[1])])
def test_every_rise_is_that_of_a_plain_full_forward(kind, decoder):
    stock = factories.model(kind, decoder, layers=LAYERS)
    batches = batches_of(stock, kind)
    expected = plain_losses(stock, batches)
    reference = {
        (way, layer): plain_losses(without(stock, layer, way), batches) for way in WAYS for layer in range(LAYERS)
    }
    found = measure_depth(Replay(stock), batches)
    assert found.keys() == expected.keys()
    for task, depth in found.items():
        assert depth.base == pytest.approx(expected[task], abs=1e-6)
        for (way, layer), losses in reference.items():
            rise = losses[task] - expected[task]
            assert depth.rise[way][layer] == pytest.approx(rise, abs=2e-6), (task, way, layer)  # float32 logits
            assert abs(rise) > 5e-6 or way == "hidden_from", "the layer has to matter, or nothing is tested"


def test_what_is_added_behind_a_layer_stays_where_the_layer_is_skipped():
    """DeepStack, on the bundled Qwen3-VL: two of its layers have image features added behind them."""
    stock, processor = load_model(bundled_path("tiny-qwen3-vl"), dtype="float32")
    batches = Asked(stock, processor).batches(read_samples("tiny", 3))
    whole = plain_losses(stock, batches)
    expected = {}
    layers = stock.model.language_model.layers
    for layer in range(3):
        forward, layers[layer].forward = layers[layer].forward, lambda hidden_states, **_: hidden_states
        expected[layer] = plain_losses(stock, batches)
        layers[layer].forward = forward
    found = measure_depth(Replay(stock), batches)
    for task, loss in whole.items():
        assert found[task].base == pytest.approx(loss, abs=1e-4)
        for layer, losses in expected.items():
            assert found[task].rise["skipped"][layer] == pytest.approx(losses[task] - loss, abs=2e-3)
    assert min(max(found[task].rise["hidden_from"]) for task in whole) > 0.5


def test_a_p_mod_model_is_measured_as_it_is_routed():
    stock = factories.model("llava_next", layers=LAYERS)
    held = {"schedule": "list", "values": [1.0, 0.6, 0.35, 0.15], "select_at": [1, 3]}
    for settings in (ROUTED_FROM_START, held):
        model = pmod_twin(stock, settings, router_std=1.0)
        batches = batches_of(model, "llava_next")
        found = measure_depth(Replay(model), batches)["doc"]
        base = plain_losses(model, batches)["doc"]
        assert found.base == pytest.approx(base, abs=1e-6)
        for layer in range(LAYERS):
            values = [0.0 if i == layer else ratio for i, ratio in enumerate(settings["values"])]
            hidden = [0.0 if i >= layer else ratio for i, ratio in enumerate(settings["values"])]
            chooses = {"select_at": [0, *held["select_at"]]} if settings is held and layer == 0 else {}
            for way, changed in (("skipped_vision", values), ("hidden_from", hidden)):
                twin = pmod_twin(stock, settings | {"values": changed} | chooses)
                twin.load_state_dict(model.state_dict(), strict=False)
                assert found.rise[way][layer] == pytest.approx(plain_losses(twin, batches)["doc"] - base, abs=1e-6)
        again = measure_depth(Replay(model), batches)["doc"]
        assert again == found, "a measurement leaves the model as it was"


def test_the_models_own_answers_take_the_place_of_labels():
    """They are what `generate` says to the same prompt, one question after the other."""
    from pmod_cli.checkpoints import load_model, resolve

    model, processor = load_model(resolve("tiny-llava-next").path, dtype="float32")
    (sample,) = read_samples("doc", 1)
    samples = [replace(sample, questions=sample.questions[:2], answers=sample.answers[:2])]
    own = Asked(model, processor).answered(samples, own=True)
    for sample in own:
        assert len(sample.answers) == len(sample.questions)
        messages = []
        for asked, said in zip(sample.questions, sample.answers, strict=True):
            image = [] if messages else [{"type": "image"}]
            text = {"type": "text", "text": asked.removeprefix("<image>\n")}
            messages.append({"role": "user", "content": [*image, text]})
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(images=list(sample.images), text=prompt, return_tensors="pt")
            new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == said
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


def test_the_report_as_a_user_asks_for_it(stock_model, workdir: Path, capsys):
    folder = stock_model()
    call = ["profile", "--report", "depth", "-m", str(folder), "--device", "cpu", "--samples", "4"]
    assert main([*call, "--tasks", "doc,chart", "--json", "--plot", "depth.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["depth"].keys() == {"doc", "chart", "mean of tasks"}
    assert all(len(values) == LAYERS for values in found["depth"]["doc"]["rise"].values())
    doc, chart, mean = (found["depth"][name] for name in ("doc", "chart", "mean of tasks"))
    assert mean["loss"] == pytest.approx((doc["loss"] + chart["loss"]) / 2)
    assert mean["rise"]["skipped"][1] == pytest.approx((doc["rise"]["skipped"][1] + chart["rise"]["skipped"][1]) / 2)
    assert Image.open("depth.png").size[0] > 500
    assert main([*call, "--tasks", "doc", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["layer"] for row in rows] == ["0", "1", "2", "3"]


def test_pictures_without_answers(stock_model, workdir: Path, capsys, monkeypatch):
    monkeypatch.setattr("pmod_cli.calibration.asked.NEW_TOKENS", 3)
    Path("pictures").mkdir()
    for number, sample in enumerate(read_samples("tiny", 2)):
        sample.images[0].save(f"pictures/{number}.png")
    Path("rows.json").write_text(
        json.dumps(
            [{"image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}]} for i in range(2)]
        )
    )
    call = ["profile", "--report", "depth", "-m", str(stock_model()), "--device", "cpu", "--samples", "2", "--json"]
    assert main([*call, "--data", "pictures"]) == 0
    out = capsys.readouterr()
    assert "the model's own take their place" in out.err
    assert json.loads(out.out)["depth"]["pictures"]["answer_tokens"] > 0
    assert main([*call, "--data", "rows.json", "--images-root", "pictures"]) == 0
    assert json.loads(capsys.readouterr().out)["depth"]["rows"]["answer_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--tasks", "doc,nonsense"], "nonsense"),
        (["--shift", "0.3"], "--shift belongs to another report"),
        (["--new-tokens", "3"], "--new-tokens belongs to"),
        (["--data", "broken"], "broken"),
        (["--data", "few"], "1 pictures"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(stock_model, workdir: Path, capsys, arguments, said):
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    Path("few").mkdir()
    Image.new("RGB", (40, 40)).save("few/a.png")
    assert main(["profile", "--report", "depth", "-m", str(stock_model()), "--device", "cpu", *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert said in out.err
    assert "Traceback" not in out.err
