"""A checkpoint folder from anybody: its tokenizer, template and image processor cost a sentence, no memory."""

import json

import pytest
from PIL import Image

from pmod_cli import checkpoints, cli
from pmod_cli.data import pictures
from pmod_cli.model import PmodSettings
from tests.factories import KINDS

SETTINGS = PmodSettings(schedule="list", values=(1.0, 0.5, 0.3, 0.15))


@pytest.fixture
def ready(workdir, stock_model):
    """A directory with a p-MoD LLaVA-NeXT, a p-MoD LLaVA-1.5 and a picture."""
    for kind in ("llava_next", "llava"):
        checkpoints.convert(stock_model(kind), workdir / kind, SETTINGS)
    Image.effect_noise((96, 64), 90).convert("RGB").save(workdir / "img.png")
    return workdir


def drawn(capsys, *arguments: object, model: str = "llava_next") -> tuple[int, str]:
    options = ["--model", model, "--device", "cpu", "--max-new-tokens", 0, "--layers", 3, "-o", "a.png"]
    code = cli.main([str(word) for word in ("visualize", "img.png", *options, *arguments)])
    return code, " ".join(capsys.readouterr().err.split())


def change(path, *keys, to) -> None:
    """Set a value anywhere in a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.unlink()  # it may be a hard link
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": "1.0"}', "[" * 100_000, '{"model": {"type": "BPE", "vocab": 7}}', "\0"]
)
def test_a_bad_tokenizer_is_named(ready, capsys, text):
    path = ready / "llava_next" / "tokenizer.json"
    path.unlink()
    path.write_text(text)
    code, message = drawn(capsys)
    assert code == 2
    assert "the tokenizer or the image processor in llava_next cannot be loaded" in message
    assert not (ready / "a.png").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # blocked by the sandbox
        "{% for x in range(10**12) %}x{% endfor %}",  # as well
        "{% if %}",
        "{{ messages[7].content }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
        "{{ messages | nothing }}",
    ],
)
def test_a_template_that_fails_is_named(ready, capsys, template):
    (ready / "llava_next" / "chat_template.jinja").write_text(template)
    code, message = drawn(capsys)
    assert code == 2
    assert "the chat template " in message


@pytest.mark.parametrize(
    ("keys", "to", "what"),
    [
        (("crop_size", "height"), 60_000, "crop_size 60000 in its processor; expected at most 25 megapixels"),
        (("crop_size", "width"), 27, "crop_size 27 in its processor; expected 32, the image_size of its vision_config"),
        (("crop_size", "height"), -1, "crop_size -1 in its processor"),
        (("size", "shortest_edge"), 60_000, "size 60000 in its processor; expected at most 25 megapixels"),
        (("size", "shortest_edge"), 0, "size 0 in its processor"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_of_other_pictures_is_refused(ready, capsys, kind, keys, to, what):
    change(ready / kind / "processor_config.json", "image_processor", *keys, to=to)
    code, message = drawn(capsys, model=kind)
    assert code == 2
    assert what in message


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ([[60_000, 60_000]], "[60000, 60000] in image_grid_pinpoints of its processor"),
        ([[28, -28]], "[28, -28] in image_grid_pinpoints"),
        ([[28]], "[28] in image_grid_pinpoints"),
        (["28"], "'28' in image_grid_pinpoints"),
        ([[28, 28]], "other image_grid_pinpoints in its processor; expected those of its config"),
    ],
)
def test_a_grid_of_other_tiles_is_refused(ready, capsys, to, what):
    change(ready / "llava_next" / "processor_config.json", "image_processor", "image_grid_pinpoints", to=to)
    code, message = drawn(capsys)
    assert code == 2
    assert what in message


@pytest.mark.parametrize("to", [0, -7, 10**9, "7", 2])
def test_another_patch_size_is_refused(ready, capsys, to):
    change(ready / "llava_next" / "processor_config.json", "patch_size", to=to)
    code, message = drawn(capsys)
    assert code == 2
    assert "patch_size" in message


def test_a_strip_that_a_crop_would_blow_up_is_refused(ready, capsys):
    """LLaVA-1.5's stock processor makes the short side as long as a tile before it crops."""
    change(ready / "llava" / "processor_config.json", "image_processor", "size", "shortest_edge", to=56)
    Image.new("RGB", (60_000, 1)).save(ready / "img.png")
    code, message = drawn(capsys, model="llava")
    assert code == 2
    assert "the image processor would make 3,360,000 × 56 pixels of this image before it crops it" in message


def test_a_strip_is_reduced_before_it_is_padded_as_in_training(ready, monkeypatch):
    """LLaVA-1.5 after training pads to a square: of 20,000 × 10 pixels that would be a gigabyte. Here of 500 × 20."""
    monkeypatch.setattr(pictures, "LONGEST_PADDED_SIDE", 100)
    from pmod_cli.visualization import draw, load_image, load_npz, save_npz, select

    Image.effect_noise((500, 20), 90).convert("RGB").save(ready / "img.png")
    model, processor = checkpoints.load_model(ready / "llava")
    record = select(
        model,
        pictures.padding_processor(processor),
        load_image(ready / "img.png"),
        max_new_tokens=0,
        regions=((100.0, 5.0, 200.0, 15.0),),
    )
    expected = pictures.reduced(pictures.open_image("img.png", ready), padded=True)
    assert record.image.tobytes() == expected.tobytes()
    assert record.notes == ("reduced to 100 × 4 before it is padded to a square",)
    (box,) = record.regions
    assert box == (20.0, 1.0, 40.0, 3.0)
    save_npz(record, ready / "a.npz")
    draw(load_npz(ready / "a.npz"), [3])
