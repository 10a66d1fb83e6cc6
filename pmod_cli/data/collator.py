"""Rows to training batches: the order of rows with `group_by_modality`, and the collator, which pads on the right."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler

from pmod_cli.data.conversation import from_messages
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.data.rendered import IGNORED
from pmod_cli.data.vision import joined, token_kinds

if TYPE_CHECKING:
    from transformers import ProcessorMixin

OF_TEXT = ("input_ids", "labels")


class ModalityBatches(Sampler[int]):
    """Row numbers for one epoch, as LLaVA's ``group_by_modality_length`` means them.

    Rows with and rows without images are shuffled apart and cut into groups, one a step of the optimizer. Within a
    group the rows are sorted by length and dealt out to the batches, so that all batches take about as long. Then the
    groups are shuffled. What does not fill a group is filled up with the first rows of its kind, so that no row is
    lost and no batch is mixed (the published code mixes the last one).

    The order is a function of seed and epoch alone: a resumed run, which skips the batches it has done, goes on with
    the same rows.

    Args:
        lengths: a number for each row, above 0 with image, below 0 without.
        batch_size: rows of one forward pass of one process.
        batches: forward passes to one optimizer step, over all processes.
        seed: of the order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, batches: int = 1, seed: int = 0) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch is another order. The Trainer calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        group, with_image = self.batch_size * self.batches, int((self.lengths > 0).sum())
        return sum(-(-count // group) * group for count in (with_image, len(self.lengths) - with_image))

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        kinds = (np.flatnonzero(self.lengths > 0), np.flatnonzero(self.lengths <= 0))
        groups = np.concatenate([self._groups(random.permutation(rows)) for rows in kinds if len(rows)])
        for group in groups[random.permutation(len(groups))]:
            yield from self._dealt(group).tolist()

    def _groups(self, rows: np.ndarray) -> np.ndarray:
        """(groups, rows of a group), the last one filled up from the front."""
        size = self.batch_size * self.batches
        return np.resize(rows, -(-len(rows) // size) * size).reshape(-1, size)

    def _dealt(self, group: np.ndarray) -> np.ndarray:
        """The rows of a group, batch after batch: the longest first, to and fro over the batches."""
        order = group[np.argsort(-np.abs(self.lengths[group]), kind="stable")].reshape(self.batch_size, self.batches)
        order[1::2] = order[1::2, ::-1]
        return order.T.ravel()


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
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **token_kinds(self.processor, ids)}
        pixels = [{name: value for name, value in row.items() if name not in OF_TEXT} for row in rows]
        return batch | joined(pixels)

    def _encode(self, row: dict) -> dict[str, torch.Tensor]:
        if self._encoder is None:
            self._encoder = RowEncoder(self.processor)
        return self._encoder(from_messages(row))
