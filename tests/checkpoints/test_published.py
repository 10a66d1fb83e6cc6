"""The published p-MoD layout: golden checkpoints give the golden logits, go back bit by bit, and settings are exact."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.checkpoints.files import read_tensors
from pmod_cli.checkpoints.layouts.published_settings import published_ratios, read_settings, write_settings
from pmod_cli.core.errors import PmodError
from pmod_cli.families.llava_next import PINPOINTS
from pmod_cli.model import PmodLlavaForConditionalGeneration, PmodLlavaNextForConditionalGeneration, PmodSettings
from tests.model.published import GOLDEN, PLACEHOLDER, golden, info

PUBLISHED = Options(to="published")
MODELS = {"llava15": PmodLlavaForConditionalGeneration, "next": PmodLlavaNextForConditionalGeneration}
FIELDS = {
    "mod_target_layers": "shiftedcos_decay_0.85_0.15",
    "mod_router_factor": 0.5,
    "mod_weight_norm": "tanh_0.2_1",
    "mod_target_token_type": "vision_all",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Both golden checkpoints in our layout, by case."""
    root = tmp_path_factory.mktemp("golden")
    for case in MODELS:
        report = convert(GOLDEN / case / "ckpt", root / case)
        assert (report.layout, report.router_state) == ("published", "trained")
        assert report.settings == PmodSettings(shift=0.5).to_dict()
    return root


@pytest.mark.parametrize(("case", "prefix"), [("llava15", "single"), ("next", "single0")])
def test_golden_logits_and_generation(case, prefix, converted):
    model, loading = MODELS[case].from_pretrained(converted / case, output_loading_info=True)
    assert not any(loading.values())
    image, inputs = model.config.image_token_id, golden(case, "inputs")
    if case == "next":
        tiles = inputs["pixel_values.0"]
        pixels = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, 5 - len(tiles)))[None]
        images = {"pixel_values": pixels, "image_sizes": inputs["image_sizes_wh"].flip(1)[:1]}
        count = info(case)["sdpa"]["single0.vision_tokens"]
    else:
        images, count = {"pixel_values": inputs["pixel_values"][:1]}, 36
    row = inputs[f"{prefix}.input_ids"][0].tolist()
    ids = torch.tensor([[i for token in row for i in ([image] * count if token == PLACEHOLDER else [token])]])
    expected = golden(case)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, **images).logits
    torch.testing.assert_close(logits[..., :128], expected[f"{prefix}.logits"], atol=1e-4, rtol=0)
    written = model.generate(input_ids=ids, **images, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert written[:, ids.shape[1] :].tolist() == expected[f"{prefix}.gen_ids"].tolist()


@pytest.mark.parametrize("case", MODELS)
def test_back_to_the_published_layout(case, converted, tmp_path):
    convert(converted / case, tmp_path / "back", options=PUBLISHED)
    before, after = (
        load_file(GOLDEN / case / "ckpt" / "model.safetensors"),
        load_file(tmp_path / "back/model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    first, second = (json.loads((f / "config.json").read_text()) for f in (GOLDEN / case / "ckpt", tmp_path / "back"))
    assert first == second
    convert(tmp_path / "back", tmp_path / "again")
    ours = load_file(converted / case / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert ours.keys() == again.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_stock_and_published_round_trip(stock_model, tmp_path):
    source = stock_model("llava_next", "llama", layers=32)
    convert(source, tmp_path / "pmod", PmodSettings(shift=0.4, norm="sigmoid"))
    convert(tmp_path / "pmod", tmp_path / "stock", options=Options(to="stock"))
    convert(tmp_path / "pmod", tmp_path / "published", options=PUBLISHED)
    report = convert(tmp_path / "published", tmp_path / "back")
    assert (report.settings["shift"], report.settings["norm"]) == (0.4, "sigmoid_1_1")
    assert report.router_state == "untrained"  # the layout does not say it, zeros do
    convert(tmp_path / "back", tmp_path / "back-stock", options=Options(to="stock"))
    before = load_file(source / "model.safetensors")
    for folder in ("stock", "back-stock"):
        tensors = read_tensors(tmp_path / folder)
        assert len(tensors) == len(before)
        file = next(iter(tensors.values())).path
        after = {n.replace("vision_tower.vision_model.", "vision_tower."): t for n, t in load_file(file).items()}
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert (tmp_path / "stock" / "model-00001-of-00001.safetensors").samefile(source / "model.safetensors")
    published = json.loads((tmp_path / "published" / "config.json").read_text())
    assert published["mod_target_layer_indices"] == report.routed_layers
    assert published["mm_vision_tower"] == "vision_tower"


def test_a_model_without_a_head_of_its_own_stays_tied(stock_model, tmp_path):
    """Its config says so at the top, and the published one is flat."""
    shutil.copytree(stock_model("llava_next"), tmp_path / "source")
    config, weights = tmp_path / "source" / "config.json", tmp_path / "source" / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(weights)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    every_second = PmodSettings(schedule="list", values=(1.0, 0.5, 1.0, 0.5))
    convert(tmp_path / "source", tmp_path / "published", every_second, PUBLISHED)
    assert json.loads((tmp_path / "published" / "config.json").read_text())["tie_word_embeddings"]
    convert(tmp_path / "published", tmp_path / "back")
    model, _ = load_model(tmp_path / "back")
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("layers", "factor", "num_layers", "schedule"),
    [
        ("shiftedcos_decay_0.85_0.15", 0.5, 32, "cosine"),
        ("shiftedlinear_decay_0.9_0.1", 0.45, 32, "linear"),
        ("shiftedcos_decay_0.85_0.15", 0.5, 40, "list"),  # the published code has 31 for L - 1 written into it
        ("interleave", 0.3, 32, "list"),
        ("deep_all", 0.53, 32, "list"),
        ("deep_all_include_last", 0.5, 24, "list"),
    ],
)
def test_schedules_are_read_and_written_exactly(layers, factor, num_layers, schedule):
    fields = FIELDS | {"mod_target_layers": layers, "mod_router_factor": factor}
    settings = read_settings(fields, num_layers, "config.json")
    assert settings.schedule == schedule
    ratios = published_ratios(layers, factor, num_layers)
    assert settings.retention(num_layers) == pytest.approx(ratios, abs=1e-12)
    if not (num_layers == 40 and schedule == "list"):
        written = write_settings(settings, num_layers)
        assert {key: written[key] for key in fields} == fields
        assert written["mod_target_layer_indices"] == [i for i, ratio in enumerate(ratios) if ratio < 1]


@pytest.mark.parametrize(
    ("norm", "read"),
    [
        ("tanh_0.2_1", ("tanh", 0.2, 1.0)),
        ("tanh", ("tanh", 1.0, 1.0)),
        ("softmax", ("softmax", 1.0, 1.0)),
        ("sigmoid_0.5_-1", ("sigmoid", 0.5, -1.0)),
        ("none", ("none", 1.0, 1.0)),
    ],
)
def test_norms_are_read_and_written_exactly(norm, read):
    settings = read_settings(FIELDS | {"mod_weight_norm": norm}, 32, "config.json")
    assert settings.weight_norm == read
    assert read_settings(write_settings(settings, 32), 32, "config.json").weight_norm == read


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"mod_target_layers": "deep_half"}, "mod_target_layers is 'deep_half'"),
        ({"mod_router_factor": "0.5"}, "mod_router_factor '0.5'"),
        ({"mod_target_token_type": "all"}, "mod_target_token_type is 'all'"),
        ({"mod_weight_norm": "relu_1_1"}, "norm must be one of"),
        ({"mod_target_layers": "interleave", "mod_router_factor": 1.5}, "within 0 ... 1"),
    ],
)
def test_unknown_fields_are_refused(values, told):
    with pytest.raises(PmodError) as caught:
        read_settings(FIELDS | values, 32, "config.json")
    assert told in caught.value.what


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (PmodSettings(string=False), "string=False"),
        (PmodSettings(schedule="stepped"), "this schedule over 32 layers"),
        (PmodSettings(schedule="constant"), "this schedule over 32 layers"),
        (PmodSettings(shift=0.3), "a router in layer 0"),
        (PmodSettings(quota="per_image"), "`quota=per_image`"),
        (PmodSettings(target_tokens="vision_video"), "`target_tokens=vision_video`"),
    ],
)
def test_what_the_published_code_cannot_do_is_refused(settings, told):
    with pytest.raises(PmodError) as caught:
        write_settings(settings, 32)
    assert told in caught.value.what


@pytest.mark.parametrize(
    "settings",
    [
        PmodSettings(alpha=0.123456789),
        PmodSettings(alpha=1e-5),
        PmodSettings(norm="sigmoid_0.00001_-1.23456789"),
        PmodSettings(max_ratio=1, min_ratio=1e-5),
        PmodSettings(target_tokens="vision_image"),
    ],
)
def test_what_is_written_reads_back_as_it_was(settings):
    """All digits of a number, none as an exponent; and tokens by a name that the published code has."""
    again = read_settings(write_settings(settings, 32), 32, "config.json")
    assert again.weight_norm == settings.weight_norm
    assert again.retention(32) == settings.retention(32)
    assert again.target_tokens == "vision_all"


def test_a_config_that_leaves_defaults_out(stock_model, tmp_path):
    """As `save_pretrained` of transformers 4 writes it: what is as in every model of the family is not said."""
    source, settings = tmp_path / "source", PmodSettings(schedule="list", values=(1.0, 0.4, 1.0, 0.4))
    shutil.copytree(stock_model(), source)
    config = json.loads((source / "config.json").read_text())
    for key in ("image_grid_pinpoints", "vision_feature_layer", "vision_feature_select_strategy"):
        del config[key]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "published", settings, PUBLISHED)
    written = json.loads((tmp_path / "published" / "config.json").read_text())
    assert written["image_grid_pinpoints"] == [[width, height] for height, width in PINPOINTS]


def test_a_router_without_bias_gets_a_zero_one(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    weights = load_file(GOLDEN / "llava15" / "ckpt" / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("router.bias")}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((GOLDEN / "llava15" / "ckpt" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mod_bias_enabled": False}))
    options = replace(Options(), vision_tower=str(GOLDEN / "llava15" / "vision_tower"))
    convert(source, tmp_path / "pmod", options=options)
    model = PmodLlavaForConditionalGeneration.from_pretrained(tmp_path / "pmod")
    routers = [layer.router for layer in model.model.language_model.layers if layer.router is not None]
    assert all(router.weight.any() and not router.bias.any() for router in routers)


def test_settings_of_its_own_are_kept(converted, tmp_path):
    with pytest.raises(PmodError, match="settings that its routers were made for"):
        convert(GOLDEN / "llava15" / "ckpt", tmp_path / "pmod", PmodSettings(shift=0.4))


def test_a_model_saved_by_training_goes_to_every_layout(stock_model, tmp_path):
    """Its routers lie in the shards, between stock weights."""
    every_second = PmodSettings(schedule="list", values=(1.0, 0.4, 1.0, 0.4))
    convert(stock_model(), tmp_path / "pmod", every_second, Options(router_init="normal:0.1"))
    model, processor = load_model(tmp_path / "pmod")
    model.config.router_state = "trained"
    model.save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    processor.save_pretrained(tmp_path / "tuned")
    before = load_file(stock_model() / "model.safetensors")
    report = convert(tmp_path / "tuned", tmp_path / "stock", options=Options(to="stock", verify=True))
    assert report.linked  # shards without a router stay as they are
    assert report.streamed
    read = read_tensors(tmp_path / "stock")
    assert read.keys() == before.keys()
    after, _ = load_model(tmp_path / "stock")
    stock, _ = load_model(stock_model())
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), stock.state_dict().values(), strict=True))
    report = convert(tmp_path / "tuned", tmp_path / "published", options=PUBLISHED)
    assert report.router_state == "trained"
    convert(tmp_path / "published", tmp_path / "back")
    again, _ = load_model(tmp_path / "back")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tower_that_is_no_hub_id_is_written_whole(stock_model, tmp_path):
    """Config, weights and preprocessor of a CLIP, as `from_pretrained` of the published code's tower wants them."""
    settings = PmodSettings(schedule="list", values=(1.0, 0.4, 1.0, 0.4))
    report = convert(stock_model("llava"), tmp_path / "published", settings, replace(PUBLISHED, dtype="float16"))
    assert any("there is no tokenizer.model" in note for note in report.notes)
    tower, folder = load_model(stock_model("llava"))[0].model.vision_tower, tmp_path / "published" / "vision_tower"
    written, loading = CLIPVisionModel.from_pretrained(folder, output_loading_info=True, dtype="float16")
    assert not any(loading.values())
    expected = tower.half().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.state_dict().items())
    assert all(name.startswith("vision_model.") for name in load_file(folder / "model.safetensors"))
    pixels = CLIPImageProcessorPil.from_pretrained(folder)
    ours = load_model(stock_model("llava"))[1].image_processor
    picture = Image.effect_mandelbrot((50, 60), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    assert torch.equal(*(p(picture, return_tensors="pt").pixel_values for p in (pixels, ours)))
    files = [folder / "model.safetensors", *(tmp_path / "published" / name for name in report.streamed)]
    assert report.streamed_bytes == sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def test_the_towers_folder_has_one_name(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llava15", tmp_path / "golden")
    shutil.copytree(tmp_path / "golden" / "ckpt", source)
    (tmp_path / "golden" / "vision_tower").rename(tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "model.safetensors"}))
    convert(source, tmp_path / "pmod", options=Options(vision_tower=str(tmp_path / "model.safetensors")))
    convert(tmp_path / "pmod", tmp_path / "published", options=PUBLISHED)
    assert json.loads((tmp_path / "published/config.json").read_text())["mm_vision_tower"] == "vision_tower"
    assert (tmp_path / "published" / "vision_tower" / "model.safetensors").is_file()
    assert (tmp_path / "published" / "model.safetensors").is_file()
