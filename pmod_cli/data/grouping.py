"""The order of rows in which every batch is all images or all text, and of similar length."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


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
