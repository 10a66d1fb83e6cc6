"""The processor of a checkpoint, held to the config beside it.

A processor comes with a checkpoint, so it may be anybody's. One that makes larger pictures than the vision tower takes
would fail in the tower, after it has filled the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MOST_SEEN = 25_000_000  # pixels of all tiles of an image: 221 tiles of 336 x 336; the published models take at most 5
HINT = "take processor_config.json or preprocessor_config.json from the checkpoint it was made from"


def check_processor(processor: ProcessorMixin, config: dict[str, Any], path: Path) -> None:
    """Hold a loaded processor to the config of its checkpoint.

    Raises:
        PmodError: it makes other pictures than the vision tower of the config takes.
    """
    images, tower = getattr(processor, "image_processor", None), config.get("vision_config") or {}
    if images is None or getattr(processor, "tokenizer", None) is None:
        raise PmodError(f"{path} has no image processor or no tokenizer beside its config", hint=HINT)
    side, patch = tower.get("image_size"), tower.get("patch_size")
    for what, length, is_result in _lengths(images):
        if type(length) is not int or not 0 < length**2 <= MOST_SEEN:
            _refuse(path, f"{what} {length!r:.40} in its processor", f"at most {MOST_SEEN / 1e6:.0f} megapixels")
        if is_result and type(side) is int and length != side:
            _refuse(path, f"{what} {length} in its processor", f"{side}, the image_size of its vision_config")
    cut = getattr(processor, "patch_size", None)
    if cut is not None and (type(cut) is not int or cut < 1 or (type(patch) is int and cut != patch)):
        _refuse(path, f"patch_size {cut!r:.40} in its processor", f"patch_size {patch} in its vision_config")
    _check_grid(getattr(images, "image_grid_pinpoints", None), config.get("image_grid_pinpoints"), path)


def _check_grid(pinpoints: Any, of_config: Any, path: Path) -> None:
    if pinpoints is None:
        return
    pairs = [list(pair) if isinstance(pair, list | tuple) else pair for pair in pinpoints]
    for pair in pairs:
        good = isinstance(pair, list) and len(pair) == 2 and all(type(length) is int and length > 0 for length in pair)
        if not good or pair[0] * pair[1] > MOST_SEEN:
            limit = f"height and width of at most {MOST_SEEN / 1e6:.0f} megapixels"
            _refuse(path, f"{pair!r:.60} in image_grid_pinpoints of its processor", limit)
    if of_config is not None and pairs != [list(pair) for pair in of_config]:
        _refuse(path, "other image_grid_pinpoints in its processor", "those of its config")


def _lengths(images: Any) -> Iterator[tuple[str, Any, bool]]:
    """What the image processor is set to: which setting, pixels, and whether the tower is given as many."""
    size, crop = dict(getattr(images, "size", None) or {}), dict(getattr(images, "crop_size", None) or {})
    crops = bool(crop) and (getattr(images, "do_center_crop", False) or hasattr(images, "image_grid_pinpoints"))
    for what, lengths, is_result in (("size", size, not crops), ("crop_size", crop, crops)):
        for name in ("height", "width", "shortest_edge"):
            if lengths.get(name) is not None:
                yield what, lengths[name], is_result and name != "shortest_edge"


def _refuse(path: Path, found: str, expected: str) -> None:
    raise PmodError(f"{path} has {found}; expected {expected}", hint=HINT)
