"""How many pixels the processor beside a model makes of a picture that is read at its own resolution.

A configuration says nothing of it, and users lower the most pixels to make a model cheaper: what is counted follows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pmod_cli.checkpoints.files import read_json
from pmod_cli.core.errors import PmodError
from pmod_cli.families.grid import GridTower
from pmod_cli.families.sizes import Sizes

# In the order in which transformers asks them: one file for the whole processor, or one for each part of it.
WHOLE = "processor_config.json"
IMAGES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"


def with_limits(sizes: Sizes, folder: Path) -> Sizes:
    """The sizes with the least and most pixels of pictures and videos as the processor in `folder` has them.

    Where it says nothing, and of models that cut pictures into tiles, they stay those of the published models.

    Raises:
        PmodError: a limit is no whole number above 0, or the least is above the most.
    """
    tower = sizes.tower
    if not isinstance(tower, GridTower):
        return sizes
    whole = _read(folder / WHOLE)
    images = whole.get("image_processor") or _read(folder / IMAGES)
    # Where videos have no file of their own, the stock processors take the limits of pictures for them too.
    videos = whole.get("video_processor") or _read(folder / VIDEOS) or _read(folder / IMAGES)
    pixels = _limits(images, tower.pixels, folder)
    clip = _limits(videos, tower.clip, folder)
    return replace(sizes, tower=replace(tower, pixels=pixels, clip=clip))


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _limits(processor: Any, usual: tuple[int, int], folder: Path) -> tuple[int, int]:
    """`size`, over which the older `min_pixels` and `max_pixels` win, as in the stock processors."""
    given: dict[str, Any] = processor if isinstance(processor, dict) else {}
    size: dict[str, Any] = found if isinstance(found := given.get("size"), dict) else {}
    asked = (("min_pixels", "shortest_edge", usual[0]), ("max_pixels", "longest_edge", usual[1]))
    least, most = (
        next((value for value in (given.get(older), size.get(newer)) if value is not None), default)
        for older, newer, default in asked
    )
    if not all(type(limit) is int and limit > 0 for limit in (least, most)) or least > most:
        raise PmodError(
            f"the processor in {folder} makes {least!r:.20} to {most!r:.20} pixels of a picture",
            hint="expected two rising whole numbers in its `size`: shortest_edge and longest_edge",
        )
    return least, most
