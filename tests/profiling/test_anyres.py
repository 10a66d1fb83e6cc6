"""Vision tokens of an image, against the stock model's own packing code and its processor."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionModel, LlavaOnevisionProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from pmod_cli.checkpoints import builtin_config
from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import image_tokens
from pmod_cli.profiling import Sizes
from tests import factories


class Packer:
    """All that the stock packing method reads of a model."""

    def __init__(self, config: object) -> None:
        self.config = config


def stock_tokens(config: object, width: int, height: int) -> tuple[int, int]:
    """(V, tiles) by the code that runs in the model, on tensors without values."""
    side = config.vision_config.image_size
    patches = (side // config.vision_config.patch_size) ** 2
    tiles = image_size_to_num_patches((height, width), config.image_grid_pinpoints, side)
    features = [torch.empty(tiles, patches, 1, device="meta")]
    newline = torch.empty(1, device="meta")
    packed, _ = LlavaNextModel.pack_image_features(Packer(config), features, [(height, width)], "default", newline)
    return packed[0].shape[0], tiles


def test_any_size_is_cut_as_the_stock_code_cuts_it() -> None:
    draw = random.Random(0)
    config = builtin_config("llava-next-7b")
    sizes = Sizes.of(config)
    cases = [(1, 1), (1, 4000), (4000, 1), (336, 336), (335, 337), (672, 672), (1008, 336), (672, 671), (1280, 720)]
    cases += [(draw.randint(1, 2500), draw.randint(1, 2500)) for _ in range(1500)]
    for width, height in cases:
        image = image_tokens(sizes, (width, height))
        assert (image.tokens, image.tiles) == stock_tokens(config, width, height), (width, height)


@pytest.mark.parametrize("ratio", ["anyres_max_9", "anyres_max_4", "anyres_max_1"])
def test_many_tiles_are_pooled_to_as_many_as_the_config_says(ratio: str) -> None:
    """LLaVA-OneVision's packing code, and its processor's count."""
    draw, config = random.Random(0), builtin_config("llava-onevision-7b")
    config.vision_aspect_ratio = ratio
    sizes, side, tile = Sizes.of(config), 27, config.vision_config.image_size
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.vision_aspect_ratio, processor.num_image_tokens = ratio, side**2
    processor.image_processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints)
    cases = [(2000, 1500), (384, 384), (1, 3000)] + [(draw.randint(1, 2500), draw.randint(1, 2500)) for _ in range(20)]
    for width, height in cases:
        image = image_tokens(sizes, (width, height))
        features, newline = [torch.zeros(image.tiles, side**2, 1)], torch.zeros(1)
        packed, _ = LlavaOnevisionModel.pack_image_features(
            Packer(config), features, [(height, width)], newline, vision_aspect_ratio=ratio
        )
        placed = processor._get_number_of_features(height, width, tile, tile)
        assert image.tokens == packed[0].shape[0] == placed, (width, height)


@pytest.mark.parametrize("ratio", ["anyres", "square", "anyres_max_0", "anyres_max_-1", 9])
def test_a_ratio_that_the_stock_code_cannot_read_is_refused(ratio: object) -> None:
    """It reads the number where an image stands alone in its row: several images, and films, have no use for it."""
    config = builtin_config("llava-onevision-7b").to_dict() | {"vision_aspect_ratio": ratio}
    with pytest.raises(PmodError, match=r"vision_aspect_ratio is .*expected anyres_max_N"):
        image_tokens(Sizes.of(config), (64, 64))
    assert image_tokens(Sizes.of(config), (64, 64), images=2).tokens == 730


def test_the_papers_image() -> None:
    image = image_tokens(Sizes.of(builtin_config("llava-next-7b")), (672, 672))
    assert (image.tokens, image.tiles) == (576 + 48 * 49, 5)
    assert image_tokens(Sizes.of(builtin_config("llava-1.5-7b")), (1280, 20)).tokens == 576


@pytest.mark.parametrize("kind", factories.KINDS)
def test_image_tokens_are_the_processors(stock_model: Callable, kind: str) -> None:
    from PIL import Image

    config, processor = factories.config(kind), factories.processor(kind)
    for size in ((64, 64), (50, 37), (300, 20), (1, 90), (31, 33)):
        batch = processor(images=Image.new("RGB", size), text="<image> a", return_tensors="pt")
        expected = int((batch["input_ids"] == config.image_token_id).sum())
        image = image_tokens(Sizes.of(config), size)
        tiles = batch["pixel_values"].shape[1] if kind == "llava_next" else 1
        assert (image.tokens, image.tiles) == (expected, tiles), size
