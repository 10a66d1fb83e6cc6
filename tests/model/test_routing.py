"""Weights and gather plans on their own."""

import pytest
import torch

from pmod_cli.model import SELECTIONS, Routing
from pmod_cli.model.routing import token_weights

TARGET = torch.tensor([[False, True, True, True, False]])


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (("tanh", 0.2, 1.0), [1.0, 1 + 0.2 * 0.76159, 1.0, 1 - 0.2 * 0.76159, 1.0]),
        (("sigmoid", 1.0, 1.0), [1.0, 1.73106, 1.5, 1.26894, 1.0]),
        (("softmax", 0.4, 0.8), [1.0, 0.8 + 0.4 * 0.66524, 0.8 + 0.4 * 0.24473, 0.8 + 0.4 * 0.09003, 1.0]),
        (("none", 1.0, 1.0), [1.0, 2.0, 1.0, 0.0, 1.0]),
    ],
)
def test_weights(norm, expected):
    logits = torch.tensor([[7.0, 1.0, 0.0, -1.0, 9.0]])
    torch.testing.assert_close(token_weights(logits, ~TARGET, norm), torch.tensor([expected]), atol=1e-5, rtol=0)


def test_gather_plan_of_unequal_rows():
    """Row 0: one text, three vision (2 kept), one text. Row 1: two text, two vision (1 kept), one padding."""
    vision = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    routing = Routing.build(vision, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]))
    assert routing.counts == [(3, 2, 1), (2, 2, 2)]
    assert routing.padded
    routing.weights = torch.tensor([[1, 0.9, 1.1, 1.0, 1], [1, 0.9, 1.1, 1, 1]])
    order = SELECTIONS["router"]().order(routing.weights, routing, None)
    assert order.tolist() == [[0, 4, 2, 3, 1], [0, 3, 2, 1, 4]]
    plan = routing.gather_plan(order, 0.7)
    assert plan.index.tolist() == [[0, 2, 3, 4], [0, 2, 3, 1]]
    assert plan.valid.tolist() == [[True] * 4, [True, True, True, False]]


def test_equal_rows_need_no_mask_and_ratio_zero_keeps_text():
    vision = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    routing = Routing.build(vision, None)
    order = torch.tensor([[0, 3, 1, 2], [2, 3, 0, 1]])
    plan = routing.gather_plan(order, 0.5)
    assert plan.valid is None
    assert plan.index.tolist() == [[0, 1, 3], [0, 2, 3]]
    assert routing.gather_plan(order, 0.0).index.tolist() == [[0, 3], [2, 3]]
