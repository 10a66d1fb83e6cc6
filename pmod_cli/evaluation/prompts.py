"""From benchmark questions to model inputs, prepared in background threads, and to left-padded batches."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL.Image import Image

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError
from pmod_cli.core.videos import Video, load_video
from pmod_cli.data.vision import as_given, clips, frames_of, joined, refusals
from pmod_cli.families import family_of

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance


IMAGE = "<image>"  # lmms-eval's mark for the place of an image, in tasks that interleave images and text
FRAMES = 32  # of a video, at equal distances over the whole of it, as lmms-eval's own models take
OF_TEXT = ("input_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Prompt:
    """One prepared question.

    Attributes:
        index: Place of the question in the caller's list.
        prompt: The text that the model reads, image places not yet expanded.
        inputs: What the processor made of it: `input_ids` (N,) int64, of some families `mm_token_type_ids` (N,), and
            the pixels, with their leading image axis.
    """

    index: int
    prompt: str
    inputs: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Tokens of the prompt, vision tokens included."""
        return self.inputs["input_ids"].shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of the inputs."""
        return sum(value.nbytes for value in self.inputs.values())

    def drop_pixels(self) -> None:
        """Frees what only a prefill needs; the ids stay."""
        for name in [name for name in self.inputs if name not in OF_TEXT]:
            del self.inputs[name]

    def count(self, ids: Sequence[int]) -> int:
        """How many of its tokens are one of these."""
        return int(torch.isin(self.inputs["input_ids"], torch.tensor(ids)).sum())


def render(processor: Any, question: str, images: int, videos: int = 0, system: str | None = None) -> str:
    """The question in the checkpoint's own chat template, with `images` image places and `videos` video places.

    Images come first, then videos, each in its own place. Where the question itself marks the places (MMMU), they stay
    there, unless the number of marks differs from the number of images, or the model has another mark: then, as
    lmms-eval's own models of the Qwen-VL families do, marks are taken out of the question.

    Args:
        system: What the system says first, see `families.record.Family.asked_as`.

    Raises:
        PmodError: the checkpoint has no chat template, or one that fails.
    """
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "video"}] * videos
    if processor.image_token != IMAGE:
        content.append({"type": "text", "text": question.replace(IMAGE, "")})
    elif question.count(IMAGE) == images > 0:
        content = [*content[images:], {"type": "text", "text": question}]
    else:
        content.append({"type": "text", "text": question.replace(IMAGE, "").strip()})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return render_chat(processor, messages)


def render_chat(processor: Any, messages: Sequence[dict[str, Any]], *, memory: int | None = chat.MEMORY) -> str:
    """Turns in the checkpoint's own chat template, up to the place where its answer begins.

    Args:
        messages: Role, and content as a list of parts: `{"type": "image"}` and `{"type": "text", "text": ...}`.
        memory: Bytes that the template may take, see `chat.rendered`.

    Raises:
        PmodError: the checkpoint has no chat template, or one that fails.
    """
    if not getattr(processor, "chat_template", None):
        raise PmodError(
            "this checkpoint has no chat template, so nobody knows how a question is put to it",
            hint="add chat_template.jinja to its folder, as the stock repository has it",
        )
    return chat.rendered(
        lambda: processor.apply_chat_template(list(messages), add_generation_prompt=True), memory=memory
    )


def as_asked(processor: Any, model_type: str) -> Any:
    """A processor that makes images as large as lmms-eval's own model of the family does, within its own limits.

    It is another one where that differs; the one given stays as it is.
    """
    family = family_of(model_type)
    if family is None or family.asked_pixels is None:
        return processor
    size = dict(processor.image_processor.size)
    (least, most), own_most = family.asked_pixels, size["longest_edge"]
    limits = {
        "shortest_edge": least if least <= own_most else size["shortest_edge"],
        "longest_edge": min(most, own_most),
    }
    asked = copy.copy(processor)
    asked.image_processor = copy.copy(processor.image_processor)
    asked.image_processor.size = type(processor.image_processor.size)(**limits)
    return asked


def prepare(
    processor: Any, index: int, question: str, visuals: Sequence[Image | Video | str], model_type: str = ""
) -> Prompt:
    """Prompt and pixels of one question; no padding yet.

    Args:
        visuals: Its images, and its videos or their paths.
        model_type: Of the model, which says what the system says first.

    Raises:
        PmodError: a video for a model that takes images alone, or one that cannot be read.
    """
    images = [visual for visual in visuals if isinstance(visual, Image)]
    videos = [visual for visual in visuals if isinstance(visual, str | Video)]
    if len(images) + len(videos) < len(visuals):
        raise PmodError(f"a question with {type(visuals[0]).__name__}: expected images, videos, or paths of videos")
    family = family_of(model_type)
    prompt = render(processor, question, len(images), len(videos), family.asked_as if family else None)
    given: dict[str, Any] = {}
    if videos:
        if getattr(processor, "video_processor", None) is None:
            raise PmodError("it asks about a video, and this model takes images alone")
        frames = replace(frames_of(processor, per_second=1e6, most=FRAMES), down=True)
        given = clips(
            processor, [each if isinstance(each, Video) else load_video(Path(each), frames) for each in videos]
        )
    return encode(processor, index, prompt, images, **given)


def encode(processor: Any, index: int, prompt: str, images: Sequence[Image], **given: Any) -> Prompt:
    """What the processor makes of a rendered prompt and the images of its places.

    Args:
        given: What it is given besides, such as videos.

    Raises:
        PmodError: it refuses a picture, or the text.
    """
    if images:
        given["images"] = as_given(processor, images)
    with refusals():
        # Verbose, the tokenizer warns of "indexing errors" where a prompt is too long, which callers say better.
        encoded = processor(text=[prompt], return_tensors="pt", verbose=False, **given)
    inputs = {
        name: torch.as_tensor(value) for name, value in encoded.items() if name not in (*OF_TEXT, "attention_mask")
    }
    return Prompt(index, prompt, {name: encoded[name][0] for name in OF_TEXT if name in encoded} | inputs)


def special_ids(model: Any, processor: Any) -> tuple[list[int], int]:
    """The ids that end an answer, and the one that pads: which one does not matter, since it is masked."""
    ends = model.generation_config.eos_token_id
    ends = processor.tokenizer.eos_token_id if ends is None else ends
    ends = list(ends) if isinstance(ends, list | tuple) else [ends]
    pad = processor.tokenizer.pad_token_id  # some tokenizers have none
    return ends, ends[0] if pad is None else pad


def collate(rows: Sequence[Prompt], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of B rows: `input_ids` and `attention_mask` (B, N) padded on the left, pixels one after another."""
    longest = max(row.length for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    if "mm_token_type_ids" in rows[0].inputs:
        batch["mm_token_type_ids"] = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        for name in OF_TEXT:
            if name in batch:
                batch[name][place, longest - row.length :] = row.inputs[name]
        batch["attention_mask"][place, longest - row.length :] = 1
    return batch | joined([{name: value for name, value in row.inputs.items() if name not in OF_TEXT} for row in rows])


WINDOW = 8  # batches that are prepared and sorted by length together, while the window before them is answered
MOST_ROWS = 128  # of a window: prepared pixels of LLaVA-NeXT take 7 MB a question
MOST_WORKERS = 4

Prepared = TypeVar("Prepared")


def windows(
    requests: Sequence[Instance], prepare: Callable[[int], Prepared], batch_size: int
) -> Iterator[tuple[dict, list[Prepared]]]:
    """Generation settings and prepared questions, a window at a time; all questions of a window share the settings.

    The length of a prompt is known once its image is decoded and cut into tiles. So a window is what can be sorted by
    length: larger than a batch, smaller than a benchmark.

    Args:
        prepare: From the place of a request in `requests` to the prepared question; called in a thread.
        batch_size: Rows of a batch.
    """
    by_settings: dict[str, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        by_settings[repr(request.args[1])].append(place)
    rows = max(batch_size, min(WINDOW * batch_size, MOST_ROWS))
    parts = [group[at : at + rows] for group in by_settings.values() for at in range(0, len(group), rows)]
    pool = ThreadPoolExecutor(preparing_threads(), thread_name_prefix="prepare")
    try:
        ahead = [pool.submit(prepare, place) for place in parts[0]] if parts else []
        for number, part in enumerate(parts):
            now = ahead
            ahead = [pool.submit(prepare, place) for place in parts[number + 1]] if number + 1 < len(parts) else []
            yield requests[part[0]].args[1], [future.result() for future in now]
    finally:
        pool.shutdown(cancel_futures=True)


def preparing_threads() -> int:
    """Threads of this process: the cores are shared with the other processes of the machine, one answers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
