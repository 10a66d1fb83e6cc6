"""Pre-training of the tiny model: its parts do what they claim, and an interrupted run ends where a whole one does."""

from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaNextForConditionalGeneration

from pmod_cli.checkpoints import bundled_path
from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import TASKS, Turn, draw
from pmod_cli.data.rows import row
from tests.beds.interrupted import ends_as_a_whole_run
from tests.beds.tiny_llava_next import pretrain as module
from tests.beds.tiny_llava_next.batches import TinyBatches
from tests.beds.tiny_llava_next.grounding import LOSSES, Grounding
from tests.beds.tiny_llava_next.measure import hidden_vision, prompts
from tests.beds.tiny_llava_next.muon import StackedMuon
from tests.beds.tiny_llava_next.pretrain import (
    RECIPE,
    Masters,
    compute_losses,
    embeddings,
    make_optimizers,
)
from tests.beds.tiny_llava_next.processor import build_processor
from tests.beds.tiny_llava_next.start import build_model


@pytest.fixture(scope="module")
def recipe():
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe |= {"batch_size": 6, "turns": 2, "log_every": 1, "save_every": 2, "workers": 0, "pad_to_multiple_of": 1}
    stage = {"mix": TASKS, "steps": 4, "rate": 1.0, "warmup": 1, "decay": 0.5, "end": 0.0}
    grounding = {
        "shown": 0,
        "up": [[0, 1]],
        "first": [[0, 0]],
        "last": [[1, 1]],
        "probed": 1,
        "rate": 0.002,
        "fade": 0.5,
    }
    grounding |= {"shows": 0.5, "belongs": 0.5, "above": 0.5, "tells": 0.5, "looks": 0.5}
    return recipe | {"stages": [{**stage, "grounding": grounding}, stage]}


@pytest.fixture(scope="module")
def processor(recipe):
    return build_processor(recipe["image"])


def random_model(processor):
    """Two random layers of the bundled model's shape."""
    config = AutoConfig.from_pretrained(bundled_path())
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 2, len(processor.tokenizer)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@pytest.fixture
def model(processor):
    return random_model(processor)


def test_fast_batches_equal_the_collator(recipe, processor):
    documents = [draw(task, seed, size) for task in TASKS for seed, size in ((1, (96, 96)), (2, (96, 48)))]
    fast = TinyBatches(processor, recipe)(documents)
    slow = Collator(processor)([row(document, document.turns[: recipe["turns"]]) for document in documents])
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(fast.inputs[name].float(), slow[name].float()), name
    assert torch.equal(fast.labels, slow["labels"])


@pytest.mark.parametrize("task", ["doc", "above", "dearer"])
def test_looked_at_tokens_belong_to_what_is_asked(recipe, processor, task):
    document = draw(task, 5)
    batch = TinyBatches(processor, recipe)([document])
    ids, turns = batch.inputs["input_ids"][0], document.turns[: recipe["turns"]]
    # a look-up for each digit of a number, one for a word
    answers = [part for turn in turns for part in (turn.answer if turn.answer.isdigit() else [turn.answer])]
    for (_, position), tokens, answer in zip(batch.last.tokens.tolist(), batch.last.looked_at, answers, strict=True):
        assert processor.decode(ids[position + 1]).removeprefix("##") == answer
        belongs = {processor.decode(i) for i in batch.belongs[0][tokens] if i >= 0}  # between label and value is paper
        assert len(belongs) == 1
        assert belongs == {answer} or tokens.sum() == 1
    looks = [look for turn in turns for look in turn.looks]
    assert [processor.decode(ids[position]) for _, position in batch.first.tokens.tolist()] == [o.word for o in looks]
    for look, (_, position), tokens in zip(looks, batch.first.tokens.tolist(), batch.first.looked_at, strict=True):
        assert {processor.decode(i) for i in batch.belongs[0][tokens]} == {look.word}
        assert look.tells.startswith(processor.decode(batch.tells[0, position]))


def test_muon_trains_the_inner_matrices_and_each_update_is_nearly_orthogonal(recipe, model):
    """torch's Muon, held to what the recipe's rates were chosen for: a step has the size of its rate."""
    masters = Masters(model)
    muon, adamw = make_optimizers(masters, None, recipe)
    trained = [parameter for optimizer in (muon, adamw) for parameter in optimizer.param_groups[0]["params"]]
    assert len(trained) == len({id(parameter) for parameter in trained}) == len(list(model.parameters()))
    assert not [name for name in masters.inner if "lm_head" in name or "embed" in name]
    before = {name: masters[name].detach().clone() for name in masters.inner}
    for name in masters.inner:
        masters[name].grad = torch.randn_like(masters[name])
    muon.param_groups[0]["lr"] = rate = 0.02
    muon.step()
    for name, old in before.items():
        rows, columns = old.shape
        update = (old - masters[name].detach()) / (rate * max(1.0, rows / columns) ** 0.5)
        wanted = newton_schulz(masters[name].grad.double()).float()
        assert (update - wanted).norm() < 0.03 * wanted.norm(), name  # it works in bfloat16
        singular = torch.linalg.svdvals(update)
        assert 0.6 < singular.median() <= singular.max() < 1.3, name


def test_the_masters_train_the_model_in_its_type(processor):
    model = random_model(processor)
    masters = Masters(model)
    weight = model.lm_head.weight
    assert weight.dtype == torch.bfloat16
    weight.grad = torch.ones_like(weight)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    masters.take_gradients()
    assert weight.grad is None
    assert masters["lm_head.weight"].grad.dtype == torch.float32
    masters["lm_head.weight"].data.add_(masters["lm_head.weight"].grad)
    masters.write()
    assert torch.equal(weight, masters["lm_head.weight"].to(torch.bfloat16))


def newton_schulz(gradient):
    """Muon's first update by its definition (Jordan et al. 2024), in the precision of `gradient`."""
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_each_layer_begins_by_adding_as_much_as_any_other(recipe, processor):
    torch.manual_seed(0)
    model = build_model(recipe, processor).eval()
    added = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(
            lambda _, inputs, output: added.append((output - inputs[0]).norm() / inputs[0].norm())
        )
    with torch.no_grad():
        model.model(**TinyBatches(processor, recipe)([draw("doc", 1)]).inputs)
    assert len(added) == recipe["decoder"]["num_hidden_layers"] == 32
    assert max(added) < 3 * min(added)


def test_embeddings_are_what_the_stock_model_makes_of_each_image(recipe, processor, model):
    batch = TinyBatches(processor, recipe)([draw(task, 3, size) for task in TASKS for size in ((96, 96), (96, 48))])
    with torch.no_grad():
        found = model.model.language_model(inputs_embeds=embeddings(model, batch), use_cache=False)
        wanted = model.model(**batch.inputs, use_cache=False)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


def test_batches_do_not_depend_on_who_draws_them(recipe, processor):
    batches = TinyBatches(processor, recipe)
    here, elsewhere = (list(batches.steps(range(3, 6), TASKS, workers)) for workers in (0, 2))
    assert len(here) == 3
    for one, other in zip(here, elsewhere, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
        assert torch.equal(one.last.looked_at, other.last.looked_at)


def test_stacked_muon_is_torchs():
    torch.manual_seed(0)
    shapes = [(12, 12)] * 3 + [(24, 12)] * 2 + [(12, 24)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = StackedMuon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for one, other in zip(ours[1:], theirs[1:], strict=True):  # the first has no gradient
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[1], theirs[0])
    held = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert held[0].keys() == held[1].keys()
    assert all(held[0][key].keys() == held[1][key].keys() for key in held[0])


def test_grounding_reaches_what_it_trains_and_leaves_no_hook(recipe, processor, model):
    stage = recipe["stages"][0]
    grounding = Grounding(model, stage["grounding"])
    batch = TinyBatches(processor, recipe)([draw("above", 1), draw("presence", 1)])
    losses = compute_losses(model, grounding, batch, stage, 0)
    trained = set(LOSSES) & stage["grounding"].keys()
    assert losses.keys() == {"answers", "right", *trained}
    assert all(losses[name] > 0 for name in trained)
    losses["looks"].backward()
    assert model.model.language_model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    grounding.detach()
    layers = model.model.language_model.layers
    assert not any(layer.self_attn._forward_pre_hooks for layer in layers)


def test_a_fully_hidden_image_tells_nothing_and_a_shown_one_does(processor, model):
    def logits(hide, seed):
        asked = [Turn("what is the price of tea?", "47", None)]
        documents = [replace(draw("doc", seed, size), turns=asked) for size in ((96, 96), (96, 48))]
        inputs = prompts(processor, documents)
        with torch.no_grad(), hidden_vision(model, (inputs["input_ids"] == model.config.image_token_index) & hide):
            return model(**inputs).logits[:, -1]

    assert torch.equal(logits(True, 1), logits(True, 2))
    assert not torch.equal(logits(False, 1), logits(False, 2))


@pytest.mark.slow
def test_an_interrupted_run_ends_where_a_whole_one_does(recipe, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "build_model", lambda *_: random_model(processor))
    broken = ends_as_a_whole_run(module, recipe, tmp_path, monkeypatch)
    model = LlavaNextForConditionalGeneration.from_pretrained(broken)
    assert model.config.text_config.num_hidden_layers == 2
