"""Where the pictures go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmod_cli.errors import PmodError
from pmod_cli.visualization.inputs import Item
from pmod_cli.visualization.page import check_format


def one_target(item: Item, out: Path | None, ending: str) -> list[Path]:
    """The picture of a single item: `out`, or `NAME-pmod.ENDING` here. Nothing is made yet.

    Raises:
        PmodError: it cannot be written there, or would replace what it is made from.
    """
    target = out or Path(f"{item.name}-pmod.{ending}")
    if not target.parent.is_dir():
        raise PmodError(f"{target}: there is no folder {target.parent}", hint=f"mkdir -p {target.parent}")
    return _checked([target], [item])


def folder_targets(items: Sequence[Item], folder: Path, ending: str) -> list[Path]:
    """A picture for each item in one folder, which need not be there yet.

    Raises:
        PmodError: the folder is a file, or a picture would replace what it is made from.
    """
    if folder.is_file() or folder.suffix.lower() in (".png", ".svg"):
        raise PmodError(f"{folder} is a file, expected a folder for {len(items)} pictures", hint="--out FOLDER")
    return _checked([folder / f"{item.name}-pmod.{ending}" for item in items], items)


def _checked(targets: list[Path], items: Sequence[Item]) -> list[Path]:
    sources = {item.path.resolve() for item in items}
    for target in targets:
        check_format(target)
        if target.is_dir():
            raise PmodError(f"{target} is a folder, expected a file to write", hint=f"-o {target / 'picture.png'}")
        for written in (target, target.with_suffix(".npz"), target.with_suffix(".html")):
            if written.resolve() in sources:
                raise PmodError(
                    f"{written} is the picture to look at, and would be replaced", hint="choose another with --out"
                )
    return targets
