"""What every layout is read into: a stock Hugging Face config, and for each tensor of it where its bytes come from.

A tensor may change on its way: cast, rows added or cut, a LoRA update merged. Only that needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.checkpoints.files import TORCH_NAMES, Tensor
from pmod_cli.model import PmodSettings

if TYPE_CHECKING:
    import torch


_PIECE = 32 * 2**20  # bytes of the source at a time
LAYER = "input_layernorm.weight"  # every decoder layer has one, and nothing else has


@dataclass(frozen=True)
class LowRank:
    """A LoRA update: `weight + scale * up @ down`.

    Attributes:
        down: (r, in).
        up: (out, r).
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class TensorSource:
    """One tensor of the result: bytes of the source, and what happens to them on the way.

    Attributes:
        source: Where the bytes are.
        rows: First size of the result, if it differs: rows beyond the source's are its mean row, the rest is cut off.
        dtype: Dtype of the result, if it differs.
        low_rank: Update that is added, if any.
    """

    source: Tensor
    rows: int | None = None
    dtype: str | None = None
    low_rank: LowRank | None = None

    @property
    def result(self) -> Tensor:
        """Dtype and shape of the result."""
        rows = self.source.shape[:1] if self.rows is None else (self.rows,)
        return replace(self.source, dtype=self.dtype or self.source.dtype, shape=rows + self.source.shape[1:])

    @property
    def changed(self) -> bool:
        """Whether the result's bytes differ from the source's."""
        result = self.result
        return (result.dtype, result.shape) != (self.source.dtype, self.source.shape) or self.low_rank is not None


@dataclass(frozen=True)
class Source:
    """A checkpoint of any layout.

    Attributes:
        folder: Where it is.
        layout: `huggingface`, `original`, `published` or `parts`.
        config: Stock configuration in the Hugging Face layout; its `model_type` is the name of a family.
        parts: Tensors by the name that they get in the Hugging Face layout, routers included.
        files: Every weight file that was read, with the names of its tensors in it.
        small_files: Small files that are copied as they are.
        write_processor: Writes tokenizer, processor and chat template into a folder, where they have to be made.
        settings: p-MoD settings, where the checkpoint is a p-MoD one already.
        router_state: `stock`, `untrained`, `trained` or `calibrated`.
        original_config: config.json of the source, where its layout is another.
        notes: What the user has to know.
    """

    folder: Path
    layout: str
    config: dict
    parts: dict[str, TensorSource]
    files: dict[Path, set[str]]
    small_files: list[Path] = field(default_factory=list)
    write_processor: Callable[[Path], None] | None = None
    settings: PmodSettings | None = None
    router_state: str = "stock"
    original_config: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Name of the family."""
        return self.config["model_type"]

    @property
    def num_layers(self) -> int:
        """L, from the names of the tensors: the config was held to them."""
        return sum(name.endswith(LAYER) for name in self.parts)

    @property
    def hidden_size(self) -> int:
        """D, from the shape of a norm."""
        return next(part.source.shape[0] for name, part in self.parts.items() if name.endswith(LAYER))

    @property
    def decoder(self) -> str:
        """Name of the decoder."""
        return self.config["text_config"].get("model_type", "llama")


def files_of(*groups: dict[str, Tensor]) -> dict[Path, set[str]]:
    """Names by file, for `Source.files`."""
    files: dict[Path, set[str]] = {}
    for group in groups:
        for name, tensor in group.items():
            files.setdefault(tensor.path, set()).add(name)
    return files


def transformed(part: TensorSource) -> Iterator[memoryview]:
    """Bytes of the result, in pieces of bounded size; a LoRA update is merged in float32, a whole matrix at once."""
    result = part.result
    if part.low_rank is not None:
        yield _bytes(_cut_or_grow(_merged(part), part.rows), result.dtype)
        return
    rows = part.source.shape[0] if part.source.shape else 1
    kept = rows if part.rows is None else min(rows, part.rows)
    for piece in _pieces(part.source, kept):
        yield _bytes(piece, result.dtype)
    if part.rows is not None and part.rows > rows:
        mean = _mean_row(part.source)
        yield _bytes(mean.expand(part.rows - rows, *mean.shape[1:]).contiguous(), result.dtype)


def _merged(part: TensorSource) -> torch.Tensor:
    """`weight + scale * up @ down`, in float32."""
    weight, up, down = (_load(tensor).float() for tensor in (part.source, part.low_rank.up, part.low_rank.down))
    return weight.addmm_(up, down, alpha=part.low_rank.scale)


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


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    tensor = tensor.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
