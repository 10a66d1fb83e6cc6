"""What a schedule costs and which one is best: held to plain computations."""

import itertools

import pytest
import torch

from pmod_cli.calibration.bench import Bench, Schedule
from pmod_cli.calibration.budget import Budget, best_ratios
from pmod_cli.calibration.replay import Replay
from pmod_cli.families.sizes import Sizes
from tests import factories
from tests.calibration.test_depth import batches_of
from tests.model.models import pmod_twin

SIZES = Sizes.of(factories.config("llava_next").to_dict())


def test_the_program_is_as_good_as_trying_everything():
    """Four layers, five ratios, losses without any order."""
    generator = torch.Generator().manual_seed(0)
    levels = (0.0, 0.2, 0.5, 0.8, 1.0)
    for share in (0.35, 0.5, 0.62, 0.8, 0.97):
        losses = [dict(zip(levels, torch.rand(5, generator=generator).tolist(), strict=True)) for _ in range(4)]
        budget = Budget(SIZES, share)
        allowed = [ratios for ratios in itertools.product(levels, repeat=4) if budget.total(ratios) <= share]

        def loss(ratios, losses=losses):
            return sum(layer[ratio] for layer, ratio in zip(losses, ratios, strict=True))

        found = best_ratios(losses, budget)
        assert found in [list(ratios) for ratios in allowed]
        assert loss(found) == pytest.approx(min(map(loss, allowed)), abs=1e-12)
    assert best_ratios([{1.0: 0.0}] * 4, Budget(SIZES, 0.9)) is None


@pytest.mark.parametrize(("of", "logits"), [("flops", "every"), ("flops", "last"), ("retention", "every")])
def test_a_budget_is_what_profile_counts(of, logits):
    from pmod_cli.profiling import Routed, Workload, prefill

    ratios = [1.0, 0.7, 0.3, 0.0]
    rows = Workload(image_sizes=((672, 672),), text_tokens=58).rows(SIZES)
    routed = Routed(ratios, routers=[False, True, False, False])
    stock, pmod = (prefill(SIZES, rows, which, logits=1 if logits == "last" else None) for which in (None, routed))
    assert stock.lm_head == 2 * SIZES.decoder.hidden * SIZES.decoder.vocabulary * (
        1 if logits == "last" else rows[0].tokens
    )
    counted = pmod.decoder / stock.decoder
    budget = Budget(SIZES, 0.5, of, logits=logits)
    assert budget.total(ratios) == pytest.approx(counted if of == "flops" else 0.5, rel=1e-9)
    ratio = budget.solve([(1, 1.0), (2, None), (1, 0.0)])
    assert budget.total([1.0, ratio, ratio, 0.0]) == pytest.approx(0.5, abs=0.02)
    assert budget.total([1.0, ratio, ratio, 0.0]) <= 0.5 + 1e-9


def test_reusing_the_prefix_gives_what_whole_forward_passes_give():
    stock = factories.model("llava_next", layers=4)
    batches = batches_of(stock, "llava_next")
    with torch.no_grad():
        before = [stock(**{**batch.inputs, "labels": None}).logits for batch in batches]
    bench = Bench(Replay(stock), batches, ("text",))
    schedule = Schedule((1.0, 0.6, 0.5, 0.25), (1, 3))
    routers = {}
    for chooser in schedule.select_at:
        bench.apply(schedule, routers)
        routers[chooser] = bench.fit(schedule, chooser, "text", bench.streams_at(chooser))[0].whole
    bench.apply(schedule, routers)
    start = bench.streams_at(1)
    found = bench.thinned(start, 1, (0.0, 0.4, 1.0))
    assert bench.divergence(start) == bench.divergence()
    state = bench.replay.model.state_dict()
    for layer, ratio in [(1, 0.4), (2, 0.0), (2, 1.0), (3, 0.4)]:
        values = [ratio if i == layer else kept for i, kept in enumerate(schedule.ratios)]
        twin = pmod_twin(factories.model("llava_next", layers=4), schedule.settings().to_dict() | {"values": values})
        twin.load_state_dict(state)
        total = tokens = 0.0
        for batch, plain in zip(batches, before, strict=True):
            answers = (batch.inputs["labels"][:, 1:] != -100).nonzero(as_tuple=True)
            with torch.no_grad():
                ours = twin(**{**batch.inputs, "labels": None}).logits[:, :-1][answers].log_softmax(-1)
            stocks = plain[:, :-1][answers].log_softmax(-1)
            total, tokens = total + float((stocks.exp() * (stocks - ours)).sum()), tokens + len(ours)
        assert found[layer][ratio] == pytest.approx(total / tokens, abs=1e-6)
        assert total / tokens > 1e-4
