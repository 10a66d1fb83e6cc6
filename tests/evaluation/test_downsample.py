"""The control with smaller pictures: how many tokens are left, and that nothing else of the model changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli.checkpoints import load_model
from pmod_cli.evaluation import provenance
from pmod_cli.evaluation.downsample import downsample, patches_per_side
from tests.factories import KINDS

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("retention", "whole", "side"),
    [
        (0.5375, 24, 18),  # the paper's: 309.6 of 576; 18² = 324 is nearer than 17² = 289
        (0.5375, 6, 4),  # 19.35 of 36: 16, not 25
        (1.0, 24, 24),
        (0.0, 24, 1),
        (0.625, 2, 2),  # 2.5 of 4: as far from 1 as from 4
    ],
)
def test_side_is_the_nearest(retention, whole, side):
    assert patches_per_side(retention, whole) == side


def tokens(model, processor) -> int:
    encoded = processor(text=["USER: <image>\nwhy? ASSISTANT:"], images=[PICTURE], return_tensors="pt")
    with torch.inference_mode():
        model(**encoded)  # as many features as places, or the model refuses
    return int((encoded["input_ids"] == model.config.image_token_index).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_many_tokens_as_near_as_can_be(stock_model, kind, dtype):
    model, processor = load_model(stock_model(kind), dtype=dtype)
    whole = tokens(model, processor)
    done = downsample(model, processor, 0.5)
    left = tokens(model, processor)
    assert done["tokens_left"] == done["patches_per_side"] ** 2 / done["of"] ** 2
    assert left / whole == pytest.approx(done["tokens_left"], abs=0.08), "line ends of LLaVA-NeXT are a larger share"
    assert model.dtype == getattr(torch, dtype)


def test_position_embeddings_are_those_of_transformers(stock_model):
    """The tower on small tiles equals the untouched tower that transformers asks to interpolate."""
    model, processor = load_model(stock_model("llava"), dtype="float32")
    reference, _ = load_model(stock_model("llava"), dtype="float32")
    done = downsample(model, processor, 0.5)
    pixels = processor(text=["<image>"], images=[PICTURE], return_tensors="pt")["pixel_values"]
    side = done["patches_per_side"] * model.config.vision_config.patch_size
    assert pixels.shape[-2:] == (side, side)
    with torch.inference_mode():
        small = model.model.vision_tower(pixels).last_hidden_state
        expected = reference.model.vision_tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(small, expected)


def test_the_image_processor_keeps_its_name(stock_model):
    model, processor = load_model(stock_model(), dtype="float32")
    before = provenance.loaded(model, processor)
    downsample(model, processor, 0.5)
    assert provenance.loaded(model, processor) == before


def test_weights_stay(stock_model):
    model, processor = load_model(stock_model(), dtype="float32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    downsample(model, processor, 0.5)
    differing = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert [name.rpartition("position_embedding")[1] for name in differing] == ["position_embedding"]


def test_whole_pictures_stay_whole(stock_model):
    """At retention 1 nothing is resized, so the answers are the stock model's."""
    model, processor = load_model(stock_model(), dtype="float32")
    encoded = processor(text=["USER: <image>\nwhy? ASSISTANT:"], images=[PICTURE], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**encoded).logits
        downsample(model, processor, 1.0)
        again = processor(text=["USER: <image>\nwhy? ASSISTANT:"], images=[PICTURE], return_tensors="pt")
        assert torch.equal(model(**again).logits, expected)
