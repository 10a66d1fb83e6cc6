"""Calibration: its parts held to plain computations, and the command as a user runs it."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pmod_cli import checkpoints
from pmod_cli.calibration.asked import Asked
from pmod_cli.calibration.bench import TARGETS, Bench, Schedule
from pmod_cli.calibration.budget import Budget, best_ratios
from pmod_cli.calibration.calibration import Calibration, CalibrationSettings, calibrate
from pmod_cli.calibration.importance import target_of
from pmod_cli.calibration.measured import Measured
from pmod_cli.calibration.regression import FOLDS
from pmod_cli.calibration.replay import Replay
from pmod_cli.calibration.results import depth_figure
from pmod_cli.calibration.samples import Sample, by_picture, read_samples
from pmod_cli.calibration.search import Found
from pmod_cli.cli import main
from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.profiling.budgets import prompt_of
from tests import factories
from tests.calibration.test_depth import batches_of
from tests.conftest import ROOT
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


def test_pictures_are_asked_about_as_the_model_and_the_result_see_them(stock_model):
    """A LLaVA-1.5 of the hub crops, and so does the checkpoint that is written, which has the same processor."""
    model, processor = checkpoints.load_model(stock_model("llava"))
    wide = Image.new("RGB", (128, 32), "white")
    wide.paste("red", (0, 0, 16, 32))
    (batch,) = Asked(model, processor).batches([Sample("wide", (wide,), ("<image>\nwhat?",), ("white",))])
    seen = processor(images=[wide], text="<image>", return_tensors="pt")
    assert torch.equal(batch.inputs["pixel_values"], seen["pixel_values"])


def _write_rows(folder: Path, shown: list[list[str]]) -> Path:
    """A LLaVA file with one row for each list of names; a picture's first letter is its content."""
    rows = []
    for number, names in enumerate(shown):
        for name in names:
            Image.new("RGB", (40, 40), f"#{ord(name[0]):02x}0000").save(folder / name)
        question = "<image>\n" * len(names) + f"question {number}?"
        rows.append({"image": names, "conversations": [{"from": "human", "value": question}]})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_no_picture_is_on_both_sides_or_in_two_folds(tmp_path: Path):
    """Three rows a picture; one picture under two names, and two that a row shows together, count as one."""
    names = [f"{letter}.png" for letter in "abcdefgh"]
    path = _write_rows(tmp_path, [[name] for name in names * 3] + [["a-again.png"], ["g.png", "h.png"]])
    samples = read_samples(str(path), 26, seed=1)
    assert len({sample.questions for sample in samples}) == 26
    groups = by_picture(samples)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    shown = [{name[0] for place in group for name in samples[place].images} for group in groups]
    assert sorted(map(sorted, shown)) == [["a"], ["b"], ["c"], ["d"], ["e"], ["f"], ["g", "h"]]
    assert sorted(len(group) for group in groups) == [3, 3, 3, 3, 3, 4, 7]


def test_a_row_without_a_question_is_passed_over(tmp_path: Path):
    path = _write_rows(tmp_path, [["a.png"], ["b.png"]])
    said = {"image": "a.png", "conversations": [{"from": "system", "value": "<image>"}]}
    path.write_text(json.dumps([said, *json.loads(path.read_text())]))
    assert len(read_samples(str(path), 2)) == 2
    with pytest.raises(PmodError, match="has 2 pictures to ask about"):
        read_samples(str(path), 3)


def test_rows_that_cannot_be_asked_about_are_counted_by_reason(tmp_path: Path):
    path = _write_rows(tmp_path, [["a.png"], ["b.png"]])
    film = {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat moves?"}]}
    late = [{"from": "human", "value": "Hello."}, {"from": "human", "value": "<image>\nWhat is it?"}]
    rows = [*json.loads(path.read_text()), film, film, {"image": "a.png", "conversations": late}]
    path.write_text(json.dumps(rows))
    assert len(read_samples(str(path), 2)) == 2
    with pytest.raises(PmodError, match=r"passed over: .*2 rows with a film"):
        read_samples(str(path), 3)
    with pytest.raises(PmodError, match=r"passed over: .*1 row with images behind the first question"):
        read_samples(str(path), 3)
    path.write_text(json.dumps([film]))
    with pytest.raises(PmodError, match=r"has 0 pictures to ask about, and .* passed over: 1 row with a film"):
        read_samples(str(path), 1)


def test_a_picture_is_asked_about_once_before_any_is_asked_about_again(tmp_path: Path):
    path = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abcdefgh" for _ in range(4)])
    for seed in range(4):
        images = [sample.images[0] for sample in read_samples(str(path), 20, seed=seed)]
        assert len(set(images[:8])) == len(set(images[8:16])) == 8
        assert len(set(images[16:])) == 4
        assert len({sample.images for sample in read_samples(str(path), 8, seed=seed, questions=["what?"])}) == 8
    with pytest.raises(PmodError, match="has 8 pictures to ask about, and `samples=9` were asked for"):
        read_samples(str(path), 9, questions=["what?"])


def test_with_one_row_a_picture_the_draw_and_the_halves_are_those_of_the_rows(tmp_path: Path):
    path = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abcdefghijkl"])
    samples = read_samples(str(path), 10, seed=3)
    order = random.Random(3).sample(range(12), 12)[:10]
    assert [sample.questions for sample in samples] == [(f"<image>\nquestion {row}?",) for row in order]
    assert by_picture(samples) == [[place] for place in range(10)]
    assert by_picture(read_samples("tiny", 64, films=True)) == [[place] for place in range(64)]


def test_the_halves_of_a_calibration_show_other_pictures(stock_model, tmp_path: Path, monkeypatch):
    """And so do its folds. A picture is told by its colour."""
    path = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abcdefgh" for _ in range(2)])
    shown: list[dict[int, set[float]]] = []

    class Seen(Bench):
        def __init__(self, replay, batches, targets, *, folds=(), **options):
            super().__init__(replay, batches, targets, folds=folds, **options)
            shown.append({})
            for fold, batch in zip(folds or (0,) * len(batches), batches, strict=True):
                colours = batch.inputs["pixel_values"].flatten(start_dim=1)[:, 0].tolist()
                shown[-1].setdefault(fold, set()).update(colours)

    monkeypatch.setattr("pmod_cli.calibration.calibration.Bench", Seen)
    model, processor = checkpoints.load_model(stock_model())
    settings = CalibrationSettings(data=str(path), samples=16, budgets=(0.6,), schedule="cosine")
    (found,) = calibrate(model, processor, Sizes.of(model.config), settings)
    chooses, judges = shown
    assert [len(chooses[fold]) for fold in range(FOLDS)] == [1] * FOLDS
    assert len(set.union(*chooses.values())) == len(judges[0]) == 4
    assert not judges[0] & set.union(*chooses.values())
    assert found.judged[0].pictures == 8
    few = _write_rows(tmp_path, [[f"{letter}.png"] for letter in "abc" * 6])
    with pytest.raises(PmodError, match="has 3 different pictures in 16 samples: expected 4 or more"):
        calibrate(model, processor, Sizes.of(model.config), replace(settings, data=str(few)))


def _prompt(processor):
    image = read_samples("doc", 1)[0].images[0]
    return processor(images=[image], text="<image> what is the price of egg?", return_tensors="pt")


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """A model of random weights would say as much as it may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmod_cli.calibration.asked.NEW_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def calibrated(stock_model, tmp_path_factory) -> Path:
    """Two budgets in one run, by the command."""
    folder = tmp_path_factory.mktemp("calibrated")
    before = Path.cwd()
    os.chdir(folder)
    try:
        call = ["calibrate", str(stock_model()), "--samples", "8", "--device", "cpu", "--budget", "0.6,1", "-o", "made"]
        assert main(call) == 0
    finally:
        os.chdir(before)
    return folder


def test_the_result_is_a_whole_p_mod_checkpoint(calibrated: Path, stock_model):
    folder = calibrated / "made-60"
    assert checkpoints.router_state(folder) == "calibrated"
    config = json.loads((folder / "config.json").read_text())
    said = json.loads((folder / "calibration.json").read_text())["budgets"][0]
    assert config["pmod"]["values"] == said["ratios"]
    assert config["pmod"]["select_at"] == said["select_at"]
    assert Budget(SIZES, 0.6).total(said["ratios"], len(said["select_at"])) <= 0.6 + 1e-6
    stock = stock_model() / "model.safetensors"
    assert os.path.samefile(folder / "model-00001-of-00001.safetensors", stock), "no weight is copied"
    pairs = [["0-1", "2-3"], ["1-2", "3"], ["2-3"], ["3"]][said["select_at"][0]]
    assert list(said["kl_of_neighbours_at_a_ratio"]) == pairs, "though no other ratios were better"
    assert said["judged"][0]["name"] == "calibrated"
    assert {"uniform", "random"} < {row["name"] for row in said["judged"]}
    card = (folder / "README.md").read_text()
    assert "## Calibration" in card
    assert "| calibrated |" in card
    model, processor = checkpoints.load_model(folder)
    assert model.generate(**_prompt(processor), max_new_tokens=2, do_sample=False).shape[1] > 2
    # Measured again in the checkpoint that was written: the same divergence as the report has.
    plain, _ = checkpoints.load_model(stock_model())
    judges = Asked(plain, processor).answered(read_samples("tiny", 8), own=True)[1::2]
    bench = Bench(Replay(plain), Asked(plain, processor).batches(judges), ())
    routers = {i: model.model.language_model.layers[i].router for i in said["select_at"]}
    bench.apply(Schedule(tuple(said["ratios"]), tuple(said["select_at"])), routers)
    assert bench.divergence() == pytest.approx(said["judged"][0]["divergence"], abs=1e-6)


def test_a_bar_is_as_wide_as_the_layers_that_were_changed_at_once():
    found = Found(Schedule((1.0, 0.5, 0.5, 0.2), (1,)), thinned={1: {0.0: 0.3, 1.0: 0.1}, 3: {0.0: 0.2, 1.0: 0.1}})
    _, needed = depth_figure(Calibration(0.5, found, (88, 58), [], [0.9, 0.4, 0.2, 0.1])).axes
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in needed.patches]
    assert bars == [pytest.approx((0.6, 2.4, 0.3)), pytest.approx((2.6, 3.4, 0.2))]


def test_a_budget_of_one_changes_nothing(calibrated: Path, stock_model):
    ours, processor = checkpoints.load_model(calibrated / "made-100")
    stock, _ = checkpoints.load_model(stock_model())
    assert not ours.config.routed_layers
    batch = Asked(stock, processor).batches(read_samples("doc", 1))[0]
    with torch.no_grad():
        inputs = {**batch.inputs, "labels": None}
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_a_calibrated_model_goes_through_the_other_verbs(calibrated: Path, workdir: Path, capsys):
    folder = str(calibrated / "made-60")
    assert main(["profile", "-m", folder, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["retention_ratio"] == 1.0
    again = ["calibrate", folder, "-o", "again", "--samples", "8", "--schedule", "cosine", "--device", "cpu"]
    assert main([*again, "--prompt", "data"]) == 0
    assert checkpoints.router_state(Path("again")) == "calibrated"


def test_a_budget_can_be_counted_on_the_prompts_of_the_data(calibrated: Path, stock_model, workdir: Path):
    """The mean of what stands in front of the first answers; the schedule costs the budget there, and not elsewhere."""
    call = ["calibrate", str(stock_model()), "--samples", "8", "--schedule", "cosine", "--device", "cpu", "-o", "made"]
    assert main([*call, "--prompt", "data"]) == 0
    said = json.loads(Path("made/calibration.json").read_text())["budgets"][0]
    plain, processor = checkpoints.load_model(stock_model())
    prompts = []
    for sample in read_samples("tiny", 8):
        (batch,) = Asked(plain, processor).batches([replace(sample, answers=("x",) * len(sample.questions))])
        first = int((batch.inputs["labels"][0] >= 0).nonzero()[0])
        prompts.append(batch.inputs["input_ids"][0, :first])
    vision = [int((ids == plain.config.image_token_id).sum()) for ids in prompts]
    text = [len(ids) - tokens for ids, tokens in zip(prompts, vision, strict=True)]
    found = said["vision_tokens"], said["text_tokens"]
    assert found == (round(sum(vision) / 8), round(sum(text) / 8))
    own = Budget(SIZES, 0.54, prompt=prompt_of(*found)[0])
    assert own.total(said["ratios"]) == pytest.approx(0.54, abs=0.01)
    assert Budget(SIZES, 0.54).total(said["ratios"]) != pytest.approx(0.54, abs=0.01)
    call[-1] = "last"
    assert main([*call, "--prompt", "data", "--logits", "last", "--json"]) == 0
    last = json.loads(Path("last/calibration.json").read_text())
    assert last["asked_for"]["logits"] == "last"
    assert replace(own, logits="last").total(last["budgets"][0]["ratios"]) == pytest.approx(0.54, abs=0.01)
    assert last["budgets"][0]["judged"][0]["retention"] > said["judged"][0]["retention"]
    assert "lm_head on the last position" in Path("last/README.md").read_text()
    assert f"mean prompt of the data: {found[0]} vision, {found[1]} text tokens" in Path("made/README.md").read_text()


def test_a_share_of_nothing_is_not_the_default(stock_model, workdir: Path, capsys):
    assert main(["convert", str(stock_model()), "--calibrate", "nowhere.json", "--target-flops", "0"]) == 2
    assert "--target-flops 0" in capsys.readouterr().err


def test_a_budget_that_cannot_be_met_is_named_as_it_was_typed(stock_model, workdir: Path, capsys):
    for verb, *more, flag in (["calibrate", "--budget"], ["convert", "--calibrate=doc", "--target-flops"]):
        assert main([verb, str(stock_model()), *more, flag, "0.001"]) == 2
        said = capsys.readouterr().err
        assert f"{flag} 0.001 cannot be met" in said
        assert f"{flag} 0." in said.partition("to 1")[2]


@pytest.mark.slow
def test_convert_calibrates_too(stock_model, workdir: Path, monkeypatch, capsys):
    few = lambda data, count, **options: read_samples(data, 8, **options)  # noqa: E731 - the default of 64 takes minutes
    monkeypatch.setattr("pmod_cli.calibration.calibration.read_samples", few)
    call = ["convert", str(stock_model()), "-o", "made", "--calibrate", "doc"]
    assert main([*call, "--target-flops", "0.6", "--schedule", "cosine"]) == 0
    assert checkpoints.router_state(Path("made")) == "calibrated"
    for more in (["--norm", "sigmoid"], ["--schedule", "linear"], ["--dry-run"], ["--dtype", "float32"]):
        assert main([*call, "-o", "other", *more]) == 2
        assert "--calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "7"], "--samples 7 are too few"),
        (["--question", "What is red in <image>?"], "holds <image>: the picture stands in front of"),
        (["--budget", "0.01"], "cannot be met"),
        (["--budget", "1.5"], "--budget 1.5"),
        (["--budget", "half"], "--budget 'half'"),
        (["--budget", "0.541,0.544"], "one folder"),
        (["--budget", ""], "--budget ''"),
        (["--budget", "0.6,0.5", "-o", "."], "--out . has no name"),
        (["--budget", "0.6,0.5", "-o", ".."], "--out .. has no name"),
        (["--target-retention", "0.01"], "cannot be met"),
        (["--budget", "0.5", "--target-retention", "0.5"], "give one of them"),
        (["--data", "broken", "--samples", "8"], "broken"),
        (["--data", "nowhere.json"], "nowhere.json"),
        (["--data", "chart"], "chart: no picture in this folder"),  # and not the synthetic charts
        (["--schedule", "linear"], "Known: search, cosine"),
        (["--prompt", "mine"], "Known: profile, data"),
        (["--logits", "first"], "Known: every, last"),
        (["-o", "there"], "there"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(stock_model, workdir: Path, capsys, arguments, said):
    Path("broken").mkdir()
    Path("chart").mkdir()
    for number in range(8):
        Path(f"broken/{number}.png").write_bytes(b"no picture")
    Path("there").mkdir()
    Path("there/mine").touch()
    before = sorted(workdir.rglob("*"))
    assert main(["calibrate", str(stock_model()), "--device", "cpu", *arguments]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert said in out.err
    assert "Traceback" not in out.err
    assert sorted(workdir.rglob("*")) == before


def test_of_several_budgets_one_that_cannot_be_met_is_told_before_any_is_computed(workdir: Path, capsys):
    call = ["calibrate", "tiny-llava-next", "--schedule", "cosine", "--budget", "0.54,0.25", "--device", "cpu"]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert "no shift of the cosine costs as little as 0.25" in error
    assert "the stock model answers" not in error


def test_a_trained_model_needs_a_word_more(calibrated: Path, workdir: Path, capsys):
    import shutil

    shutil.copytree(calibrated / "made-60", "trained")
    config = json.loads(Path("trained/config.json").read_text())
    Path("trained/config.json").write_text(json.dumps(config | {"router_state": "trained"}))
    assert main(["calibrate", "trained", "--device", "cpu", "--samples", "8"]) == 2
    assert "--recalibrate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_was_stopped_measures_what_is_missing(stock_model, workdir: Path, monkeypatch, capsys):
    """It ends as one that was not stopped, to the bit, and leaves no file of measurements."""
    call = ["calibrate", str(stock_model()), "--samples", "8", "--device", "cpu", "-o"]
    assert main([*call, "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as stopped:
        stopped.setattr("pmod_cli.calibration.calibration._mean", lambda rows: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*call, "made"]) == 130
    assert not Path("made").exists()
    assert len(list(Path(".pmod").glob("calibrate-*"))) == 1
    judged = []
    monkeypatch.setattr(Bench, "_judge", lambda self, *a, plain=Bench._judge: judged.append(1) or plain(self, *a))
    capsys.readouterr()
    assert main([*call, "made"]) == 0
    found = int(capsys.readouterr().err.split(" measurements of a run that was stopped")[0].split()[-1])
    assert found > 4 * len(judged)
    assert not list(Path(".pmod").glob("calibrate-*"))
    whole, made = (json.loads(Path(name, "calibration.json").read_text()) for name in ("whole", "made"))
    assert whole == made
    routers = "model-routers.safetensors"
    assert Path("whole", routers).read_bytes() == Path("made", routers).read_bytes()


def test_an_old_measurement_counts_for_the_same_model_data_and_settings_alone(tmp_path: Path):
    stock = factories.model("llava", layers=3)
    batches = batches_of(stock, "llava", count=2)

    def judged(schedule: Schedule, batches=batches, model=stock) -> int:
        measured = Measured(tmp_path / "measured.sqlite")
        bench = Bench(Replay(model), batches, (), measured=measured)
        bench.apply(schedule, bench.zero_routers(schedule))
        bench.judged()
        return measured.found

    half = Schedule((1.0, 0.5, 0.5))
    assert judged(half) == 0
    assert judged(half) == 1
    assert judged(Schedule((1.0, 0.5, 0.25))) == 0
    assert judged(half, batches_of(stock, "llava", count=3)) == 0
    with torch.no_grad():
        stock.lm_head.weight[0] += 1
    assert judged(half) == 0


def test_answers_that_are_no_numbers_are_refused():
    """They would have a divergence of 0, less than any schedule's."""
    model = factories.model("llava", layers=3)
    with torch.no_grad():
        model.lm_head.weight[0] = float("inf")
    bench = Bench(Replay(model), batches_of(model, "llava", count=2), ())
    with pytest.raises(PmodError, match="no numbers in float32"):
        bench.judged()


def test_a_picture_that_the_processor_refuses_is_named(tmp_path: Path):
    model, processor = checkpoints.load_model(checkpoints.resolve("tiny-qwen3-vl").path)
    Image.new("RGB", (2, 600)).save(tmp_path / "line.png")
    sample = Sample("pictures", ("line.png",), ("<image>\nwhat?",), folder=tmp_path)
    with pytest.raises(PmodError, match=r"pictures, line\.png: .* aspect ratio"):
        Asked(model, processor).answered([sample])


def test_a_damaged_file_of_measurements_is_begun_anew_and_one_that_cannot_be_is_told(tmp_path: Path, capsys):
    path = tmp_path / "measured.sqlite"
    path.write_bytes(b"no database " * 100)
    measured = Measured(path)
    assert [measured("a", lambda: [1, 2]), measured("a", lambda: [3])] == [[1, 2], [1, 2]]
    assert measured.found == 0, "what a run asks twice is of no run that was stopped"
    again = Measured(path)
    assert (again("a", lambda: [3]), again.found) == ([1, 2], 1)
    measured.forget()
    assert not path.exists()
    (tmp_path / "file").touch()
    without = Measured(tmp_path / "file" / "measured.sqlite")
    assert [without("a", lambda: 1), without("a", lambda: 2)] == [1, 2]
    assert "starts over" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(stock_model, workdir: Path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pmod_cli.profiling.plots.save", full)
    call = ["calibrate", str(stock_model()), "-o", "made", "--samples", "8", "--schedule", "cosine", "--device", "cpu"]
    assert main(call) == 1
    assert not Path("made").exists()
    assert "Traceback" not in capsys.readouterr().err
    assert not [path for path in workdir.iterdir() if "made" in path.name and path.is_dir()]


@pytest.mark.parametrize(
    "kills",
    [pytest.param([1], marks=pytest.mark.slow, id="while it writes"), pytest.param(range(30), marks=pytest.mark.soak)],
)
def test_killed_at_any_moment_it_leaves_nothing_or_all(stock_model, workdir: Path, kills):
    """Every second kill waits for the moment of writing, which is short. The next run needs no help."""
    call = [sys.executable, "-m", "pmod_cli", "calibrate", str(stock_model()), "-o", "made", "--samples", "8"]
    call += ["--schedule", "cosine", "--device", "cpu", "--overwrite"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    seconds = 10.0
    for kill in kills:
        process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        moment = random.Random(kill).uniform(0, 1.1 * seconds)
        while process.poll() is None:
            writes = any(path.is_dir() and "staging" in path.name for path in workdir.iterdir())
            if (kill % 2 and writes) or (not kill % 2 and time.monotonic() - started > moment):
                time.sleep(random.Random(kill).uniform(0, 0.2) if writes else 0)
                process.kill()
            time.sleep(0.002)
        seconds = time.monotonic() - started if process.returncode == 0 else seconds
        assert process.returncode in (0, -9)
        if Path("made").exists():
            checkpoints.load_model(Path("made"))
            assert json.loads(Path("made/calibration.json").read_text())["budgets"]
    assert subprocess.run(call, env=environment, capture_output=True).returncode == 0
    assert sorted(path.name for path in workdir.iterdir() if path.is_dir() and path.name != ".pmod") == ["made"]
