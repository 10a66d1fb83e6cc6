"""Routers that start from what the stock weights attend to."""

import pytest
import torch

from pmod_cli.model import capture_selection, kept_tokens
from pmod_cli.training.calibration import SPREAD, _most_attended, calibrate_routers
from tests.factories import KINDS
from tests.model.models import ROWS, batch, pmod_model


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
