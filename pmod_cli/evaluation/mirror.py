"""From a split of a data set to its parquet files: in a mirror on the disk, in the Hugging Face cache, on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.evaluation.benchmarks import Split

CHECKSUMS = "SHA256SUMS"  # in the root of a mirror, as `sha256sum --check` reads it
CARD = "README.md"  # a data set's card says which files make up which split
_SHARD = re.compile(r"-of-(\d{5})\b")


def split_files(source: Split, names: Iterable[str], card: str | None) -> list[str]:
    """Which files of a repository make up a split; none where any of them is missing.

    Args:
        names: The files of the repository, as `folder/name`.
        card: Text of its card; without one, or where it is silent, the names that the hub's own tools write are tried.
    """
    patterns = _declared(source, card or "") or _usual(source)
    found = sorted(
        name for name in names if name.endswith(".parquet") and any(fnmatchcase(name, part) for part in patterns)
    )
    of = {int(match[1]) for name in found if (match := _SHARD.search(name))}
    return [] if of and max(of) != len(found) else found  # half a split would give a wrong score


def in_folder(source: Split, folder: Path) -> list[Path]:
    """The files of a split in a copy of its repository; none where the split is not there, or not whole."""
    card = folder / CARD
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet")]
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    return [folder / name for name in split_files(source, names, text)]


def checksums(root: Path) -> dict[str, str]:
    """The SHA-256 of the files of a mirror, by their names under its root, as its `SHA256SUMS` lists them."""
    path = root / CHECKSUMS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def find(source: Split, root: Path | None) -> list[Path]:
    """The files of a split that are on this machine.

    Args:
        root: A mirror, laid out as `owner/name/…`; None: the Hugging Face cache.
    """
    if root is not None:
        return in_folder(source, root / source.repository)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return in_folder(source, Path(snapshot_download(source.repository, repo_type="dataset", local_files_only=True)))
    except LocalEntryNotFoundError:
        return []


def obtain(source: Split, root: Path | None) -> list[Path]:
    """The files of a split, downloaded into the Hugging Face cache where there is no mirror and they are not here.

    Raises:
        PmodError: they cannot be had.
    """
    files = find(source, root)
    if not files and root is None:
        download([source])
        files = find(source, root)
    if not files:
        raise PmodError(f"{source}: not in {root or 'the Hugging Face cache'}", code=RUN_FAILED)
    return files


def download(sources: Sequence[Split], folder: Path | None = None) -> tuple[str, dict[str, str]]:
    """Fetch the splits of one repository and its card; what is there already stays.

    Args:
        folder: Where to; None: the Hugging Face cache.

    Returns:
        Commit of the data set, and the SHA-256 that the hub has of each large file.

    Raises:
        PmodError: the hub has no such split. Whatever the hub's client raises where there is no network.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    repository = sources[0].repository
    info = HfApi().dataset_info(repository, files_metadata=True)
    names = [sibling.rfilename for sibling in info.siblings]
    where = {"repo_type": "dataset", "revision": info.sha, "local_dir": folder}
    text = Path(hf_hub_download(repository, CARD, **where)).read_text(encoding="utf-8") if CARD in names else None
    wanted: list[str] = []
    for source in sources:
        files = split_files(source, names, text)
        if not files:
            raise PmodError(f"{source}: the hub's repository has no parquet files of this split", code=RUN_FAILED)
        wanted += files
    snapshot_download(repository, allow_patterns=[CARD, *wanted], **where)
    digests = {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings if sibling.lfs is not None}
    return info.sha, {name: digests[name] for name in wanted if name in digests}


def _declared(source: Split, card: str) -> list[str]:
    """The patterns of a card's `configs`, for the configuration and split."""
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return []
    patterns: list[str] = []
    for config in (header or {}).get("configs") or []:
        if config.get("config_name") != (source.configuration or "default"):
            continue
        for part in config.get("data_files") or []:
            if isinstance(part, dict) and part.get("split") == source.split:
                paths = part.get("path") or []
                patterns += [paths] if isinstance(paths, str) else paths
    return patterns


def _usual(source: Split) -> list[str]:
    folders = [source.configuration] if source.configuration else ["data", "default"]
    patterns = [
        pattern for folder in folders for pattern in (f"{folder}/{source.split}-*", f"{folder}/{source.split}/*")
    ]
    return patterns if source.configuration else [*patterns, f"{source.split}-*"]
