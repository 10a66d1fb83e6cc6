"""Pre-training of the tiny model: its parts do what they claim, and an interrupted run ends where a whole one does."""

from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import TASKS, Turn, draw
from pmod_cli.data.rows import row
from tests.beds.tiny_llava_next import pretrain as module
from tests.beds.tiny_llava_next.batches import TinyBatches
from tests.beds.tiny_llava_next.grounding import Grounding
from tests.beds.tiny_llava_next.measure import hidden_vision, prompts
from tests.beds.tiny_llava_next.model import build_model, build_processor
from tests.beds.tiny_llava_next.pretrain import RECIPE, compute_losses, grow, make_optimizers, pretrain


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


def test_muon_trains_the_inner_matrices_and_each_update_is_nearly_orthogonal(recipe, processor, model):
    """torch's Muon, held to what the recipe's rates were chosen for: a step has the size of its rate."""
    muon, adamw = make_optimizers(model, None, recipe)
    trained = [parameter for optimizer in (muon, adamw) for parameter in optimizer.param_groups[0]["params"]]
    assert len(trained) == len({id(parameter) for parameter in trained}) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(parameter)]: parameter for parameter in muon.param_groups[0]["params"]}
    assert not [name for name in matrices if "lm_head" in name or "embed" in name]
    before = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    for parameter in matrices.values():
        parameter.grad = torch.randn_like(parameter)
    muon.param_groups[0]["lr"] = rate = 0.02
    muon.step()
    for name, parameter in matrices.items():
        rows, columns = parameter.shape
        update = (before[name] - parameter.detach()) / (rate * max(1.0, rows / columns) ** 0.5)
        wanted = newton_schulz(parameter.grad.double()).float()
        assert (update - wanted).norm() < 0.03 * wanted.norm(), name  # it works in bfloat16
        singular = torch.linalg.svdvals(update)
        assert 0.6 < singular.median() <= singular.max() < 1.3, name


def newton_schulz(gradient):
    """Muon's first update by its definition (Jordan et al. 2024), in the precision of `gradient`."""
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


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

    keep = module.keep
    with monkeypatch.context() as patch:
        patch.setattr(module, "keep", dying)
        for _ in range(2):
            with pytest.raises(Killed):
                pretrain(recipe, tmp_path / "broken", report=lambda line: None)
    broken = pretrain(recipe, tmp_path / "broken", report=lambda line: None)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = LlavaNextForConditionalGeneration.from_pretrained(broken)
    assert model.config.text_config.num_hidden_layers == 4
