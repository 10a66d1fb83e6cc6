"""Weight files of the result: linked where not a byte differs, else written anew, shard by shard in bounded memory.

A tensor may change on its way: cast, rows added or cut, a LoRA update merged. Only that needs torch. New routers are
written without it, in any dtype of the format.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pmod_cli.checkpoints.files import SINGLE, TORCH_NAMES, Tensor, encode_header
from pmod_cli.checkpoints.layout import LowRank, Source, TensorSource
from pmod_cli.core.atomic import sync

if TYPE_CHECKING:
    import numpy as np
    import torch

SHARD_BYTES = 5 * 10**9
_CHUNK = 64 * 2**20  # bytes that are copied at a time
_PIECE = 32 * 2**20  # bytes that are computed at a time


@dataclass(frozen=True)
class WeightFiles:
    """Weight files of the result.

    Attributes:
        unchanged: File name to the source file with the very same bytes.
        streamed: File name to its tensors by name.
    """

    unchanged: dict[str, Path] = field(default_factory=dict)
    streamed: dict[str, dict[str, TensorSource]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All file names."""
        return [*self.unchanged, *self.streamed]

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the tensors that are written anew."""
        return sum(part.result.nbytes for parts in self.streamed.values() for part in parts.values())


def lay_out(
    parts: dict[str, TensorSource], source: Source, *, max_shard_bytes: int | None, routers: str | None
) -> WeightFiles:
    """Decide which files of the source serve as they are, and how the rest is cut into shards.

    Args:
        max_shard_bytes: Size of a shard. None keeps the source's files where possible.
        routers: File that new routers get, beside the others; None if there are none.
    """
    rest, kept = dict(parts), []
    for path, tensors in source.files.items():
        same = path.suffix == ".safetensors" and all(
            name in parts and not parts[name].changed and parts[name].source.path == path for name in tensors
        )
        if same and (max_shard_bytes is None or path.stat().st_size <= max_shard_bytes):
            kept.append(path)
            rest = {name: part for name, part in rest.items() if name not in tensors}
    shards = _cut(rest, max_shard_bytes or SHARD_BYTES)
    if not shards and all(path.name != SINGLE for path in kept):
        return WeightFiles({path.name: path for path in kept})
    total = len(kept) + len(shards)
    # Beside routers or other shards, a file called model.safetensors would be loaded alone, without them.
    names = (
        [SINGLE]
        if total == 1 and not routers
        else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )
    return WeightFiles(dict(zip(names, kept, strict=False)), dict(zip(names[len(kept) :], shards, strict=True)))


def _cut(parts: dict[str, TensorSource], limit: int) -> list[dict[str, TensorSource]]:
    """Shards of at most `limit` bytes, in order; a larger tensor gets its own."""
    shards: list[dict[str, TensorSource]] = []
    room = 0
    for name, part in parts.items():
        nbytes = part.result.nbytes
        if not shards or nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = part
        room -= nbytes
    # Wide numbers first, as the format's own writer does: readers want every tensor at a multiple of its item size.
    width = {"F64": 0, "I64": 0, "F32": 1, "I32": 1}
    return [dict(sorted(shard.items(), key=lambda item: width.get(item[1].result.dtype, 2))) for shard in shards]


def place(path: Path, target: Path, link: str) -> str:
    """Give a source file a second name: returns how, `linked`, `symlinked` or `copied`.

    A hard link is impossible across file systems, and where the kernel protects files of others; then it is copied.
    """
    blob = path.resolve()  # the Hugging Face cache holds symbolic links to its blobs
    if link == "symlink":
        target.symlink_to(blob)
        return "symlinked"
    if link == "hard":
        try:
            os.link(blob, target)
            return "linked"
        except OSError:
            pass
    shutil.copyfile(blob, target)
    return "copied"


def stream(weights: WeightFiles, folder: Path, progress: Callable[[int], None]) -> None:
    """Write the streamed shards. Each goes to the disk behind the next one's back.

    Args:
        progress: Told the bytes of each piece written.
    """
    syncing: Future[None] | None = None
    with ThreadPoolExecutor(1) as behind:
        for name, parts in weights.streamed.items():
            write_shard(folder / name, parts, progress)
            if syncing is not None:
                syncing.result()  # a full disk may show only now
            syncing = behind.submit(sync, folder / name)
        if syncing is not None:
            syncing.result()


def write_shard(path: Path, parts: dict[str, TensorSource], progress: Callable[[int], None]) -> None:
    """One safetensors file: a header, then the tensors.

    Ranges that do not change are copied inside the kernel; what changes is computed beside that, in a second thread.
    """
    header = encode_header({name: (part.result.dtype, part.result.shape) for name, part in parts.items()})
    ranges, changing = _places(parts, len(header))
    with open(path, "wb", buffering=0) as out, ThreadPoolExecutor(1) as beside:
        _write_at(out, header, 0)
        computed = beside.submit(_write_changing, out, changing, progress)
        for run in ranges:
            _copy_range(run, out, progress)
        computed.result()


@dataclass
class _Range:
    """Bytes of a source file and where they go."""

    path: Path
    start: int
    length: int
    target: int

    @property
    def end(self) -> tuple[Path, int, int]:
        """Where a neighbour would begin: file, place in it, place in the result."""
        return self.path, self.start + self.length, self.target + self.length


def _places(parts: dict[str, TensorSource], start: int) -> tuple[list[_Range], list[tuple[int, TensorSource]]]:
    """(ranges to copy, parts that change with their places). Neighbours that stay neighbours are one range."""
    ranges: list[_Range] = []
    changing = []
    for part in parts.values():
        tensor, target = part.source, start
        start += part.result.nbytes
        if part.changed or tensor.loaded is not None:
            changing.append((target, part))
            continue
        if ranges and ranges[-1].end == (tensor.path, tensor.offset, target):
            ranges[-1].length += tensor.nbytes
        else:
            ranges.append(_Range(tensor.path, tensor.offset, tensor.nbytes, target))
    return ranges, changing


def _write_changing(out: BinaryIO, changing: list[tuple[int, TensorSource]], progress: Callable[[int], None]) -> None:
    for place, part in changing:
        for piece in transformed(part):
            _write_at(out, piece, place)
            place += len(piece)
            progress(len(piece))


def _copy_range(run: _Range, out: BinaryIO, progress: Callable[[int], None]) -> None:
    done = 0
    with open(run.path, "rb", buffering=0) as file:
        while done < run.length:
            count, source, target = min(run.length - done, _CHUNK), run.start + done, run.target + done
            try:
                copied = os.copy_file_range(file.fileno(), out.fileno(), count, source, target)
            except (OSError, AttributeError) as error:  # not every system and file system can
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                data = os.pread(file.fileno(), count, source)
                _write_at(out, data, target)
                copied = len(data)
            if not copied:
                raise OSError(errno.EIO, "the source ended before its header said", str(run.path))
            done += copied
            progress(copied)


def _write_at(out: BinaryIO, data: bytes | memoryview, place: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(out.fileno(), view, place)
        view, place = view[written:], place + written


def write_routers(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    std: float,
    seed: int,
    given: Mapping[str, np.ndarray] | None = None,
) -> None:
    """A safetensors file of routers.

    Args:
        shapes: Shape by tensor name.
        dtype: `F32`, `BF16` or `F16`.
        std: Standard deviation of the weights; biases are zero.
        given: Instead: what each holds, float32.
    """
    import numpy as np  # a third of the time that `pmod convert --help` would take

    generator = np.random.default_rng(seed)
    with open(path, "wb") as file:
        file.write(encode_header({name: (dtype, shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            if given is None and (not std or not name.endswith("weight")):
                file.write(bytes(Tensor(path, dtype, shape).nbytes))
                continue
            drawn = generator.normal(0.0, std, shape) if given is None else given[name].reshape(shape)
            values = np.ascontiguousarray(drawn, dtype=np.float16 if dtype == "F16" else np.float32)
            if dtype == "BF16":  # numpy has none: the upper half of a float32, rounded to even
                bits = values.view(np.uint32)
                values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            file.write(values.tobytes())


def transformed(part: TensorSource) -> Iterator[memoryview]:
    """Bytes of the result, in pieces of bounded size; a LoRA update is merged in float32, a whole matrix at once."""
    result = part.result
    if part.low_rank is not None:
        yield _bytes(_cut_or_grow(_merged(part.source, part.low_rank), part.rows), result.dtype)
        return
    rows = part.source.shape[0] if part.source.shape else 1
    kept = rows if part.rows is None else min(rows, part.rows)
    for piece in _pieces(part.source, kept):
        yield _bytes(piece, result.dtype)
    if part.rows is not None and part.rows > rows:
        mean = _mean_row(part.source)
        yield _bytes(mean.expand(part.rows - rows, *mean.shape[1:]).contiguous(), result.dtype)


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


def _bytes(tensor: torch.Tensor, dtype: str) -> memoryview:
    import torch

    tensor = tensor.to(getattr(torch, TORCH_NAMES[dtype])).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
