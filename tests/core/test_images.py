"""Every kind of picture comes out RGB and upright, the same for every verb; what is no picture is refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import MOST_PIXELS, as_rgb, image_size, load_image, pictures_in
from pmod_cli.data.pictures import open_image
from pmod_cli.profiling.average import _size

RED = (255, 0, 0)


def turned(path, orientation: int = 6) -> None:
    """Stored as 30 x 10, red at the left. By orientation 6 the left edge is the true top edge."""
    stored = Image.new("RGB", (30, 10), "blue")
    stored.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)


def deep(path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 40000, 65535]], dtype=np.uint16)).save(path)


def see_through(path) -> None:
    """Red that nobody sees, as the published code, transformers' `load_image` and lmms-eval's tasks read it."""
    Image.new("RGBA", (4, 4), (*RED, 0)).save(path)


def palette(path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 255, *RED])
    picture.putpixel((0, 0), 0)
    picture.save(path, transparency=0)


@pytest.mark.parametrize(
    ("make", "pixels", "notes"),
    [
        (turned, {(5, 2): RED, (5, 25): (0, 0, 255)}, ("turned upright by its EXIF tag",)),
        (deep, {(0, 0): (0,) * 3, (1, 0): (100,) * 3, (2, 0): (156,) * 3, (3, 0): (255,) * 3}, ("scaled to 8 bits",)),
        (see_through, {(0, 0): RED}, ("transparency dropped, as the model is given it",)),
        (palette, {(0, 0): (0, 0, 255), (3, 3): RED}, ("transparency dropped, as the model is given it",)),
    ],
)
def test_every_verb_is_given_the_same_picture(tmp_path, make, pixels, notes):
    """What `visualize` shows is what `finetune` reads, from a file, from bytes and from an open image."""
    make(tmp_path / "a.png")
    shown = load_image(tmp_path / "a.png")
    assert shown.notes == notes
    assert {place: shown.pixels.getpixel(place) for place in pixels} == pixels
    with Image.open(tmp_path / "a.png") as opened:
        read = [open_image("a.png", tmp_path), open_image((tmp_path / "a.png").read_bytes()), open_image(opened)]
    for image in read:
        assert (image.mode, image.size, image.tobytes()) == ("RGB", shown.pixels.size, shown.pixels.tobytes())
    assert _size("a.png", tmp_path) == shown.pixels.size  # what `profile --from-data` counts


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(tmp_path, orientation):
    for ending in ("png", "jpg", "tiff"):
        path = tmp_path / f"a.{ending}"
        turned(path, orientation)
        with Image.open(path) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        found = load_image(path).pixels
        assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())
        assert image_size(path) == expected.size
        with Image.open(path) as image:
            assert as_rgb(image).tobytes() == expected.tobytes()
        assert as_rgb(found).tobytes() == found.tobytes()  # nothing is turned twice


def test_profile_counts_the_tiles_of_the_upright_picture(tmp_path):
    from pmod_cli.profiling import Sizes
    from pmod_cli.profiling.average import read_rows
    from pmod_cli.profiling.subject import load_subject

    sizes = Sizes.of(load_subject("llava-next-7b").stock)
    stored = Image.new("RGB", (1600, 400))
    stored.save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "tall.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Grey."}]
    names = ("wide.png", "turned.png", "tall.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    wide, upright, tall = read_rows(tmp_path / "rows.json", None, sizes, len)
    assert upright == tall != wide


def test_damaged_tags_lose_no_picture(tmp_path):
    Image.new("RGB", (30, 10), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 30)
    assert load_image(tmp_path / "a.jpg").pixels.size == (30, 10)


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.float32, [-1.0, 0.0, 1.0], [0, 128, 255]),
        (np.float32, [np.nan, 0.0, np.inf], [0, 0, 0]),
        (np.int32, [0, 100, 255], [0, 100, 255]),
        (np.int32, [0, 25700, 65535], [0, 100, 255]),
        (np.int32, [0, 100_000, 200_000], [0, 128, 255]),
    ],
)
def test_deep_pictures_are_scaled_by_what_they_hold(tmp_path, dtype, values, expected):
    Image.fromarray(np.array([values], dtype=dtype)).save(tmp_path / "deep.tiff")
    assert np.asarray(load_image(tmp_path / "deep.tiff").pixels)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("L", 76), ("1", 1), ("LA", (76, 255))])
def test_other_modes_become_rgb(tmp_path, mode, colour):
    Image.new(mode, (5, 3), colour).save(tmp_path / "picture.tiff")
    loaded = load_image(tmp_path / "picture.tiff")
    assert (loaded.pixels.mode, loaded.pixels.size, loaded.notes) == ("RGB", (5, 3), ())
    if mode == "CMYK":
        red, green, blue = loaded.pixels.getpixel((0, 0))
        assert red > 200 > 60 > max(green, blue)


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff", "png"])
def test_first_frame_of_an_animation(tmp_path, kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"moving.{kind}", save_all=True, append_images=frames[1:], **options)
    loaded = load_image(tmp_path / f"moving.{kind}")
    assert loaded.pixels.getpixel((0, 0)) == RED
    assert loaded.notes == ("first of several frames",)


def test_the_pictures_of_a_folder_are_the_files_that_pillow_opens(tmp_path):
    for name in ("b.png", "a.JPG", "paper.pdf", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.JPG", "b.png"]


def test_bad_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("this is no picture")
    with pytest.raises(PmodError, match=r"words\.png is not an image"):
        load_image(tmp_path / "words.png")
    for name in ("none.png", "x" * 300, "a\0b", "\udcff"):
        with pytest.raises(PmodError, match="no such image file"):
            load_image(tmp_path / name)
    with pytest.raises(PmodError, match="this is a folder, expected image file"):
        load_image(tmp_path)

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval's tasks leave it
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("whole.png", "whole.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        half = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(half[: len(half) // 2])
        with pytest.raises(PmodError, match="cannot be decoded"):
            load_image(tmp_path / f"half-{name}")


@pytest.mark.parametrize("theirs", [None, 10**9])
def test_a_huge_picture_is_refused_whatever_others_allow(tmp_path, monkeypatch, theirs):
    """lmms-eval's tasks raise Pillow's bound for the whole process; None switches it off."""
    Image.new("1", (MOST_PIXELS // 1000 + 1, 1000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
    for read in (load_image, image_size):
        with pytest.raises(PmodError, match=r"bomb\.png has more than 89 megapixels"):
            read(tmp_path / "bomb.png")


def test_postscript_starts_no_other_program(tmp_path):
    """Pillow would hand it to Ghostscript, by its content and whatever its name says."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(PmodError, match=r"a\.png is PostScript"):
        load_image(tmp_path / "a.png")
