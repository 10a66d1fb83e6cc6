"""From items to files: ask the model about each picture, draw it, write what was asked for, and say what was drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pmod_cli.core.atomic import write_files
from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import LoadedImage, load_image
from pmod_cli.core.text import printable
from pmod_cli.core.videos import Video
from pmod_cli.visualization.archive import load_npz, npz_bytes
from pmod_cli.visualization.figure import ALL_LAYERS, MODES, PARTS, draw
from pmod_cli.visualization.image_selection import ImageSelection, parse_layers
from pmod_cli.visualization.inputs import Item, load_film
from pmod_cli.visualization.page import check_format, encode
from pmod_cli.visualization.recording import DEFAULT_QUESTION, MAX_NEW_TOKENS, LoadedModel, attend, select_together
from pmod_cli.visualization.selection_page import html_page
from pmod_cli.visualization.statistics import check_depths, in_common

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class DrawSettings:
    """What to ask and what to draw.

    Attributes:
        layers: as `parse_layers` takes it.
        mode, parts: one of MODES, one of PARTS.
        question: for pictures that bring none of their own, or for all.
        against_question: `compare` the same model on another question.
        max_new_tokens: length limit of the answer, 0 for none.
        answer_only: no question, legend and model in the caption.
    """

    layers: str = "all"
    mode: str = "kept"
    parts: str = "separate"
    question: str | None = None
    against_question: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    answer_only: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("parts", self.parts, PARTS)):
            if value not in known:
                raise PmodError(f"`{name}={value}`: there is no such choice", hint=f"one of {', '.join(known)}")
        if self.mode in ALL_LAYERS and self.layers.strip().lower() != "all":
            layers = f"`layers={self.layers[:60]}`"
            raise PmodError(f"`mode={self.mode}` shows all layers, yet {layers} was given", hint="leave `layers` out")
        for question in filter(None, (self.question, self.against_question)):
            if re.search("[\ud800-\udfff]", question):  # how Python holds other bytes of a command line
                raise PmodError(f"the question is no UTF-8: {printable(question)[:60]}", hint="see `locale`")


@dataclass(frozen=True)
class Drawn:
    """One finished item: its record, what it was compared with, the layers drawn, the files written."""

    item: Item
    record: ImageSelection
    against: ImageSelection | None
    layers: list[int]
    files: tuple[Path, ...]


def check_saved(items: Sequence[Item], against: Path | None, settings: DrawSettings) -> set[int]:
    """Read saved selections and parse the layers asked of them, before anything is started.

    Returns:
        How many layers their model has; empty where none is saved.

    Raises:
        PmodError: a file that cannot be read, a layer that is not in it, nothing in common, another question.
    """
    other = load_npz(against) if against else None
    depths = set()
    for item in items:
        if item.is_saved:
            record = load_npz(item.path)
            parse_layers(settings.layers, record.num_layers)
            for asked, hint in ((settings.question, "name a picture"), (settings.against_question, "`against=B.npz`")):
                if asked:
                    raise PmodError(f"{item.path} is saved: it cannot be asked another question", hint=hint)
            if settings.mode == "compare" and other:
                in_common(record, other)
            depths.add(record.num_layers)
    check_depths(depths)
    return depths


def run(
    items: Sequence[Item],
    settings: DrawSettings,
    targets: Sequence[Path],
    *,
    subject: LoadedModel | None,
    against: LoadedModel | Path | None = None,
    beside: Sequence[str] = (),
    faults: dict[Path | Item, PmodError] | None = None,
) -> Iterator[Drawn]:
    """Draw each item into its target, one by one; the files of an item are written when all of them are made.

    Args:
        targets: a picture's path for each item. Its folder is made.
        subject: the model; None where every item is saved.
        against: what `compare` compares with: a model or a saved selection.
        beside: endings of files to write beside each picture: `.html` for the page, `.npz` for the arrays.
        faults: takes the errors of items that cannot be drawn, by item, and the others are drawn.

    Raises:
        PmodError: an item cannot be drawn, and there is no `faults`.
    """
    asked: dict[Any, list[ImageSelection]] = {}
    for item, target in zip(items, targets, strict=True):
        try:
            if item.is_saved or subject is None:
                record = load_npz(item.path)
            else:
                question = settings.question or item.question or DEFAULT_QUESTION
                prompt = (item.together or item.path, item.is_film, item.regions, question)
                if prompt not in asked:
                    asked = {prompt: _ask(subject, item, question, settings)}  # one prompt: its pictures come in a row
                record = asked[prompt][item.place]
            other = _other(record, item, settings, subject, against) if settings.mode == "compare" else None
            layers = parse_layers(settings.layers, record.num_layers)
            files = _drawn(record, other, layers, settings, target, beside)
        except PmodError as error:
            if faults is None:
                raise
            paths = item.together or (item.path,)  # a prompt needs all of its pictures
            told = PmodError(f"{', '.join(map(str, paths))}: {error.what}", hint=error.hint)
            faults[item] = told
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        write_files(files)
        yield Drawn(item, record, other, layers, tuple(files))


def _drawn(
    record: ImageSelection,
    other: ImageSelection | None,
    layers: Sequence[int],
    settings: DrawSettings,
    target: Path,
    beside: Sequence[str],
) -> dict[Path, bytes]:
    """The files of an item: its picture, and what stands beside it."""
    figure = draw(record, layers, settings.mode, against=other, parts=settings.parts, answer_only=settings.answer_only)
    files = {target: encode(figure, check_format(target))}
    for ending in beside:
        page = ending == ".html"
        files[target.with_suffix(ending)] = html_page(record, layers=layers).encode() if page else npz_bytes(record)
    return files


def _ask(
    model: LoadedModel, item: Item, question: str, settings: DrawSettings, picture: LoadedImage | None = None
) -> list[ImageSelection]:
    """A record for each picture of the item's prompt; `picture` is its picture where that is at hand."""
    pictures: list[LoadedImage] | Video
    if picture is not None:
        pictures = [picture]
    else:
        pictures = load_film(item.path) if item.is_film else [load_image(path) for path in item.together or [item.path]]
    return select_together(
        model.model,
        model.processor,
        pictures,
        question,
        max_new_tokens=settings.max_new_tokens,
        name=model.name,
        selection=model.selection,
        regions=[] if item.together else [item.regions],
        notes=model.notes,
        budget=model.budget,
    )


def _other(
    record: ImageSelection,
    item: Item,
    settings: DrawSettings,
    subject: LoadedModel | None,
    against: LoadedModel | Path | None,
) -> ImageSelection | None:
    """The second record of a comparison: saved, of another question, of another model, or of stock attention."""
    if isinstance(against, Path):
        return load_npz(against)
    if subject is not None and settings.against_question:
        return _ask(subject, item, settings.against_question, settings)[item.place]
    if against is None:
        return None
    several = item.is_film or bool(item.together)
    if against.router_state == "stock":
        if several:
            raise PmodError(
                "the attention of a stock model is drawn for one picture alone, not for several or a film",
                hint="`against=random`, or another p-MoD checkpoint",
            )
        return attend(against.model, against.processor, record, name=against.name, notes=against.notes)
    again = None if several else LoadedImage(record.image, record.notes)
    return _ask(against, replace(item, regions=record.regions), record.question, settings, again)[item.place]


def layer_table(drawn: Drawn) -> Table:
    """One row a layer that was drawn: tokens kept, retention, and what a comparison has in common."""
    from rich.table import Table

    record = drawn.record
    common = in_common(record, drawn.against)[0] if drawn.against else None
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", f"kept of {record.layout.size}", "retention", *([] if common is None else ["in common"])):
        table.add_column(heading, justify="right")
    for layer in drawn.layers:
        kept = str(record.kept[layer].sum()) if record.routed[layer] else "all (plain)"
        shared = [] if common is None else ["-" if np.isnan(common[layer]) else f"{common[layer]:.0%}"]
        table.add_row(str(layer), kept, f"{record.retention[layer]:.3f}", *shared)
    return table


def summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The numbers of `summarise` beside chance, one line each; none where nothing is known."""
    for words, numbers in (
        ("kept tokens that the next layer keeps too", summary["neighbour_overlap"]),
        ("kept tokens that lie on the boxes", summary["kept_on_regions"]),
        ("the same, against as many tokens of each part", summary["kept_on_regions_in_parts"]),
    ):
        if numbers:
            interval = ""
            if numbers["lift_95"]:
                low, high = numbers["lift_95"]
                interval = f" (95 % interval: {low:.2f} … {high:.2f})"
            yield (
                f"{words}: {numbers['mean']:.1%}, by chance {numbers['by_chance']:.1%}, "
                f"lift {numbers['lift']:.2f}{interval}"
            )


def describe(drawn: Drawn) -> dict[str, Any]:
    """Everything about one picture, for JSON; `against` is null where nothing was compared."""
    against = None
    if drawn.against:
        common, chance = in_common(drawn.record, drawn.against)
        against = drawn.against.to_dict(drawn.layers)
        for layer in against["layers"]:
            for name, shares in (("in_common", common), ("in_common_by_chance", chance)):
                share = float(shares[layer["layer"]])
                layer[name] = None if np.isnan(share) else round(share, 4)  # one of both keeps nothing
    written = {"image": str(drawn.item.path), "files": [str(file) for file in drawn.files]}
    return {**written, **drawn.record.to_dict(drawn.layers), "against": against}
