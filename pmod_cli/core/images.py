"""One way from any picture to the RGB image that a model is given, the same in every verb.

The rule is what a person and the field's own loaders agree on; docs/design.md says why:

- the first frame, turned upright by its EXIF orientation;
- transparency is dropped, and the stored colours stay, as `Image.convert("RGB")` has it;
- more than 8 bits a channel are scaled to 8, not clipped.
"""

from __future__ import annotations

import base64
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.Image import Transpose

from pmod_cli.core.errors import PmodError

MOST_PIXELS = 89_478_485  # Pillow's own bound, held here because packages that are imported beside us move Pillow's
WIDTH, HEIGHT, ORIENTATION = 0x0100, 0x0101, 0x0112  # tags of EXIF, and of TIFF
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
STRIP = 1 << 22  # pixels that are scaled to 8 bits at a time


@dataclass(frozen=True)
class LoadedImage:
    """An RGB image of 8 bits a channel, upright.

    Attributes:
        pixels: the image.
        notes: what was done to it that its owner may not expect, for a caption.
    """

    pixels: Image.Image
    notes: tuple[str, ...] = ()


def load_image(source: Path | str | bytes, name: str | None = None) -> LoadedImage:
    """Read a picture.

    Args:
        source: a file, or the encoded bytes of one.

    Raises:
        PmodError: no such file, not a picture, cut off, or so large that decoding it could exhaust the memory.
    """
    with _opened(source, name or str(source)) as image:
        several = getattr(image, "is_animated", False)
        image.seek(0)
        image.load()
        _check(image, name or str(source))  # of an icon the size is known only now
        notes = _notes(image) + ["first of several frames"] * several
        return LoadedImage(as_rgb(image), tuple(notes))


def pictures_in(folder: Path) -> list[Path]:
    """The files of a folder that Pillow opens by their endings, by name. PDF, which it only writes, is none of them.

    Raises:
        PmodError: there is none.
    """
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = sorted(child for child in folder.iterdir() if child.suffix.lower() in known and child.is_file())
    if not found:
        raise PmodError(f"{folder}: no picture in this folder", hint="name a folder of .png or .jpg files")
    return found


def image_size(source: Path | str | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of what `load_image` would give, from the header: nothing is decoded.

    An orientation that a PNG states behind its pixels is not seen.

    Raises:
        PmodError: as `load_image`, as far as a header tells.
    """
    with _opened(source, name or str(source)) as image:
        unknown = image.format == "PNG" and "exif" not in image.info  # looking further would decode it
        turned = not unknown and _orientation(image) >= 5
        # Pillow 11 and later turn a TIFF themselves: its size when it is opened, its pixels when they are read.
        size = tuple(map(image.getexif().get, (WIDTH, HEIGHT))) if image.format == "TIFF" else image.size
        return size[::-1] if turned else size


def as_rgb(image: Image.Image) -> Image.Image:
    """The rule of this module on an open image: upright, without transparency, 8 bits a channel, and no tags left."""
    image.load()  # a TIFF is upright then
    orientation = _orientation(image)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    rgb = (_to_8_bit(image) if _is_deep(image) else image).convert("RGB")
    rgb.info = {}
    return rgb


def in_data_url(url: str) -> bytes:
    """The encoded bytes of a picture in a data URL.

    Raises:
        ValueError: it holds none in base64.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("a data URL is expected as data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise ValueError("the data URL is no base64") from None


@contextmanager
def _opened(source: Path | str | bytes, name: str) -> Iterator[Image.Image]:
    """The image, its header read; whatever Pillow raises until the block ends becomes a sentence."""
    if not isinstance(source, bytes) and not os.path.isfile(source):
        hint = "nothing is downloaded: save the picture to a file first" if re.match(r"https?:/", str(name)) else None
        what = "this is a folder, expected" if os.path.isdir(source) else "no such"
        raise PmodError(f"{name}: {what} image file", hint=hint)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with _no_truncated_images(), Image.open(file) as image:
                _check(image, name)
                yield image
    except (PmodError, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        raise PmodError(f"{name} is not an image, or of a kind that Pillow cannot read") from error
    except Exception as error:  # on a damaged file Pillow's decoders raise nearly anything
        raise PmodError(f"{name} cannot be decoded ({error}); the file may be cut off") from error


@contextmanager
def _no_truncated_images() -> Iterator[None]:
    """Other packages (lmms-eval's tasks) tell Pillow to fill up what a file lacks, for the whole process."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _check(image: Image.Image, name: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise _too_large(name)
    if image.format == "EPS":
        raise PmodError(f"{name} is PostScript, which only another program can draw", hint="save it as a PNG")


def _too_large(name: str) -> PmodError:
    limit = f"{MOST_PIXELS / 1e6:.0f} megapixels"
    return PmodError(f"{name} has more than {limit}: too large to be decoded safely", hint="scale it down first")


def _notes(image: Image.Image) -> list[str]:
    notes = []
    if _orientation(image) in UPRIGHT:
        notes.append("turned upright by its EXIF tag")
    if _is_deep(image):
        notes.append("scaled to 8 bits")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        notes.append("transparency dropped, as the model is given it")
    return notes


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where the tag is absent, or lost in a damaged block."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block of tags is no reason to lose the picture
        return 1
    return found if isinstance(found, int) and found in UPRIGHT else 1


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale deep grey images, which Pillow would clip to white: by the range of 16 bits, else by their own.

    32-bit integers that would fit into 8 or 16 bits are taken as such.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        if image.mode == "I" and low >= 0 and high <= 65535:
            low, high = 0.0, 255.0 if high <= 255 else 65535.0
    scaled = np.zeros(values.shape, dtype=np.uint8)
    step = max(1, STRIP // max(image.width, 1))
    for top in range(0, image.height, step):  # in strips: float64 of a large picture would be gigabytes
        strip = np.nan_to_num(values[top : top + step].astype(np.float64), nan=low, posinf=high, neginf=low)
        scaled[top : top + step] = ((strip - low) / max(high - low, 1e-12) * 255).round()
    return Image.fromarray(scaled)
