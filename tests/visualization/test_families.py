"""Pictures of the families that take several images and films: which token lies where, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pmod_cli import cli, visualization
from pmod_cli.checkpoints import convert, load_model
from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import LoadedImage
from pmod_cli.core.videos import Video
from pmod_cli.data.conversation import from_messages
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.evaluation import prompts
from pmod_cli.model import PmodSettings
from pmod_cli.visualization.prompt import prepare
from tests.visual_processors import KINDS, save_interleave, save_stock

SETTINGS = PmodSettings(schedule="list", values=(1.0, 0.5, 0.3, 0.15))
QWEN = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=KINDS)
def ready(request, tmp_path_factory):
    """A p-MoD checkpoint of each family, loaded too."""
    folder = tmp_path_factory.mktemp(request.param)
    convert(save_stock(folder / "stock", request.param), folder / "routed", SETTINGS)
    model, processor = load_model(folder / "routed", dtype="float32")
    return request.param, folder, model, processor


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def lit(image, box):
    """The image, black but for one box."""
    pixels = np.zeros_like(np.asarray(image))
    x0, y0, x1, y1 = (round(edge) for edge in box)
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def pixel_change(processor, model, image, box):
    """For Qwen-VL: which vision tokens see a box, read from the patches that change with it."""
    seen = []
    for picture in (Image.new("RGB", image.size), lit(image, box)):
        pixels = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        seen.append(pixels.reshape(-1, 4 * pixels.shape[1]))  # a cell of 2 x 2 patches a token
    return (seen[0] != seen[1]).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [(24, 16), (16, 24), (20, 20)])
def test_a_token_of_native_resolution_lies_where_its_patches_change(ready, size):
    kind, _, model, processor = ready
    if kind not in QWEN:
        pytest.skip("its tiles are tested in test_geometry")
    image = noise(*size)
    _, (shown,) = prepare(model, processor, [image], "what?")
    boxes = shown.layout.boxes()
    assert shown.layout.size == len(boxes) > 4
    for token in (0, len(boxes) // 2, len(boxes) - 1):
        x0, y0, x1, y1 = boxes[token]
        middle = ((3 * x0 + x1) / 4, (3 * y0 + y1) / 4, (x0 + 3 * x1) / 4, (y0 + 3 * y1) / 4)
        assert token in pixel_change(processor, model, image, middle)


def test_a_picture_of_many_tiles_lies_in_as_few_cells_as_its_processor_says(tmp_path):
    """Four tiles of LLaVA-OneVision pooled to one: the model takes as many placeholders, each at a place of its own."""
    stock = save_stock(tmp_path / "stock", "llava_onevision")
    for file in ("config.json", "processor_config.json"):
        said = json.loads((stock / file).read_text())
        (stock / file).write_text(json.dumps(said | {"vision_aspect_ratio": "anyres_max_1"}))
    convert(stock, tmp_path / "routed", SETTINGS)
    model, processor = load_model(tmp_path / "routed", dtype="float32")
    inputs, (shown,) = prepare(model, processor, [noise(16, 16)], "what?")
    assert shown.layout.size == 16 + 4 * 5  # the base image, and 8 x 8 patches of four tiles made 4 x 4
    with torch.no_grad():
        model(**inputs)  # which refuses another number


def test_several_images_are_a_record_each_and_together_the_row(ready):
    _, _, model, processor = ready
    pictures = [LoadedImage(noise(16, 12)), LoadedImage(noise(24, 16, 1))]
    records = visualization.select_together(model, processor, pictures, "which?", max_new_tokens=2)
    assert [record.image.size for record in records] == [(16, 12), (24, 16)]
    assert records[0].notes == ("picture 1 of 2 in the prompt",)
    inputs, _ = prepare(model, processor, [picture.pixels for picture in pictures], "which?")
    from pmod_cli.visualization.recording import run

    kept, _, routed, _, _ = run(model, inputs)
    spare = kept.shape[1] - sum(record.layout.size for record in records)
    assert spare in (0, 2)  # the ends of LLaVA-OneVision's pictures lie nowhere
    for layer in np.flatnonzero(routed):
        assert 0 <= kept[layer].sum() - sum(int(record.kept[layer].sum()) for record in records) <= spare
    assert len({record.answer for record in records}) == 1


def test_several_pictures_whose_tiles_are_no_whole_patches_lie_where_they_are_seen(ready, monkeypatch):
    """Four patches of 2 see 8 of 9 pixels of a tile: light on what the last one sees changes what it is given."""
    kind, _, model, processor = ready
    if kind != "llava_onevision":
        pytest.skip("others see several images as they see one")
    monkeypatch.setattr(model.config.vision_config, "image_size", 9)
    monkeypatch.setattr(processor.image_processor, "size", type(processor.image_processor.size)(height=9, width=9))
    image = noise(90, 60)
    boxes = prepare(model, processor, [image, image], "what?")[1][0].layout.boxes()
    x0, y0, x1, y1 = boxes[7]  # at the right, in the second row
    assert (x0, x1, y1) == (60, 80, 25)  # of 10 pixels a pixel of the tile, the picture padded by 15 above and below
    given = processor.image_processor(images=[[lit(image, (x0, y0, x1, y1))] * 2], return_tensors="pt")
    tile = given["pixel_values"][0, 0, 0]
    assert (tile[2:4, 6:8] > 0.9).all()
    assert tile[2:4, 8].max() < 0.9


def test_a_film_is_a_strip_whose_cells_are_its_tokens(ready):
    """A frame is lit; only features of its tokens change, and these lie in its part of the strip."""
    kind, _, model, processor = ready
    frames = np.random.default_rng(0).integers(0, 255, (8, 16, 24, 3), dtype=np.uint8)
    other = frames.copy()
    changed, groups = (2, 3), 4 if kind in QWEN else 8
    other[list(changed)] = 255 - other[list(changed)]
    shown, features = [], []
    for pixels in (frames, other):
        inputs, (found,) = prepare(model, processor, Video(pixels, 2.0), "what happens?")
        shown.append(found)
        given = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw") if name in inputs}
        with torch.no_grad():
            made = model.get_video_features(**given, return_dict=True).pooler_output
        features.append(torch.cat([each.reshape(-1, each.shape[-1]) for each in made]))
    layout, order = shown[0].layout, shown[0].tokens
    assert (layout.frames, shown[0].image.size) == (groups, (24 * groups, 16))
    moved = ((features[0] - features[1]).abs().max(dim=1).values > 1e-4).numpy()[order]
    boxes = layout.boxes()
    places = set(((boxes[moved][:, 0] + boxes[moved][:, 2]) / 2 // 24).astype(int).tolist())
    assert places == ({1} if kind in QWEN else set(changed))
    record = visualization.select_together(model, processor, Video(frames, 2.0), "what happens?", max_new_tokens=0)[0]
    figure = visualization.draw(record, [1, 2], "kept")
    assert figure.get_size_inches()[0] > 6.5  # a layer a line, since a strip is wide


@pytest.mark.parametrize("count", [3, 5, 7])
def test_an_odd_film_shows_the_frames_that_its_tokens_are_of(ready, count):
    """The frame that a part of the strip shows is lit: pixels change in that part's group of patches alone."""
    kind, _, model, processor = ready
    if kind not in QWEN:
        pytest.skip("its frames have tokens of their own")
    frames = np.random.default_rng(0).integers(0, 255, (count, 16, 24, 3), dtype=np.uint8)
    inputs, (shown,) = prepare(model, processor, Video(frames, 2.0), "what happens?")
    pixels, groups = inputs["pixel_values_videos"], shown.layout.frames
    assert groups == count // 2 + 1
    for group, seen in enumerate(np.split(np.asarray(shown.image), groups, axis=1)):
        lit = np.where((frames == seen).all(axis=(1, 2, 3), keepdims=True), 255, frames).astype(np.uint8)
        changed = prepare(model, processor, Video(lit, 2.0), "what happens?")[0]["pixel_values_videos"] != pixels
        assert changed.reshape(groups, -1).any(dim=1).tolist() == [other == group for other in range(groups)]


def test_the_command_draws_several_images_rows_and_films(ready, workdir, capsys):
    _, folder, _, _ = ready
    for name, seed in (("a", 0), ("b", 1)):
        noise(24, 16, seed).save(workdir / f"{name}.png")
    (workdir / "clip").mkdir()
    for number in range(3):
        noise(16, 16, number).save(workdir / "clip" / f"{number}.png")
    rows = [
        {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image>\n<image>\nwhich?"}]},
        {"video": "clip", "conversations": [{"from": "human", "value": "<video>\nwhat?"}]},
    ]
    (workdir / "rows.json").write_text(json.dumps(rows))
    model = ["-m", str(folder / "routed"), "--device", "cpu", "--max-new-tokens", "2", "--layers", "1"]
    assert cli.main(["visualize", "a.png", "b.png", "--together", *model, "-o", "two"]) == 0
    assert {path.name for path in (workdir / "two").glob("*.png")} == {"a-pmod.png", "b-pmod.png"}
    assert (
        cli.main(["visualize", "clip", "--video", *model, "--layers", "1,3", "-o", "film.png", "--html", "--npz"]) == 0
    )
    assert visualization.load_npz(workdir / "film.npz").image.size[1] == 16
    capsys.readouterr()
    assert cli.main(["visualize", "rows.json", *model, "-o", "rows", "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [image["question"] for image in images] == ["which?", "which?", "what?"]
    words = ["a.png", "b.png", "--together", "--against"]
    assert cli.main(["visualize", *words, "random", *model, "-o", "against"]) == 0
    assert cli.main(["visualize", *words, str(folder / "stock"), *model, "-o", "stock"]) == 2
    assert "one picture alone" in capsys.readouterr().err
    assert cli.main(["visualize", "a.png", "--against", str(folder / "stock"), *model, "-o", "one.png"]) == 0


def test_what_the_processor_refuses_leaves_the_others(ready, workdir, capsys):
    """Qwen-VL takes no picture whose sides are more than 200 : 1; a mark in the question is no place of a film."""
    kind, folder, _, processor = ready
    for name, size in (("a", (24, 16)), ("b", (900, 2)), ("c", (16, 24))):
        noise(*size).save(workdir / f"{name}.png")
    model = ["-m", str(folder / "routed"), "--device", "cpu", "--max-new-tokens", "0", "--layers", "1"]
    refused = "b.png: the model's processor refuses this input: absolute aspect ratio"
    code = cli.main(["visualize", "a.png", "b.png", "c.png", *model, "-o", "drawn"])
    told, drawn = " ".join(capsys.readouterr().err.split()), {path.name for path in (workdir / "drawn").iterdir()}
    assert (code, refused in told) == ((3, True) if kind in QWEN else (0, False))
    assert drawn - {"b-pmod.png"} == {"a-pmod.png", "c-pmod.png", "statistics.json"}
    assert ("b-pmod.png" in drawn) == (kind not in QWEN)
    if kind in QWEN:
        assert cli.main(["visualize", "b.png", *model, "-o", "b-pmod.png"]) == 2
        assert cli.main(["visualize", "b.png", "b.png", *model, "-o", "none"]) == 2
        assert refused in " ".join(capsys.readouterr().err.split())
        assert not (workdir / "b-pmod.png").exists()
        assert not (workdir / "none").exists()
    mark = processor.video_token
    assert cli.main(["visualize", "a.png", "--question", f"what is {mark}?", *model, "-o", "q.png"]) == 2
    assert f"the question holds {mark}" in " ".join(capsys.readouterr().err.split())


def test_a_film_of_one_frame_is_drawn(ready):
    _, _, model, processor = ready
    frame = np.random.default_rng(0).integers(0, 255, (1, 16, 24, 3), dtype=np.uint8)
    record = visualization.select_together(model, processor, Video(frame, 2.0), "what?", max_new_tokens=0)[0]
    assert (record.layout.frames, record.image.size) == (1, (24, 16))


def test_a_film_for_a_model_of_images_alone_is_refused(stock_model, workdir):
    convert(stock_model(), workdir / "routed", SETTINGS)
    model, processor = load_model(workdir / "routed", dtype="float32")
    with pytest.raises(PmodError, match="takes images alone"):
        visualization.select_together(model, processor, Video(np.zeros((2, 8, 8, 3), np.uint8), 1.0), "what?")


def test_llava_interleave_sees_several_images(tmp_path):
    """A LLaVA-1.5 whose processor squashes and does not crop: rows for training, questions and pictures agree."""
    convert(save_interleave(tmp_path / "stock"), tmp_path / "routed", SETTINGS)
    model, processor = load_model(tmp_path / "routed", dtype="float32")
    pictures = [noise(16, 12), noise(24, 16, 1)]
    records = visualization.select_together(model, processor, list(map(LoadedImage, pictures)), "which?")
    assert [record.layout.size for record in records] == [16, 16]
    row = {"messages": [{"role": "user", "content": "<image><image>which?"}, {"role": "assistant", "content": "a"}]}
    encoded = RowEncoder(processor)(from_messages({**row, "images": pictures}))
    asked = prompts.prepare(processor, 0, "which?", pictures, "llava").inputs
    assert torch.equal(encoded["pixel_values"], asked["pixel_values"])
    length = len(asked["input_ids"])
    assert (
        encoded["input_ids"][: length - 1].tolist() == asked["input_ids"][:-1].tolist()
    )  # "assistant\n" or "assistant "
    with torch.no_grad():
        model(input_ids=encoded["input_ids"][None], pixel_values=encoded["pixel_values"])
