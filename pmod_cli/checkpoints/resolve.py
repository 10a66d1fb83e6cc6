"""One resolver for every command: a local folder, else an alias, else a repository on the hub.

What is in the Hugging Face cache is taken from there without asking the hub.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.aliases import ALIASES, alias_of, bundled_path
from pmod_cli.checkpoints.files import missing_files
from pmod_cli.core.errors import PmodError, first_line, is_network_error
from pmod_cli.core.folders import heal
from pmod_cli.core.paths import expanded

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PICKLED_PATTERNS = ["*.json", "*.bin", "*.model", "*.txt", "*.jinja"]  # of repositories without safetensors
PATIENCE = 2.0  # seconds to the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says more: the network may be dead


@dataclass(frozen=True)
class Resolved:
    """Where a checkpoint is.

    Attributes:
        path: Folder with config.json.
        name: What the user typed.
        origin: `folder`, `bundled`, `cache` or `hub`.
        alias: Alias that `name` is, if any.
        repo: Repository on the hub, if it came from one.
        commit: Commit of that repository.
    """

    path: Path
    name: str
    origin: str
    alias: str | None = None
    repo: str | None = None
    commit: str | None = None


def resolve(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    weights: bool = True,
    cache_dir: Path | None = None,
) -> Resolved:
    """Find the files of a model, downloading them where they are not on this machine.

    Args:
        name: Folder, alias, `org/name` or `org/name@revision`.
        revision: Branch, tag or commit on the hub.
        offline: Do not use the network; HF_HUB_OFFLINE=1 says the same.
        weights: Also require the weights; False is satisfied by the configuration.
        cache_dir: Hugging Face cache, instead of the one that HF_HOME sets.

    Raises:
        PmodError: there is no such folder, alias or repository, it is neither cached nor reachable, or it is none that
            has revisions and one was given.
    """
    folder = expanded(name)
    heal(folder)
    if folder.is_dir():
        _refuse_revision(revision, f"{name} is a folder")
        _require_complete(folder, name, weights)
        return Resolved(folder, name, "folder")
    if folder.is_file():
        whole = (folder.parent / "config.json").is_file()
        raise PmodError(
            f"{name} is a file, and a checkpoint is a folder with config.json and its weights",
            hint=f"name the folder that holds it: {folder.parent}" if whole else "name the folder of a checkpoint",
        )
    if page := re.fullmatch(r"https?://[^/]+/([^/]+/[^/]+?)(?:/tree/([^/]+))?/?", name):
        known = "@".join(part for part in page.groups() if part)
        raise PmodError(f"{name} is the address of a page", hint=f"name the model as the hub does: {known}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise PmodError(f"there is no folder {name}", hint="pmod convert --list shows the names that are known")
    base, _, suffix = name.partition("@")
    if suffix and revision:
        raise PmodError(f"two revisions: {suffix!r} in the name and {revision!r} in `revision`; give one")
    base = alias_of(base)
    alias = ALIASES.get(base)
    if alias is None and "/" not in base:
        raise _unknown(name)
    if alias is not None and alias.repo is None:
        _refuse_revision(suffix or revision, f"{base} is part of this program")
        return Resolved(bundled_path(base), name, "bundled", alias=base)
    repo = alias.repo if alias and alias.repo else base
    path, origin = _from_hub(repo, suffix or revision, name, offline, weights, cache_dir)
    return Resolved(path, name, origin, alias=base if alias else None, repo=repo, commit=path.name)


def find_here(name: str) -> Resolved | None:
    """As `resolve`, but nothing is fetched: None where the hub would be asked for the model.

    Raises:
        PmodError: as `resolve`, which offline includes a model that is not in the cache.
    """
    from huggingface_hub import constants

    base, _, revision = name.partition("@")
    base = alias_of(base)
    repo = (ALIASES[base].repo or "") if base in ALIASES else base
    may_be_on_hub = repo.count("/") == 1 and not name.startswith((".", "/", "~"))
    if may_be_on_hub and not expanded(name).exists() and not constants.HF_HUB_OFFLINE:
        cached = _cached(repo, revision or None, None)
        if cached is None or missing_files(cached):
            return None
    return resolve(name)


def _refuse_revision(revision: str | None, found: str) -> None:
    if revision:
        raise PmodError(f"{found}, and has no revision {revision!r}", hint="leave `revision` out, or name a hub id")


def _require_complete(folder: Path, name: str, weights: bool) -> None:
    missing = missing_files(folder, weights=weights)
    if missing:
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise PmodError(
            f"the folder {name} lacks {', '.join(missing)}; it holds {', '.join(found) or 'nothing'}",
            hint="name a folder that holds a checkpoint: config.json and its weights",
        )


def _unknown(name: str) -> PmodError:
    near = difflib.get_close_matches(name, ALIASES, n=3, cutoff=0)
    local = sorted(str(path.parent) for path in Path("checkpoints").glob("*/config.json"))
    found = f"; checkpoints here: {', '.join(local)}" if local else ""
    return PmodError(
        f"{name!r} is no folder and no alias. Near: {', '.join(near)}{found}",
        hint="pmod convert --list, or give a hub id as org/name",
    )


def _from_hub(
    repo: str, revision: str | None, name: str, offline: bool, weights: bool, cache_dir: Path | None
) -> tuple[Path, str]:
    """(snapshot folder, "cache" or "hub")."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cached = _cached(repo, revision, cache_dir)
    missing = missing_files(cached, weights=weights) if cached else ["all of it"]
    if cached and not missing:
        return cached, "cache"

    def unavailable(why: str) -> PmodError:
        known = name if name.startswith(repo) else f"{name} ({repo})"
        cache, fetch = cache_dir or constants.HF_HUB_CACHE, f"hf download {repo}"
        fetch += f" --revision {revision}" if revision else ""
        return PmodError(
            f"{known} is not in the Hugging Face cache {cache} (missing: {', '.join(missing)}), and {why}.",
            hint=f"Fetch it once where there is a network with `{fetch}`, or give the folder that holds it.",
        )

    if offline or constants.HF_HUB_OFFLINE:
        raise unavailable("offline mode is on")
    try:
        info = ask_hub(lambda: HfApi().model_info(repo, revision=revision))
    except HfHubHTTPError:
        raise  # the hub answered: gated, unknown, not allowed
    except Exception as error:
        if not is_network_error(error) and not isinstance(error, (OSError, RuntimeError)):
            raise
        raise unavailable(f"the hub at {constants.ENDPOINT} does not answer: {first_line(error)}") from error
    # By the name of the revision: asked for by its commit, the cache would not know next time what the name stands for.
    place = {"repo_id": repo, "revision": revision, "cache_dir": cache_dir}
    hf_hub_download(filename="config.json", **place)  # small, and says early whether this is a model for us
    safe = any(file.rfilename.endswith(".safetensors") for file in info.siblings or ())
    patterns = (PATTERNS if safe else PICKLED_PATTERNS) if weights else ["*.json"]
    return Path(snapshot_download(allow_patterns=patterns, **place)), "hub"


def _cached(repo: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise PmodError(f"{repo!r} cannot be a repository: {first_line(error)}") from error


def ask_hub(call: Callable[[], Any]) -> Any:
    """The result of `call`, the first question to the hub: whether it answers at all.

    In a thread of its own, since the look-up of a host name knows no timeout.

    Raises:
        TimeoutError: there was no answer within HF_HUB_ETAG_TIMEOUT seconds, or `PATIENCE` where the user has not set
            it; `call` is left behind and does not keep the program alive.
    """
    from huggingface_hub import constants

    given = os.environ.get("HF_HUB_ETAG_TIMEOUT")
    seconds = constants.HF_HUB_ETAG_TIMEOUT if given else PATIENCE
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s (HF_HUB_ETAG_TIMEOUT={5 * seconds:g} waits longer)")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
