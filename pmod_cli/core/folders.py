"""Folders that this program writes. One rule for all commands: a folder is replaced only

- if this program wrote all that is in it, which a marker file in it says,
- if nothing in it is read by the run that replaces it,
- by a successor that is whole, in one exchange of names, while a lock is held that all commands share.

Beside a folder `x` there may be, for as long as it takes: `.x.lock`, held while one process writes; `.x.staging`, the
successor in the making, or what is left of the folder it has replaced; and, where the system cannot exchange two
names, `.x.replaced`, the old folder between two renames. A killed run may leave each of them. The next run for `x` goes
on with the successor or starts it anew, and removes the rest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pmod_cli import __version__
from pmod_cli.core.atomic import sync_folder, write_json
from pmod_cli.core.errors import PmodError
from pmod_cli.core.exchange import exchange
from pmod_cli.core.locks import Busy, locked

MARKER = ".pmod.json"
SUCCESSOR = ".pmod-successor"  # in a successor until the exchange: a staging folder without it is the old one
WRITERS = {"checkpoint": "pmod convert", "run": "pmod finetune", "evaluation": "pmod eval", "data": "pmod"}  # by kind
LOCK = ".lock"  # in a folder whose parent takes no new names, as that of a mounted disk; else beside it
_IGNORED = {MARKER, SUCCESSOR, LOCK, ".DS_Store"}


@contextmanager
def held(target: Path, *, wait: float | None = 0.0) -> Iterator[Path]:
    """Be the one writer of `target`, and bring it to order first if a run was killed while it replaced it.

    Args:
        target: A folder, there or not. Its parents are made.
        wait: Seconds to wait for another writer; None waits as long as it takes.

    Yields:
        The same without symlinks in it.

    Raises:
        PmodError: another run is writing it.
    """
    real = Path(os.path.realpath(target))
    real.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(_lock_of(real), wait=wait):
            _restore(real)
            yield real
    except Busy:
        raise PmodError(f"another run is writing {target}", hint="wait for it, or choose another folder") from None


def heal(target: Path) -> None:
    """For who only reads: where a run was killed between the two renames of a swap, put the old folder back."""
    real = Path(os.path.realpath(target))
    if not real.exists() and _beside(real, "replaced").is_dir():
        with suppress(PmodError, OSError), held(real, wait=2.0):
            pass


def mark(folder: Path, kind: str, names: Iterable[str] = ()) -> None:
    """Say that this program writes `folder`, and that entries of these names in it are its own too."""
    known = set(_names(folder) or ())
    names = sorted(known | set(names))
    write_json(folder / MARKER, {"schema_version": 1, "kind": kind, "made_by": f"pmod {__version__}", "names": names})


def kind_of(folder: Path) -> str | None:
    """The kind that the marker of a folder says; None where there is none."""
    found = _marker(folder)
    return found["kind"] if found else None


def check_replaceable(target: Path, kind: str, sources: Iterable[Path] = ()) -> None:
    """Refuse to replace a folder that is not ours to replace. Nothing is changed.

    Args:
        target: May be missing or empty; that is never refused.
        kind: What is to take its place: only a folder of the same kind is replaced.
        sources: Files and folders that the run reads.

    Raises:
        PmodError: it is no folder of that kind, holds something that this program did not write, or is read by the run.
    """
    if target.exists() and not target.is_dir():
        raise PmodError(f"{target} is a file", hint="choose a folder with --out")
    if os.path.ismount(target):
        raise PmodError(f"{target} is a disk of its own, which cannot be replaced", hint="choose a folder on it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    for source in sources:
        if (read := _inside(source, target)) is not None:
            raise PmodError(
                f"this run reads {read}, and {target} is what it would replace", hint="choose another folder with --out"
            )
    hint = "choose another folder with --out; if an older pmod wrote it, remove it yourself"
    if (found := kind_of(target)) is None:
        raise PmodError(f"{target} was not written by {WRITERS[kind]}: it lacks {MARKER}", hint=hint)
    if found != kind:
        raise PmodError(
            f"{target} was written by {WRITERS.get(found, found)}, not by {WRITERS[kind]}", hint="choose another folder"
        )
    if others := list(foreign(target)):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise PmodError(
            f"{target} holds what {WRITERS[kind]} did not write: {', '.join(others[:3])}{more}",
            hint="move that elsewhere, or choose another folder with --out",
        )


def foreign(folder: Path) -> Iterator[str]:
    """Names in a marked folder that this program did not write; folders with a marker of their own are looked into."""
    names = set(_names(folder) or ())
    for path in sorted(folder.iterdir()):
        if path.name in names | _IGNORED or _is_leftover(path, names):
            continue
        if path.is_dir() and not path.is_symlink() and kind_of(path) is not None:
            yield from (f"{path.name}/{name}" for name in foreign(path))
        else:
            yield path.name


def successor(target: Path, kind: str, *, fresh: bool = False) -> Path:
    """The folder that is to replace `target`, while it is `held`: new, or as a killed run of the same kind left it.

    Args:
        fresh: Throw away what a killed run left.

    Raises:
        PmodError: a run of another kind, which was killed, was to replace `target` too.
    """
    staging = staging_of(target)
    found = kind_of(staging)
    if found not in (None, kind):
        raise PmodError(
            f"{WRITERS.get(found, found)} was stopped while it made {target} anew, and has left {staging}",
            hint="repeat that command, or remove that folder",
        )
    if fresh or found is None:
        _remove(staging)
    if not staging.exists():
        staging.mkdir()
        (staging / SUCCESSOR).touch()
        mark(staging, kind)
    return staging


def staging_of(target: Path) -> Path:
    """Where the successor of `target` is made."""
    return _beside(Path(os.path.realpath(target)), "staging")


def replace(staging: Path, target: Path) -> None:
    """Put a whole successor in the place of `target`, and remove what was there. Both are `held`.

    Raises:
        PmodError: `target` may not be replaced, any more.
        OSError: the file system refuses. In both cases `target` is as it was, and the successor too.
    """
    settle(staging)
    check_replaceable(target, str(kind_of(staging)))
    old = _beside(target, "replaced")
    if not os.path.lexists(target):
        staging.rename(target)
    elif not exchange(staging, target):
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
    sync_folder(target.parent)
    _restore(target)


@contextmanager
def staged_directory(
    target: Path, kind: str, *, overwrite: bool = False, sources: Iterable[Path] = (), wait: bool = False
) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: Folder to write. Its parents are made.
        kind: What it will be, one of `WRITERS`.
        overwrite: Replace an existing target.
        sources: What is read meanwhile; see `check_replaceable`.
        wait: Where another run is writing `target`, wait for its end, instead of refusing.

    Raises:
        PmodError: `target` exists and may not be replaced, or another run is writing it and `wait` is false.
    """
    with held(target, wait=None if wait else 0.0) as real:
        refuse_existing(target, overwrite)
        check_replaceable(target, kind, sources)
        staging = successor(real, kind, fresh=True)
        try:
            yield staging
            mark(staging, kind, [path.name for path in staging.iterdir()])
            replace(staging, real)
        except BaseException:
            if (staging / SUCCESSOR).exists():  # it has not become the target
                _remove(staging)
            raise


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raises PmodError where `target` exists and `overwrite` is false."""
    if target.exists() and not overwrite:
        raise PmodError(f"{target} exists", hint="replace it with --overwrite, or choose another folder with --out")


def _restore(target: Path) -> None:
    """After a swap, or one that was killed at any moment: the target in its place, and nothing of an old one left."""
    staging, old = _beside(target, "staging"), _beside(target, "replaced")
    in_the_making = (staging / SUCCESSOR).exists()
    if old.exists():
        if not os.path.lexists(target):
            old.rename(target)
        elif not in_the_making:
            _remove(old)
    with suppress(NotADirectoryError):
        (target / SUCCESSOR).unlink(missing_ok=True)
    if staging.exists() and not in_the_making:
        _remove(staging)


def _remove(folder: Path) -> None:
    """Remove a folder of ours, its marks last, so that one who is killed here leaves what is still known as ours.

    Raises:
        PmodError: it is not ours, though its name says so.
    """
    if not folder.exists():
        return
    marks = (MARKER, SUCCESSOR)
    if kind_of(folder) is None and not all(path.name in marks or _is_leftover(path) for path in folder.iterdir()):
        raise PmodError(f"{folder} is in the way: it lacks {MARKER}, so it is not of pmod", hint="move it elsewhere")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in marks:
            path.unlink()
    shutil.rmtree(folder)


def settle(folder: Path) -> None:
    """Bring to the disk what was written to a marked folder, with the access that new files have here: safetensors lets
    only the owner read. A file with a second name was there before and is left alone."""
    usual = (folder / MARKER).stat().st_mode & 0o777
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.is_symlink() or path.stat().st_nlink > 1:
                continue
            if path.stat().st_mode & 0o777 == 0o600 != usual:
                path.chmod(usual)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def _inside(source: Path, target: Path) -> Path | None:
    """What of a source lies in `target` or is it, by the real paths of the source and of the files it links to."""
    links = [path for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
    for path in (source, *links):
        real = Path(os.path.realpath(path))
        if any(folder.exists() and folder.samefile(target) for folder in (real, *real.parents)):
            return path
    return None


def _is_leftover(path: Path, names: Iterable[str] = ()) -> bool:
    """Whether this is the temporary name or the lock of something of ours, which a killed run has left."""
    of, _, ending = path.name[1:].rpartition(".")
    if not path.name.startswith(".") or ending not in ("tmp", "lock"):
        return False
    return of == MARKER or of in names or kind_of(path.with_name(of)) is not None


def _marker(folder: Path) -> dict | None:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return found if isinstance(found["kind"], str) and isinstance(found["names"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _names(folder: Path) -> list[str] | None:
    found = _marker(folder)
    return found and found["names"]


def _lock_of(target: Path) -> Path:
    inside = target.is_dir() and not os.access(target.parent, os.W_OK)
    return target / LOCK if inside else _beside(target, "lock")


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")
