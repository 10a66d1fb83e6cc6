"""A planted router: tower and decoder pass each patch's own brightness on, and the routers like bright patches.

A white corner of a black picture must then be kept, by the boxes that the record gives its tokens.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pmod_cli import checkpoints
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings, kept_tokens
from pmod_cli.visualization import LoadedImage, attend, select


@torch.no_grad()
def like_brightness(model) -> None:
    """No token sees another or its own place, and each router points from a black patch's features to a white one's."""
    tower = model.model.vision_tower
    for name, parameter in tower.named_parameters():
        if "out_proj" in name or "fc2" in name or "position_embedding" in name:
            parameter.zero_()
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    side = tower.config.image_size
    # Black and white as the processor gives them: CLIP's mean and deviation, or the tiny model's, both near these.
    black, white = (
        model.model.multi_modal_projector(
            tower(torch.full((1, 3, side, side), value), output_hidden_states=True).hidden_states[-2][:, 1]
        )[0]
        for value in (-1.75, 2.0)
    )
    direction = (white - black) / (white - black).norm() ** 2
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.copy_(black)
    for layer in model.model.language_model.layers:
        if layer.router is not None:
            layer.router.weight.copy_(4 * direction[None])
            layer.router.bias.fill_(-4 * float(direction @ black) - 2)


@pytest.fixture(scope="module", params=["llava_next", "llava"])
def bright_model(request, stock_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bright") / request.param
    checkpoints.convert(stock_model(request.param), folder, PmodSettings(schedule="list", values=(1.0, 0.7, 0.3, 0.08)))
    model, processor = checkpoints.load_model(folder)
    like_brightness(model)
    return model, processor


SIZES = [(128, 128), (64, 192), (192, 64), (32, 96), (96, 32), (100, 260), (260, 100), (61, 83), (300, 300)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_bright_patches_are_kept(bright_model, height, width):
    model, processor = bright_model
    corner = np.array([0.35 * width, 0.35 * height]).round()  # white from here to the lower right corner
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((*corner, width, height), fill="white")
    record = select(model, processor, LoadedImage(image), max_new_tokens=0)

    boxes = record.layout.boxes(clip=False)
    # Bicubic resizing smears an edge over two pixels of the smaller of the two pictures.
    smear = np.maximum(2, 2 * (boxes[:, 2:] - boxes[:, :2]) / 8)  # (V, 2), in pixels of the original
    unpadded = (boxes[:, 2:] <= np.array([width, height]) + 0.5).all(axis=1)
    inside = (boxes[:, :2] >= corner + smear).all(axis=1) & unpadded
    outside = (boxes[:, 2:] <= corner - smear).any(axis=1) | np.isnan(boxes[:, 0])  # newlines are planted black
    assert inside.any()
    assert outside.any()

    assert record.routed.tolist() == [False, True, True, True]
    assert record.kept[0].all()
    bright_weight, dark_weight = record.weight[1][inside], record.weight[1][outside]
    assert bright_weight.min() > 1.1 > 0.9 > dark_weight.max()
    for layer in (1, 2, 3):
        kept = record.kept[layer]
        assert kept.sum() == kept_tokens(record.layout.size, record.retention[layer])
        if kept.sum() >= (~outside).sum():
            assert kept[inside].all()
        if kept.sum() <= inside.sum():
            assert not kept[outside].any()


def test_neither_answer_nor_question_changes_the_selection(bright_model):
    model, processor = bright_model
    image = LoadedImage(Image.effect_noise((90, 60), 80).convert("RGB"))
    silent = select(model, processor, image, "what is the price of egg?", max_new_tokens=0)
    answered = select(model, processor, image, "what is the price of egg?", max_new_tokens=4)
    asked = select(model, processor, image, "is there a red circle?", max_new_tokens=0)
    assert (asked.kept == silent.kept).all()  # the image stands before the question, and attention is causal
    assert silent.answer is None
    assert isinstance(answered.answer, str)
    assert (silent.kept == answered.kept).all()
    np.testing.assert_allclose(silent.weight, answered.weight, atol=1e-6)
    assert answered.router_state == "untrained"


def test_a_processor_that_does_not_fit_is_refused(bright_model):
    model, processor = bright_model
    template = processor.chat_template
    try:
        processor.chat_template = None
        with pytest.raises(PmodError, match="no chat template"):
            select(model, processor, LoadedImage(Image.new("RGB", (64, 64))))
        processor.chat_template = template
        processor.num_additional_image_tokens = 2
        with pytest.raises(PmodError, match="vision tokens in the prompt"):
            select(model, processor, LoadedImage(Image.new("RGB", (64, 64))))
    finally:
        processor.chat_template = template
        processor.num_additional_image_tokens = 1


def test_an_image_mark_in_the_question_moves_the_image(bright_model):
    """Text before the image is seen by it, so weights change; text behind it is not."""
    model, processor = bright_model
    image = LoadedImage(Image.effect_noise((90, 60), 80).convert("RGB"))
    behind = select(model, processor, image, "<image>\nwhat is the price of egg?", max_new_tokens=0)
    plain = select(model, processor, image, "what is the price of egg?", max_new_tokens=0)
    before = select(model, processor, image, "what is the price of egg? <image>", max_new_tokens=0)
    np.testing.assert_allclose(behind.weight, plain.weight, atol=1e-5)
    assert before.layout.size == plain.layout.size
    with pytest.raises(PmodError, match="more than once"):
        select(model, processor, image, "<image> or <image>", max_new_tokens=0)


def test_attention_is_that_of_one_eager_pass(stock_model, tmp_path):
    """The two-step prefill gives the last row of the maps that one pass over the whole prompt gives."""
    settings = PmodSettings(schedule="list", values=(1.0, 0.5, 0.3, 0.1))
    checkpoints.convert(stock_model("llava_next"), tmp_path / "pmod", settings)
    routed = checkpoints.load_model(tmp_path / "pmod")
    stock, processor = checkpoints.load_model(stock_model("llava_next"), attn_implementation="eager")
    picture = LoadedImage(Image.effect_noise((90, 60), 80).convert("RGB"))
    record = select(*routed, picture, "what is it?", max_new_tokens=0)
    beside = attend(stock, processor, record, name="stock")

    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=picture.pixels, text=text, return_tensors="pt")
    with torch.no_grad():
        maps = stock(**inputs, output_attentions=True).attentions
    is_vision = inputs["input_ids"][0] == stock.config.image_token_id
    for layer in range(4):
        expected = maps[layer][0, :, -1].mean(0)[is_vision].numpy()
        np.testing.assert_allclose(beside.weight[layer], expected, atol=1e-6)
        kept = int(record.kept[layer].sum())
        assert beside.kept[layer].sum() == kept
        assert set(np.flatnonzero(beside.kept[layer])) == set(np.argsort(-expected)[:kept])
    assert (beside.chosen_by, beside.router_state, beside.answer) == ("attention", "stock", None)

    other, its_processor = checkpoints.load_model(stock_model("llava"), attn_implementation="eager")
    with pytest.raises(PmodError, match="nothing can be compared"):
        attend(other, its_processor, record, name="llava")


@pytest.mark.timing
def test_one_image_and_32_layers_take_two_seconds():
    """CPU time beyond the imports: loading, asking, drawing all layers; of that drawing alone 1 s."""
    run = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loading, asking, drawing = map(float, run.stdout.split())
    assert drawing <= 1
    assert loading + asking + drawing <= 2


TIMED = """
import tempfile, time
from pathlib import Path
import matplotlib.backends.backend_agg, matplotlib.figure, torch
import transformers.models.clip.modeling_clip, transformers.models.llama.modeling_llama
import transformers.models.llava_next.processing_llava_next
import pmod_cli.visualization as v
import pmod_cli.model.modeling
from pmod_cli import checkpoints
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.model import PmodSettings
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    checkpoints.convert(checkpoints.resolve("tiny-llava-next").path, folder / "pmod", PmodSettings())
    document = draw("doc", seed_of("test", 0))
    document.image.save(folder / "image.png")
    start = time.process_time()
    model, processor = checkpoints.load_model(folder / "pmod")
    loaded = time.process_time()
    record = v.select(model, processor, v.load_image(folder / "image.png"), document.turns[0].question)
    asked = time.process_time()
    assert record.num_layers == 32
    v.save(v.draw(record, range(32)), folder / "sheet.png")
    print(loaded - start, asked - loaded, time.process_time() - asked)
"""
