"""What routers are fitted to, and how well: held to autograd and to plain computations."""

import pytest
import torch

from pmod_cli import checkpoints
from pmod_cli.calibration.asked import Asked
from pmod_cli.calibration.bench import TARGETS, Bench, Schedule
from pmod_cli.calibration.importance import target_of
from pmod_cli.calibration.regression import FOLDS
from pmod_cli.calibration.replay import Replay
from pmod_cli.calibration.samples import read_samples
from tests import factories
from tests.calibration.test_depth import batches_of
from tests.model.models import pmod_twin


def test_targets_are_what_autograd_and_eager_attention_give():
    stock = factories.model("llava", layers=3)
    batches = batches_of(stock, "llava", count=2)
    bench = Bench(Replay(stock), batches, TARGETS)
    stock.set_attn_implementation("eager")
    for batch, importance, stream in zip(batches, bench.importance, bench.start, strict=True):
        with torch.no_grad():
            attention = stock(**{**batch.inputs, "labels": None}, output_attentions=True).attentions
        text = stream.routing.rank_base == float("inf")
        for layer, weights in enumerate(attention):
            behind = weights.tril(-1) * text[:, None, :, None]
            vision = stream.routing.target
            assert torch.allclose(importance["text"][layer][vision], behind.amax(dim=(1, 2))[vision], atol=1e-6)
    stock.set_attn_implementation("sdpa")
    # Fisher: the gate of a layer's update alone has the same gradient as the update itself along its own direction.
    assert all((found["fisher"] >= 0).all() and found["fisher"].any() for found in bench.importance)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, [2, 0, 1, 0, 0, 2]), (0.34, [1, 0, 0, 0, 0, 2]), (0.01, [0] * 6)]
)
def test_of_fisher_information_the_order_is_the_target(ratio, expected):
    """One token outweighs all others; of equal ones the first comes first, as in a router's choice."""
    importance = torch.tensor([3.0, 0.5, 1.0, 0.25, 1.0, 9e4])
    assert target_of("fisher", importance, ratio).tolist() == expected
    assert target_of("fisher", importance**3, ratio).tolist() == expected
    assert target_of("text", importance, ratio) is importance


def test_fisher_information_fits_a_router_that_chooses_well():
    """On the bundled model, at a third of the tokens: near to what attention from text gives, far from chance."""
    model, processor = checkpoints.load_model(checkpoints.resolve("tiny-llava-next").path, dtype="float32")
    bench = Bench(Replay(model), Asked(model, processor).batches(read_samples("doc", 8)), ("text", "fisher"))
    layers = len(bench.replay)
    schedule, found = Schedule((1.0,) + (0.3,) * (layers - 1), (1,)), {}
    streams = bench.streams_at(1)
    for name in ("text", "fisher"):
        router, correlation, _ = bench.fit(schedule, 1, name, streams)
        assert correlation > 0.3
        bench.apply(schedule, {1: router.whole})
        found[name] = bench.divergence(streams)
    bench.apply(schedule, {1: router.whole}, selection="random")
    chance = bench.divergence(streams)
    assert found["fisher"] < max(0.25 * chance, 2 * found["text"]), (found, chance)


def test_routers_that_were_fitted_predict_and_shuffled_ones_lose():
    """On the bundled model: what it reads can be told from hidden states, and a wrong direction is worse."""
    model, processor = checkpoints.load_model(checkpoints.resolve("tiny-llava-next").path, dtype="float32")
    bench = Bench(Replay(model), Asked(model, processor).batches(read_samples("doc", 8)), ("text",))
    layers, chooser = len(bench.replay), len(bench.replay) // 3
    schedule = Schedule((1.0,) * chooser + (0.3,) * (layers - chooser), (chooser,))
    streams = bench.streams_at(chooser)
    fitted, correlation, _ = bench.fit(schedule, chooser, "text", streams)
    router = fitted.whole
    assert correlation > 0.3
    bench.apply(schedule, {chooser: router})
    fitted = bench.divergence(streams)
    vision = streams[0].routing.target
    weights = 1 + 0.2 * torch.tanh(router(streams[0].hidden[vision]))
    assert 0 < (weights - 1).abs().max() < 1e-2
    assert (weights - 1).abs().mean() < 1e-3
    right, shuffled = router.weight.clone(), []
    for seed in range(4):  # a single wrong direction may be a good one by luck
        order = torch.randperm(right.shape[1], generator=torch.Generator().manual_seed(seed))
        router.weight.copy_(right[:, order])
        shuffled.append(bench.divergence(streams))
    assert sum(shuffled) / len(shuffled) > 1.5 * fitted, (fitted, shuffled)


def test_no_picture_is_ranked_by_a_router_that_was_fitted_on_it(monkeypatch):
    """With the importances of a fold changed, the router that it is ranked by stays, and the others do not."""
    monkeypatch.setattr("pmod_cli.calibration.regression.SHRINKAGE", (0.01,))
    stock = factories.model("llava_next", layers=3)
    batches = [batches_of(stock, "llava_next", count=1)[0] for _ in range(FOLDS)]
    schedule, found = Schedule((1.0, 0.5, 0.5), (1,)), []
    for change in (False, True):
        bench = Bench(Replay(stock), batches, ("text",), folds=range(FOLDS))
        if change:
            bench.importance[0]["text"] = bench.importance[0]["text"].flip(-1)
        router = bench.fit(schedule, 1, "text", bench.streams_at(1))[0]
        bench.apply(schedule, {1: router})
        bench.judged()
        assert router.fold == FOLDS - 1, "each batch was ranked by the router of its fold"
        found.append([each.weight.clone() for each in (*router.crossed, router.whole)])
    same = [torch.allclose(one, other, rtol=1e-3) for one, other in zip(*found, strict=True)]
    assert same == [True] + [False] * FOLDS


@pytest.mark.parametrize(
    "old",
    [
        {"target_tokens": "vision_hr"},
        {"selection": "visionzip", "schedule": "constant", "mean": 0.6},
    ],
    ids=["which tokens", "what ranks in the tower"],
)
def test_a_p_mod_model_is_measured_as_the_stock_model_that_it_was(old):
    """What is written routes all vision tokens by its own routers, whatever the source was converted with."""
    stock = factories.model("llava_next", layers=4)
    batches, found = batches_of(stock, "llava_next"), []
    for model in (stock, pmod_twin(stock, old)):
        replay = Replay(model)
        replay.keep_all()
        bench = Bench(replay, batches, ("text",))
        schedule = Schedule((1.0, 0.6, 0.5, 0.25), (1,))
        router = bench.fit(schedule, 1, "text", bench.streams_at(1))[0].whole
        bench.apply(schedule, {1: router})
        found.append((bench.divergence(), *(stream.routing.target for stream in bench.start)))
    for expected, ours in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(expected))
