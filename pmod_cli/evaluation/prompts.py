"""From benchmark questions to model inputs, prepared in background threads, and to left-padded batches."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL.Image import Image

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance


IMAGE = "<image>"  # lmms-eval's mark for the place of an image, in tasks that interleave images and text


@dataclass(frozen=True)
class Prompt:
    """One prepared question.

    Attributes:
        index: Place of the question in the caller's list.
        prompt: The text that the model reads, image places not yet expanded.
        inputs: What the processor made of it: `input_ids` (N,) int64, and the pixels, with their leading image axis.
    """

    index: int
    prompt: str
    inputs: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Tokens of the prompt, vision tokens included."""
        return self.inputs["input_ids"].shape[0]


def render(processor: Any, question: str, images: int) -> str:
    """The question in the checkpoint's own chat template, with `images` image places.

    Images come first, each in its own place. Where the question itself marks the places (MMMU), they stay there,
    unless the number of marks differs from the number of images.

    Raises:
        PmodError: the checkpoint has no chat template, or one that fails.
    """
    if not getattr(processor, "chat_template", None):
        raise PmodError(
            "this checkpoint has no chat template, so nobody knows how a question is put to it",
            hint="add chat_template.jinja to its folder, as the stock repository has it",
        )
    if question.count(IMAGE) == images > 0:
        content = [{"type": "text", "text": question}]
    else:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question.replace(IMAGE, "").strip()}]
    messages = [{"role": "user", "content": content}]
    return chat.rendered(lambda: processor.apply_chat_template(messages, add_generation_prompt=True))


def prepare(processor: Any, index: int, question: str, images: Sequence[Image]) -> Prompt:
    """Prompt and pixels of one question; no padding yet."""
    prompt = render(processor, question, len(images))
    encoded = processor(text=[prompt], images=list(images) or None, return_tensors="pt")
    inputs = {name: value for name, value in encoded.items() if name not in ("input_ids", "attention_mask")}
    return Prompt(index, prompt, {"input_ids": encoded["input_ids"][0], **inputs})


def collate(rows: Sequence[Prompt], pad_id: int) -> dict[str, torch.Tensor]:
    """One batch of B rows: `input_ids` and `attention_mask` (B, N) padded on the left, pixels joined along the images.

    Images of LLaVA-NeXT have different numbers of tiles; the missing ones are zeros, which the model drops.
    """
    longest = max(row.length for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - row.length :] = row.inputs["input_ids"]
        mask[place, longest - row.length :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for name in sorted({name for row in rows for name in row.inputs} - {"input_ids"}):
        batch[name] = _join([row.inputs[name] for row in rows if name in row.inputs])
    return batch


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis, the second padded with zeros where the shapes differ there (tiles)."""
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        most = max(tensor.shape[1] for tensor in tensors)
        tensors = [
            torch.cat([tensor, tensor.new_zeros(tensor.shape[0], most - tensor.shape[1], *tensor.shape[2:])], dim=1)
            for tensor in tensors
        ]
    return torch.cat(tensors)


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
    pool = ThreadPoolExecutor(_workers(), thread_name_prefix="prepare")
    try:
        ahead = [pool.submit(prepare, place) for place in parts[0]] if parts else []
        for number, part in enumerate(parts):
            now = ahead
            ahead = [pool.submit(prepare, place) for place in parts[number + 1]] if number + 1 < len(parts) else []
            yield requests[part[0]].args[1], [future.result() for future in now]
    finally:
        pool.shutdown(cancel_futures=True)


def _workers() -> int:
    """Threads of this process: the cores are shared with the other processes of the machine, one answers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
