"""Every kind of picture comes out RGB and upright; what is no picture is refused in a sentence."""

import numpy as np
import pytest
from PIL import Image, ImageFile

from pmod_cli.core.errors import PmodError
from pmod_cli.visualization.images import load_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_exif_rotation_is_undone(tmp_path):
    """Orientation 6: the camera was turned, the stored picture's left edge is the true top edge."""
    stored = Image.new("RGB", (30, 10), "blue")
    stored.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    loaded = load_image(tmp_path / "turned.png")
    assert loaded.pixels.size == (10, 30)
    assert loaded.pixels.getpixel((5, 2)) == RED
    assert loaded.notes == ("turned upright by its EXIF tag",)


def test_transparency_is_shown_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    loaded = load_image(tmp_path / "clear.png")
    assert loaded.pixels.getpixel((0, 0)) == WHITE
    assert loaded.notes == ("transparency shown over white",)


def test_palette_with_transparency(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, *RED])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "palette.png", transparency=0)
    loaded = load_image(tmp_path / "palette.png").pixels
    assert loaded.getpixel((0, 0)) == WHITE
    assert loaded.getpixel((3, 3)) == RED


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = load_image(tmp_path / "deep.png")
    assert np.asarray(loaded.pixels)[0, :, 0].tolist() == [0, 100, 255]
    assert loaded.notes == ("scaled to 8 bits",)


def test_float_picture_uses_its_own_range(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)).save(tmp_path / "float.tiff")
    assert np.asarray(load_image(tmp_path / "float.tiff").pixels)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("L", 76), ("1", 1), ("LA", (76, 255))])
def test_other_modes_become_rgb(tmp_path, mode, colour):
    Image.new(mode, (5, 3), colour).save(tmp_path / "picture.tiff")
    loaded = load_image(tmp_path / "picture.tiff")
    assert (loaded.pixels.mode, loaded.pixels.size, loaded.notes) == ("RGB", (5, 3), ())
    if mode == "CMYK":
        red, green, blue = loaded.pixels.getpixel((0, 0))
        assert red > 200 > 60 > max(green, blue)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    loaded = load_image(tmp_path / "moving.gif")
    assert loaded.pixels.getpixel((0, 0)) == RED
    assert loaded.notes == ("first of 3 frames",)


def test_bad_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "words.png").write_text("this is no picture")
    with pytest.raises(PmodError, match=r"words\.png: not an image"):
        load_image(tmp_path / "words.png")
    with pytest.raises(PmodError, match=r"none\.png: no such image file"):
        load_image(tmp_path / "none.png")
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

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # Pillow warns from here on, and refuses at twice that
    with pytest.raises(PmodError, match=r"whole\.png: the image has more than .* megapixels"):
        load_image(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PmodError, match="more than"):
        load_image(tmp_path / "whole.png")
