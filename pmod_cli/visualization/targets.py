"""Where the pictures go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.inputs import Item
from pmod_cli.visualization.page import check_format


def one_target(item: Item, out: Path | None, ending: str, beside: Sequence[str] = ()) -> list[Path]:
    """The picture of a single item: `out`, or `NAME-pmod.ENDING` here. Nothing is made yet.

    Args:
        beside: endings of what is written beside it.

    Raises:
        PmodError: it cannot be written there, or would replace what it is made from.
    """
    target = out or Path(f"{item.name}-pmod.{ending}")
    if not target.parent.is_dir():
        raise PmodError(f"{target}: there is no folder {target.parent}", hint=f"mkdir -p {target.parent}")
    _check_writable(target.parent)
    return _checked([target], [item], beside)


def folder_targets(items: Sequence[Item], folder: Path, ending: str, beside: Sequence[str] = ()) -> list[Path]:
    """A picture for each item in one folder, which need not be there yet.

    Args:
        beside: endings of what is written beside each.

    Raises:
        PmodError: the folder is a file, or a picture would replace what it is made from.
    """
    if folder.is_file() or folder.suffix.lower() in (".png", ".svg"):
        raise PmodError(f"{folder} is a file, expected a folder for {len(items)} pictures", hint="`out=FOLDER`")
    _check_writable(next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir()))
    return _checked([folder / f"{item.name}-pmod.{ending}" for item in items], items, beside)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        raise PmodError(f"{folder}: nothing can be written into this folder", hint="choose another with `out`")


def _checked(targets: list[Path], items: Sequence[Item], beside: Sequence[str]) -> list[Path]:
    sources = {item.path.resolve() for item in items}
    for target in targets:
        check_format(target)
        for written in (target, *(target.with_suffix(ending) for ending in beside)):
            if written.is_dir():
                raise PmodError(f"{written} is a folder, expected a file to write", hint="choose another with `out`")
            if written.resolve() in sources:
                raise PmodError(
                    f"{written} is the picture to look at, and would be replaced", hint="choose another with `out`"
                )
    return targets
