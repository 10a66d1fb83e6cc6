"""How many vision tokens an image becomes, by the arithmetic of the stock LLaVA-NeXT code. Needs no torch.

The tests hold it to the stock code itself, size by size; as plain arithmetic it serves whole data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmod_cli.profiling.sizes import Sizes


@dataclass(frozen=True)
class ImageTokens:
    """One image as the model sees it.

    Args:
        width: Pixels.
        height: Pixels.
        tiles: Passes through the vision tower, the downscaled base image included.
        base: Vision tokens of the base image.
        high_resolution: Vision tokens of the other tiles after unpadding, one `image_newline` a row included. 0 for
            LLaVA-1.5.
        patches_per_tile: Vision tokens that the tower gives for one tile; all of them pass the projector.
    """

    width: int
    height: int
    tiles: int
    base: int
    high_resolution: int
    patches_per_tile: int

    @property
    def tokens(self) -> int:
        """Vision tokens of the prompt, V."""
        return self.base + self.high_resolution


def image_tokens(sizes: Sizes, image_size: tuple[int, int] | None = None) -> ImageTokens:
    """Cut an image as the stock model does.

    Args:
        sizes: The model.
        image_size: Width and height in pixels; None is a square of two by two tiles.
    """
    tower = sizes.tower
    patches = tower.tokens - tower.dropped
    width, height = image_size or (2 * tower.tile,) * 2
    if sizes.pinpoints is None:
        return ImageTokens(width, height, tiles=1, base=patches, high_resolution=0, patches_per_tile=patches)
    fitted_height, fitted_width = _best_resolution(width, height, sizes.pinpoints)
    across, down = fitted_width // tower.tile, fitted_height // tower.tile
    side = tower.tile // tower.patch
    rows, columns = _unpadded(width, height, down * side, across * side)
    tiles = 1 + -(-fitted_width // tower.tile) * -(-fitted_height // tower.tile)
    return ImageTokens(width, height, tiles, patches, rows * (columns + 1), patches)


def _best_resolution(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) that shows most pixels of the image and, among those, wastes least."""
    best, most, least_waste = pinpoints[0], 0, float("inf")
    for high, wide in pinpoints:
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        waste = wide * high - shown
        if shown > most or (shown == most and waste < least_waste):
            best, most, least_waste = (high, wide), shown, waste
    return best


def _unpadded(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """The (rows, columns) of patches that are left when what was padded to the tiles' shape is cut off again."""
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - kept) // 2)
