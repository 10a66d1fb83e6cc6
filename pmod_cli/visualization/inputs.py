"""What is looked at: pictures, folders, LLaVA JSON files and saved selections; and where the new pictures go."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pmod_cli.core import json_text
from pmod_cli.core.errors import BAD_INPUT, PmodError
from pmod_cli.core.folders import check_writable
from pmod_cli.core.images import load_image, pictures_in
from pmod_cli.data.conversation import BadRow
from pmod_cli.data.pictures import inside
from pmod_cli.visualization.archive import check_regions
from pmod_cli.visualization.page import check_format

Region = tuple[float, float, float, float]
ROWS = (".json", ".jsonl")
SAVED = ".npz"
LONGEST_STEM = 220  # bytes


@dataclass(frozen=True)
class Item:
    """One picture to draw.

    Attributes:
        path: an image, or a saved selection (`.npz`).
        name: what its outputs are called; each name once.
        question: of the row it came from, None elsewhere.
        regions: pixel boxes of the row.
    """

    path: Path
    name: str
    question: str | None = None
    regions: tuple[Region, ...] = ()

    @property
    def is_saved(self) -> bool:
        """Whether it is a selection that was saved, not a picture."""
        return self.path.suffix.lower() == SAVED


def find_items(paths: Sequence[Path], image_folder: Path | None = None) -> list[Item]:
    """The pictures that `paths` name, in order; a folder's own pictures by name, a JSON file's rows in its order.

    Args:
        image_folder: where the rows' image files are; by default beside the JSON file.

    Raises:
        PmodError: a path that is not there, a folder or JSON file without pictures, a row that cannot be read.
    """
    items = [item for path in paths for item in _expand(path, image_folder)]
    return list(_named_apart(items))


def check_pictures(items: Sequence[Item]) -> dict[Path, PmodError]:
    """Decode every image once, before anything is started.

    Returns:
        The errors of those that cannot be read, by path.

    Raises:
        PmodError: None can be read.
    """
    faults = {}
    for path in dict.fromkeys(item.path for item in items if not item.is_saved):
        try:
            load_image(path)
        except PmodError as error:
            faults[path] = error
    if faults and all(item.path in faults for item in items):
        raise summed_up(faults, BAD_INPUT)
    return faults


def summed_up(faults: dict[Path, PmodError], code: int) -> PmodError:
    """One error for all pictures that cannot be read; up to ten are named."""
    first, *others = faults.values()
    if not others:
        return PmodError(first.what, hint=first.hint, code=code)
    told = "; ".join(fault.what for fault in [first, *others][:10])
    return PmodError(
        f"{len(faults)} pictures cannot be read: {told}", hint="remove them, or name the others", code=code
    )


def short_name(name: str) -> str:
    """The name, cut so that a number and an ending behind it still make a file name."""
    while len(os.fsencode(name)) > LONGEST_STEM:
        name = name[:-1]
    return name


def _expand(path: Path, image_folder: Path | None) -> Iterator[Item]:
    if path.is_dir():
        yield from (Item(child, short_name(child.stem)) for child in pictures_in(path))
    elif path.suffix.lower() in ROWS and path.is_file():
        yield from _rows(path, image_folder or path.parent)
    else:
        yield Item(path, short_name(path.stem))


def _rows(path: Path, image_folder: Path) -> Iterator[Item]:
    """Rows with an image: `{"image": FILE, "conversations": [{"from": "human", "value": TEXT}, …], "boxes": [[…]]}`."""
    found = False
    for number, row in _read_rows(path):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise PmodError(f"{where}: expected an object, found {type(row).__name__}")
        image = row.get("image")
        if image is None:  # a row of text alone
            continue
        if not isinstance(image, str):
            raise PmodError(f"{where}: `image` is expected to be one file name, found {json.dumps(image)[:60]}")
        found = True
        try:
            file = inside(image, image_folder)
        except BadRow as error:
            raise PmodError(f"{where}: {error.what}", hint="`image_folder` names the folder of the images") from None
        yield Item(file, short_name(file.stem), _question(row, where), _regions(row, where))
    if not found:
        raise PmodError(f"{path}: no row has an image", hint='a row is {"image": "a.png", "conversations": [...]}')


def _read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix.lower() == ".jsonl":
        return enumerate(json_text.read_lines(path))
    try:
        rows = json_text.loads(path.read_bytes())
    except ValueError as error:  # json's, or a byte that is no UTF-8
        raise PmodError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise PmodError(f"{path}: expected a list of rows, found {type(rows).__name__}")
    return enumerate(rows)


def _question(row: dict, where: str) -> str | None:
    """The first human turn. A mark in front of the text is where images stand anyway; elsewhere it is kept."""
    turns = row.get("conversations") or []
    try:
        text = next((turn["value"] for turn in turns if turn["from"] in ("human", "user")), None)
        return text and text.strip().removeprefix("<image>").strip()
    except (TypeError, KeyError, AttributeError) as error:
        raise PmodError(f'{where}: a turn is {{"from": "human" or "gpt", "value": TEXT}}') from error


def _regions(row: dict, where: str) -> tuple[Region, ...]:
    try:
        return check_regions(row.get("boxes") or [])
    except ValueError as error:
        raise PmodError(
            f"{where}: `boxes` is expected to be a list of [x0, y0, x1, y1] in pixels of the image, x0 < x1 and "
            f"y0 < y1; found {error}"
        ) from error


def _named_apart(items: Sequence[Item]) -> Iterator[Item]:
    """Pictures of the same name, and several questions about one picture, get a number behind their name."""
    taken = {item.name for item in items}
    last: dict[str, int] = {}
    for item in items:
        number = last.get(item.name, 0) + 1
        while number > 1 and f"{item.name}-{number}" in taken:
            number += 1
        last[item.name] = number
        name = item.name if number == 1 else f"{item.name}-{number}"
        taken.add(name)
        yield replace(item, name=name)


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
    check_writable(target.parent)
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
    check_writable(folder)
    return _checked([folder / f"{item.name}-pmod.{ending}" for item in items], items, beside)


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
