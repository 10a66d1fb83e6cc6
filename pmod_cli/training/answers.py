"""lm_head where an answer is learnt, and nowhere else.

A prompt has thousands of positions and an answer a few. A model's own loss makes logits for all of them, in float32 and
with their gradients, to throw all but a few away: with a large vocabulary they take more memory than the layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from pmod_cli.data.rendered import IGNORED

POSITIONS = "answer_positions"  # in a batch: its `positions`, made with it, so that nobody has to ask the device


def positions(labels: Tensor) -> Tensor:
    """Positions whose next token is learnt.

    Args:
        labels: int64 (B, N), -100 outside the answers.

    Returns:
        int64 (A,), of B * N.
    """
    found = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))
    return found.flatten().nonzero()[:, 0]


class AnswersHead:
    """Leaves lm_head the positions of the answers; its logits are (1, A, vocabulary) then.

    Args:
        model: stock or p-MoD, before it is wrapped for adapters or distributed training.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._positions: Tensor | None = None
        model.lm_head.register_forward_pre_hook(self._pick)

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[None]:
        """Within the block, these positions alone: int64 (A,), of B * N."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _pick(self, head: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._positions is None:
            return None
        (hidden,) = arguments
        return (hidden.flatten(0, 1).index_select(0, self._positions)[None],)
