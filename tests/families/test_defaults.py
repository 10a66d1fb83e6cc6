"""What a config.json leaves out is what transformers' own classes say."""

from pathlib import Path

import pytest
import transformers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen3VLTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pmod_cli import families
from pmod_cli.checkpoints.layouts.shapes import decoder_shapes, tower_shapes
from pmod_cli.core.errors import PmodError
from pmod_cli.families import DECODERS, FAMILIES, TOWERS
from pmod_cli.profiling import Sizes
from tests import factories

CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen2_5_vl_text": Qwen2_5_VLTextConfig,
    "qwen3_vl_text": Qwen3VLTextConfig,
}
TOWER_CONFIGS = {"clip_vision_model": CLIPVisionConfig, "siglip_vision_model": SiglipVisionConfig}


def test_a_family_is_one_file_of_at_most_two_hundred_lines():
    folder = Path(families.__file__).parent
    lines = {name: len((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in FAMILIES}
    assert {name: count for name, count in lines.items() if count > 200} == {}


def test_every_decoder_and_tower_is_written_down():
    assert set(DECODERS) == set(CONFIGS)
    assert set(TOWERS) == set(TOWER_CONFIGS)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((DECODERS[kind].defaults, CONFIGS[kind]) for kind in CONFIGS),
        *((TOWERS[kind].defaults, TOWER_CONFIGS[kind]) for kind in TOWER_CONFIGS),
    ],
)
def test_defaults_of_a_part(ours, theirs):
    whole = theirs().to_dict()
    assert {key: whole.get(key) for key in ours if ours[key] is not None} == {
        key: value for key, value in ours.items() if value is not None
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_defaults_of_the_whole(family):
    whole = getattr(transformers, f"{family.classes}Config")().to_dict()
    for key, value in family.defaults.items():
        there = whole[key]
        assert value == ({name: there[name] for name in value} if isinstance(value, dict) else there), key


SAID = [{}, {"num_attention_heads": 64, "hidden_size": 8192}, {"head_dim": None}]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (kind, said)
        for kind in CONFIGS
        for said in SAID
        if "head_dim" not in said or DECODERS[kind].defaults["head_dim"] is None  # else it is a number, never null
    ],
)
def test_what_follows_from_what_is_said(kind, said):
    theirs = CONFIGS[kind](**said)
    config = {"model_type": "llava", "text_config": {"model_type": kind, **said}}
    sizes = Sizes.of(config)
    assert sizes == Sizes.of({"model_type": "llava", "text_config": theirs.to_dict()})
    assert sizes.decoder.kv_heads == theirs.num_key_value_heads
    shapes = decoder_shapes(config["text_config"], "config.json")
    assert shapes == decoder_shapes(theirs.to_dict(), "config.json")
    assert shapes["language_model.model.layers.0.self_attn.k_proj.weight"][0] == (
        sizes.decoder.kv_heads * sizes.decoder.head_size
    )


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_null_that_transformers_refuses_is_refused(kind):
    with pytest.raises(PmodError, match="num_key_value_heads is None"):
        decoder_shapes({"model_type": kind, "num_key_value_heads": None}, "config.json")


def test_a_decoder_or_tower_of_a_hundred_million_layers_is_refused():
    for config in (
        {"text_config": {"num_hidden_layers": 10**8}},
        {"vision_config": {"num_hidden_layers": 10**8, "model_type": "clip_vision_model"}},
    ):
        with pytest.raises(PmodError, match="num_hidden_layers is more than 1,000"):
            Sizes.of({"model_type": "llava", **config})
    with pytest.raises(PmodError, match="num_hidden_layers is more than 1,000"):
        decoder_shapes({"num_hidden_layers": 10**8}, "config.json")


@pytest.mark.parametrize("kind", TOWER_CONFIGS)
def test_shapes_of_a_tower(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"image_size": 32, "patch_size": 8}
    if kind == "clip_vision_model":
        tower = factories.model("llava").model.vision_tower
        vision = tower.config.to_dict()
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
        vision = sizes | {"model_type": kind}
    theirs = {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    ours = {name.removeprefix("vision_tower."): shape for name, shape in tower_shapes(vision, "config.json").items()}
    assert ours == theirs
