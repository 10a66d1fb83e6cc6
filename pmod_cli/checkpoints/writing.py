"""Weight files of the result: linked where not a byte differs, else written anew, shard by shard in bounded memory.

Only a tensor that changes on its way (`checkpoints/changes.py`) needs torch. New routers are written without it, in any
dtype of the format.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pmod_cli.checkpoints.changes import too_large, transformed
from pmod_cli.checkpoints.files import SINGLE, Tensor, encode_header
from pmod_cli.checkpoints.layout import Source, TensorSource
from pmod_cli.core.atomic import sync

if TYPE_CHECKING:
    import numpy as np

SHARD_BYTES = 5 * 10**9
_CHUNK = 64 * 2**20  # bytes that are copied at a time


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
    if not shards and all(path.name not in (SINGLE, routers) for path in kept):
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


def _places(parts: dict[str, TensorSource], start: int) -> tuple[list[_Range], list[tuple[int, str, TensorSource]]]:
    """(ranges to copy, places, names and parts of what changes). Neighbours that stay neighbours are one range."""
    ranges: list[_Range] = []
    changing = []
    for name, part in parts.items():
        tensor, target = part.source, start
        start += part.result.nbytes
        if part.changed or tensor.loaded is not None:
            changing.append((target, name, part))
            continue
        if ranges and ranges[-1].end == (tensor.path, tensor.offset, target):
            ranges[-1].length += tensor.nbytes
        else:
            ranges.append(_Range(tensor.path, tensor.offset, tensor.nbytes, target))
    return ranges, changing


def _write_changing(
    out: BinaryIO, changing: list[tuple[int, str, TensorSource]], progress: Callable[[int], None]
) -> None:
    for place, name, part in changing:
        for piece in transformed(name, part):
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

    Raises:
        PmodError: a number is too large for the dtype.
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
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(drawn, dtype=np.float16 if dtype == "F16" else np.float32)
            if (np.isinf(values) & np.isfinite(drawn)).any():
                raise too_large(name, dtype)
            if dtype == "BF16":  # numpy has none: the upper half of a float32, rounded to even
                bits = values.view(np.uint32)
                values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            file.write(values.tobytes())
