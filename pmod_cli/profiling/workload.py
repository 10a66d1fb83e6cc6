"""What is profiled: one prompt, with the image cut and padded as the stock model does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlavaConfig, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from pmod_cli.errors import PmodError


@dataclass(frozen=True)
class Workload:
    """One prompt: an image, a text, and what is generated after it.

    Args:
        image_size: Width and height of the image in pixels. None: a square of two by two tiles, the paper's case
            (672x672 for a tower of 336 pixels).
        text_tokens: Text tokens of the prompt (58 in the paper's figures).
        new_tokens: Generated tokens that are fed back through the model after the prefill.

    Raises:
        PmodError: a size below 1 or a negative count.
    """

    image_size: tuple[int, int] | None = None
    text_tokens: int = 58
    new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.image_size is not None and min(self.image_size) < 1:
            width, height = self.image_size
            raise PmodError(
                f"--image-size {width}x{height} is empty: width and height are at least 1 pixel",
                hint="pmod profile --image-size 672x672",
            )
        for flag, number in (("--text-tokens", self.text_tokens), ("--new-tokens", self.new_tokens)):
            if number < 0:
                raise PmodError(f"{flag} {number} is negative: expected 0 or more", hint="pmod profile --help")


@dataclass(frozen=True)
class ImageTokens:
    """One image as the model sees it.

    Args:
        width: Pixels.
        height: Pixels.
        tiles: Passes through the vision tower, the downscaled base image included.
        base: Vision tokens of the base image.
        high_resolution: Vision tokens of the other tiles after unpadding, one `image_newline` a row included. 0 for
            LLaVA-1.5.
        patches_per_tile: Vision tokens that the tower gives for one tile; all of them pass the projector.
    """

    width: int
    height: int
    tiles: int
    base: int
    high_resolution: int
    patches_per_tile: int

    @property
    def tokens(self) -> int:
        """Vision tokens of the prompt, V."""
        return self.base + self.high_resolution


def image_tokens(config: LlavaConfig | LlavaNextConfig, image_size: tuple[int, int] | None = None) -> ImageTokens:
    """Cut an image as the stock model does, by running its own packing code on shapes alone.

    Args:
        config: A stock or p-MoD LLaVA configuration.
        image_size: Width and height in pixels; None is two by two tiles.
    """
    vision = config.vision_config
    patches = tower_tokens(config) - (config.vision_feature_select_strategy == "default")  # "default" drops CLS
    width, height = image_size or (2 * vision.image_size,) * 2
    if not isinstance(config, LlavaNextConfig):
        return ImageTokens(width, height, tiles=1, base=patches, high_resolution=0, patches_per_tile=patches)
    tiles = image_size_to_num_patches((height, width), config.image_grid_pinpoints, vision.image_size)
    packed, _ = LlavaNextModel.pack_image_features(
        _Packer(config),
        [torch.empty(tiles, patches, 1, device="meta")],
        [(height, width)],
        config.vision_feature_select_strategy,
        image_newline=torch.empty(1, device="meta"),
    )
    return ImageTokens(width, height, tiles, patches, packed[0].shape[0] - patches, patches)


def tower_tokens(config: LlavaConfig | LlavaNextConfig) -> int:
    """Tokens of one tile inside the vision tower: its patches, and CLS where the tower is a CLIP."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")


@dataclass(frozen=True)
class _Packer:
    """All that the stock packing method reads of a model: its configuration."""

    config: LlavaNextConfig
