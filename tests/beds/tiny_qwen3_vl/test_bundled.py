"""The bundled tiny Qwen3-VL: a stock checkpoint, small, that reads stills, pairs of pictures and films."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from pmod_cli import cli
from pmod_cli.calibration.asked import Asked
from pmod_cli.calibration.samples import read_samples
from pmod_cli.checkpoints import bundled_path
from pmod_cli.checkpoints.digests import file_sha256
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.data.several import ALL_TASKS, draw_several
from pmod_cli.evaluation.prompts import render
from pmod_cli.families.qwen3_vl import QWEN3_VL
from tests.beds.tiny_llava_next.measure import answers
from tests.beds.tiny_qwen3_vl.measure import prompts, unseen_documents
from tests.beds.tiny_qwen3_vl.processor import CHAT_TEMPLATE

NAME = "tiny-qwen3-vl"
SHA256 = "a53ab46aa194124e51a0b66c8509d81fad36cb492fc7fc59aa70e224bf855164"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(bundled_path(NAME))


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(bundled_path(NAME), dtype=torch.float32).eval()


def test_it_is_a_small_stock_checkpoint_with_the_hard_parts(model, processor):
    folder = bundled_path(NAME)
    config = json.loads((folder / "config.json").read_text())
    assert "pmod" not in config
    assert (type(model), type(processor)) == (Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
    assert len(model.model.language_model.layers) == 12
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [6, 5, 5]
    assert config["vision_config"]["deepstack_visual_indexes"] == [0, 1]
    assert config["vision_config"]["spatial_merge_size"] == 2
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    assert not [file.name for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".py"}]


def test_its_weights_are_those_that_were_measured():
    assert file_sha256(bundled_path(NAME) / "model.safetensors") == SHA256


def test_it_reads_unseen_documents_and_cannot_without_their_pictures(model, processor):
    share = {}
    for blank in (False, True):
        hits = {}
        for task in ALL_TASKS:
            documents = unseen_documents(task, 3)
            said = answers(model, processor, prompts(processor, documents, blank))
            hits[task] = sum(text == each.turns[0].answer for text, each in zip(said, documents, strict=True))
        share[blank] = sum(hits.values()) / (3 * len(ALL_TASKS))
    assert share[False] >= 0.9
    assert share[True] <= 0.5


def test_calibration_asks_it_about_pairs_and_films_too(model, processor):
    assert {each.task for each in read_samples("tiny", 9, films=True)} == set(ALL_TASKS)
    samples = read_samples("which,moving", 4)
    assert [(len(each.images), len(each.videos)) for each in samples] == [(2, 0), (2, 0), (0, 1), (0, 1)]
    asked = Asked(model, processor)
    own = asked.answered(samples, own=True)
    hits = [
        one == other
        for each, given in zip(own, samples, strict=True)
        for one, other in zip(each.answers, given.answers, strict=True)
    ]
    assert sum(hits) >= len(hits) - 1, "it sees what it is asked about"
    (batch,) = asked.batches(own)
    assert {"pixel_values", "pixel_values_videos"} <= set(batch.inputs)


@pytest.mark.parametrize(("size", "tokens"), [((96, 96), 144), ((96, 48), 72), ((48, 104), 78), ((100, 52), 72)])
def test_a_picture_of_any_size_is_read_at_its_own(processor, size, tokens):
    inputs = processor(text="<|image_pad|>", images=[Image.new("RGB", size)], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
    assert inputs["image_grid_thw"].prod() == 4 * tokens


def test_timestamps_stand_between_the_frames_of_a_film(processor):
    document = draw_several("moving", seed_of("test", 0))
    text = processor.decode(prompts(processor, [document])["input_ids"][0])
    assert text.count("seconds >") == document.pictures // 2
    assert "< 0. 2 seconds >" in text
    assert "< 1. 2 seconds >" in text


@pytest.mark.parametrize("text", ["hello, world 2048", "what is the price of tea?", "the qr-code: x1 (3.5%)", "A b C"])
def test_any_lower_case_text_is_spelt_and_read_back(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_the_template_leaves_only_the_system_text_of_benchmarks_out(processor):
    rendered = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what is the price of tea?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(processor, "what is the price of tea?", 1, system=QWEN3_VL.asked_as) == rendered
    spoken = render(processor, "what is the price of tea?", 1, system="be kind")
    assert spoken == f"<|im_start|>system\nbe kind<|im_end|>\n{rendered}"
    assert processor.chat_template == CHAT_TEMPLATE


def call(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.slow
def test_convert_ask_and_visualize_run_on_it(workdir, capsys):
    document, film = draw("doc", seed_of("test", 0)), draw_several("moving", seed_of("test", 0))
    document.image.save("doc.png")
    (workdir / "film").mkdir()
    for number, frame in enumerate(film.images):
        frame.save(f"film/{number}.png")
    assert call("convert", NAME, "-o", "routed", "--quiet") == 0
    turn = document.turns[0]
    assert call("ask", "doc.png", turn.question, "-m", NAME, "--device", "cpu") == 0
    written = capsys.readouterr()
    assert written.out.splitlines()[-1] == turn.answer
    assert call("ask", "doc.png", turn.question, "-m", "routed", "--device", "cpu") == 0
    assert call("visualize", "doc.png", "-m", "routed", "-o", "doc-kept.png") == 0
    assert call("visualize", "film", "--video", "-m", "routed", "-o", "film-kept.png") == 0
    assert (workdir / "film-kept.png").is_file()
    assert "a bundled model" not in capsys.readouterr().err, "it reads these pictures"


@pytest.mark.slow
def test_finetune_eval_profile_and_calibrate_run_on_it(workdir, capsys):
    assert call("convert", NAME, "-o", "routed", "--quiet") == 0
    tasks = "data.tasks=[doc, which, moving]"
    train = ("--max-steps", 2, "--set", "train.batch_size=3", "--set", tasks)
    assert call("finetune", "tiny", "-m", "routed", "-o", "trained", "--device", "cpu", *train) == 0
    every = ("-t", "tiny,tiny-several", "--limit", 3, "--device", "cpu", "-o", "scores")
    assert call("eval", "-m", "trained", "--against", "stock,random,uniform", *every) == 0
    found = json.loads((workdir / "scores" / "results.json").read_text())
    assert len(found["models"]) == 4
    assert call("profile", "-m", "trained") == 0
    assert call("profile", "-m", NAME, "--video", "6x48x48@2") == 0
    assert call("profile", "--report", "depth", "-m", NAME, "--samples", 7, "--device", "cpu") == 0
    assert call("calibrate", NAME, "-o", "chosen", "--samples", 8, "--device", "cpu") == 0
    assert (workdir / "chosen" / "model-routers.safetensors").is_file()


@pytest.mark.slow
def test_a_film_is_refused_by_a_model_of_images_with_a_sentence(workdir, capsys):
    code = call("eval", "-m", "tiny-llava-next", "-t", "tiny_moving", "--limit", 2, "--device", "cpu", "-o", "scores")
    assert code != 0
    assert "this model takes images alone" in capsys.readouterr().err
