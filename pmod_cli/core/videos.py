"""One way from a video to its frames: a folder of pictures, or a file that an installed decoder reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.core.images import image_size, load_image, pictures_in

DECODERS = ("decord", "pyav", "opencv", "torchcodec")  # of transformers' `load_video`, in this order
DECORDS_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")  # the time, file and line in which its errors begin


@dataclass(frozen=True)
class Frames:
    """How many frames of a video are taken.

    Attributes:
        per_second: Frames a second. The pictures of a folder are taken to be as many a second already.
        most: Frames at most; of a longer video so many are taken at equal distances.
        exact: Whether `most` frames are taken of any video, some of them twice where it has fewer: models that
            read a frame as a tile put videos of one length alone into a batch.
        down: Whether a place between two frames is the earlier one, as in lmms-eval's own models; else the nearer, as
            in transformers' processors.
    """

    per_second: float = 2.0
    most: int = 32
    exact: bool = False
    down: bool = False

    def chosen(self, frames: int, recorded: float) -> np.ndarray:
        """The frames that are taken, int64 and ascending.

        Args:
            frames: Of the whole video.
            recorded: Frames a second of it.
        """
        wanted = max(1, round(frames / recorded * self.per_second)) if recorded else frames
        count = self.most if self.exact else min(wanted, frames, self.most)
        places = np.linspace(0, frames - 1, count)
        return (places if self.down else places.round()).astype(np.int64)


@dataclass(frozen=True)
class Video:
    """Frames in RGB.

    Attributes:
        pixels: uint8 `(T, height, width, 3)`.
        per_second: Frames of `pixels` that a second has.
    """

    pixels: np.ndarray
    per_second: float

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self.pixels.shape[:3]


def load_video(source: Path | Sequence[Path], frames: Frames, name: str | None = None) -> Video:
    """Read a video.

    Args:
        source: A folder of pictures of one size, in the order of their names; a list of such pictures; or a file.
        frames: Which frames are taken.
        name: What it is called in messages.

    Raises:
        PmodError: There is none, it cannot be decoded, no decoder is installed, or its pictures differ in size.
    """
    if not isinstance(source, Path):
        return _of_pictures(list(source), frames, name or f"a video of {len(source)} pictures")
    name = name or str(source)
    if source.is_dir():
        return _of_pictures(pictures_in(source), frames, name)
    if not source.is_file():
        raise PmodError(f"no such video: {name}", hint="name a file, or a folder of its frames")
    return _decoded(source, frames, name)


def _of_pictures(paths: list[Path], frames: Frames, name: str) -> Video:
    if not paths:
        raise PmodError(f"{name} has no frames")
    chosen = frames.chosen(len(paths), frames.per_second)
    pictures = [np.asarray(load_image(paths[index]).pixels) for index in chosen]
    for index, picture in zip(chosen, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            sizes = " and ".join(f"{shape[1]} x {shape[0]}" for shape in (pictures[0].shape, picture.shape))
            raise PmodError(f"the frames of {name} differ in size: {sizes} pixels ({paths[index].name})")
    return Video(np.stack(pictures), frames.per_second * len(chosen) / len(paths))


def _decoded(path: Path, frames: Frames, name: str) -> Video:
    from transformers import video_utils

    def choose(metadata: Any, **_: Any) -> np.ndarray:
        return frames.chosen(metadata.total_num_frames, metadata.fps or 0.0)

    try:
        pixels, metadata = video_utils.load_video(str(path), backend=_decoder(), sample_indices_fn=choose)
        pixels = np.asarray(pixels)
    except PmodError:
        raise
    except Exception as error:  # each decoder has exceptions of its own
        if _is_picture(path):
            what = f"{name} is a picture, expected a video or a folder of its frames"
            raise PmodError(what, hint="leave out `video=True`") from None
        said = DECORDS_PLACE.sub("", first_line(error))
        raise PmodError(f"the video {name} cannot be decoded: {said:.200}") from None
    if pixels.ndim != 4 or not len(pixels):
        raise PmodError(f"the video {name} has no frames")
    whole, recorded = metadata.total_num_frames, metadata.fps
    return Video(pixels, len(pixels) / whole * recorded if whole and recorded else frames.per_second)


def _is_picture(path: Path) -> bool:
    try:
        return bool(image_size(path))
    except PmodError:
        return False


def _decoder() -> str:
    from transformers.utils import import_utils

    known: dict[str, Callable[[], bool]] = {
        "decord": import_utils.is_decord_available,
        "pyav": import_utils.is_av_available,
        "opencv": import_utils.is_cv2_available,
        "torchcodec": import_utils.is_torchcodec_available,
    }
    for decoder in DECODERS:
        if known[decoder]():
            return decoder
    raise PmodError(
        "no video decoder is installed",
        hint="pip install av; or name a folder of the video's frames instead of the file",
    )
