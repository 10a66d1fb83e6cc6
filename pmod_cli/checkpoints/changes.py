"""What becomes of a tensor on its way into the result: cast, rows added or cut, a LoRA update merged.

It is computed in pieces, so that memory stays small whatever the tensor's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pmod_cli.checkpoints.files import TORCH_NAMES, Tensor
from pmod_cli.checkpoints.layout import LowRank, TensorSource
from pmod_cli.core.errors import RUN_FAILED, PmodError

if TYPE_CHECKING:
    import torch

_PIECE = 32 * 2**20  # bytes that are computed at a time


def transformed(name: str, part: TensorSource) -> Iterator[memoryview]:
    """Bytes of the result, in pieces of bounded size; a LoRA update is merged in float32, a whole matrix at once.

    Args:
        name: Of the tensor, for messages.

    Raises:
        PmodError: a number is too large for the dtype of the result.
    """
    dtype = part.result.dtype
    if part.low_rank is not None:
        yield _bytes(name, _cut_or_grow(_merged(part.source, part.low_rank), part.rows), dtype)
        return
    rows = part.source.shape[0] if part.source.shape else 1
    kept = rows if part.rows is None else min(rows, part.rows)
    for piece in _pieces(part.source, kept):
        yield _bytes(name, piece, dtype)
    if part.rows is not None and part.rows > rows:
        mean = _mean_row(part.source)
        yield _bytes(name, mean.expand(part.rows - rows, *mean.shape[1:]), dtype)


def _merged(source: Tensor, update: LowRank) -> torch.Tensor:
    """`weight + scale * up @ down`, in float32."""
    weight, up, down = (_load(tensor).float() for tensor in (source, update.up, update.down))
    return weight.addmm_(up, down, alpha=update.scale)


def _mean_row(tensor: Tensor) -> torch.Tensor:
    """The mean of all rows, in float32, shape (1, ...).

    As a row of lm_head it gives a new token the mean of all logits, which is never the largest.
    """
    import torch

    total = torch.zeros(1, *tensor.shape[1:], dtype=torch.float64)
    for piece in _pieces(tensor, tensor.shape[0]):
        total += piece.sum(dim=0, keepdim=True, dtype=torch.float32)
    return (total / tensor.shape[0]).float()


def _load(tensor: Tensor) -> torch.Tensor:
    """The tensor itself, in memory."""
    import torch

    if tensor.loaded is not None:
        return tensor.loaded
    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset)
        data = bytearray(tensor.nbytes)
        file.readinto(data)
    return torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[tensor.dtype])).view(tensor.shape)


def _pieces(tensor: Tensor, rows: int) -> Iterator[torch.Tensor]:
    """The first rows, a few at a time."""
    if not tensor.shape or tensor.loaded is not None:
        whole = _load(tensor)
        yield whole[:rows] if tensor.shape else whole
        return
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    step = max(_PIECE // max(row_bytes, 1), 1)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield _load(Tensor(tensor.path, tensor.dtype, (count, *tensor.shape[1:]), tensor.offset + start * row_bytes))


def _cut_or_grow(weight: torch.Tensor, rows: int | None) -> torch.Tensor:
    import torch

    if rows is None or rows <= len(weight):
        return weight[:rows]
    mean = weight.mean(dim=0, keepdim=True)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _bytes(name: str, tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    cast = tensor.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    extremes = cast.aminmax() if cast.numel() else ()  # a tenth of the time that casting takes
    if not all(each.isfinite() for each in extremes) and (tensor.isfinite() & ~cast.isfinite()).any():
        raise too_large(name, dtype)
    return memoryview(cast.reshape(-1).view(torch.uint8).numpy())


def too_large(name: str, dtype: str) -> PmodError:
    """The error for a finite number of the tensor `name` that is infinite in `dtype`, as safetensors names it."""
    asked = TORCH_NAMES[dtype]
    return PmodError(
        f"{name} holds a number that is too large for {asked}: it would be written as infinite",
        hint="`dtype=bfloat16` has the range of float32" if asked == "float16" else None,
        code=RUN_FAILED,
    )
