"""Pre-training of the tiny model: its parts do what they claim, and an interrupted run ends where a whole one does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import TASKS, Turn, draw
from pmod_cli.data.rows import row
from pmod_cli.training import pretrain_tiny
from pmod_cli.training.grounding import Grounding
from pmod_cli.training.measure_tiny import hidden_vision, prompts
from pmod_cli.training.muon import Muon, orthogonal
from pmod_cli.training.pretrain_tiny import compute_losses, grow, pretrain
from pmod_cli.training.tiny_batches import TinyBatches
from pmod_cli.training.tiny_model import build_model, build_processor

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny-llava-next.yaml"


@pytest.fixture(scope="module")
def recipe():
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe |= {"batch_size": 4, "turns": 2, "log_every": 1, "save_every": 2}
    stage = {"mix": TASKS, "steps": 4, "rate": 1.0, "warmup": 1, "decay": 0.5, "end": 0.0}
    grounding = {"layers": [0, 1], "heads": 2, "shows": 0.5, "belongs": 0.5, "looks": 0.5, "fade": 0.5}
    return recipe | {"stages": [{"layers": 2, **stage, "grounding": grounding}, {"layers": 4, **stage}]}


@pytest.fixture(scope="module")
def processor(recipe):
    return build_processor(recipe["image"])


@pytest.fixture
def model(recipe, processor):
    torch.manual_seed(0)
    return build_model(recipe, processor, 2).eval()


def test_fast_batches_equal_the_collator(recipe, processor):
    documents = [draw(task, seed, size) for task in TASKS for seed, size in ((1, (96, 96)), (2, (96, 48)))]
    fast = TinyBatches(processor, recipe)(documents)
    slow = Collator(processor)([row(document, document.turns[: recipe["turns"]]) for document in documents])
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(fast.inputs[name].float(), slow[name].float()), name
    assert torch.equal(fast.labels, slow["labels"])


def test_looked_at_tokens_show_the_answer(recipe, processor):
    batch = TinyBatches(processor, recipe)([draw("doc", 5)])
    for (b, position), tokens in zip(batch.answers.tolist(), batch.looked_at, strict=True):
        answer = processor.decode(batch.inputs["input_ids"][b, position + 1]).removeprefix("##")
        assert [processor.decode(i) for i in batch.shows[b][tokens]] == [answer]


@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 24, 8), (3, 16, 16)])
def test_muon_updates_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert singular.min() > 0.3
    assert singular.max() < 1.3


def test_muon_step_has_the_size_of_its_rate():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    weight.grad = torch.randn(16, 16)
    Muon([weight], lr=0.02).step()
    assert 0.01 < torch.linalg.matrix_norm(weight.detach(), 2) < 0.03


def test_growth_preserves_the_function(recipe, processor, model):
    inputs = TinyBatches(processor, recipe)([draw("chart", 1)]).inputs
    with torch.no_grad():
        before = model(**inputs).logits
        after = grow(model, 4)(**inputs).logits
    assert model.config.text_config.num_hidden_layers == len(model.model.language_model.layers) == 4
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match="multiple"):
        grow(model, 6)


def test_grounding_reaches_what_it_trains_and_leaves_no_hook(recipe, processor, model):
    stage = recipe["stages"][0]
    grounding = Grounding(model, stage["grounding"])
    batch = TinyBatches(processor, recipe)([draw("doc", 1), draw("presence", 1)])
    losses = compute_losses(model, grounding, batch, stage, 0)
    losses["looks"].backward()
    assert model.model.language_model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    grounding.detach()
    layers = model.model.language_model.layers
    assert not any(layer.self_attn._forward_pre_hooks for layer in layers)


def test_a_fully_hidden_image_tells_nothing_and_a_shown_one_does(processor, model):
    def logits(share, seed):
        asked = [Turn("what is the price of tea?", "47", None)]
        documents = [replace(draw("doc", seed, size), turns=asked) for size in ((96, 96), (96, 48))]
        inputs = prompts(processor, documents)
        with torch.no_grad(), hidden_vision(model, inputs, 0, share):
            return model(**inputs).logits[:, -1]

    assert torch.equal(logits(1.0, 1), logits(1.0, 2))
    assert not torch.equal(logits(0.0, 1), logits(0.0, 2))


def test_an_interrupted_run_ends_where_a_whole_one_does(recipe, tmp_path, monkeypatch):
    whole = pretrain(recipe, tmp_path / "whole", report=lambda line: None)

    class Killed(Exception):
        pass

    def dying(*arguments):
        keep(*arguments)
        raise Killed

    keep = pretrain_tiny.keep
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_tiny, "keep", dying)
        for _ in range(2):
            with pytest.raises(Killed):
                pretrain(recipe, tmp_path / "broken", report=lambda line: None)
    broken = pretrain(recipe, tmp_path / "broken", report=lambda line: None)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = LlavaNextForConditionalGeneration.from_pretrained(broken)
    assert model.config.text_config.num_hidden_layers == 4
