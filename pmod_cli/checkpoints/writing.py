"""Weight files of the result: linked where not a byte differs, else written anew, shard by shard in bounded memory."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pmod_cli.checkpoints.files import SINGLE, encode_header
from pmod_cli.checkpoints.layouts.normal import Part, Source
from pmod_cli.checkpoints.transforms import transformed

LINKS = ("hard", "copy", "symlink")
SHARD_BYTES = 5 * 10**9
_CHUNK = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Layout:
    """Weight files of the result.

    Attributes:
        unchanged: File name to the source file with the very same bytes.
        streamed: File name to its tensors by name.
    """

    unchanged: dict[str, Path] = field(default_factory=dict)
    streamed: dict[str, dict[str, Part]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.unchanged, *self.streamed]

    @property
    def streamed_bytes(self) -> int:
        return sum(part.result.nbytes for parts in self.streamed.values() for part in parts.values())


def lay_out(parts: dict[str, Part], source: Source, *, max_shard_bytes: int | None, routers: str | None) -> Layout:
    """Decide which files of the source serve as they are, and how the rest is cut into shards.

    Args:
        parts: Tensors of the result by name.
        source: Where they come from.
        max_shard_bytes: Size of a shard. None keeps the source's files where possible.
        routers: File that new routers get, beside the others; None if there are none.
    """
    rest, kept = dict(parts), []
    for path, names in source.files.items():
        same = path.suffix == ".safetensors" and all(
            name in parts and not parts[name].changed and parts[name].source.path == path for name in names
        )
        if same and (max_shard_bytes is None or path.stat().st_size <= max_shard_bytes):
            kept.append(path)
            rest = {name: part for name, part in rest.items() if name not in names}
    shards = _cut(rest, max_shard_bytes or SHARD_BYTES)
    if not shards and all(path.name != SINGLE for path in kept):
        return Layout({path.name: path for path in kept})
    total = len(kept) + len(shards)
    # Beside routers or other shards, a file called model.safetensors would be loaded alone, without them.
    names = (
        [SINGLE]
        if total == 1 and not routers
        else [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    )
    return Layout(dict(zip(names, kept, strict=False)), dict(zip(names[len(kept) :], shards, strict=True)))


def _cut(parts: dict[str, Part], limit: int) -> list[dict[str, Part]]:
    """Shards of at most `limit` bytes, in order; a larger tensor gets its own."""
    shards: list[dict[str, Part]] = []
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


def stream(layout: Layout, folder: Path, progress: Callable[[int], None]) -> None:
    """Write the streamed shards. Each goes to the disk behind the next one's back.

    Args:
        layout: From `lay_out`.
        folder: Where to.
        progress: Told the bytes of each piece written.
    """
    syncing: threading.Thread | None = None
    failures: list[OSError] = []

    def sync(path: Path) -> None:
        try:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:  # a full disk may show only now
            failures.append(error)

    for name, parts in layout.streamed.items():
        write_shard(folder / name, parts, progress)
        if syncing:
            syncing.join()
        syncing = threading.Thread(target=sync, args=(folder / name,))
        syncing.start()
    if syncing:
        syncing.join()
    if failures:
        raise failures[0]


def write_shard(path: Path, parts: dict[str, Part], progress: Callable[[int], None]) -> None:
    """One safetensors file: a header, then the tensors; ranges that do not change are copied inside the kernel."""
    header = encode_header({name: (part.result.dtype, part.result.shape) for name, part in parts.items()})
    with open(path, "wb", buffering=0) as out:
        _write_all(out, header)
        for start, length, part in _runs(parts):
            if length is not None:
                with open(part.source.path, "rb", buffering=0) as file:
                    _copy_range(file, start, length, out, progress)
                continue
            for piece in transformed(part):
                _write_all(out, piece)
                progress(len(piece))


def _runs(parts: dict[str, Part]) -> Iterator[tuple[int, int | None, Part]]:
    """(start, length, part): neighbours in the source that stay neighbours are one range. No length: it changes."""
    run: list | None = None
    for part in parts.values():
        tensor = part.source
        if part.changed or tensor.loaded is not None:
            if run:
                yield tuple(run)
            run = None
            yield 0, None, part
        elif run and run[2].source.path == tensor.path and run[0] + run[1] == tensor.offset:
            run[1] += tensor.nbytes
        else:
            if run:
                yield tuple(run)
            run = [tensor.offset, tensor.nbytes, part]
    if run:
        yield tuple(run)


def _copy_range(file: BinaryIO, start: int, length: int, out: BinaryIO, progress: Callable[[int], None]) -> None:
    while length:
        count = min(length, _CHUNK)
        try:
            done = os.copy_file_range(file.fileno(), out.fileno(), count, start)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in (28, 122):  # no space, quota
                raise
            file.seek(start)
            done = len(data := file.read(count))
            _write_all(out, data)
        if not done:
            raise OSError(5, "the source ended before its header said", file.name)
        start, length = start + done, length - done
        progress(done)


def _write_all(out: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]
