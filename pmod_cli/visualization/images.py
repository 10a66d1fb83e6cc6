"""Any picture file → the RGB image that the model is given and the drawing shows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from pmod_cli.core.errors import PmodError


@dataclass(frozen=True)
class LoadedImage:
    """An RGB image of 8 bits a channel, upright.

    Attributes:
        pixels: the image.
        notes: what was done to it that its owner may not expect, for the caption.
    """

    pixels: Image.Image
    notes: tuple[str, ...] = ()


def load_image(path: Path | str) -> LoadedImage:
    """Read a picture: first frame, turned upright by its EXIF tag, transparency over white, 16 bits scaled to 8.

    Raises:
        PmodError: no such file, not a picture, cut off, or so large that decoding it could exhaust the memory.
    """
    path = Path(path)
    if not path.is_file():
        raise PmodError(f"{path}: {'this is a folder, expected' if path.is_dir() else 'no such'} image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _no_truncated_images(), Image.open(path) as source:
                frames = getattr(source, "n_frames", 1)
                source.seek(0)
                source.load()
                image, notes = _upright_rgb(source)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise PmodError(f"{path}: the image has more than {limit}", hint="scale it down first") from error
    except UnidentifiedImageError as error:
        raise PmodError(f"{path}: not an image, or of a kind that Pillow cannot read") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's words for a damaged file
        raise PmodError(f"{path}: the image cannot be decoded ({error})", hint="the file may be cut off") from error
    if frames > 1:
        notes.append(f"first of {frames} frames")
    return LoadedImage(image, tuple(notes))


@contextmanager
def _no_truncated_images() -> Iterator[None]:
    """Other packages (lmms-eval's tasks) tell Pillow to fill up what a file lacks, for the whole process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright_rgb(source: Image.Image) -> tuple[Image.Image, list[str]]:
    notes = []
    image = ImageOps.exif_transpose(source)
    if source.getexif().get(0x0112, 1) != 1:  # Orientation
        notes.append("turned upright by its EXIF tag")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bit(image)
        notes.append("scaled to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("transparency shown over white")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), notes


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale deep grey images, which Pillow would clip: 16-bit ones by that range, others by their own."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and values.min() >= 0 and values.max() <= 65535)
    low, high = (0, 65535) if is_16_bit else (values.min(), values.max())
    return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
