"""What a processor makes of the images and videos of a row: how many tokens, which tensors. The stock code decides.

torch is imported where tensors are made: prompts are checked without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pmod_cli.core.errors import PmodError, first_line
from pmod_cli.core.videos import Frames, Video
from pmod_cli.data.pictures import is_square

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

    Tensors = dict[str, torch.Tensor]


@contextmanager
def refusals(refused: type[PmodError] = PmodError) -> Iterator[None]:
    """Says in one sentence what a stock processor refuses with a ValueError, such as a picture of sides above 200 : 1.

    Args:
        refused: The class of the error; it takes the sentence.
    """
    try:
        yield
    except ValueError as error:
        raise refused(f"the model's processor refuses this input: {first_line(error):.200}") from None


def frames_of(processor: ProcessorMixin, per_second: float, most: int) -> Frames:
    """Which frames of a video a processor is given."""
    return Frames(per_second, most, exact=films_are_equal(processor))


def films_are_equal(processor: ProcessorMixin) -> bool:
    """Whether all films of a batch have as many frames: so where a frame is a tile, and not where it is a grid."""
    return not hasattr(getattr(processor, "video_processor", None), "merge_size")


def vision_ids(processor: ProcessorMixin) -> list[int]:
    """Ids of the tokens that stand for images, and for videos where the processor takes them."""
    ids = [getattr(processor, f"{what}_token_id", None) for what in ("image", "video")]
    return [number for number in ids if number is not None]


def image_lengths(processor: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Vision tokens of each image of a row.

    Args:
        sizes: (height, width) of each in pixels.
    """
    if not sizes:
        return []
    if len(sizes) > 1 and _joins_images(processor):
        marks = processor.replace_image_token({"batch_num_images": [len(sizes)]}, 0)
        return [marks.count(processor.image_token)] * len(sizes)
    pixels = processor.image_processor
    if is_square(processor) and not getattr(pixels, "crop_size", None):  # which the stock count asks for
        blank = np.zeros((3, pixels.size["height"], pixels.size["width"]))
        return [processor.replace_image_token({"pixel_values": [blank]}, 0).count(processor.image_token)] * len(sizes)
    return processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens


def image_tensors(processor: ProcessorMixin, images: Sequence[Any]) -> Tensors:
    """What the model takes of the images of a row, ``pixel_values`` float32 and what belongs to them."""
    return dict(processor.image_processor(images=as_given(processor, images), return_tensors="pt"))


def marks_of(processor: ProcessorMixin) -> list[str]:
    """What marks the place of an image in a prompt, and of a video where the model takes any."""
    return [mark for mark in (processor.image_token, getattr(processor, "video_token", None)) if mark]


def as_given(processor: ProcessorMixin, images: Sequence[Any]) -> list[Any]:
    """The images of one row, as the processor is told that they belong together."""
    return [list(images)] if _joins_images(processor) else list(images)


def video_tensors(processor: ProcessorMixin, videos: Sequence[Video]) -> tuple[list[np.ndarray], Tensors]:
    """The tokens of each video of a row, int64, timestamps included; and ``pixel_values_videos`` float32."""
    import torch

    tensors, texts = processor._process_videos(**clips(processor, videos), return_metadata=True, return_tensors="pt")
    ids = processor.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    kept = {name: value for name, value in tensors.items() if name in processor.model_input_names}
    return [np.array(each, dtype=np.int64) for each in ids], {
        name: torch.as_tensor(value) for name, value in kept.items()
    }


def clips(processor: ProcessorMixin, videos: Sequence[Video]) -> dict[str, Any]:
    """Videos as arguments of a processor: their frames are chosen already, and when each was is said.

    Where the tower reads frames in pairs, a single one is its own pair, as its processor of still images has it too.
    """
    import torch

    pair = getattr(processor.video_processor, "temporal_patch_size", 1)
    seen = [[*range(len(video.pixels)), *[0] * (pair - len(video.pixels))] for video in videos]
    metadata = [
        {"total_num_frames": len(places), "fps": video.per_second, "frames_indices": places}
        for video, places in zip(videos, seen, strict=True)
    ]
    frames = [
        torch.from_numpy(video.pixels[places]).permute(0, 3, 1, 2) for video, places in zip(videos, seen, strict=True)
    ]
    return {"videos": frames, "video_metadata": metadata, "do_sample_frames": False}


def token_kinds(processor: ProcessorMixin, ids: torch.Tensor) -> Tensors:
    """``mm_token_type_ids``, (B, N) as `ids`, where the model wants it: 1 at tokens of images, 2 at those of videos."""
    if "mm_token_type_ids" not in processor.model_input_names:
        return {}
    images, videos = ids == processor.image_token_id, ids == processor.video_token_id
    return {"mm_token_type_ids": images.long() + 2 * videos.long()}


def joined(rows: Sequence[Tensors]) -> Tensors:
    """The pixels of several rows, one after another.

    Images of LLaVA-NeXT have different numbers of tiles; missing ones are zeros, which the model drops.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _concatenated([row[name] for row in rows if name in row]) for name in names}


def _concatenated(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Along the images, the second axis (tiles) filled up with zeros where it differs."""
    import torch

    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        most = max(tensor.shape[1] for tensor in tensors)
        tensors = [torch.cat([t, t.new_zeros(len(t), most - t.shape[1], *t.shape[2:])], dim=1) for t in tensors]
    return torch.cat(tensors)


def _joins_images(processor: ProcessorMixin) -> bool:
    """Whether several images of a row are seen otherwise than one (LLaVA-OneVision: a tile each)."""
    return hasattr(processor, "vision_aspect_ratio")
