"""Planted coordinates: every pixel says where it is, and each token must have seen the pixels its box claims.

The picture goes through the stock image processor and the stock model's packing of features, with the patch means as
features. What arrives at token t is therefore the mean position of what that token really saw.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from pmod_cli.core.errors import PmodError
from tests.visualization.records import image_layout

PATCH = 7
SIDE = 84
PINPOINTS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]
NARROW = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
RAW = {"do_rescale": False, "do_normalize": False}
SIZES = [  # height, width: squares, 3:1, 1:3, every grid, odd sizes, smaller than a tile, thin
    (168, 168), (200, 200), (255, 255), (85, 255), (255, 85), (84, 252), (252, 84), (90, 200), (163, 101), (130, 250),
    (250, 130), (40, 40), (61, 199), (20, 240), (240, 20), (101, 97), (168, 84), (84, 168), (3, 250),
]  # fmt: skip


def position_picture(height: int, width: int) -> Image.Image:
    """Red: x, green: y (in pixels, centred in each), blue: 255 wherever there is a picture at all."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, 255)], axis=-1).astype(np.uint8))


def patch_means(pixels: np.ndarray) -> torch.Tensor:
    """(T, 3, S, S) pixels of T squares -> (T, patches, 3)."""
    count, _, height, width = pixels.shape
    cells = torch.tensor(pixels).float().reshape(count, 3, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.mean(dim=(3, 5)).flatten(2).transpose(1, 2)


def assert_seen(seen: torch.Tensor, boxes: np.ndarray, height: int, width: int) -> None:
    """Compare mean positions (V, 3) with boxes (V, 4): centres where a box lies inside, the covered share elsewhere."""
    x0, y0, x1, y1 = boxes.T
    area = (x1 - x0) * (y1 - y0)
    clipped = (x1.clip(0, width) - x0.clip(0, width)) * (y1.clip(0, height) - y0.clip(0, height))
    # Where patches are larger than pixels of the original, 8-bit positions and bicubic edges blur the border patch.
    covered = seen[:, 2].numpy() / 255
    # A thin picture is scaled by a rounded factor; one resized pixel of a patch is the tolerance.
    np.testing.assert_allclose(covered, clipped / area, atol=1.5 / PATCH)
    scale = np.maximum(1, np.stack([x1 - x0, y1 - y0]) / PATCH)  # original pixels in one pixel of the resized picture
    margin = 2 * scale  # bicubic resizing bends the ramp within two pixels of the border
    inside = (x0 >= margin[0]) & (y0 >= margin[1]) & (x1 <= width - margin[0]) & (y1 <= height - margin[1])
    assert inside.any() or min(height, width) < 42
    centres = np.stack([(x0 + x1) / 2, (y0 + y1) / 2]) - 0.5  # pixel i covers i ... i + 1
    errors = np.abs(seen[:, :2].numpy().T - centres)
    assert errors[:, inside].max(initial=0) <= 1.0


@pytest.fixture(scope="module")
def anyres_model() -> LlavaNextModel:
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, image_token_id=7)
    return LlavaNextModel(config)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_anyres_tokens_saw_their_boxes(anyres_model, height, width):
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS, **RAW
    )
    pixels = processor(position_picture(height, width), return_tensors="np")["pixel_values"][0]
    assert len(pixels) == image_size_to_num_patches((height, width), PINPOINTS, SIDE)
    newline = torch.full((3,), -1.0)
    packed, _ = anyres_model.pack_image_features(
        [patch_means(pixels)], torch.tensor([[height, width]]), "default", newline
    )
    seen = packed[0]  # (V, 3)

    layout = image_layout(processor, PATCH, height, width)
    base, tiles = layout.parts
    assert layout.size == len(seen)
    is_newline = (seen == newline).all(-1).numpy()
    assert np.flatnonzero(is_newline).tolist() == tiles.newlines.tolist()
    assert base.tokens.shape == (SIDE // PATCH,) * 2
    boxes = layout.boxes(clip=False)
    assert (np.isnan(boxes).any(-1) == is_newline).all()
    assert_seen(seen[~is_newline], boxes[~is_newline], height, width)


def test_every_grid_is_among_the_sizes():
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    layouts = [image_layout(processor, PATCH, height, width) for height, width in SIZES]
    assert {layout.tile_grid for layout in layouts} == {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)}
    full = {layout.tile_grid: layout.tile_grid[0] * layout.tile_grid[1] * (SIDE // PATCH) ** 2 for layout in layouts}
    unpadded = {layout.parts[1].tokens.size < full[layout.tile_grid] for layout in layouts}
    assert unpadded == {True, False}


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **RAW),
        CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False, **RAW),
        CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size={"height": SIDE, "width": SIDE}, **RAW),
        LlavaImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True, image_mean=None, **RAW
        ),
    ],
    ids=["crop", "squash", "small", "pad"],
)
def test_llava15_tokens_saw_their_boxes(processor, height, width):
    pixels = processor(position_picture(height, width), return_tensors="np")["pixel_values"]
    layout = image_layout(processor, PATCH, height, width)
    assert [part.name for part in layout.parts] == ["image"]
    assert layout.size == (SIDE // PATCH) ** 2
    assert_seen(patch_means(pixels)[0], layout.boxes(clip=False), height, width)


def test_tokens_of_padding_have_no_box():
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True
    )
    layout = image_layout(processor, PATCH, height=42, width=84)  # a quarter of padding above, a quarter below
    boxes = layout.boxes().reshape(12, 12, 4)
    assert np.isnan(boxes[[0, 1, 2, 9, 10, 11]]).all()
    assert boxes[3, 0].tolist() == [0, 0, 7, 7]
    assert boxes[8, 11].tolist() == [77, 35, 84, 42]


def test_paper_sized_anyres():
    """The paper's count: 576 base tokens and 48 rows of 48 patches and a newline for a square image."""
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    layout = image_layout(processor, 14, 1000, 1000)
    assert [part.size for part in layout.parts] == [576, 48 * 49]
    assert layout.size == 2928


def test_a_size_without_a_fixed_grid_is_refused():
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, do_center_crop=False)
    processor.size = type(processor.size)(shortest_edge=SIDE, longest_edge=200)
    with pytest.raises(PmodError, match="no fixed patch grid"):
        image_layout(processor, PATCH, 100, 200)
