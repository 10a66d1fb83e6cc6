"""What can happen to a tensor on its way: cast, rows added or cut, a LoRA update merged. Needs torch only then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pmod_cli.checkpoints.files import Tensor
from pmod_cli.checkpoints.source import TensorSource
from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "I64": "int64", "I32": "int32"}
_PIECE = 32 * 2**20  # bytes of the source at a time


def transformed(part: TensorSource) -> Iterator[memoryview]:
    """Bytes of the result, in pieces of bounded size; a LoRA update is merged in float32, a whole matrix at once."""
    result = part.result
    if part.low_rank is not None:
        yield _bytes(_cut_or_grow(merged(part), part.rows), result.dtype)
        return
    rows = part.source.shape[0] if part.source.shape else 1
    kept = rows if part.rows is None else min(rows, part.rows)
    for piece in _pieces(part.source, kept):
        yield _bytes(piece, result.dtype)
    if part.rows is not None and part.rows > rows:
        mean = mean_row(part.source)
        yield _bytes(mean.expand(part.rows - rows, *mean.shape[1:]).contiguous(), result.dtype)


def merged(part: TensorSource) -> torch.Tensor:
    """`weight + scale * up @ down`, in float32.

    Raises:
        PmodError: the shapes do not fit.
    """
    weight, up, down = (load(tensor).float() for tensor in (part.source, part.low_rank.up, part.low_rank.down))
    if up.shape[1:] != down.shape[:1] or (*up.shape[:1], *down.shape[1:]) != tuple(weight.shape):
        update = f"{list(up.shape)} x {list(down.shape)}"
        raise PmodError(f"{part.low_rank.up.path}: an update {update} does not fit a weight {list(weight.shape)}")
    return weight.addmm_(up, down, alpha=part.low_rank.scale)


def mean_row(tensor: Tensor) -> torch.Tensor:
    """The mean of all rows, in float32, shape (1, ...).

    As a row of lm_head it gives a new token the mean of all logits, which is never the largest.
    """
    import torch

    total = torch.zeros(1, *tensor.shape[1:], dtype=torch.float64)
    for piece in _pieces(tensor, tensor.shape[0]):
        total += piece.sum(dim=0, keepdim=True, dtype=torch.float32)
    return (total / tensor.shape[0]).float()


def load(tensor: Tensor) -> torch.Tensor:
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
        whole = load(tensor)
        yield whole[:rows] if tensor.shape else whole
        return
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
    step = max(_PIECE // max(row_bytes, 1), 1)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield load(Tensor(tensor.path, tensor.dtype, (count, *tensor.shape[1:]), tensor.offset + start * row_bytes))


def _cut_or_grow(weight: torch.Tensor, rows: int | None) -> torch.Tensor:
    import torch

    if rows is None or rows <= len(weight):
        return weight[:rows]
    mean = weight.mean(dim=0, keepdim=True)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    tensor = tensor.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
