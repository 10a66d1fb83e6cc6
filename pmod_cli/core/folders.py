"""Folders that this program writes, by one rule for all commands.

A folder is replaced only

- if this program wrote all that is in it, which a marker file in it says (see `markers`),
- if nothing in it is read by the run that replaces it,
- by a successor that is whole, in one exchange of names, while a lock is held that all commands share.

Beside a folder `x` there may be, for as long as it takes: `.x.lock`, held while one process writes; `.x.staging`, the
successor in the making, or what is left of the folder it has replaced; and, where the system cannot exchange two
names, `.x.replaced`, the old folder between two renames. A killed run may leave each of them. The next run for `x` goes
on with the successor or starts it anew, and removes the rest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Self

from pmod_cli.core.atomic import Busy, exchange, locked, sync
from pmod_cli.core.errors import PmodError
from pmod_cli.core.markers import (
    LOCK,
    MARKER,
    SUCCESSOR,
    WRITERS,
    foreign,
    is_leftover,
    is_new,
    kind_of,
    mark,
    require_kind,
)


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
    real = real_path(target)
    real.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(_lock_of(real), wait=wait):
            _restore(real)
            yield real
    except Busy:
        raise PmodError(f"another run is writing {target}", hint="wait for it, or choose another folder") from None


def heal(target: Path) -> None:
    """For who only reads: where a run was killed between the two renames of a swap, put the old folder back."""
    real = real_path(target)
    if not real.exists() and _beside(real, "replaced").is_dir():
        with suppress(PmodError, OSError), held(real, wait=2.0):
            pass


def take(target: Path, kind: str, names: Iterable[str] = ()) -> None:
    """Make `target`, which is `held`, a folder that is written in place: new, empty, or of this kind already.

    Args:
        names: What the run will write there, as `mark` takes it.

    Raises:
        PmodError: it is another kind of folder.
    """
    if not is_new(target):
        require_kind(target, kind)
    target.mkdir(exist_ok=True)
    mark(target, kind, names)


def check_replaceable(target: Path, kind: str, sources: Iterable[Path] = ()) -> None:
    """Refuse to replace a folder that is not ours to replace. Nothing is changed.

    Args:
        target: May be missing or empty; that is never refused.
        kind: What is to take its place: only a folder of the same kind is replaced.
        sources: Files and folders that the run reads.

    Raises:
        PmodError: it is no folder of that kind, holds something that this program did not write, or is read by the run.
    """
    if os.path.ismount(target):
        raise PmodError(f"{target} is a disk of its own, which cannot be replaced", hint="choose a folder on it")
    if is_new(target):
        return
    for source in sources:
        if (read := _inside(source, target)) is not None:
            raise PmodError(
                f"this run reads {read}, and {target} is what it would replace", hint="choose another folder with `out`"
            )
    require_kind(target, kind)
    if others := list(foreign(target)):
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise PmodError(
            f"{target} holds what {WRITERS[kind]} did not write: {', '.join(others[:3])}{more}",
            hint="move that elsewhere, or choose another folder with `out`",
        )


def check_writable(target: Path) -> None:
    """Refuse a folder that cannot be made or written. Nothing is changed.

    Raises:
        PmodError: a file is in its way, or nothing can be written there.
    """
    above = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise PmodError(f"{target} cannot be made: {above} is a file", hint="choose another `out`")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PmodError(f"nothing can be written into {above}", hint="choose another `out`")


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
        discard(staging)
    if not staging.exists():
        staging.mkdir()
        (staging / SUCCESSOR).touch()
        mark(staging, kind)
    return staging


def replace(staging: Path, target: Path) -> None:
    """Put a whole successor in the place of `target`, and remove what was there. Both are `held`.

    Raises:
        PmodError: `target` may not be replaced, any more.
        OSError: the file system refuses. In both cases `target` is as it was, and the successor too.
    """
    settle(staging, like=staging / MARKER)
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
    sync(target.parent)
    _restore(target)


def discard(folder: Path) -> None:
    """Remove a folder of ours, its marks last, so that one who is killed here leaves what is still known as ours.

    Raises:
        PmodError: it is not ours, though its name says so.
    """
    if not folder.exists():
        return
    marks = (MARKER, SUCCESSOR)
    if kind_of(folder) is None and not all(path.name in marks or is_leftover(path) for path in folder.iterdir()):
        raise PmodError(f"{folder} is in the way: it lacks {MARKER}, so it is not of pmod", hint="move it elsewhere")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in marks:
            path.unlink()
    shutil.rmtree(folder)


class OutputFolder:
    """A context in which no other run writes to a folder that a run may go on in.

    Args:
        out: The folder.
        overwrite: Write a successor beside it, which takes its place when it is whole. One that was left by a run
            which was stopped may go on.

    Attributes:
        path: Where the run writes: the folder itself, or the successor.
        worth_keeping: Pattern of what a run can go on from: a successor without any goes when the run fails.
    """

    worth_keeping: ClassVar[str]

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out, self.overwrite = out, overwrite
        self.path = staging_of(out) if overwrite else out
        self._held = ExitStack()
        self._successor: Path | None = None  # once it is ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._held:
            if error and self._successor and not any(self._successor.glob(self.worth_keeping)):
                discard(self._successor)

    def hold(self) -> Path:
        """Be the one writer until the end of the context; see `held`."""
        return self._held.enter_context(held(self.out))

    def put_in_place(self) -> None:
        """Let a successor, which is whole, take the place of the folder."""
        if self._successor is not None:
            replace(self._successor, real_path(self.out))
            self._successor = None


@contextmanager
def staged_directory(
    target: Path, kind: str, *, overwrite: bool = False, sources: Iterable[Path] = (), wait: bool = False
) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        overwrite: Replace an existing target.
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
                discard(staging)
            raise


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raises PmodError where `target` exists and `overwrite` is false."""
    if target.exists() and not overwrite:
        raise PmodError(f"{target} exists", hint="replace it with `overwrite=True`, or choose another `out`")


def settle(folder: Path, like: Path) -> None:
    """Bring to the disk what was written to a folder.

    Where only the owner may read a file, as safetensors writes them, it gets the access of the file `like`. A file with
    a second name was there before and is left alone.
    """
    usual = like.stat().st_mode & 0o777
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.is_symlink() or path.stat().st_nlink > 1:
                continue
            if path.stat().st_mode & 0o777 == 0o600 != usual:
                path.chmod(usual)
            sync(path)
        sync(Path(parent))


def staging_of(target: Path) -> Path:
    """Where the successor of `target` is made."""
    return _beside(real_path(target), "staging")


def real_path(target: Path) -> Path:
    """Absolute and without symlinks in it; it need not be there."""
    return Path(os.path.realpath(target))


def _restore(target: Path) -> None:
    """After a swap, or one that was killed at any moment: the target in its place, and nothing of an old one left."""
    staging, old = _beside(target, "staging"), _beside(target, "replaced")
    in_the_making = (staging / SUCCESSOR).exists()
    if old.exists():
        if not os.path.lexists(target):
            old.rename(target)
        elif not in_the_making:
            discard(old)
    with suppress(NotADirectoryError):
        (target / SUCCESSOR).unlink(missing_ok=True)
    if staging.exists() and not in_the_making:
        discard(staging)


def _inside(source: Path, target: Path) -> Path | None:
    """What of a source lies in `target` or is it, by the real paths of the source and of the files it links to."""
    links = [path for path in source.iterdir() if path.is_symlink()] if source.is_dir() else []
    for path in (source, *links):
        real = real_path(path)
        if any(folder.exists() and folder.samefile(target) for folder in (real, *real.parents)):
            return path
    return None


def _lock_of(target: Path) -> Path:
    inside = target.is_dir() and not os.access(target.parent, os.W_OK)
    return target / LOCK if inside else _beside(target, "lock")


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")
