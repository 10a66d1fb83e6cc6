"""The prompt of one question about one picture, several, or a film; and where each vision token lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError
from pmod_cli.core.videos import Video
from pmod_cli.data.vision import as_given, clips, image_lengths, marks_of, refusals
from pmod_cli.families.configs import known_family
from pmod_cli.families.geometry import TokenLayout, numbered, patch_spans
from pmod_cli.visualization.image_selection import IMAGE_MARK

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Shown:
    """One picture of a prompt.

    Attributes:
        image: RGB; of a film the frames that have tokens, side by side.
        layout: where its tokens lie.
        tokens: int64 (V,), for each token of the layout its place among all vision tokens of the prompt.
    """

    image: Image.Image
    layout: TokenLayout
    tokens: np.ndarray


def prepare(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: Sequence[Image.Image] | Video, question: str
) -> tuple[BatchFeature, list[Shown]]:
    """The model's inputs, and each picture with its tokens.

    Raises:
        PmodError: no chat template, a film for a model of images alone, a picture that the processor refuses, or image
            tokens that do not match the layout.
    """
    if isinstance(pictures, Video):
        if getattr(processor, "video_processor", None) is None:
            raise PmodError("this model takes images alone, no films", hint="pmod convert qwen2.5-vl-3b")
        text = _text(processor, question, 1, "video")
        with refusals():
            inputs = processor(text=[text], return_tensors="pt", **clips(processor, [pictures]))
        total = int((inputs["input_ids"] == model.config.video_token_id).sum())
        return inputs.to(model.device, model.dtype), [_film(processor, inputs, pictures, total)]
    text = _text(processor, question, len(pictures), "image")
    with refusals():
        inputs = processor(text=[text], images=as_given(processor, pictures), return_tensors="pt")
    total = int((inputs["input_ids"] == model.config.image_token_id).sum())
    lengths, alone = image_lengths(processor, [image.size[::-1] for image in pictures]), len(pictures) == 1
    shown, first = [], 0
    for image, length in zip(pictures, lengths, strict=True):
        each = _picture(model, processor, image, first, alone)
        # A picture of several has an end-of-row token of its own in LLaVA-OneVision, which lies nowhere.
        first += each.layout.size + (length - each.layout.size == 1 and not alone)
        shown.append(each)
    if first != total:
        raise PmodError(
            f"the image has {total} vision tokens in the prompt, and {first} places in the image; "
            "patch size, vision_feature_select_strategy or grid of the processor are not those of a stock LLaVA",
            hint="compare processor_config.json with the checkpoint this one was converted from",
        )
    return inputs.to(model.device, model.dtype), shown


def _picture(model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, first: int, alone: bool) -> Shown:
    patch = getattr(processor, "patch_size", None) or model.config.vision_config.patch_size
    if alone or not hasattr(processor, "vision_aspect_ratio"):
        layout = known_family(model.config).place_tokens(processor, patch, image.height, image.width)
    else:  # LLaVA-OneVision pads each of several images to a square
        side = max(image.size)
        rows, columns = patch_spans(processor.image_processor, patch, side, side)
        rows, columns = rows - (side - image.height) // 2, columns - (side - image.width) // 2
        layout = TokenLayout(image.width, image.height, (numbered("image", rows, columns, first=0),))
    return Shown(image, layout, first + np.arange(layout.size))


def _film(processor: ProcessorMixin, inputs: BatchFeature, film: Video, total: int) -> Shown:
    """The frames that have tokens of their own, side by side; tokens are numbered as they lie in that strip."""
    width, height = film.pixels.shape[2], film.pixels.shape[1]
    if "video_grid_thw" in inputs:
        merge = processor.video_processor.merge_size
        frames, high, wide = inputs["video_grid_thw"][0].tolist()
        rows, columns = _spans(high // merge, height), _spans(wide // merge, width)
        # The first of each group that the tower reads as one; the processor repeats the last frame to fill its group.
        seen = film.pixels[:: processor.video_processor.temporal_patch_size]
    else:
        frames, tile = inputs["pixel_values_videos"].shape[1], inputs["pixel_values_videos"].shape[-1]
        side = isqrt(total // frames)  # its frames are pooled; one token more may end the film, and lies nowhere
        rows, columns = patch_spans(processor.video_processor, tile // side, height, width)
        seen = film.pixels[np.arange(frames) * len(film.pixels) // frames]
    strip = Image.fromarray(np.concatenate(list(seen), axis=1))
    places = np.concatenate([columns.clip(0, width) + number * width for number in range(frames)])
    layout = TokenLayout(strip.width, height, (numbered("image", rows, places, first=0),), frames=frames)
    order = np.arange(layout.size).reshape(frames, len(rows), len(columns)).transpose(1, 0, 2).ravel()
    return Shown(strip, layout, order)


def _spans(count: int, length: int) -> np.ndarray:
    """float64 (count, 2): `length` pixels cut into equal spans."""
    edges = np.linspace(0, length, count + 1)
    return np.stack([edges[:-1], edges[1:]], axis=1)


def _text(processor: ProcessorMixin, question: str, count: int, kind: str) -> str:
    if not processor.chat_template:
        raise PmodError(
            "the processor has no chat template, so the prompt's form is not known",
            hint="add chat_template.jinja of the stock checkpoint to the model's folder",
        )
    for mark in marks_of(processor):
        if mark != IMAGE_MARK and mark in question:
            raise PmodError(f"the question holds {mark}, the mark of a picture's place", hint="leave it out")
    marks = question.count(IMAGE_MARK)
    if marks and (kind == "video" or marks != count):
        one = "more than once" if count == 1 else f"{marks} times, for {count} pictures"
        raise PmodError(f"the question holds {IMAGE_MARK} {one}: {question!r}", hint="ask about one image")
    if not marks:
        content = [{"type": kind}] * count + [{"type": "text", "text": question}]
    elif processor.image_token == IMAGE_MARK:
        # Stock templates put images before all text, wherever they stand in the message; text stays where it is.
        content = [{"type": "text", "text": question}]
    else:
        pieces = question.split(IMAGE_MARK)
        content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            content += [{"type": "image"}, {"type": "text", "text": piece.removeprefix("\n")}]
    messages = [{"role": "user", "content": content}]
    return chat.rendered(lambda: processor.apply_chat_template(messages, add_generation_prompt=True))
