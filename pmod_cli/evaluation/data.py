"""The data sets of the benchmarks: their files in a mirror, the Hugging Face cache or the hub; making a mirror."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from pmod_cli.checkpoints.resolve import ask_hub
from pmod_cli.core.atomic import write_text
from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.core.text import disk_size
from pmod_cli.evaluation.benchmarks import BENCHMARKS, Benchmark, Split

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
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    return [folder / name for name in split_files(source, names, text)]


def checksums(root: Path) -> dict[str, str]:
    """The SHA-256 of the files of a mirror, by their names under its root, as its `SHA256SUMS` lists them."""
    path = root / CHECKSUMS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
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
    # No commit: asked for by one, the cache would not know next time which one is the newest, which `find` asks.
    where = {"repo_type": "dataset", "local_dir": folder}
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
    """The patterns of a card's `configs` for the configuration and split; none where the card has another form."""
    match = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return []
    patterns: list[str] = []
    for config in _mappings(header.get("configs") if isinstance(header, dict) else None):
        if config.get("config_name") != (source.configuration or "default"):
            continue
        for part in _mappings(config.get("data_files")):
            if part.get("split") == source.split:
                paths = part.get("path")
                patterns += [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
    return patterns


def _mappings(value: Any) -> list[dict]:
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def _usual(source: Split) -> list[str]:
    folders = [source.configuration] if source.configuration else ["data", "default"]
    patterns = [f"{folder}/{source.split}{mark}*" for folder in folders for mark in "-/"]
    return patterns if source.configuration else [*patterns, f"{source.split}-*"]


def require_data(benchmarks: Iterable[Benchmark], data_root: Path | None = None) -> None:
    """Check that the data of the paper's benchmarks is here or can be fetched when its turn comes.

    Nothing is downloaded but lists of files. A task that was passed through is checked when it runs.

    Args:
        data_root: A mirror. Where it is given, nothing else is looked at, neither the cache nor the hub.

    Raises:
        PmodError: one sentence with all that is missing, its size, and how to get it.
    """
    benchmarks = list(benchmarks)
    if data_root is not None and not data_root.is_dir():
        fetched = [benchmark for benchmark in benchmarks if benchmark.data]  # --fetch-data refuses the others
        hint = _fetch_command(fetched, data_root) if fetched else None
        raise PmodError(f"`data_root={data_root}`: no such folder", hint=hint)
    missing = {
        source: benchmark for benchmark in benchmarks for source in benchmark.data if not find(source, data_root)
    }
    if missing and data_root is None:
        missing = _not_on_hub(missing)
    if not missing:
        return
    lacking = list(dict.fromkeys(missing.values()))
    titles = ", ".join(benchmark.title for benchmark in lacking)
    listed = ", ".join(f"{source} ({disk_size(1e6 * (source.megabytes or 0))})" for source in missing)
    total = disk_size(1e6 * sum(source.megabytes or 0 for source in missing))
    place = "on this machine, nor can the hub be reached" if data_root is None else f"whole in {data_root}"
    raise PmodError(
        f"the data of {titles} is not {place}: {listed}; {total} in all",
        hint=f"where there is a network: {_fetch_command(lacking, data_root)}"
        + ("; then copy DIR here: pmod eval --data-root DIR" if data_root is None else f"; then copy {data_root} here")
        + ". `pmod eval --tasks tiny` needs no data",
    )


def fetch(
    benchmarks: Iterable[Benchmark], data_root: Path, on_progress: Callable[[str], None] | None = None
) -> list[str]:
    """Make or extend a mirror; what is there already is checked and kept, what was interrupted goes on.

    The checksums of all its files are written to `SHA256SUMS` in its root; those of the hub are compared first.

    Args:
        on_progress: Called with a line about each data set before it is fetched.

    Returns:
        The files of the mirror that the benchmarks read.

    Raises:
        PmodError: no network, no space, or a file that arrived damaged.
    """
    from huggingface_hub import constants

    benchmarks = list(benchmarks)
    if others := [benchmark.name for benchmark in benchmarks if not benchmark.data and not benchmark.drawn]:
        raise PmodError(
            f"`fetch_data` knows the data of the paper's benchmarks, not that of {', '.join(others)}",
            hint="hf download REPOSITORY --repo-type dataset --local-dir DIR/REPOSITORY",
        )
    repositories: dict[str, list[Split]] = {}
    for source in dict.fromkeys(source for benchmark in benchmarks for source in benchmark.data):
        repositories.setdefault(source.repository, []).append(source)
    if constants.HF_HUB_OFFLINE:
        raise PmodError("`fetch_data` needs a network, and `offline=True` or HF_HUB_OFFLINE forbids it")
    data_root.mkdir(parents=True, exist_ok=True)
    _require_space([source for sources in repositories.values() for source in sources], data_root)
    fetched: list[str] = []
    for repository, sources in repositories.items():
        if on_progress is not None:
            on_progress(f"{repository}: {disk_size(1e6 * sum(source.megabytes or 0 for source in sources))}")
        _, digests = download(sources, data_root / repository)
        files = sorted({file for source in sources for file in find(source, data_root)})
        sums = {file.relative_to(data_root).as_posix(): _sha256(file) for file in files}
        for name, expected in digests.items():
            if sums[f"{repository}/{name}"] != expected:
                raise PmodError(
                    f"{data_root / repository / name}: its SHA-256 is not the hub's {expected}",
                    hint="delete the file and repeat the command",
                    code=RUN_FAILED,
                )
        listed = sorted((checksums(data_root) | sums).items())
        write_text(data_root / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in listed))
        fetched += sums
    return fetched


def listing(benchmarks: Iterable[Benchmark] | None = None, data_root: Path | None = None) -> list[dict[str, Any]]:
    """One row per benchmark, by default all: what is asked, of which data, scored how, and is the data here?"""
    return [
        {
            "name": benchmark.name,
            "title": benchmark.title,
            "group": benchmark.group,
            "task": benchmark.task,
            "data": list(dict.fromkeys(source.repository for source in benchmark.data)),
            "split": list(dict.fromkeys(source.split for source in benchmark.data)),
            "rows": benchmark.rows,
            "megabytes": sum(source.megabytes or 0 for source in benchmark.data),
            "metric": benchmark.metric,
            # Of data that lmms-eval fetches by itself nothing is known.
            "here": all(find(source, data_root) for source in benchmark.data)
            if benchmark.data or benchmark.drawn
            else None,
        }
        for benchmark in (BENCHMARKS.values() if benchmarks is None else benchmarks)
    ]


def _not_on_hub(missing: dict[Split, Benchmark]) -> dict[Split, Benchmark]:
    """What the hub has not either. Where it is silent, only the cache counts from now on: no minutes of retries."""
    import datasets
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return missing
    try:
        ask_hub(lambda: get_session().head(constants.ENDPOINT))
    except Exception:  # whichever way a network can fail
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return missing
    absent = set()
    for repository in dict.fromkeys(source.repository for source in missing):
        try:
            HfApi().dataset_info(repository)
        except HfHubHTTPError:
            absent.add(repository)
    return {source: benchmark for source, benchmark in missing.items() if source.repository in absent}


def _fetch_command(benchmarks: Iterable[Benchmark], data_root: Path | None) -> str:
    names = ",".join(benchmark.name for benchmark in benchmarks)
    return f"pmod eval --fetch-data {names} --data-root {quote(str(data_root or 'DIR'))}"


def _require_space(sources: Iterable[Split], data_root: Path) -> None:
    needed = 1e6 * sum(source.megabytes or 0 for source in sources if not find(source, data_root))
    free = shutil.disk_usage(data_root).free
    if needed > free:
        raise PmodError(
            f"{data_root} has {disk_size(free)} free, the data takes {disk_size(needed)}",
            hint="free some space, choose another `data_root`, or fetch fewer tasks",
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
