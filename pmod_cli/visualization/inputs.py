"""What is looked at: pictures, folders, LLaVA JSON files and saved selections; and where the new pictures go."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from pmod_cli.core import json_text
from pmod_cli.core.errors import BAD_INPUT, PmodError
from pmod_cli.core.folders import check_writable
from pmod_cli.core.images import load_image, pictures_in
from pmod_cli.core.videos import Frames, Video, load_video
from pmod_cli.data.conversation import IMAGE, MARKS, BadRow, from_messages, is_llava
from pmod_cli.data.pictures import inside
from pmod_cli.visualization.archive import check_regions
from pmod_cli.visualization.page import check_format

Region = tuple[float, float, float, float]
ROWS = (".json", ".jsonl")
SAVED = ".npz"
STATISTICS = "statistics.json"  # of a batch, beside its pictures
LONGEST_STEM = 220  # bytes
FILM_FRAMES, FILM_PER_SECOND = 8, 2.0


@dataclass(frozen=True)
class Item:
    """One picture to draw.

    Attributes:
        path: an image, or a saved selection (`.npz`).
        name: what its outputs are called; each name once.
        question: of the row it came from, None elsewhere.
        regions: pixel boxes of the row.
        together: all pictures of the prompt, this one among them; none where it is the only one.
        place: its place among them.
        is_film: whether it is a video: a file, or a folder of frames.
    """

    path: Path
    name: str
    question: str | None = None
    regions: tuple[Region, ...] = ()
    together: tuple[Path, ...] = ()
    place: int = 0
    is_film: bool = False

    @property
    def is_saved(self) -> bool:
        """Whether it is a selection that was saved, not a picture."""
        return self.path.suffix.lower() == SAVED

    def can_be_asked(self, faults: Container[Path | Item]) -> bool:
        """Whether none of the pictures that cannot be read is in its prompt, which needs all of its own."""
        return not any(path in faults for path in self.together or (self.path,))


def find_items(
    paths: Sequence[Path], image_folder: Path | None = None, *, together: bool = False, film: bool = False
) -> list[Item]:
    """The pictures that `paths` name, in order; a folder's own pictures by name, a JSON file's rows in its order.

    Args:
        image_folder: where the rows' image files are; by default beside the JSON file.
        together: all of them stand in one prompt.
        film: each path is a video, a file or a folder of its frames.

    Raises:
        PmodError: a path that is not there, a folder or JSON file without pictures, a row that cannot be read.
    """
    if film:
        items = [Item(path, short_name(path.stem), is_film=True) for path in paths]
    else:
        items = [item for path in paths for item in _expand(path, image_folder)]
    if together:
        if film or any(item.is_saved or item.question is not None for item in items):
            raise PmodError("`together` takes pictures, not films, rows or saved selections", hint="leave it out")
        files = tuple(item.path for item in items)
        items = [replace(item, together=files, place=place) for place, item in enumerate(items)]
    return list(_named_apart(items))


def check_pictures(items: Sequence[Item]) -> dict[Path | Item, PmodError]:
    """Decode every image once, before anything is started.

    Returns:
        The errors of those that cannot be read, by path.

    Raises:
        PmodError: None can be read.
    """
    faults: dict[Path | Item, PmodError] = {}
    for item in dict.fromkeys(items):
        if item.is_saved or item.path in faults:
            continue
        try:
            load_film(item.path) if item.is_film else load_image(item.path)
        except PmodError as error:
            faults[item.path] = error
    if faults and not any(item.can_be_asked(faults) for item in items):
        raise summed_up(faults, BAD_INPUT)
    return faults


def load_film(path: Path) -> Video:
    """A few frames of a video, at equal distances: what a strip has room for."""
    return load_video(path, Frames(per_second=FILM_PER_SECOND, most=FILM_FRAMES))


def summed_up(faults: dict[Path | Item, PmodError], code: int) -> PmodError:
    """One error for all pictures that cannot be drawn; up to ten reasons are told, each once."""
    first, *others = reasons = list({fault.what: fault for fault in faults.values()}.values())
    if not others:
        return PmodError(first.what, hint=first.hint, code=code)
    told = "; ".join(fault.what for fault in reasons[:10])
    return PmodError(
        f"{len(faults)} pictures cannot be drawn: {told}", hint="remove them, or name the others", code=code
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
    """Rows with pictures: `{"image": FILE, "conversations": [{"from": "human", "value": TEXT}, …], "boxes": [[…]]}`.

    `image` may be a list of files, which stand in one prompt, and `video` names a film. The other forms that
    `from_row` takes are read as well.
    """
    found = False
    for number, row in _read_rows(path):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise PmodError(f"{where}: expected an object, found {type(row).__name__}")
        try:
            if not is_llava(row):
                said = from_messages(row, answered=False)
                turns = [{"from": turn.role, "value": turn.text} for turn in said.turns]
                row |= {"image": [*said.images] or None, "video": [*said.videos] or None, "conversations": turns}
            pictures, films = (_named(row, key) for key in ("image", "video"))
            files = tuple(inside(name, image_folder) for name in pictures or films)
        except BadRow as error:
            hint = "images are named as they are below `image_folder`, and nothing is downloaded"
            raise PmodError(f"{where}: {error.what}", hint=hint) from None
        if pictures and films:
            raise PmodError(
                f"{where} has images and a video, which are not drawn from one prompt", hint="remove the row"
            )
        if not files:  # a row of text alone
            continue
        found = True
        question = _question(row, where, film=bool(films))
        if len(files) == 1:
            yield Item(files[0], short_name(files[0].stem), question, _regions(row, where), is_film=bool(films))
            continue
        for place, file in enumerate(files):
            yield Item(file, short_name(file.stem), question, together=files, place=place)
    if not found:
        raise PmodError(f"{path}: no row has an image", hint='a row is {"image": "a.png", "conversations": [...]}')


def _named(row: dict, key: str) -> list[str]:
    """The names of a row's images, or of its film."""
    given = row.get(key) if row.get(key) is not None else row.get(f"{key}s") or None
    if given is None:
        return []
    names = given if isinstance(given, list) else [given]
    readable = all(isinstance(name, str) and name and not re.match("https?:/|data:", name) for name in names)
    if not names or not readable or (key == "video" and len(names) > 1):
        found = json.dumps(given, default=lambda data: f"{len(data)} bytes")  # which a data URL holds
        raise BadRow(f"`{key}` is expected to be a file name, found {found[:60]}")
    return names


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


def _question(row: dict, where: str, *, film: bool) -> str | None:
    """The first human turn. Where all marks are in front of the text, images stand there anyway; so does a film."""
    turns = row.get("conversations") or []
    try:
        text = next((turn["value"] for turn in turns if turn["from"] in ("human", "user")), None)
        if text and film:
            return MARKS.sub("", text).strip()
        words = text and re.sub(r"^(<image>|<video>|\s)+", "", text).strip()
        return text.strip() if text and words and IMAGE in words else words
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


def one_target(
    item: Item, out: Path | None, ending: str, beside: Sequence[str] = (), read: Sequence[Path] = ()
) -> list[Path]:
    """The picture of a single item: `out`, or `NAME-pmod.ENDING` here. Nothing is made yet.

    Args:
        beside: endings of what is written beside it.
        read: what else the run reads, such as the selection to compare with.

    Raises:
        PmodError: it cannot be written there, or would replace what it is made from.
    """
    target = out or Path(f"{item.name}-pmod.{ending}")
    if not target.parent.is_dir():
        raise PmodError(f"{target}: there is no folder {target.parent}", hint=f"mkdir -p {quote(str(target.parent))}")
    check_writable(target.parent)
    _check_written([target], [item], beside, read)
    return [target]


def folder_targets(
    items: Sequence[Item], folder: Path, ending: str, beside: Sequence[str] = (), read: Sequence[Path] = ()
) -> list[Path]:
    """A picture for each item in one folder, which need not be there yet; their statistics will stand there too.

    Args:
        beside: endings of what is written beside each.
        read: what else the run reads, such as a file of rows.

    Raises:
        PmodError: the folder is a file, or a picture would replace what it is made from.
    """
    if folder.is_file() or folder.suffix.lower() in (".png", ".svg"):
        raise PmodError(f"{folder} is a file, expected a folder for {len(items)} pictures", hint="`out=FOLDER`")
    check_writable(folder)
    targets = [folder / f"{item.name}-pmod.{ending}" for item in items]
    _check_written(targets, items, beside, read, others=[folder / STATISTICS])
    return targets


def _check_written(
    targets: Sequence[Path],
    items: Sequence[Item],
    beside: Sequence[str],
    read: Sequence[Path],
    others: Sequence[Path] = (),
) -> None:
    pictures = {item.path.resolve() for item in items}
    frames = {frame for item in items if item.is_film and item.path.is_dir() for frame in item.path.resolve().iterdir()}
    sources = pictures | frames | {path.resolve() for path in read}
    for target in targets:
        check_format(target)
    for written in (*targets, *(target.with_suffix(ending) for target in targets for ending in beside), *others):
        if written.is_dir():
            raise PmodError(f"{written} is a folder, expected a file to write", hint="choose another with `out`")
        if written.resolve() in sources:
            what = "the picture to look at" if written.resolve() in pictures else "what this run reads"
            raise PmodError(f"{written} is {what}, and would be replaced", hint="choose another with `out`")
