"""What methods cost: formula and trace agree, a budget is met, and skipped tokens whose keys are seen are counted."""

import pytest

from pmod_cli.calibration.budget import Budget
from pmod_cli.core.errors import PmodError
from pmod_cli.families.sizes import Sizes
from pmod_cli.model import METHODS, SCHEDULES, Method, PmodSettings
from pmod_cli.profiling import Routed, Workload, load_subject, profile
from pmod_cli.profiling.budgets import PromptBudget, cost_of, prompt_of, solve
from pmod_cli.profiling.count.memory import inference_memory
from pmod_cli.profiling.count_report import to_json


@pytest.mark.parametrize("before", [None, "divprune:0.33"])
@pytest.mark.parametrize("method", list(METHODS))
def test_formula_and_trace_agree(method, before):
    settings = {"method": method, "mean": 0.4, "before": before}
    found = profile(load_subject("tiny-llava-next", settings), Workload(((96, 64), (64, 64)), text_tokens=20))
    formula = found.formula(pmod=True)
    assert found.pmod.matrix + found.pmod.lm_head == formula.paper
    assert found.pmod.attention_products == formula.attention_products
    assert found.pmod.selector == formula.selector
    cost = cost_of(found.sizes, PmodSettings(**settings), found.rows)
    assert cost.flops == found.pmod.total / found.stock.total
    held = sum(k.total for k in found.pmod_kv)
    assert cost.kv_bytes == held / sum(k.total for k in found.stock_kv)
    routed = Routed.of(found.subject.pmod)
    assert inference_memory(found.sizes, found.rows, found.dtype, routed=routed).cache == held
    assert cost.mean_tokens == found.mean_retention == found.subject.pmod.settings.mean_retention(32)
    assert cost.mean_tokens == pytest.approx(0.4 if before is None else 0.4 * 0.33, rel=0.02)


def test_budgets_are_met_to_one_percent_by_every_method():
    sizes = Sizes.of(load_subject("llava-next-7b").stock)
    for budget in (0.3, 0.4, 0.54):
        for method in METHODS:
            assert cost_of(sizes, solve(method, budget, sizes)).flops == pytest.approx(budget, rel=0.01), method
    with pytest.raises(
        PmodError, match=r"pyramiddrop cannot cost 0\.15 of the stock model: it comes as near as 0\.278"
    ):
        solve("pyramiddrop", 0.15, sizes)
    with pytest.raises(PmodError, match=r"visionzip cannot run on Qwen2\.5-VL: it ranks by the class token of a CLIP"):
        solve("visionzip", 0.4, Sizes.of(load_subject("qwen2.5-vl-7b").stock))
    with pytest.raises(PmodError, match="unknown method 'best'"):
        solve("best", 0.4, sizes)


def test_a_method_whose_schedule_fits_no_model_is_a_sentence():
    SCHEDULES.register("short")(lambda num_layers, mean: [mean] * 3)
    METHODS.register("short")(Method("uniform", "short"))
    try:
        with pytest.raises(PmodError, match="short has settings at no budget: schedule 'short' needs one ratio per"):
            solve("short", 0.4, Sizes.of(load_subject("llava-next-7b").stock))
    finally:
        METHODS.unregister("short")
        SCHEDULES.unregister("short")


@pytest.mark.parametrize("method", list(METHODS))
def test_a_budget_is_met_on_each_prompt(method):
    """Prompts of a document, of a wide picture, and of much text; settings of the same cost are found as well."""
    sizes = Sizes.of(load_subject("llava-next-7b").stock)
    budget = PromptBudget(sizes, method, 0.54)
    for vision, text in ((1700, 70), (2144, 400)):
        settings = budget.settings(vision, text)
        assert budget.is_met(vision, text)
        assert cost_of(sizes, settings, prompt_of(vision, text)).flops == pytest.approx(0.54, rel=0.01)
    alike = {budget.settings(2928, text) for text in (58, 59, 60, 61)}
    assert len(alike) <= 2, "prompts of about one shape share a batch"
    like = PmodSettings(shift=0.4)
    settings = PromptBudget(sizes, method, like).settings(2144, 200)
    wanted = cost_of(sizes, like, prompt_of(2144, 200)).flops
    assert cost_of(sizes, settings, prompt_of(2144, 200)).flops == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pmod"])
def test_the_whole_budget_is_the_stock_model(method):
    """Not one token less, however short the prompt."""
    sizes = Sizes.of(load_subject("tiny-llava-next").stock)
    for vision, text in ((192, 12), (7, 3)):
        settings = PromptBudget(sizes, method, 1.0).settings(vision, text)
        assert settings.retention(sizes.decoder.layers) == [1.0] * sizes.decoder.layers


def test_a_budget_that_a_prompt_cannot_meet_says_so():
    """Text cannot be dropped, and a short prompt has few tokens."""
    sizes = Sizes.of(load_subject("tiny-llava-next").stock)
    budget = PromptBudget(sizes, "random", 0.15)
    assert budget.is_met(198, 12)
    assert not budget.is_met(198, 150)
    assert not budget.is_met(0, 12)
    assert cost_of(sizes, budget.settings(198, 150), prompt_of(198, 150)).flops > 0.3


def test_dropping_before_the_decoder_reaches_what_the_schedule_alone_cannot():
    sizes = Sizes.of(load_subject("llava-next-7b").stock)
    alone = cost_of(sizes, PmodSettings(shift=0.1)).flops
    both = cost_of(sizes, PmodSettings(before="divprune:0.33"))
    assert alone > 0.28 > both.flops > 0.1
    assert both.first_layer == pytest.approx(0.33)


@pytest.mark.parametrize("shift", [0.2, 0.5])
def test_calibration_counts_the_same(shift):
    """Its budget adds up layers, to search among schedules; the sum is what the whole costs."""
    sizes = Sizes.of(load_subject("llava-next-7b").stock)
    settings = PmodSettings(shift=shift)
    layers = sizes.decoder.layers
    total = Budget(sizes, 0.5).total(settings.retention(layers), sum(settings.routed(layers)))
    assert cost_of(sizes, settings).flops == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("target", ["vision_all", "vision_hr"])
def test_vision_tokens_that_are_not_routed_are_processed(target):
    """The base image's 576 of 2928 pass every layer: more than the schedule's mean, which `mean_retention` stays."""
    found = profile(load_subject("llava-next-7b", {"target_tokens": target}), Workload(text_tokens=58))
    processed = sum(layer.vision_tokens for layer in found.pmod.layers) / (32 * 2928)
    assert processed == pytest.approx({"vision_all": 0.537, "vision_hr": 0.628}[target], abs=1e-3)
    cost = cost_of(found.sizes, found.subject.pmod.settings, found.rows)
    assert cost.mean_tokens == pytest.approx(processed, abs=1e-3)
    assert found.mean_retention == pytest.approx(0.5375)
    cache = to_json(found)["kv_cache"]
    assert cache["paper_convention_percent"] == pytest.approx(cache["vision_pmod_of_stock_percent"], abs=0.1)
    thinned = PmodSettings("list", values=[0.25] * 32, target_tokens=target)
    first = cost_of(found.sizes, thinned).first_layer
    assert first == pytest.approx(0.25 if target == "vision_all" else 0.3975, abs=1e-3)
