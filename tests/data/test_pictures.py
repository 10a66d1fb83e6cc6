"""Pictures of rows: every kind trains or is named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.data.check import check_rows, refuse_bad
from pmod_cli.data.collator import Collator
from pmod_cli.data.conversation import BadRow
from pmod_cli.data.dataset import build_dataset
from pmod_cli.data.pictures import open_image
from tests import factories
from tests.data.rows import said, settings, write
from tests.data.tokenizers import processor_of
from tests.factories import KINDS


def test_llava_15_pads_to_a_square_with_the_mean_colour(tmp_path, pictures):
    processor = processor_of("vicuna_v1", "llava")
    data = build_dataset(settings(write(tmp_path / "rows.json", [said(image="b.png")]), pictures), processor)
    mean = tuple(int(value * 255) for value in processor.image_processor.image_mean)
    square = Image.new("RGB", (70, 70), mean)
    square.paste(Image.open(pictures / "b.png"), (0, (70 - 41) // 2))
    expected = processor.image_processor(images=[square], return_tensors="pt")["pixel_values"]
    assert torch.equal(data[0]["pixel_values"], expected)
    assert data.encoder.processor.image_processor.do_pad  # what is saved with the model


def test_next_cuts_into_tiles_as_its_processor_does(tmp_path, pictures):
    processor = processor_of("vicuna_v1")
    data = build_dataset(settings(write(tmp_path / "rows.json", [said(image="c.png")]), pictures), processor)
    expected = processor.image_processor(images=[Image.open(pictures / "c.png")], return_tensors="pt")
    assert torch.equal(data[0]["pixel_values"], expected["pixel_values"])
    assert data[0]["image_sizes"].tolist() == [[70, 41]]


def save(folder, name, image, **options):
    image.save(folder / name, **options)


def broken_images(folder):
    """File name to what is said about it; None where it is a fine image."""
    picture = Image.effect_noise((300, 300), 80).convert("RGB")
    save(folder, "whole.jpg", picture)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:9000])
    save(folder, "whole.png", picture)
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:9000])
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "empty.jpg").write_bytes(b"")
    save(folder, "bomb.png", Image.new("1", (20000, 20000)))
    save(folder, "cmyk.jpg", picture.convert("CMYK"))
    save(folder, "palette.gif", picture.convert("P"))
    save(folder, "palette.png", picture.convert("P"), transparency=0)
    save(folder, "alpha.png", picture.convert("RGBA"))
    save(folder, "grey.png", picture.convert("L"))
    save(folder, "one.png", Image.new("RGB", (1, 1)))
    save(folder, "long.png", Image.new("RGB", (20000, 10), "red"))
    save(folder, "tall.png", Image.new("RGB", (10, 20000), "red"))
    (folder / "folder.png").mkdir()
    return {
        "cut.jpg": "cut.jpg cannot be decoded",
        "cut.png": "cut.png cannot be decoded",
        "text.jpg": "text.jpg is not an image",
        "empty.jpg": "empty.jpg is not an image",
        "bomb.png": "bomb.png has more than 89 megapixels",
        "folder.png": "folder.png: this is a folder, expected image file",
        "none.png": "no such image: none.png",
        "../secret.png": "../secret.png lies outside the image folder",
        "a/../b.png": "a/../b.png has '..' in it",
        "/etc/secret.png": "/etc/secret.png lies outside the image folder",
        **dict.fromkeys(["cmyk.jpg", "palette.gif", "palette.png", "alpha.png", "grey.png"]),
        **dict.fromkeys(["one.png", "long.png", "tall.png"]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_trains_or_is_named(tmp_path, pictures, kind):
    expected = broken_images(pictures)
    path = write(tmp_path / "rows.json", [said(image=name) for name in expected])
    processor = processor_of("vicuna_v1", kind)
    data = build_dataset(settings(path, pictures), processor)
    report = check_rows(data, None)
    assert report.num_bad == sum(reason is not None for reason in expected.values())
    found = {fault.row: fault.reason for fault in report.bad}
    model = factories.model(kind, vocab_size=len(processor.tokenizer))
    model.config.image_token_index = model.config.image_token_id = processor.image_token_id
    for row, (name, reason) in enumerate(expected.items()):
        if reason is None:
            assert row not in found, (name, found.get(row))
            with torch.no_grad():
                assert model(**Collator(processor)([data[row]])).loss.isfinite()
        else:
            assert reason in found[row]
            with pytest.raises(BadRow) as caught:
                data[row]
            assert caught.value.what.startswith(f"row {row} of {path}: ")
            assert "\n" not in caught.value.what
    with pytest.raises(PmodError, match=r"10 of 18 rows looked at in .*rows.json cannot be used:\n  row 0: cut.jpg"):
        refuse_bad(report)


def test_absolute_names_of_images_are_taken_below_the_image_folder(tmp_path, pictures, monkeypatch):
    """As some tools write them; the folder says what is allowed, and `/` allows all."""
    name = str(pictures / "a.png")
    path = write(tmp_path / "rows.json", [said(image=name), said(image=f"{pictures}/../images/b.png")])
    processor = processor_of("vicuna_v1")
    for folder in (pictures, tmp_path, "/"):
        data = build_dataset(settings(path, folder), processor)
        assert data[0]["pixel_values"].shape[0] == 1
        with pytest.raises(BadRow, match="lies outside"):
            data[1]
    monkeypatch.chdir(tmp_path)
    assert len(build_dataset(settings("rows.json", "images"), processor)[0]["pixel_values"]) == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(BadRow, match=r"a\.png lies outside the image folder .*other"):
        build_dataset(settings(path, tmp_path / "other"), processor)[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_images_are_bad_rows_and_nothing_else(kind):
    """60 images of each kind with bytes changed, lost or cut off, at places of a fixed seed."""
    buffer, random = io.BytesIO(), np.random.default_rng(0)
    Image.effect_noise((40, 30), 90).convert("P" if kind == "GIF" else "RGB").save(buffer, kind)
    outcomes = set()
    for _ in range(60):
        data = bytearray(buffer.getvalue())
        for place in random.integers(0, len(data), 4):
            data[place] = random.integers(0, 256)
        del data[random.integers(len(data) // 2, 2 * len(data)) :]
        try:
            assert open_image(bytes(data)).mode == "RGB"
            outcomes.add("fine")
        except BadRow:
            outcomes.add("bad")
    assert "bad" in outcomes
