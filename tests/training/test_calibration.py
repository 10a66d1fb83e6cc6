"""Routers that start from what the stock weights attend to."""

import pytest
import torch

from pmod_cli.calibration.bench import Bench, Schedule
from pmod_cli.calibration.replay import Replay
from pmod_cli.model import capture_selection, kept_tokens
from pmod_cli.training.calibration import SPREAD, _most_attended, calibrate_routers, fit_routers
from tests import factories
from tests.calibration.test_depth import batches_of
from tests.factories import KINDS
from tests.model.models import ROWS, batch, pmod_model, pmod_twin


def test_the_most_attended_are_the_k_that_a_later_token_reads_most():
    attention = torch.zeros(1, 2, 5, 5)
    attention[0, 0, 4] = torch.tensor([0.0, 0.1, 0.2, 0.6, 0.1])
    attention[0, 1, 3] = torch.tensor([0.0, 0.8, 0.1, 0.1, 0.0])
    attention[0, 0, 2, 2] = 1.0  # a look at itself counts nothing
    vision = torch.tensor([[False, True, True, True, False]])
    assert _most_attended(attention, vision, 0.7).tolist() == [[False, True, False, True, False]]
    assert _most_attended(attention, vision, 0.4).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_routers_predict_what_is_attended_to(kind):
    model = pmod_model(kind, router_std=0.0)
    inputs = batch(kind, ROWS, "right")
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".router." not in name}
    correlations = calibrate_routers(model, [inputs])
    assert sorted(correlations) == model.config.routed_layers == [0, 2, 3]
    assert all(0.2 < value < 1 for value in correlations.values()), correlations
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)
    with torch.no_grad(), capture_selection(model) as record:
        model(**inputs)
    logits = record.layers[0].logit[record.vision_mask]  # the first layer reads the same stream as in calibration
    assert logits.std(correction=0) == pytest.approx(SPREAD, rel=1e-3)
    assert logits.mean() == pytest.approx(0, abs=1e-4)
    num_vision = record.vision_mask.sum(dim=1).tolist()
    assert record.layers[0].K.tolist() == [kept_tokens(n, model.config.retention[0]) for n in num_vision]


def test_a_layer_that_keeps_everything_learns_what_the_layers_behind_it_keep_by_its_choice():
    held = pmod_model(pmod={"schedule": "list", "values": [1.0, 1.0, 0.6, 0.2], "select_at": [1]}, router_std=0.0)
    itself = pmod_model(pmod={"schedule": "list", "values": [1.0, 0.4, 1.0, 1.0]}, router_std=0.0)
    inputs = batch("llava_next", ROWS, "right")
    assert calibrate_routers(held, [inputs]) == calibrate_routers(itself, [inputs])  # as the mean of 0.6 and 0.2
    routers = [model.model.language_model.layers[1].router for model in (held, itself)]
    assert routers[0].weight.any()
    assert torch.equal(routers[0].weight, routers[1].weight)


def test_a_router_that_nothing_is_left_to_choose_for_stays_at_zero():
    model = pmod_model(pmod={"schedule": "list", "values": [1.0, 0.6, 0.35, 0.15], "max_ratio": 2.0}, router_std=0.0)
    correlations = calibrate_routers(model, [batch("llava_next", ROWS, "right")])
    routers = [layer.router.weight for layer in model.model.language_model.layers]
    assert correlations[0] == 0
    assert [bool(weight.any()) for weight in routers] == [False, True, True, True]
    assert all(weight.isfinite().all() for weight in routers)


@pytest.mark.parametrize("select_at", [None, (1,)])
def test_a_calibrated_start_is_the_router_of_pmod_calibrate(select_at):
    """The same direction as the calibration's own bench finds with the same pictures, for each layer that chooses."""
    stock = factories.model("llava_next", layers=4)
    batches = batches_of(stock, "llava_next")
    settings = {"schedule": "list", "values": [1.0, 0.6, 0.5, 0.3]} | (
        {"select_at": list(select_at)} if select_at else {}
    )
    model = pmod_twin(stock, settings)
    inputs = [{name: tensor for name, tensor in each.inputs.items() if name != "labels"} for each in batches]
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".router." not in name}
    found = fit_routers(model, inputs)
    assert sorted(found) == model.config.routed_layers == ([1] if select_at else [1, 2, 3])
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in before)
    bench = Bench(Replay(stock), batches, ("text",))
    for layer in found:
        one = Schedule(tuple(settings["values"]), select_at or (layer, *range(layer + 1, 4)))
        bench.apply(Schedule((1.0,) * 4))
        expected = bench.fit(one, layer, "text", bench.streams_at(layer))[0].whole.weight[0]
        ours = model.model.language_model.layers[layer].router.weight[0]
        assert torch.cosine_similarity(ours, expected, dim=0) > 0.9999
