"""Everything that a score depends on, for the result file: software, machine, model and data. No secrets, no argv."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.checkpoints import files
from pmod_cli.evaluation import mirror
from pmod_cli.evaluation.sources import Source

BLOB = re.compile(r"[0-9a-f]{64}")  # the Hugging Face cache names a large file by the SHA-256 of its bytes
COMMIT = re.compile(r"[0-9a-f]{40}")
PROCESSOR_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
)


def software() -> dict[str, Any]:
    """Versions of Python, of pmod with the commit of its checkout, and of every installed package."""
    packages = {dist.metadata["Name"]: dist.version for dist in distributions() if dist.metadata["Name"]}
    return {
        "pmod": __version__,
        "pmod_commit": _commit_of_checkout(),
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def machine(device: str) -> dict[str, Any]:
    """What the model ran on: system, device by name, number of threads."""
    import torch

    found: dict[str, Any] = {
        "system": platform.system(),
        "processor": platform.machine(),
        "device": device,
        "torch_threads": torch.get_num_threads(),
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        found |= {
            "device_name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return found


def loaded(model: Any, processor: Any) -> dict[str, Any]:
    """What a score depends on, as far as it lies in the loaded model and its processor."""
    config, text = model.config, model.config.get_text_config()
    retention = getattr(config, "retention", None)
    image_processor = processor.image_processor
    return {
        "mean_retention": sum(retention) / len(retention) if retention else 1.0,
        "pmod": getattr(config, "pmod", None),
        "model_type": config.model_type,
        "decoder": text.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "context": getattr(text, "max_position_embeddings", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
        "device": str(model.device),
        "image_processor": type(image_processor).__name__,
        "image_backend": "Pillow" if "Pil" in type(image_processor).__name__ else "torchvision",
    }


def checkpoint(folder: Path, commit: str | None) -> dict[str, Any]:
    """What a score depends on, as far as it lies in the files of a checkpoint."""
    return {
        "path": str(folder),
        "commit": commit,
        "weights_sha256": weights_sha256(folder),
        "config_sha256": _sha256(folder / files.CONFIG),
        "processor_sha256": {name: _sha256(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()},
    }


def data(sources: Iterable[Source], root: Path | None) -> list[dict[str, Any]]:
    """Which files the questions of a benchmark came from.

    Nothing is read but names: a file's SHA-256 is known where the Hugging Face cache names it so, or where the mirror's
    `SHA256SUMS` lists it; else it is None. The commit of the data set is known where it came from the cache.
    """
    sums = mirror.checksums(root) if root is not None else {}
    found = []
    for source in sources:
        paths = mirror.find(source, root)
        commit = next((part for part in paths[0].parts if COMMIT.fullmatch(part)), None) if paths and not root else None
        listed = [
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": sums.get(path.relative_to(root).as_posix()) if root else _blob_name(path),
            }
            for path in paths
        ]
        found.append(
            {
                "repository": source.repository,
                "configuration": source.configuration or None,
                "split": source.split,
                "commit": commit,
                "files": listed,
            }
        )
    return found


def weights_sha256(folder: Path) -> str:
    """One digest of a checkpoint's weights: SHA-256 over the SHA-256 of each weight file, in the order of their names.

    A file of the Hugging Face cache is named by its SHA-256, so neither it nor a hard link to it, as `pmod convert`
    makes them, is read. Others are read whole, several at a time, once in the life of the process: seconds for a 7B
    model that is about to be read anyway.
    """
    paths = [folder / name for name in files.shard_names(folder)]
    known = _linked_blobs() if any(path.stat().st_nlink > 1 for path in paths) else {}
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda path: _digest(path, known), paths)
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(file: Path, known: dict[tuple[int, int], str]) -> str:
    state = file.stat()
    named = _blob_name(file) or known.get((state.st_dev, state.st_ino))
    return named or _read_digest(file.resolve(), state.st_size, state.st_mtime_ns)


def _linked_blobs() -> dict[tuple[int, int], str]:
    """The SHA-256 of the large files of models in the Hugging Face cache, by device and inode."""
    from huggingface_hub import constants

    found = {}
    for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*"):
        if BLOB.fullmatch(path.name):
            state = path.stat()
            found[state.st_dev, state.st_ino] = path.name
    return found


def _blob_name(file: Path) -> str | None:
    """The SHA-256 of a file of the Hugging Face cache."""
    blob = file.resolve()
    return blob.name if BLOB.fullmatch(blob.name) and blob.parent.name == "blobs" else None


@cache
def _read_digest(file: Path, size: int, modified_ns: int) -> str:
    """Size and time are what makes a changed file another entry."""
    return _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _commit_of_checkout() -> str | None:
    """The commit of the checkout that pmod runs from, `-dirty` where files differ; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("-dirty" if changed.strip() else "")
