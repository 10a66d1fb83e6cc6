"""The control that every way of dropping vision tokens has to beat: the plain model, shown a smaller picture.

A LLaVA reads tiles of G×G patches. Here each picture is resized to g/G of its width and height, and read in tiles of
g×g patches, with g² / G² as near to the mean retention of the p-MoD model as a whole number g allows. All weights stay;
the position embeddings of the vision tower are resized to g×g, as transformers' own `interpolate_pos_encoding` does.
So every layer of the decoder gets g² / G² of the vision tokens, but for rounding and for LLaVA-NeXT's line ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from torch import nn


def patches_per_side(retention: float, whole: int) -> int:
    """The g in 1 … `whole` whose square is nearest to `retention` of the square of `whole`; of two, the larger.

    Args:
        retention: Share of vision tokens to keep, 0 to 1.
        whole: G, patches along the side of a tile: 24 for CLIP-L/14 at 336 pixels.
    """
    return min(range(whole, 0, -1), key=lambda side: abs(side**2 - retention * whole**2))


def downsample(model: Any, processor: Any, retention: float) -> dict[str, Any]:
    """Make a loaded plain LLaVA, and its processor, read smaller pictures. Both are changed in place.

    Args:
        model: A stock LLaVA-1.5 or LLaVA-NeXT.
        retention: Share of vision tokens to come near to.

    Returns:
        What was done: patches along a tile's side before and after, the share of tokens that is left.

    Raises:
        PmodError: the vision tower is not CLIP.
    """
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    found = getattr(model.model, "vision_tower", None) or model.model.visual
    modules = found.modules()
    embeddings = next((module for module in modules if isinstance(module, CLIPVisionEmbeddings)), None)
    if embeddings is None:
        tower = type(found).__name__
        raise PmodError(f"`against=downsample` knows CLIP vision towers; this model has a {tower}")
    patch, whole = embeddings.patch_size, embeddings.image_size // embeddings.patch_size
    side = patches_per_side(retention, whole)
    _resize_positions(embeddings, side)
    model.config.vision_config.image_size = embeddings.image_size
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = _scaled(model.config.image_grid_pinpoints, side, whole)
    _shrink(processor.image_processor, side, whole, side * patch)
    return {"patches_per_side": side, "of": whole, "tokens_left": side**2 / whole**2}


def _resize_positions(embeddings: nn.Module, side: int) -> None:
    """Position embeddings of the class token and of side × side patches, instead of those of a whole tile."""
    import torch

    pixels = side * embeddings.patch_size
    table = embeddings.position_embedding.weight.data  # (1 + G², D)
    # In float32, since not every device resizes in half precision.
    embeddings.position_embedding.weight.data = table.float()
    of_patches = table.new_empty(1, 1 + side**2, table.shape[1], dtype=torch.float32)  # only their shape is read
    with torch.no_grad():
        resized = embeddings.interpolate_pos_encoding(of_patches, pixels, pixels)[0].to(table.dtype)  # (1 + g², D)
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(resized, freeze=True)
    embeddings.position_ids = torch.arange(len(resized), device=table.device).expand(1, -1)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = pixels, side**2, len(resized)


def _shrink(image_processor: Any, side: int, whole: int, pixels: int) -> None:
    """Resize each picture first, then cut it into tiles of `pixels`. A subclass, so that nothing else changes."""
    stock = type(image_processor)

    def preprocess(self: Any, images: Any, *args: Any, **named: Any) -> Any:
        return stock.preprocess(self, _each(images, side, whole), *args, **named)

    image_processor.__class__ = type(stock.__name__, (stock,), {"preprocess": preprocess})  # results say its name
    for name in ("size", "crop_size"):
        setattr(image_processor, name, _tile(getattr(image_processor, name), pixels))
    if getattr(image_processor, "image_grid_pinpoints", None):
        image_processor.image_grid_pinpoints = _scaled(image_processor.image_grid_pinpoints, side, whole)


def _each(images: Any, side: int, whole: int) -> Any:
    from PIL import Image

    if isinstance(images, list | tuple):
        return [_each(image, side, whole) for image in images]
    width, height = (max(1, round(length * side / whole)) for length in images.size)
    return images.resize((width, height), Image.Resampling.BICUBIC)


def _tile(size: Any, pixels: int) -> Any:
    """A processor's `size` or `crop_size` with each length that it sets replaced."""
    return type(size)(**{name: pixels for name, length in dict(size).items() if length is not None})


def _scaled(pinpoints: Any, side: int, whole: int) -> list[list[int]]:
    return [[length // whole * side for length in pinpoint] for pinpoint in pinpoints]
