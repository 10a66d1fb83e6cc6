"""What a folder holds and its config does not fit, told when it is loaded; and what older files leave to the model."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pmod_cli.checkpoints import convert, load_model, load_processor
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from tests.factories import KINDS


def changed(file: Path, change) -> None:
    """Change the JSON object in a file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("routed", [False, True])
def test_weights_of_another_shape_than_the_config_says_are_named(stock_model, tmp_path, routed):
    model = tmp_path / "model"
    if routed:
        convert(stock_model(), model, PmodSettings())
    else:
        shutil.copytree(stock_model(), model)
    changed(model / "config.json", lambda values: values["text_config"].update(intermediate_size=80))
    with pytest.raises(PmodError, match=r"has, in another shape than its config says, 12 tensors: .*mlp\.down_proj"):
        load_model(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_that_leaves_counting_to_the_model(kind, stock_model, tmp_path):
    """As checkpoints of before transformers 4.46 have it; today's has to know how many tokens a picture takes."""
    shutil.copytree(stock_model(kind), tmp_path / "model")
    counting = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    changed(tmp_path / "model" / "processor_config.json", lambda values: [values.pop(name) for name in counting])
    picture = {"images": Image.new("RGB", (50, 40)), "text": "<image> what?", "return_tensors": "pt"}
    expected = load_processor(stock_model(kind))(**picture)["input_ids"]
    assert load_processor(tmp_path / "model")(**picture)["input_ids"].equal(expected)


def test_a_tokenizer_with_another_image_token_than_the_config(stock_model, tmp_path):
    shutil.copytree(stock_model(), tmp_path / "model")
    changed(tmp_path / "model" / "config.json", lambda values: values.update(image_token_index=5))
    with pytest.raises(PmodError, match=r"has image token \d+ in its tokenizer; expected 5, the image token of its"):
        load_processor(tmp_path / "model")
