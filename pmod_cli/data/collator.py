"""Rows to a training batch: padded on the right, pixels joined along the images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pmod_cli.data.conversation import from_messages
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.data.templates import IGNORED

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["IGNORED", "Collator"]


class Collator:
    """Makes a batch of rows: encoded ones (``pmod_cli.data.dataset``), or ``{"images": …, "messages": …}``.

    The latter (``pmod_cli.data.rows``) are encoded here by the processor's own chat template, whose
    ``{% generation %}`` blocks mark what the assistant says, end-of-turn token included: the labels lie there.
    """

    def __init__(self, processor: "ProcessorMixin") -> None:
        self.processor = processor
        self._encoder: RowEncoder | None = None

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Batch of B rows, N tokens: ``input_ids``, ``attention_mask``, ``labels`` int64 (B, N), and the pixels.

        Images of LLaVA-NeXT have different numbers of tiles; missing ones are zeros, which the model drops.

        Raises:
            BadRow: a row whose ``<image>`` places and images do not match in number.
            PmodError: rows have to be encoded here, and the chat template does not mark the answers.
        """
        rows = [row if "input_ids" in row else self._encode(row) for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.processor.tokenizer.pad_token_id or 0, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[place, :length], labels[place, :length], mask[place, :length] = row["input_ids"], row["labels"], 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        for name in ("pixel_values", "image_sizes"):
            found = [row[name] for row in rows if name in row]
            if found:
                batch[name] = _joined(found)
        return batch

    def _encode(self, row: dict) -> dict[str, torch.Tensor]:
        if self._encoder is None:
            self._encoder = RowEncoder(self.processor)
        return self._encoder(from_messages(row))


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Concatenation along the images, the second axis (tiles) filled up with zeros where it differs."""
    most = max(tensor.shape[1] for tensor in tensors)
    if all(tensor.shape[1] == most for tensor in tensors):
        return torch.cat(tensors)
    filled = [torch.cat([t, t.new_zeros(len(t), most - t.shape[1], *t.shape[2:])], dim=1) for t in tensors]
    return torch.cat(filled)
