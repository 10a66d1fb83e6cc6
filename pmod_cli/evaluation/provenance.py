"""Everything that a score depends on, for the result file: software, machine, model and data. No secrets, no argv."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pmod_cli import __version__
from pmod_cli.checkpoints.digests import blob_name, file_sha256, weights_sha256
from pmod_cli.checkpoints.files import CONFIG
from pmod_cli.evaluation import data as data_files
from pmod_cli.evaluation.benchmarks import Split
from pmod_cli.families.configs import context_of

COMMIT = re.compile(r"[0-9a-f]{40}")
PROCESSOR_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
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
    from pmod_cli.evaluation.prompts import as_asked  # which imports torch

    config, text = model.config, model.config.get_text_config()
    settings = getattr(config, "settings", None)
    image_processor = as_asked(processor, config.model_type).image_processor
    size = {name: length for name, length in dict(getattr(image_processor, "size", None) or {}).items() if length}
    return {
        "mean_retention": 1.0 if settings is None else settings.mean_retention(text.num_hidden_layers),
        "pmod": getattr(config, "pmod", None),
        "model_type": config.model_type,
        "decoder": text.model_type,
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "context": context_of(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": config._attn_implementation,
        "device": str(model.device),
        "image_processor": type(image_processor).__name__,
        "image_pixels": [size[edge] for edge in ("shortest_edge", "longest_edge")] if "longest_edge" in size else None,
        "image_backend": "Pillow" if "Pil" in type(image_processor).__name__ else "torchvision",
    }


def checkpoint(folder: Path, commit: str | None) -> dict[str, Any]:
    """What a score depends on, as far as it lies in the files of a checkpoint."""
    return {
        "path": str(folder),
        "commit": commit,
        "weights_sha256": weights_sha256(folder),
        "config_sha256": file_sha256(folder / CONFIG),
        "processor_sha256": {name: file_sha256(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()},
    }


def data(sources: Iterable[Split], root: Path | None) -> list[dict[str, Any]]:
    """Which files the questions of a benchmark came from.

    Nothing is read but names: a file's SHA-256 is known where the Hugging Face cache names it so, or where the mirror's
    `SHA256SUMS` lists it; else it is None. The commit of the data set is known where it came from the cache.
    """
    sums = data_files.checksums(root) if root is not None else {}
    found = []
    for source in sources:
        paths = data_files.find(source, root)
        commit = next((part for part in paths[0].parts if COMMIT.fullmatch(part)), None) if paths and not root else None
        listed = [
            {
                "name": path.name,
                "bytes": path.stat().st_size,
                "sha256": sums.get(path.relative_to(root).as_posix()) if root else blob_name(path),
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
