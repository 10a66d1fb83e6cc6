"""From one benchmark question to model inputs, and from rows of different lengths to one left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from pmod_cli.core import chat
from pmod_cli.core.errors import PmodError

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
