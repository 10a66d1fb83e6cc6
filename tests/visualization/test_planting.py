"""One bright square on a dark picture, a router that likes brightness: the kept boxes must be the square, to a pixel.

Sizes are chosen so that the square covers whole patches, and the patches' places are worked out here, by hand-made
arithmetic that shares nothing with the code under test: scale to fit the canvas, centre, count patches.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pmod_cli import checkpoints
from pmod_cli.model import PmodSettings
from pmod_cli.visualization import LoadedImage, select
from tests.factories import PATCH, TILE
from tests.visualization.test_ask import like_brightness

GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]  # rows, columns of tiles: those of the paper
PINPOINTS = [[rows * TILE, columns * TILE] for rows, columns in GRIDS]


@dataclass(frozen=True)
class Case:
    """height, width of the image in pixels; the grid it must get; pixels of the image that a patch of a tile covers."""

    height: int
    width: int
    grid: tuple[int, int]
    cell: int

    @property
    def fills(self) -> bool:
        """No padding: nothing is unpadded."""
        return self.height * self.grid[1] == self.width * self.grid[0]


CASES = [
    Case(128, 128, (2, 2), 16),  # square
    Case(64, 128, (1, 2), 16),
    Case(128, 64, (2, 1), 16),
    Case(64, 192, (1, 3), 16),  # 3:1
    Case(192, 64, (3, 1), 16),  # 1:3
    Case(96, 128, (2, 2), 16),  # a quarter of the canvas is padding, above and below
    Case(128, 96, (2, 2), 16),
    Case(96, 192, (1, 2), 24),  # filled
    Case(32, 192, (1, 3), 16),  # 6:1: padding above and below
    Case(192, 32, (3, 1), 16),
]


@pytest.fixture(scope="module")
def bright(stock_model, tmp_path_factory):
    """A model whose layer 1 keeps few tokens, the brightest; all five grids."""
    folder = tmp_path_factory.mktemp("planting") / "next"
    checkpoints.convert(
        stock_model("llava_next"), folder, PmodSettings(schedule="list", values=(1.0, 0.08, 0.08, 0.08))
    )
    model, processor = checkpoints.load_model(folder)
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = PINPOINTS
    like_brightness(model)
    return model, processor


def show(bright, case: Case, square: tuple[int, int, int, int]):
    """The record of a black picture with one white rectangle."""
    image = Image.new("RGB", (case.width, case.height))
    ImageDraw.Draw(image).rectangle((square[0], square[1], square[2] - 1, square[3] - 1), fill="white")
    record = select(*bright, LoadedImage(image), max_new_tokens=0)
    assert record.layout.tile_grid == case.grid
    return record


def brightest(record, part) -> int:
    return max(part.tokens.ravel(), key=lambda token: record.weight[1, token])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.height}x{case.width}")
def test_a_bright_patch_of_the_tiles_is_kept(bright, case):
    rows, columns = case.height // case.cell, case.width // case.cell
    for row, column in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)}:
        square = tuple(edge * case.cell for edge in (column, row, column + 1, row + 1))
        record = show(bright, case, square)
        base, tiles = record.layout.parts
        assert tiles.tokens.shape == (rows, columns)  # padding is gone, whether there was any or not
        token = brightest(record, tiles)
        np.testing.assert_allclose(record.layout.boxes()[token], square, atol=1)
        assert token == base.size + row * (columns + 1) + column
        assert record.kept[1, token]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.height}x{case.width}")
def test_a_bright_patch_of_the_whole_image_is_kept(bright, case):
    """The whole image is squashed: its patches are a quarter as wide and a quarter as high as the picture."""
    for row, column in ((0, 0), (3, 3), (2, 1)):
        wide, high = case.width // 4, case.height // 4
        square = (column * wide, row * high, (column + 1) * wide, (row + 1) * high)
        record = show(bright, case, square)
        token = brightest(record, record.layout.parts[0])
        np.testing.assert_allclose(record.layout.boxes()[token], square, atol=1)
        assert token == 4 * row + column


def test_the_cases_cover_every_grid_with_and_without_unpadding():
    assert {case.grid for case in CASES} == {tuple(grid) for grid in GRIDS}
    assert {case.fills for case in CASES} == {True, False}
    assert TILE // PATCH == 4


@pytest.mark.parametrize("pad", [False, True], ids=["crop", "pad"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 192), (192, 64)])
def test_llava15(stock_model, tmp_path_factory, height, width, pad):
    """Cropped to the centre, or padded to a square: a bright patch of the part that is seen."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    folder = tmp_path_factory.mktemp("planting") / "llava"
    checkpoints.convert(stock_model("llava"), folder, PmodSettings(schedule="list", values=(1.0, 0.07, 0.07, 0.07)))
    model, processor = checkpoints.load_model(folder)
    if pad:
        settings = {"size": {"height": TILE, "width": TILE}, "crop_size": {"height": TILE, "width": TILE}}
        processor.image_processor = LlavaImageProcessorPil(do_pad=True, **settings)
    like_brightness(model)
    side = max(height, width) if pad else min(height, width)
    cell = side // (TILE // PATCH)
    left, top = (width - side) // 2, (height - side) // 2
    column, row = 1, (side // 2) // cell  # in the middle of what a padded picture shows
    square = (left + column * cell, top + row * cell, left + (column + 1) * cell, top + (row + 1) * cell)
    if pad and not (square[0] >= 0 and square[1] >= 0 and square[2] <= width and square[3] <= height):
        square = (max(square[0], 0), max(square[1], 0), min(square[2], width), min(square[3], height))
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((square[0], square[1], square[2] - 1, square[3] - 1), fill="white")
    record = select(model, processor, LoadedImage(image), max_new_tokens=0)
    assert record.kept[1].sum() == 1
    np.testing.assert_allclose(record.layout.boxes()[record.kept[1]][0], square, atol=1)
