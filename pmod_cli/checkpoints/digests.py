"""Digests of weights: of their bytes, since a fine-tuned router may be all that differs in 14 GB.

A file is read once. Where the Hugging Face cache names it by its digest it is not read at all; the digest of another
large file is kept in the cache under the file's place, inode, size and time of change, so that no later start reads it.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from pmod_cli.checkpoints.files import shard_names

BLOB = re.compile(r"[0-9a-f]{64}")  # the Hugging Face cache names a large file by the SHA-256 of its bytes
LARGE = 64 << 20  # bytes: from here on a digest is worth keeping


def weights_sha256(folder: Path) -> str:
    """One digest of a checkpoint's weights: SHA-256 over the SHA-256 of each weight file, in the order of their names.

    A file of the Hugging Face cache is named by its SHA-256, so neither it nor a hard link to it, as `pmod convert`
    makes them, is read. Others are read whole, several at a time, once in the life of the file: seconds for a 7B model
    that is about to be read anyway.
    """
    paths = [folder / name for name in shard_names(folder)]
    known = _linked_blobs() if any(path.stat().st_nlink > 1 for path in paths) else {}
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda path: _digest(path, known), paths)
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of the bytes of one file, which is read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def blob_name(file: Path) -> str | None:
    """The SHA-256 of a file of the Hugging Face cache, by its name."""
    blob = file.resolve()
    return blob.name if BLOB.fullmatch(blob.name) and blob.parent.name == "blobs" else None


def _digest(file: Path, known: dict[tuple[int, int], str]) -> str:
    state = file.stat()
    named = blob_name(file) or known.get((state.st_dev, state.st_ino))
    return named or _read_digest(file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


def _linked_blobs() -> dict[tuple[int, int], str]:
    """The SHA-256 of the large files of models in the Hugging Face cache, by device and inode."""
    from huggingface_hub import constants

    found = {}
    for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*"):
        if BLOB.fullmatch(path.name):
            state = path.stat()
            found[state.st_dev, state.st_ino] = path.name
    return found


@cache
def _read_digest(file: Path, inode: int, size: int, modified_ns: int) -> str:
    """Inode, size and time are what makes a changed file another entry."""
    if size < LARGE:
        return file_sha256(file)
    from huggingface_hub.constants import HF_HOME

    name = hashlib.sha256(f"{file} {inode} {size} {modified_ns}".encode()).hexdigest()[:32]
    kept = Path(HF_HOME, "pmod", "digests", name)
    with suppress(OSError, UnicodeDecodeError):
        if BLOB.fullmatch(digest := kept.read_text()):
            return digest
    digest = file_sha256(file)
    with suppress(OSError):  # a read-only or full cache: the file is read again the next time
        from pmod_cli.core.atomic import write_text

        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, digest)
    return digest
