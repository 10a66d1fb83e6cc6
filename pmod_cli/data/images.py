"""Images of training rows: opened with care, and padded to a square where the model was trained so."""

import copy
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile, UnidentifiedImageError

from pmod_cli.data.conversation import BadRow

if TYPE_CHECKING:
    from transformers import ProcessorMixin

LONGEST_PADDED_SIDE = 8192  # pixels: a longer side is reduced before padding, since a square of it is huge


def open_image(source: Any, folder: Path | None = None) -> Image.Image:
    """An RGB image, converted as the published code does it: ``Image.open(…).convert("RGB")``.

    Args:
        source: a file name below ``folder``, encoded bytes, or a PIL image.
        folder: the image folder.

    Raises:
        BadRow: no such file, one outside the folder, not an image, cut off, or too large to decode safely.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    name = source if isinstance(source, str) else "its image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_inside(source, folder) if isinstance(source, str) else io.BytesIO(source)) as image:
                before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
                try:
                    return image.convert("RGB")
                finally:
                    ImageFile.LOAD_TRUNCATED_IMAGES = before
    except FileNotFoundError:
        raise BadRow(f"no such image: {name}, in {folder}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise BadRow(f"{name} has more than {limit}: too large to be decoded safely; scale it down first") from None
    except UnidentifiedImageError:
        raise BadRow(f"{name} is not an image, or of a kind that Pillow cannot read") from None
    except MemoryError:
        raise
    except Exception as error:  # on a damaged file Pillow's decoders raise nearly anything
        raise BadRow(f"{name} cannot be decoded ({error}); the file may be cut off") from None


def _inside(name: str, folder: Path | None) -> Path:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BadRow(f"{name} lies outside the image folder")
    return (folder or Path()) / relative


def reduced(image: Image.Image, padded: bool) -> Image.Image:
    """The image, smaller by a whole factor where padding it to a square would take gigabytes."""
    longest = max(image.size)
    if not padded or longest <= LONGEST_PADDED_SIDE:
        return image
    factor = -(-longest // LONGEST_PADDED_SIDE)
    return image.resize([max(1, side // factor) for side in image.size], Image.Resampling.BICUBIC)


def is_anyres(processor: "ProcessorMixin") -> bool:
    """Whether the processor cuts images into tiles (LLaVA-NeXT)."""
    return hasattr(processor.image_processor, "image_grid_pinpoints")


def padding_processor(processor: "ProcessorMixin") -> "ProcessorMixin":
    """A LLaVA-1.5 processor that pads images to a square with their mean colour, as LLaVA-1.5 was trained.

    The processors of the Hugging Face LLaVA-1.5 checkpoints crop the centre instead. Save the one returned here with
    the trained model, so that it sees in use what it saw in training. LLaVA-NeXT's is returned as it is.
    """
    images = processor.image_processor
    if is_anyres(processor) or getattr(images, "do_pad", False):
        return processor
    if type(images).__name__.endswith("Pil"):
        from transformers import LlavaImageProcessorPil as Padding
    else:
        from transformers import LlavaImageProcessor as Padding
    settings = {key: value for key, value in images.to_dict().items() if hasattr(Padding, key)}
    padding = copy.copy(processor)
    padding.image_processor = Padding(**{**settings, "do_pad": True})
    return padding
