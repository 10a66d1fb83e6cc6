"""Selections: what holds for each of them on every family and batch shape, and choices that later layers hold.

`test_parity.py` holds held choices to the naive loop, with caches and padding on either side.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pmod_cli.model import SELECTIONS, BadPlugin, PmodSettings, Selection, capture_selection, kept_tokens
from pmod_cli.model.routing import Routing
from tests import factories
from tests.model.models import IMAGES, ROWS, batch, pmod_model, single
from tests.model.test_launches import ROUTER, operators_of_a_layer

HELD = {"schedule": "list", "values": [0.6, 0.6, 0.3, 0.8], "select_at": [0, 3]}
"""Layer 0 chooses; layer 1 keeps as many, layer 2 fewer; layer 3 chooses again."""


def captured(model, inputs):
    with torch.no_grad(), capture_selection(model) as record:
        logits = model(**inputs).logits
    return logits, record


def positions(inputs):
    return (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("select_at", [None, [0, 3]])
@pytest.mark.parametrize("kind", factories.KINDS)
@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_what_holds_for_every_selection(selection, kind, select_at, side):
    """Text is kept, K is exact, padding is not, and a row of a batch gets what it gets alone."""
    model = pmod_model(kind, pmod=HELD | {"select_at": select_at, "selection": selection})
    inputs = batch(kind, ROWS, side)
    logits, record = captured(model, inputs | {"position_ids": positions(inputs)})
    num_vision = record.vision_mask.sum(dim=1).tolist()
    text = inputs["attention_mask"].bool() & ~record.vision_mask
    for layer, selected in record.layers.items():
        assert selected.K.tolist() == [kept_tokens(number, model.config.retention[layer]) for number in num_vision]
        assert torch.equal(selected.kept & ~record.vision_mask, text)
    for row in range(len(ROWS)):
        real = inputs["attention_mask"][row].bool()
        expected, alone = captured(model, single(inputs, row, IMAGES[row]))
        torch.testing.assert_close(logits[row][real], expected[0], atol=2e-5, rtol=1e-5)
        for layer, selected in alone.layers.items():
            assert torch.equal(record.layers[layer].kept[row][real], selected.kept[0])


@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_a_held_choice_is_the_earlier_one(selection):
    model = pmod_model(pmod=HELD | {"selection": selection})
    _, record = captured(model, batch("llava_next", ROWS))
    first, same, fewer, anew = (record.layers[layer].kept for layer in range(4))
    assert torch.equal(first, same)
    assert not (fewer & ~first).any()
    assert fewer.sum() < first.sum() < anew.sum()
    assert [layer.router is not None for layer in model.model.language_model.layers] == [True, False, False, True]
    assert model.config.routed_layers == [0, 3]
    assert (record.layers[1].weight == 1).all()


def test_uniform_choices_that_are_held_stay_spread():
    model = pmod_model(pmod=HELD | {"selection": "uniform"})
    _, record = captured(model, batch("llava_next", ROWS[:1]))
    kept = record.layers[2].kept[0][record.vision_mask[0]].nonzero().flatten()
    assert kept.diff().max() <= 3 / 0.3


def test_training_in_bfloat16_keeps_what_inference_keeps():
    """Autocast makes products in bfloat16; what is most unlike is told apart in float32 all the same."""
    states = torch.randn(1, 200, 256, generator=torch.Generator().manual_seed(0)) + 0.5
    routing = Routing.build(torch.ones(1, 200, dtype=torch.bool), None)
    layer, selection = SimpleNamespace(ratio=0.25), SELECTIONS["divprune"]()
    expected = selection.order(states, routing, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selection.order(states, routing, layer), expected)


@pytest.mark.parametrize("mean", [0.52, 0.6, 0.9])
@pytest.mark.parametrize("words", ["hi", "what is the price of tea?"])
def test_dart_is_its_rule(mean, words):
    """Pivots by the L1 norm of stock's own keys, each taking in turn the tokens least like it, one token at a time."""
    model = pmod_model(pmod={"method": "dart", "mean": mean})
    inputs, states = batch("llava_next", [(words, [(300, 200)])]), []
    decoder = model.model.language_model
    layer = decoder.layers[2]
    layer.register_forward_pre_hook(lambda _, args, kwargs: states.append(args[0]), with_kwargs=True)
    _, record = captured(model, inputs)
    vision = record.vision_mask[0].nonzero().flatten().tolist()
    with torch.no_grad():
        normed = layer.input_layernorm(states[0])
        keys = layer.self_attn.k_proj(normed).view(1, normed.shape[1], -1, layer.self_attn.head_dim).transpose(1, 2)
        cosines, sines = decoder.rotary_emb(keys, torch.arange(normed.shape[1])[None])
        norms = apply_rotary_pos_emb(keys, keys, cosines, sines)[0][0].abs().sum(dim=(0, 2)).tolist()
        states = normed[0].double()
    by_norm = sorted(range(len(norms)), key=lambda place: -norms[place])
    most = kept_tokens(len(vision), model.config.retention[2])
    pivots = [place for place in by_norm if place in vision][: min(4, most)]
    kept = set(pivots)
    pivots += [place for place in by_norm if place > max(vision)][:4]
    left = most - len(kept)
    for turn, pivot in enumerate(pivots):
        for _ in range(left // len(pivots) + (turn < left % len(pivots))):
            free = [place for place in vision if place not in kept]
            kept.add(min(free, key=lambda place: float(torch.cosine_similarity(states[pivot], states[place], dim=0))))
    for at in (2, 3):
        assert set(record.layers[at].kept[0].nonzero().flatten().tolist()) & set(vision) == kept


def test_a_held_layer_starts_fewer_kernels():
    """No router, no ranking; what is left is moving tokens. A second layer of the same ratio makes no plan either."""
    counts = {}
    for at in (range(4), [0]):
        model = pmod_model(pmod=HELD | {"values": [0.6, 0.3, 0.3, 0.3], "select_at": list(at)})
        counts[len(at)] = operators_of_a_layer(model, batch("llava_next", ROWS[:1]), use_cache=False)
    chosen, held = counts[4], counts[1]
    spared = chosen - held
    assert all(spared[name] >= number for name, number in ROUTER.items())
    assert spared["aten::sort.stable"] == spared["aten::sort"] == 1
    assert spared["aten::gather"] == 1  # of the weights
    assert held - chosen == {"aten::clone": 1}  # in the place of the scaling of skipped tokens
    assert chosen.total() - held.total() == 10


def test_gradient_checkpointing_recomputes_held_choices():
    model = pmod_model(pmod=HELD)
    inputs = batch("llava_next", ROWS)
    gradients = []
    for repeated in (False, True):
        model.zero_grad()
        if repeated:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any(".router." in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_scores_of_any_kind_cannot_break_the_count():
    class Odd(Selection):
        def scores(self, hidden_states, routing, layer):
            odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
            return odd.repeat(routing.target.numel())[: routing.target.numel()].view(routing.target.shape)

    model = pmod_model(pmod=HELD)
    SELECTIONS.register("odd")(Odd)
    try:
        model.set_selection("odd")
        inputs = batch("llava_next", ROWS)
        logits, record = captured(model, inputs)
        text = inputs["attention_mask"].bool() & ~record.vision_mask
        assert logits[inputs["attention_mask"].bool()].isfinite().all()
        for layer, selected in record.layers.items():
            wanted = [kept_tokens(n, model.config.retention[layer]) for n in record.vision_mask.sum(dim=1).tolist()]
            assert selected.K.tolist() == wanted
            assert torch.equal(selected.kept & ~record.vision_mask, text)
    finally:
        SELECTIONS.unregister("odd")


def test_scores_of_another_shape_are_refused():
    class Short(Selection):
        def scores(self, hidden_states, routing, layer):
            return torch.zeros(len(hidden_states))

    class Nothing(Selection):
        def scores(self, hidden_states, routing, layer):
            pass

    model = pmod_model(pmod=HELD)
    for made, found in ((Short, r"of shape \(1,\)"), (Nothing, "a NoneType")):
        SELECTIONS.register("odd")(made)
        try:
            model.set_selection("odd")
            with pytest.raises(BadPlugin, match=f"of {made.__name__} are {found}, expected a tensor of shape"):
                model(**batch("llava_next", ROWS[:1]))
        finally:
            SELECTIONS.unregister("odd")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_at": []}, "must be a list of layers"),
        ({"select_at": "8"}, "must be a list of layers"),
        ({"select_at": [True]}, "must be a list of layers"),
        ({"select_at": [8, 4]}, "in ascending order"),
        ({"select_at": [4, 4]}, "in ascending order"),
        ({"selection": "best"}, "selection must be one of .*router"),
        ({"selection": ["router"]}, "selection must be one of"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        PmodSettings(**settings)


def test_settings_that_do_not_fit_the_layers():
    with pytest.raises(ValueError, match="select_at names layer 40, and the model has 32 layers"):
        PmodSettings(select_at=[8, 40]).routed(32)
    with pytest.raises(ValueError, match=r"layer 8 keeps 0.844 .* no layer has chosen before it"):
        PmodSettings(select_at=[9]).chosen_at(32)
    assert PmodSettings(select_at=[8, 14]).chosen_at(32) == [None] * 8 + [8] * 6 + [14] * 18


def test_the_papers_choice_is_not_written_down():
    """Files of before these settings read as before, and are written as before."""
    assert not {"selection", "select_at"} & PmodSettings().to_dict().keys()
    assert PmodSettings.from_dict(PmodSettings().to_dict()) == PmodSettings()
    held = PmodSettings(selection="uniform", select_at=[8])
    assert held.to_dict()["select_at"] == [8]
    assert PmodSettings.from_dict(held.to_dict()) == held
