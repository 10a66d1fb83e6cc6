"""What is said of groups of layers, held to the depth report and to models that are built so."""

import pytest

from pmod_cli.calibration.depth import measure_depth
from pmod_cli.calibration.replay import Replay
from tests import factories
from tests.beds.groups import rises
from tests.calibration.test_depth import batches_of, plain_losses
from tests.factories import DECODERS, KINDS
from tests.model.models import pmod_twin

LAYERS = 4


@pytest.mark.parametrize("kind", KINDS)
def test_rises_of_groups_are_those_of_the_depth_report_and_of_frozen_models(kind):
    stock = factories.model(kind, DECODERS[0], layers=LAYERS)
    batches = batches_of(stock, kind)
    settings = {"schedule": "list", "values": [1.0, 0.0, 0.0, 1.0], "selection": "shortv", "keep_keys": True}
    frozen, base = plain_losses(pmod_twin(stock, settings), batches), plain_losses(stock, batches)
    depth = measure_depth(Replay(stock), batches)
    found = rises(Replay(stock), batches, [range(2, LAYERS), range(1, 2), range(1, 3)])
    for task, rise in found.items():
        assert rise["skipped", 0] == pytest.approx(depth[task].rise["hidden_from"][2], abs=1e-6)
        assert rise["skipped", 1] == pytest.approx(depth[task].rise["skipped_vision"][1], abs=1e-6)
        assert rise["frozen", 2] == pytest.approx(frozen[task] - base[task], abs=1e-6)


def test_in_the_last_layers_vision_tokens_are_only_read():
    """Nothing comes behind them: frozen tokens cost what the last layer but one has left to do, unseen ones all."""
    stock = factories.model(KINDS[0], DECODERS[0], layers=LAYERS)
    found = rises(Replay(stock), batches_of(stock, KINDS[0]), [range(LAYERS - 1, LAYERS)])
    for rise in found.values():
        assert rise["unseen", 0] == pytest.approx(rise["skipped", 0], abs=1e-6)
        assert rise["frozen", 0] == pytest.approx(0, abs=1e-6)
        assert abs(rise["skipped", 0]) > 1e-5
