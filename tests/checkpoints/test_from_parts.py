"""The paper's starting point: language model, CLIP tower and pretrained projector become one LLaVA."""

import json

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.checkpoints.conversion import PROVENANCE
from pmod_cli.core.errors import PmodError
from tests import factories
from tests.checkpoints.originals import tokenizer_without_image
from tests.checkpoints.test_original import PICTURE, logits_of


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders `llm` and `clip` and the file `mm_projector.bin`, cut out of a stock model, and that model."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = tokenizer_without_image()
    stock = factories.model("llava", "llama", 2, vocab_size=len(tokenizer) + 8, pad_token_id=0)
    stock.config.image_token_index = stock.config.image_token_id = len(tokenizer)
    config = stock.config.text_config
    config.vocab_size = len(tokenizer)
    llm = LlamaForCausalLM(config)
    inner = {f"model.{name}": tensor for name, tensor in stock.model.language_model.state_dict().items()}
    weights = inner | {"lm_head.weight": stock.lm_head.weight}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][: len(tokenizer)]
    llm.load_state_dict(weights)
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    tower = CLIPVisionModel(stock.config.vision_config)
    tower.load_state_dict(stock.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "clip")
    projector = stock.model.multi_modal_projector.state_dict()
    number = {"linear_1": "0", "linear_2": "2"}
    renamed = {f"model.mm_projector.{number[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in projector.items()}
    torch.save(renamed, folder / "mm_projector.bin")
    return folder, stock, len(tokenizer)


def test_logits_are_those_of_the_whole(parts, tmp_path):
    folder, stock, vocabulary = parts
    options = Options(to="stock", vision_tower=str(folder / "clip"), projector=folder / "mm_projector.bin", verify=True)
    report = convert(folder / "llm", tmp_path / "stock", options=options)
    assert report.layout == "parts"
    shards = json.loads((tmp_path / "stock" / PROVENANCE).read_text())["source_shards"]
    assert [*shards] == ["model.safetensors", f"{folder.name}/mm_projector.bin", "clip/model.safetensors"]
    model, processor = load_model(tmp_path / "stock")
    inputs = processor(images=PICTURE, text="USER: <image>\nwhat is this ASSISTANT:", return_tensors="pt")
    assert torch.equal(logits_of(model, inputs, vocabulary), logits_of(stock, inputs, vocabulary))


def test_a_llava_next_gets_a_row_separator(parts, tmp_path):
    folder, _, _ = parts
    options = Options(vision_tower=str(folder / "clip"), projector=folder / "mm_projector.bin", anyres=True)
    report = convert(folder / "llm", tmp_path / "pmod", options=options)
    assert report.model_type == "pmod_llava_next"
    model, _ = load_model(tmp_path / "pmod")
    assert 0.5 < model.model.image_newline.std() * 32**0.5 < 1.5


def test_parts_that_are_missing_are_named(parts, stock_model, tmp_path):
    folder, _, _ = parts
    with pytest.raises(PmodError, match="a language model without a vision part") as caught:
        convert(folder / "llm", tmp_path / "x")
    assert "--projector" in caught.value.hint
    torch.save({"x": torch.zeros(2)}, tmp_path / "wrong.bin")
    wrong = Options(vision_tower=str(folder / "clip"), projector=tmp_path / "wrong.bin")
    with pytest.raises(PmodError, match="holds no mm_projector, found x"):
        convert(folder / "llm", tmp_path / "x", options=wrong)
    with pytest.raises(PmodError, match="expected a language model"):
        convert(stock_model(), tmp_path / "x", options=Options(projector=folder / "mm_projector.bin"))
