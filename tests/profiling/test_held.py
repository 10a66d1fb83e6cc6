"""What `profile` counts is held to the weights beside the config.json; without weights, what was assumed is said."""

import json
import random
import shutil
from pathlib import Path

import pytest

from pmod_cli.checkpoints.aliases import bundled_path
from pmod_cli.checkpoints.conversion import convert
from pmod_cli.core.errors import PmodError
from pmod_cli.profiling import Routed, Sizes, Workload, load_subject, prefill, scaled
from tests import factories
from tests.checkpoints.mutations import change as change_anything


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A p-MoD checkpoint of the bundled model."""
    convert(bundled_path(), tmp_path / "pm")
    return tmp_path / "pm"


def change(folder: Path, part: str | None, key: str, value: object) -> None:
    """Set a value of config.json; ... removes it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    holder = config[part] if part else config
    if value is ...:
        del holder[key]
    else:
        holder[key] = value
    file.unlink()  # not through a hard link
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "config.json"])
@pytest.mark.parametrize(
    ("part", "key", "value", "told"),
    [
        ("text_config", "hidden_size", ..., "hidden_size 4096 is no multiple|expected .*4096"),
        ("text_config", "hidden_size", 224, "expected .*224"),
        ("text_config", "num_hidden_layers", 16, "holds decoder layers 0-31, expected 0-15"),
        ("text_config", "num_hidden_layers", 10**8, "num_hidden_layers is more than 1,000"),
        ("text_config", "intermediate_size", ..., "expected .*11008"),
        ("text_config", "vocab_size", 32000, "expected .*32000"),
        ("text_config", "num_key_value_heads", 2, "expected .*56"),
        ("text_config", "head_dim", 56, "expected .*224"),
        ("vision_config", "num_hidden_layers", 4, "encoder.layers.3"),
        ("vision_config", "hidden_size", ..., "expected .*768"),
        ("vision_config", "patch_size", 16, "expected .*16"),
        (None, "vision_config", ..., "less than one tile of 336 x 336"),
        (None, "vision_feature_layer", [-2, -1], "expected .*224"),
        (None, "pmod", {"schedule": "interleaved"}, "holds routers in layers"),
    ],
)
def test_a_config_that_is_not_that_of_its_weights(checkpoint, part, key, value, told, whole):
    change(checkpoint, part, key, value)
    with pytest.raises(PmodError, match=told):
        load_subject(str(checkpoint if whole else checkpoint / "config.json"))


def test_a_default_that_the_weights_confirm_is_no_assumption(checkpoint):
    whole = load_subject(str(checkpoint))
    change(checkpoint, "text_config", "head_dim", ...)
    change(checkpoint, "vision_config", "num_channels", ...)
    short = load_subject(str(checkpoint))
    assert short.assumed == ()
    assert Sizes.of(short.stock) == Sizes.of(whole.stock)


def test_without_weights_what_is_assumed_is_named(checkpoint, tmp_path, capsys):
    from pmod_cli.cli import main

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copyfile(checkpoint / "config.json", alone / "config.json")
    assert load_subject(str(alone)).assumed == ()
    change(alone, "text_config", "intermediate_size", ...)
    assert load_subject(str(alone)).assumed == ("text_config.intermediate_size 11008",)
    assert main(["profile", "-m", str(alone), "--sweep", "shift=0.5", "--text-tokens", "9"]) == 0
    assert "leaves out text_config.intermediate_size 11008" in capsys.readouterr().err
    assert load_subject("llava-next-7b").assumed == ()  # its sizes are ours


def test_a_config_of_the_original_code_is_no_config_of_defaults(tmp_path):
    flat = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 5120}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with pytest.raises(PmodError, match="in the original layout"):
        load_subject(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("part", "key", "value", "told"),
    [
        ("vision_config", "image_size", ..., r"\[48, 96\], which is less than one tile of 224 x 224"),
        ("text_config", "num_hidden_layers", 1, "a schedule needs at least 2 layers"),
        (None, "pmod", {"schedule": "list", "values": [0.5, 0.5]}, "needs one ratio per layer: expected 32, found 2"),
        ("text_config", "model_type", {"a": 1}, "the decoder .* is unknown"),
        ("vision_config", "model_type", ["a"], "the vision tower .* is unknown"),
    ],
)
def test_a_config_alone_that_no_model_can_have(checkpoint, part, key, value, told):
    for file in checkpoint.glob("*.safetensors*"):
        file.unlink()
    change(checkpoint, part, key, value)
    with pytest.raises(PmodError, match=told):
        load_subject(str(checkpoint))


def test_a_list_of_ratios_is_not_that_of_another_number_of_layers():
    subject = load_subject("llava-1.5-7b", {"schedule": "list", "values": [0.5] * 32})
    with pytest.raises(PmodError, match="expected 8, found 32"):
        scaled(subject, layers=8)


def damaged(folder: Path, seed: int) -> str:
    """One value of config.json set or deleted, then read and counted by formula. Returns what was done."""
    done = change_anything(folder / "config.json", random.Random(seed))
    try:
        subject = load_subject(str(folder / "config.json"))
        sizes = Sizes.of(subject.stock)
        prefill(sizes, Workload(image_sizes=((64, 64),)).rows(sizes), Routed.of(subject.pmod))
    except PmodError:
        pass
    except Exception as error:
        raise AssertionError(f"seed {seed}: {done}") from error
    return done


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(1000, 4000), marks=pytest.mark.soak)])
def test_damaged_configs_alone(seeds, tmp_path):
    kinds = [("llava_next", "llama"), ("llava", "mistral"), ("llava_next", "qwen2")]
    wholes = [factories.config(*kind, layers=3).to_dict() | {"pmod": {"schedule": "cosine"}} for kind in kinds]
    for seed in seeds:
        whole = wholes[seed % len(wholes)]
        whole = whole | {"model_type": f"pmod_{whole['model_type'].removeprefix('pmod_')}"}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        damaged(tmp_path, seed)
