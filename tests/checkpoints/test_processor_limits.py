"""Pixels of a picture as the processor beside a model makes them: what is counted is what the processor gives."""

import json
import shutil

import pytest
from PIL import Image
from transformers import AutoVideoProcessor

from pmod_cli.checkpoints import bundled_path, load_processor
from pmod_cli.checkpoints.processor_limits import IMAGES, VIDEOS, WHOLE, with_limits
from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes, image_tokens
from pmod_cli.profiling.subject import load_subject

BUNDLED = "tiny-qwen3-vl"
CHANGES = [{}, {"size": {"shortest_edge": 4096, "longest_edge": 20_000}}, {"max_pixels": 9_000}]
PICTURES = [(96, 96), (672, 672), (30, 200), (1200, 40), (8, 8)]


def sizes_of(folder):
    return with_limits(Sizes.of(json.loads((folder / "config.json").read_text())), folder)


def tokens(processor, size):
    grid = processor.image_processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"]
    return int(grid.prod()) // processor.image_processor.merge_size**2


@pytest.mark.parametrize(
    "change", [{}, {"size": {"shortest_edge": 4096, "longest_edge": 20_000}}, {"max_pixels": 9_000}]
)
def test_counted_tokens_are_those_of_the_processor(change, tmp_path):
    folder = shutil.copytree(bundled_path(BUNDLED), tmp_path / "model")
    whole = json.loads((folder / WHOLE).read_text())
    whole["image_processor"] |= change
    (folder / WHOLE).write_text(json.dumps(whole))
    processor, sizes = load_processor(folder), sizes_of(folder)
    for size in PICTURES:
        assert image_tokens(sizes, size).tokens == tokens(processor, size), size
    assert load_subject(str(folder)).sizes == sizes


def test_a_file_for_each_part(tmp_path):
    """As most checkpoints on the hub have it, with the older names; videos as the stock class takes them from there."""
    shutil.copy(bundled_path(BUNDLED) / "config.json", tmp_path)
    usual = sizes_of(tmp_path).tower
    assert usual.pixels == (256 * 256, 4096 * 4096)  # of the published models
    limits = {"min_pixels": 784, "max_pixels": 50_176}
    (tmp_path / IMAGES).write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **limits}))
    found, stock = sizes_of(tmp_path).tower, AutoVideoProcessor.from_pretrained(tmp_path).size
    assert found.pixels == (784, 50_176)
    assert found.clip == (stock.shortest_edge, stock.longest_edge)
    (tmp_path / VIDEOS).write_text(json.dumps({"size": {"shortest_edge": 4096, "longest_edge": 8192}}))
    assert sizes_of(tmp_path).tower.clip == (4096, 8192)


def test_models_that_cut_tiles_stay_as_they_are():
    folder = bundled_path("tiny-llava-next")
    assert sizes_of(folder) == Sizes.of(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("wrong", [{"max_pixels": "many"}, {"max_pixels": 5}, {"min_pixels": 0}, {"min_pixels": True}])
def test_limits_that_are_none(wrong, tmp_path):
    shutil.copy(bundled_path(BUNDLED) / "config.json", tmp_path)
    (tmp_path / IMAGES).write_text(json.dumps(wrong))
    with pytest.raises(PmodError, match="pixels of a picture"):
        load_subject(str(tmp_path)).sizes  # noqa: B018
