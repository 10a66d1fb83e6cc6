"""Images and videos at their own resolution: the towers of the Qwen-VL families.

An image is resized to a whole number of cells of merge x merge patches, within a range of pixels; a video is cut into
groups of frames of such grids. The tower reads each grid as it is, and gives one vision token a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, prod, sqrt
from typing import TYPE_CHECKING, Any

from pmod_cli.core.errors import PmodError
from pmod_cli.families.record import ImageTokens, PixelInputs

if TYPE_CHECKING:
    from pmod_cli.families.geometry import TokenLayout


@dataclass(frozen=True)
class GridTower:
    """Sizes of a tower that reads grids of patches.

    Args:
        layers: Blocks.
        hidden: Width.
        inner: Width of the MLP.
        channels: Of a pixel.
        patch: Side of a patch in pixels.
        merge: Patches along the side of a cell; a cell becomes one vision token.
        temporal: Frames that become one; a still image is repeated so often.
        out: Width of a vision token, that of the decoder.
        gated: Whether the MLP has a gate, as the decoder's has.
        window: Side of an attention window in pixels; None: every block attends to the whole frame.
        whole: Number of blocks that attend to the whole frame.
        deepstack: Mergers beside the last, whose features go to the first layers of the decoder.
        mergers: Those that run: the last, and of DeepStack's those whose block is there.
        positions: Rows of the table of positions; 0 without one.
        pixels: Least and most pixels of an image, height x width, as the processor of the published models has them.
        clip: The same for all frames of a video together, or for each, see `per_frame`.
        per_frame: Whether `clip` bounds the pixels of each frame.
    """

    layers: int
    hidden: int
    inner: int
    channels: int
    patch: int
    merge: int
    temporal: int
    out: int
    gated: bool
    window: int | None
    whole: int
    deepstack: int
    mergers: int
    positions: int
    pixels: tuple[int, int]
    clip: tuple[int, int]
    per_frame: bool

    @property
    def cell(self) -> int:
        """Side of a cell in pixels."""
        return self.patch * self.merge

    @property
    def cell_width(self) -> int:
        """Width of a cell's patches side by side, which the merger takes."""
        return self.hidden * self.merge**2

    def patches(self, image: ImageTokens) -> int:
        """Patches of an image, or of all frames of a video."""
        return image.frames * (image.height // self.patch) * (image.width // self.patch)

    def pairs(self, image: ImageTokens) -> int:
        """Pairs of patches that see each other, summed over all blocks: whole frames in some, windows in the others."""
        rows, columns = image.height // self.patch, image.width // self.patch
        windowed = 0
        if self.window is not None:
            side = self.window // self.cell * self.merge  # a window has whole cells
            windowed = prod(
                (count // side) * side**2 + (count % side) ** 2  # full windows, and what is left at the end
                for count in (rows, columns)
            )
        return image.frames * (self.whole * (rows * columns) ** 2 + (self.layers - self.whole) * windowed)


def resized(
    height: int, width: int, cell: int, least: int, most: int, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """Height and width in pixels after the processor's resize: whole cells, the pixels of all frames in a range.

    Args:
        height: Of the picture.
        width: Of the picture.
        cell: Side of a cell.
        least: Pixels that it has at least.
        most: Pixels that it has at most.
        frames: Frames whose pixels are counted together.
        temporal: They are counted as a multiple of it.

    Raises:
        PmodError: One side is more than 200 times the other, which the stock processors refuse.
    """
    if max(height, width) > 200 * min(height, width):
        raise PmodError(f"an image of {width} x {height} pixels is too long: at most 200 times as long as wide")
    rows, columns = round(height / cell) * cell, round(width / cell) * cell
    counted = round(frames / temporal) * temporal * rows * columns
    if counted > most:
        scale = sqrt(frames * height * width / most)
        return max(cell, floor(height / scale / cell) * cell), max(cell, floor(width / scale / cell) * cell)
    if counted < least:
        scale = sqrt(least / (frames * height * width))
        return ceil(height * scale / cell) * cell, ceil(width * scale / cell) * cell
    return rows, columns


def image_tokens(sizes: Any, image_size: tuple[int, int] | None = None, images: int = 1) -> ImageTokens:
    """One vision token a cell."""
    tower = sizes.tower
    width, height = image_size or (672, 672)
    high, wide = resized(height, width, tower.cell, *tower.pixels)
    cells = (high // tower.cell) * (wide // tower.cell)
    return ImageTokens(wide, high, tiles=1, base=cells, high_resolution=0, patches_per_tile=cells)


def video_tokens(sizes: Any, size: tuple[int, int, int]) -> ImageTokens:
    """One vision token a cell, for each group of frames."""
    tower = sizes.tower
    frames, width, height = size
    groups = ceil(frames / tower.temporal)
    if tower.per_frame:
        high, wide = resized(height, width, tower.cell, *tower.clip)
    else:
        scale = max(1.0, tower.cell / height, tower.cell / width)
        height, width = int(height * scale), int(width * scale)
        least, most = tower.clip
        high, wide = resized(height, width, tower.cell, least, most, max(frames, tower.temporal), tower.temporal)
    cells = (high // tower.cell) * (wide // tower.cell)
    return ImageTokens(wide, high, groups, cells * groups, 0, cells, frames=groups, video=True)


def pixel_inputs(config: Any, images: Sequence[tuple[int, int]], rows: Sequence[int] = ()) -> PixelInputs:
    """All patches one after another, `(patches, numbers of a patch)`, and the grid of each image."""
    return _grids(config, [(1, *size) for size in images], "image_grid_thw")


def video_inputs(config: Any, videos: Sequence[tuple[int, int, int]]) -> PixelInputs:
    """The same of videos."""
    temporal = config.vision_config.temporal_patch_size
    return _grids(config, [(ceil(frames / temporal), *size) for frames, *size in videos], "video_grid_thw")


def _grids(config: Any, grids: Sequence[tuple[int, ...]], name: str) -> PixelInputs:
    """Of pictures whose sides are whole cells already."""
    vision = config.vision_config
    side, cell = vision.patch_size, vision.patch_size * vision.spatial_merge_size
    found = [
        [groups, max(1, high // cell) * vision.spatial_merge_size, max(1, wide // cell) * vision.spatial_merge_size]
        for groups, high, wide in grids
    ]
    patches = sum(groups * rows * columns for groups, rows, columns in found)
    return (patches, vision.in_channels * vision.temporal_patch_size * side**2), {name: found}


def reader(config: Any, defaults: Mapping[str, Any]) -> Callable[..., Any]:
    """A function from a key of `vision_config` to its value, the default where the config is silent.

    The function raises PmodError where the value is no whole number above 0, or no list of them (`sequence=True`).
    """

    def read(part: Any, key: str) -> Any:
        return part.get(key) if isinstance(part, Mapping) else getattr(part, key, None)

    vision = read(config, "vision_config") or {}

    def get(key: str, sequence: bool = False) -> Any:
        value = read(vision, key)
        value = defaults[key] if value is None else value
        fits = isinstance(value, list | tuple) and all(map(_whole, value)) if sequence else _whole(value) and value > 0
        if not fits:
            expected = "a list of whole numbers" if sequence else "a whole number of 1 or more"
            raise PmodError(f"vision_config.{key} is {value!r:.60}: expected {expected}")
        return value

    return get


def tower(get: Callable[..., Any], **own: Any) -> GridTower:
    """A tower whose common sizes have the names of `vision_config` in both families.

    Args:
        get: From a key to its value; see `reader`.
        own: The fields of `GridTower` in which the families differ.
    """
    return GridTower(
        layers=get("depth"),
        hidden=get("hidden_size"),
        inner=get("intermediate_size"),
        channels=get("in_channels"),
        patch=get("patch_size"),
        merge=get("spatial_merge_size"),
        temporal=get("temporal_patch_size"),
        out=get("out_hidden_size"),
        **own,
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**7


def cells(height: int, width: int, cell: int, least: int, most: int) -> TokenLayout:
    """Where the tokens of an image lie: one grid of cells over the whole of it.

    Args:
        height: Of the image in pixels.
        width: Of the image in pixels.
        cell: Side of a cell in pixels of the resized image.
        least: Pixels that the processor leaves at least.
        most: Pixels that it leaves at most.
    """
    import numpy as np

    from pmod_cli.families.geometry import TokenLayout, numbered

    high, wide = resized(height, width, cell, least, most)
    rows, columns = (np.arange(count)[:, None] + np.array([0.0, 1.0]) for count in (high // cell, wide // cell))
    part = numbered("image", rows * (height / len(rows)), columns * (width / len(columns)), first=0)
    return TokenLayout(width, height, (part,))


def with_biases(weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`NAME.weight` and `NAME.bias` of each name."""
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


_WHOLE = (
    "architectures",
    "auto_map",
    "dtype",
    "image_token_id",
    "model_type",
    "pmod",
    "quantization_config",
    "router_state",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
)
"""Keys of a config.json that are not the decoder's."""


def unfold(config: Mapping[str, Any], text_type: str) -> dict[str, Any]:
    """A config.json whose decoder stands at its top, as older ones have it, with a `text_config` of its own.

    Args:
        config: As it stands in the file.
        text_type: `model_type` of the decoder.
    """
    if "text_config" in config or "hidden_size" not in config:
        return dict(config)
    text = {key: value for key, value in config.items() if key not in _WHOLE}
    return {
        **{key: value for key, value in config.items() if key in _WHOLE},
        "text_config": {"model_type": text_type} | text,
    }
