"""LLaVA-1.5: one square tile an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pmod_cli.families.record import Family, ImageTokens, PixelInputs
from pmod_cli.families.towers import CLIP, CLIP_L_336

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.image_processing_utils import BaseImageProcessor

    from pmod_cli.families.geometry import TokenLayout

DEFAULTS = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": CLIP.name, **CLIP_L_336},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def image_tokens(sizes: Any, image_size: tuple[int, int] | None = None, images: int = 1) -> ImageTokens:
    """As many vision tokens for each image as the tower has patches."""
    width, height = image_size or (2 * sizes.tower.tile,) * 2
    patches = sizes.tower.tokens - sizes.tower.dropped
    return ImageTokens(width, height, tiles=1, base=patches, high_resolution=0, patches_per_tile=patches)


def pixel_inputs(config: Any, images: Sequence[tuple[int, int]], rows: Sequence[int] = ()) -> PixelInputs:
    """One tile an image, `(images, 3, tile, tile)`."""
    tile = config.vision_config.image_size
    return (len(images), 3, tile, tile), {}


def place_tokens(processor: ProcessorMixin, patch_size: int, height: int, width: int) -> TokenLayout:
    """One grid over the image, which is padded to a square or cropped from its centre as the processor says."""
    from pmod_cli.families.geometry import TokenLayout, numbered, patch_spans

    image_processor = processor.image_processor
    pad = bool(image_processor.do_pad) and hasattr(image_processor, "pad_to_square")
    side = max(height, width)
    seen_h, seen_w = (side, side) if pad else (height, width)
    top, left = ((side - height) // 2, (side - width) // 2) if pad else (0, 0)
    rows, columns = patch_spans(image_processor, patch_size, seen_h, seen_w)
    return TokenLayout(width, height, (numbered("image", rows - top, columns - left, first=0),))


def image_processor(config: Mapping[str, Any], options: dict[str, Any], pad_to_square: bool) -> BaseImageProcessor:
    """The stock one, which crops the centre; the original code pads to a square instead."""
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

    return LlavaImageProcessorPil(do_pad=True, **options) if pad_to_square else CLIPImageProcessorPil(**options)


LLAVA = Family(
    name="llava",
    title="LLaVA-1.5",
    classes="Llava",
    defaults=DEFAULTS,
    image_tokens=image_tokens,
    pixel_inputs=pixel_inputs,
    place_tokens=place_tokens,
    image_processor=image_processor,
    small_pixels=(1, 3, 8, 8),
)
