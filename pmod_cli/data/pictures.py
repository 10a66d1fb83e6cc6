"""The images and videos of a row: how they are found and opened, and what a processor is set to for them."""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import as_rgb, load_image
from pmod_cli.core.videos import Frames, Video, load_video
from pmod_cli.data.conversation import BadRow

if TYPE_CHECKING:
    from transformers import ProcessorMixin

LONGEST_PADDED_SIDE = 8192  # pixels: a longer side is reduced before padding, since a square of it is huge


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An RGB image, opened as in every other verb (`pmod_cli.core.images`).

    Args:
        source: a file name below ``folder``, encoded bytes, or a PIL image.

    Raises:
        BadRow: no such file, one outside the folder, not an image, cut off, or too large to decode safely.
    """
    if isinstance(source, Image.Image):
        return as_rgb(source)
    try:
        if isinstance(source, str):
            return load_image(find_image(source, folder), source).pixels
        if isinstance(source, bytes):
            return load_image(source, "its image").pixels
        raise BadRow(f"expected an image, its bytes or a file name, found {type(source).__name__}")
    except BadRow:
        raise
    except PmodError as error:
        raise BadRow(error.what) from None


def open_video(source: Any, folder: Path | None, frames: Frames) -> Video:
    """The frames of a video.

    Args:
        source: a name below ``folder`` of a file or of a folder of frames, a list of the names of frames, or the
            frames themselves, all of which are taken.
        frames: which frames are taken.

    Raises:
        BadRow: no such file, one outside the folder, or one that cannot be decoded.
    """
    if isinstance(source, Video):
        return source
    try:
        if isinstance(source, list | tuple):
            return load_video([find_image(name, folder) for name in source], frames)
        if isinstance(source, str):
            return load_video(inside(source, folder), frames, source)
        raise BadRow(f"expected the name of a video or of its frames, found {type(source).__name__}")
    except BadRow:
        raise
    except PmodError as error:
        raise BadRow(error.what) from None


def find_image(name: str, folder: Path | None) -> Path:
    """The file ``name`` of the image folder.

    Raises:
        BadRow: there is none, or it lies outside the folder.
    """
    path = inside(name, folder)
    if not os.path.exists(path):  # False for a name that is too long, where `Path.exists` raises
        raise BadRow(f"no such image: {name:.200}, in {folder}")
    return path


def inside(name: str, folder: Path | None) -> Path:
    """The path of ``name`` in the image folder, there or not. An absolute one has to begin with that folder's own path.

    Raises:
        BadRow: It lies outside, or is no name.
    """
    if not isinstance(name, str):
        raise BadRow(f"expected a file name, found {type(name).__name__}")
    path, own = Path(name), folder or Path()
    if ".." in path.parts and not path.is_absolute() and not os.path.normpath(name).startswith(".."):
        raise BadRow(f"{name:.200} has '..' in it: expected the name as it is below {own}")
    if ".." in path.parts or (path.is_absolute() and not path.is_relative_to(own.absolute())):
        raise BadRow(f"{name:.200} lies outside the image folder {own}")
    return own / path


def reduced(image: Image.Image, padded: bool) -> Image.Image:
    """The image, smaller by a whole factor where padding it to a square would take gigabytes."""
    longest = max(image.size)
    if not padded or longest <= LONGEST_PADDED_SIDE:
        return image
    factor = -(-longest // LONGEST_PADDED_SIDE)
    return image.resize([max(1, side // factor) for side in image.size], Image.Resampling.BICUBIC)


def is_square(processor: "ProcessorMixin") -> bool:
    """Whether an image becomes one square (LLaVA-1.5), neither tiles (LLaVA-NeXT) nor cells (Qwen-VL)."""
    images = processor.image_processor
    return not hasattr(images, "image_grid_pinpoints") and not hasattr(images, "merge_size")


def pads_to_square(processor: "ProcessorMixin") -> bool:
    """Whether an image is padded to a square, and not cropped or squashed."""
    return is_square(processor) and bool(getattr(processor.image_processor, "do_pad", False))


def padding_processor(processor: "ProcessorMixin") -> "ProcessorMixin":
    """A LLaVA-1.5 processor that pads images to a square with their mean colour, as LLaVA-1.5 was trained.

    The processors of the Hugging Face LLaVA-1.5 checkpoints crop the centre instead. Save the one returned here with
    the trained model, so that it sees in use what it saw in training. Others are returned as they are, and so is one
    that does not crop (SigLIP's, of LLaVA-Interleave).
    """
    images = processor.image_processor
    if not is_square(processor) or pads_to_square(processor) or not getattr(images, "do_center_crop", False):
        return processor
    if type(images).__name__.endswith("Pil"):
        from transformers import LlavaImageProcessorPil as Padding
    else:
        from transformers import LlavaImageProcessor as Padding
    settings = {key: value for key, value in images.to_dict().items() if hasattr(Padding, key)}
    padding = copy.copy(processor)
    padding.image_processor = Padding(**{**settings, "do_pad": True})
    return padding
