"""The clock, models that share their weights, and the phases that are timed: on small real models."""

import time

import pytest
import torch

from pmod_cli.core.errors import PmodError
from pmod_cli.model.layer import Router
from pmod_cli.profiling import Sizes, Workload, load_subject, profile
from pmod_cli.profiling.measure.clock import (
    REST,
    TimedCall,
    Timing,
    interleaved,
    peak_bytes,
    shares_of_time,
    threads,
    timed,
)
from pmod_cli.profiling.measure.devices import DEVICES, named_device, parse_memory
from pmod_cli.profiling.measure.latency import measured_device, phase_flops
from pmod_cli.profiling.measure.phases import (
    CHECKPOINTED,
    DECODE,
    FIRST_TOKEN,
    PREFILL,
    TRAIN,
    PhaseBench,
    prompt,
    random_pair,
)
from tests import factories
from tests.model import visual


def timing(*seconds: float, per: int = 1) -> Timing:
    return Timing([TimedCall(cpu=value, wall=2 * value) for value in seconds], per)


def test_ratios_are_taken_within_a_round() -> None:
    """Both slow down threefold, and one always takes half of the other."""
    fast, slow = timing(1, 2, 3), timing(2, 4, 6)
    assert fast.ratio(slow) == 0.5
    assert fast.median() == 2
    assert fast.median("wall") == 4
    assert timing(8, per=4).median() == 2
    assert timing(8, per=4).ratio(timing(8)) == 0.25
    assert timing(1).spread == 0
    assert timing(1, 2, 3, 4, 5).spread == pytest.approx(1 / 3)  # quartiles 2 and 4
    assert TimedCall(cpu=1, wall=2, device=3).seconds == 3


def test_calls_take_turns_and_every_second_round_is_reversed() -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "ab"}
    found = interleaved(calls, device="cpu", warmup=1, repeats=2, per=3)
    assert called == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(timing.samples) for name, timing in found.items()} == {"a": 2, "b": 2}
    assert found["a"].per == 3


def test_a_sleep_takes_wall_time_alone() -> None:
    sample = timed(lambda: time.sleep(0.05), "cpu")
    assert sample.wall >= 0.05
    assert sample.cpu < sample.wall
    assert sample.device is None


def test_the_peak_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first, second
        torch.zeros(800)

    assert peak_bytes(call, "cpu") == 4 * 1500


def test_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    with threads(1) as number:
        assert number == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_gpu_that_nobody_knows_is_told_with_near_names() -> None:
    assert named_device(" A100 80GB ") is DEVICES["a100-80gb"]
    with pytest.raises(PmodError, match=r"Near: .*a100-40gb|Near: .*a10") as failure:
        named_device("a100")
    assert failure.value.hint is None, "a size has no peaks"
    for wrong in ("0GB", "9e9GB", "much"):
        with pytest.raises(PmodError):
            parse_memory(wrong)


def test_peaks_of_this_machine_are_above_zero() -> None:
    device = measured_device("cpu", torch.float32)
    assert device.flops > 0
    assert device.bandwidth > 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "config.json"
    factories.config("llava_next", "qwen2", layers=3).to_json_file(file)
    subject = load_subject(str(file), {"mean": 0.3})
    return subject, random_pair(subject, device="cpu", dtype="float32", attention="sdpa")


@pytest.fixture(scope="module")
def bench(pair) -> PhaseBench:
    subject, models = pair
    rows = Workload(((64, 48), (30, 400)), text_tokens=9).rows(Sizes.of(subject.stock))
    return PhaseBench(models, prompt(subject.stock, rows, device="cpu", dtype=torch.float32), 2)


def test_stock_and_pmod_are_the_same_memory(pair) -> None:
    _, models = pair
    stock = dict(models.stock.named_parameters())
    own = {name for name, parameter in models.pmod.named_parameters() if name not in stock}
    assert own
    assert all(".router." in name for name in own)
    for name, parameter in models.pmod.named_parameters():
        if name in stock:
            assert parameter.data_ptr() == stock[name].data_ptr(), name
    routers = [module for module in models.pmod.modules() if isinstance(module, Router)]
    assert all(router.weight.any() for router in routers)  # no ties, so that kept tokens lie scattered


def test_controls_are_the_same_model_with_another_selection(pair) -> None:
    _, models = pair
    for name in ("random", "uniform", "p-mod"):
        assert models[name] is models.pmod
    assert models["stock"] is models.stock


@pytest.mark.parametrize("phase", [PREFILL, FIRST_TOKEN, DECODE, TRAIN])
def test_a_control_is_counted_with_its_own_ranking(tmp_path, phase) -> None:
    """As the p-MoD model is that ranks so by its settings, and without the ranking of that one."""
    file = tmp_path / "config.json"
    factories.config("llava_next", "qwen2", layers=3).to_json_file(file)
    batch = Workload(((64, 48), (30, 400)), text_tokens=9)

    def counted(name: str, **settings: str) -> tuple[int, int]:
        return phase_flops(profile(load_subject(str(file), {"mean": 0.3} | settings), batch), phase, name, 1)

    own = counted("p-mod")
    for name in ("fastv", "divprune", "random"):
        assert counted(name) == counted("p-mod", selection=name)
        assert counted("router", selection=name) == own
        assert (counted(name) > own) == (name != "random" and phase != DECODE)


def test_a_prompt_is_padded_on_the_left(bench) -> None:
    made, image_token = bench.prompt, bench.pair.stock.config.image_token_id
    assert made.attention_mask is not None
    assert made.attention_mask[:, -1].all()
    assert not made.attention_mask.all()
    assert torch.equal(made.vision_mask, made.input_ids == image_token)
    assert made.attention_mask[made.vision_mask].all()
    assert made.pixels["image_sizes"].tolist() == [[48, 64], [400, 30]]


@pytest.mark.parametrize("kind", visual.KINDS)
def test_a_stock_model_takes_a_prompt_of_two_images_a_row(kind) -> None:
    model = visual.stock(kind)
    rows = Workload(((16, 16),), images=2, text_tokens=5, batch_size=2).rows(Sizes.of(model.config))
    made = prompt(model.config, rows, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=made.input_ids, attention_mask=made.attention_mask, **made.pixels).logits
    assert logits.shape[:2] == (2, rows[0].tokens)
    assert made.vision_mask.sum() == sum(row.vision_tokens for row in rows)


def test_images_that_need_text_between_them_are_told() -> None:
    config = visual.stock_config("qwen3_vl")
    rows = Workload(((16, 16),), images=3, text_tokens=1).rows(Sizes.of(config))
    with pytest.raises(PmodError, match="1 text tokens, and 2 stand between"):
        prompt(config, rows, device="cpu", dtype=torch.float32)


def test_shares_of_a_forward_add_up(bench) -> None:
    shares = shares_of_time(bench.pair["p-mod"], bench.call(FIRST_TOKEN, "p-mod"), "cpu")
    assert sum(shares.values()) == pytest.approx(1)
    assert {"vision tower", "projector", "attention", "MLP", "router", "lm_head", REST} == set(shares)
    assert shares["attention"] > 0
    bench.filled_cache("stock")  # its first prefill merges the embeddings
    before = _hooks(bench)
    stock = shares_of_time(bench.pair["stock"], bench.call(PREFILL, "stock"), "cpu")
    assert "router" not in stock  # and a prefill sees no pixels
    assert "vision tower" not in stock
    assert _hooks(bench) == before  # transformers has some of its own


def _hooks(bench: PhaseBench) -> list[int]:
    modules = bench.pair.stock.modules()
    return [hook for module in modules for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@pytest.mark.parametrize("name", ["stock", "p-mod", "uniform"])
def test_decoding_leaves_the_cache_as_it_was(bench, name) -> None:
    call = bench.call(DECODE, name)
    cache = next(cell.cell_contents for cell in call.__wrapped__.__closure__ if hasattr(cell.cell_contents, "layers"))
    before = [layer.keys.shape for layer in cache.layers]
    call()
    assert [layer.keys.shape for layer in cache.layers] == before


@pytest.mark.parametrize("phase", [TRAIN, CHECKPOINTED])
def test_a_training_step_leaves_no_gradient(bench, phase) -> None:
    bench.call(phase, "p-mod")()
    model = bench.pair.pmod
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
