"""A decoder and a model family from outside the package: each is used through the command line.

The decoder (Qwen3) comes by a call, the family (ViP-LLaVA) by the entry point of a package.
"""

import json
import shutil

import pytest
import torch
from PIL import Image

from pmod_cli import cli, families
from pmod_cli.checkpoints import load_model
from pmod_cli.checkpoints.layouts.shapes import decoder_shapes
from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES, DecoderKind, register_decoder
from pmod_cli.families.decoders import QKVO
from tests import factories

PACKAGE = '''\
"""ViP-LLaVA: LLaVA-1.5 whose projector takes five layers of the tower, behind a norm."""

from pmod_cli.families import Family, llava

VIPLLAVA = Family(
    name="vipllava",
    title="ViP-LLaVA",
    classes="VipLlava",
    processor="LlavaProcessor",
    defaults={**llava.DEFAULTS, "vision_feature_layer": [-2, -5, -8, -11, 6]},
    image_tokens=llava.image_tokens,
    pixel_inputs=llava.pixel_inputs,
    place_tokens=llava.place_tokens,
    image_processor=llava.image_processor,
    more_shapes=lambda hidden, projector_in: {
        f"multi_modal_projector.projector_layernorm.{name}": (projector_in,) for name in ("weight", "bias")
    },
    small_config={"vision_feature_layer": [-2, -1]},
    small_pixels=llava.LLAVA.small_pixels,
)
'''


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Both are registered, and forgotten after the tests of this file."""
    site = tmp_path_factory.mktemp("site")
    information = site / "toy_family-1.0.dist-info"
    information.mkdir()
    (site / "toy_family.py").write_text(PACKAGE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[pmod_cli.families]\nvipllava = toy_family:VIPLLAVA\n")
    with pytest.MonkeyPatch.context() as patch:
        for registry in (FAMILIES, DECODERS):
            patch.setattr(registry, "_items", dict(registry._items))
        patch.setattr(FAMILIES, "_complete", False)  # as in a new process
        patch.syspath_prepend(site)
        register_decoder(
            DecoderKind(
                "qwen3",
                "Qwen3",
                {
                    "vocab_size": 151936,
                    "intermediate_size": 22016,
                    "num_key_value_heads": 32,
                    "head_dim": 128,
                    "max_position_embeddings": 32768,
                },
                biases={"attention_bias": QKVO},
                head_norms=("self_attn.q_norm", "self_attn.k_norm"),
                sliding_window=4096,
                window_key="use_sliding_window",
            )
        )
        yield


def run(*words) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.parametrize(("kind", "decoder"), [("llava_next", "qwen3"), ("vipllava", "llama")])
def test_through_the_command_line(kind, decoder, outside, workdir, capsys):
    stock = factories.save_stock(workdir / "stock", kind, decoder)
    assert run("convert", stock, "-o", "routed", "--router-init", "normal:1", "--verify", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    family = FAMILIES[kind]
    assert (report["model_type"], report["decoder"]) == (family.routed_name, decoder)
    assert any("bit for bit stock" in line for line in report["verified"])

    assert run("profile", "--model", "routed", "--image-size", "64x32", "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    model, processor = load_model(workdir / "routed")
    assert type(model).__name__ == family.routed_class
    picture = Image.effect_mandelbrot((64, 32), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    inputs = processor(images=picture, text="USER: <image>\nwhat is this? ASSISTANT:", return_tensors="pt")
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert counted["workload"]["padded_length_tokens"] - counted["workload"]["text_tokens"] == vision
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    text = inputs["input_ids"].shape[1] - vision
    kept = [int(torch.tensor(vision) * torch.tensor(ratio)) for ratio in model.config.retention]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [k + text for k in kept]
    words = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert words.shape[1] == inputs["input_ids"].shape[1] + 3

    picture.save(workdir / "picture.png")
    assert run("visualize", "picture.png", "-m", "routed", "-o", "picture-selection.png") == 0
    assert (workdir / "picture-selection.png").stat().st_size > 1000


def test_a_decoder_that_transformers_lacks_is_in_nobodys_way(stock_model, monkeypatch, workdir):
    """Loading any model asked for the classes of all decoders."""
    assert run("convert", stock_model(), "-o", "routed", "--router-init", "normal:1") == 0
    monkeypatch.setattr(DECODERS, "_items", dict(DECODERS._items))
    register_decoder(DecoderKind("later", "OfALaterRelease", {}))
    load_model(workdir / "routed")


def test_an_unknown_decoder_is_a_sentence_in_each_command(stock_model, tmp_path, capsys):
    other = shutil.copytree(stock_model(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["model_type"] = "gpt_bigcode"
    (other / "config.json").write_text(json.dumps(config))
    for command in (("convert", other, "-o", tmp_path / "out"), ("profile", "--model", other)):
        assert run(*command) == 2
        said = capsys.readouterr().err
        assert "gpt_bigcode" in said
        assert "llama, mistral, qwen2" in said
        assert "Traceback" not in said


def test_a_null_that_this_decoder_does_not_take_is_a_sentence(outside):
    with pytest.raises(PmodError, match="head_dim is None, expected a whole number"):
        decoder_shapes({"model_type": "qwen3", "head_dim": None}, "config.json")


def test_two_of_one_name_are_refused():
    with pytest.raises(PmodError, match="there are two of the decoder 'llama'"):
        register_decoder(DecoderKind("llama", "Other", {}))
    assert register_decoder(families.decoders.LLAMA) is DECODERS["llama"]
