"""Counts against the paper, and against real forwards and real caches."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from pmod_cli.model import PmodLlavaConfig, PmodLlavaNextConfig, PmodSettings
from pmod_cli.model.methods import METHODS
from pmod_cli.model.modeling import PmodLlavaForConditionalGeneration, PmodLlavaNextForConditionalGeneration
from pmod_cli.profiling import Subject, Workload, load_subject, profile
from pmod_cli.profiling.comparison import printed_case
from pmod_cli.profiling.count.operators import count
from pmod_cli.profiling.count_report import layers_table, to_json
from tests import factories

TERA = 1e12


@pytest.mark.parametrize(
    ("alias", "stock", "pmod", "with_attention", "kv_with_text"),
    [("llava-1.5-7b", 8.38, 4.92, (8.59, 5.01), 57.9), ("llava-next-7b", 39.46, 21.94, (44.13, 23.83), 54.6)],
)
def test_the_papers_figures(alias: str, stock: float, pmod: float, with_attention: tuple, kv_with_text: float) -> None:
    result = profile(load_subject(alias), Workload())
    assert result.totals("paper") == pytest.approx((stock * TERA, pmod * TERA), rel=0.005)
    assert (result.stock.total / TERA, result.pmod.total / TERA) == pytest.approx(with_attention, abs=0.006)
    assert 100 * result.mean_retention == pytest.approx(53.8, abs=0.051)
    kv = to_json(result)["kv_cache"]
    assert kv["vision_pmod_of_stock_percent"] == pytest.approx(
        53.8, abs=0.15
    )  # K is truncated, the paper's ratio is not
    assert kv["total_pmod_of_stock_percent"] == pytest.approx(kv_with_text, abs=0.15)
    assert (result.published.tflops.stock, result.published.tflops.pmod) == (stock, pmod)
    assert not result.unknown_operators


@pytest.mark.parametrize(
    ("alias", "settings", "prompt", "printed"),
    [
        ("llava-next-7b", {"before": "divprune:0.33"}, {}, False),
        ("llava-next-7b", {"target_tokens": "vision_hr"}, {}, False),
        ("llava-next-7b", {"select_at": [3, 10]}, {}, False),
        ("llava-next-7b", {"shift": 0.5, "norm": "softmax"}, {}, True),  # the paper's shift, said; and no norm costs
        ("llava-next-7b", {"selection": "attention"}, {}, False),
        ("llava-next-7b", {}, {"batch_size": 2}, False),
        ("llava-next-video-7b", {}, {"videos": ((4, 336, 336),)}, False),  # 576 tokens, as many as a LLaVA-1.5's image
    ],
)
def test_printed_numbers_stand_beside_their_own_case_alone(
    alias: str, settings: dict, prompt: dict, printed: bool
) -> None:
    assert (printed_case(load_subject(alias, settings), Workload(**prompt)) is not None) == printed


def _subject(kind: str, decoder: str, **settings) -> Subject:
    stock = factories.config(kind, decoder, layers=6)
    shared = {key: value for key, value in stock.to_dict().items() if key not in ("model_type", "architectures")}
    routed = {"llava": PmodLlavaConfig, "llava_next": PmodLlavaNextConfig}[kind]
    return Subject(kind, "test", stock, routed.from_dict({**shared, "pmod": PmodSettings(**settings).to_dict()}))


def _prefill(
    subject: Subject, image_size: tuple[int, int], text: int, tokens: int, tiles: int
) -> tuple[nn.Module, dict]:
    """A real random p-MoD model with eager attention, whose products every counter sees, and one real prompt."""
    config = subject.pmod
    config._attn_implementation = "eager"
    next_model = isinstance(config, PmodLlavaNextConfig)
    model = (PmodLlavaNextForConditionalGeneration if next_model else PmodLlavaForConditionalGeneration)(config).eval()
    side = config.vision_config.image_size
    ids = torch.tensor([[1] + [config.image_token_id] * tokens + [2] * (text - 1)])
    pixels = torch.rand(1, tiles, 3, side, side) if next_model else torch.rand(1, 3, side, side)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if next_model:
        inputs["image_sizes"] = torch.tensor([image_size[::-1]])
    return model, inputs


@pytest.mark.parametrize(
    ("kind", "decoder", "settings"),
    [
        ("llava", "llama", {}),
        ("llava_next", "mistral", {"schedule": "constant", "mean": 0.4}),
        ("llava_next", "qwen2", {"target_tokens": "vision_hr"}),
        ("llava", "llama", {"method": "shortv", "mean": 0.5}),  # skipped tokens stay in the cache
        *(("llava", "llama", {"selection": name}) for name in ("dart", "divprune", "uniform")),
    ],
)
def test_equals_a_real_forward_and_its_real_cache(kind: str, decoder: str, settings: dict) -> None:
    """Predicted FLOPs and bytes of a prefill and of decoded tokens, against a model that really ran them."""
    size, text, steps = (50, 37), 9, 16
    subject = _subject(kind, decoder, **settings)
    result = profile(subject, Workload(image_sizes=(size,), text_tokens=text, new_tokens=steps), dtype="float32")
    model, inputs = _prefill(subject, size, text, result.longest.vision_tokens, result.longest.tiles)
    cache = DynamicCache()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, past_key_values=cache, use_cache=True)
    assert counter.get_total_flops() == result.totals("full")[1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert counter.get_total_flops() == result.totals("generate")[1] < result.totals("full")[1]
    mask = inputs["attention_mask"]
    for step in range(1, steps + 1):
        mask = torch.cat([mask, mask[:, :1]], dim=1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.tensor([[2]]), attention_mask=mask, past_key_values=cache, use_cache=True)
        assert counter.get_total_flops() == result.pmod.decode(step)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    assert held == [layer.total for layer in result.pmod_kv]


@pytest.mark.parametrize(
    ("settings", "selects"),
    [
        ({}, False),
        ({"before": "divprune:0.6"}, True),
        ({"method": "fastv", "mean": 0.5}, True),
        ({"selection": "attention"}, True),
    ],
)
def test_parts_add_up_to_the_whole_whatever_ranks_the_tokens(settings: dict, selects: bool) -> None:
    result = profile(_subject("llava_next", "llama", **settings), Workload())
    report = to_json(result)
    parts = report["flops"]["parts"]
    assert ("selection" in parts) == selects
    for key in ("stock_tflops", "pmod_tflops"):
        whole = report["flops"]["conventions"]["full"][key]
        assert sum(part[key] for part in parts.values()) == pytest.approx(whole, rel=1e-9)
    for layer in report["layers"]:
        kinds = ("attention", "attention_products", "mlp", "router", "selection")
        assert sum(layer[f"{kind}_gflops"] for kind in kinds) == pytest.approx(layer["total_gflops"], rel=1e-9)


@pytest.mark.parametrize("name", list(METHODS))
def test_what_a_method_computes_is_known(name: str) -> None:
    assert not profile(_subject("llava", "llama", method=name, mean=0.6), Workload()).unknown_operators


def test_the_layer_that_ranks_has_a_row_of_its_own() -> None:
    """FastV ranks in a layer that keeps everything, as the layers in front of it do."""
    table = layers_table(profile(_subject("llava_next", "llama", method="fastv", mean=0.7), Workload()))
    columns = {column.header: list(column.cells) for column in table.columns}
    (ranks,) = (index for index, cell in enumerate(columns["choice"]) if cell != "-")
    assert columns["layers"][ranks].isdecimal()
    assert columns["ratio"][ranks] == columns["ratio"][ranks - 1] == "1.000"
    assert float(columns["total"][ranks]) > float(columns["total"][ranks - 1])


def test_an_operator_that_nobody_counts_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x, x)

    assert "cdist" in str(count(Odd(), torch.empty(1, 4, 8, device="meta")).unknown_operators)


def test_a_reduced_retention_costs_less_and_full_retention_costs_stock_plus_routers() -> None:
    whole = profile(_subject("llava_next", "llama", max_ratio=1.1, schedule="list", values=[1.0] * 6), Workload())
    routers = sum(layer.router for layer in whole.pmod.layers)
    assert routers > 0
    assert whole.pmod.total == whole.stock.total + routers
    half = profile(_subject("llava_next", "llama", schedule="constant", mean=0.5), Workload())
    assert half.pmod.total < whole.pmod.total
    assert sum(layer.total for layer in half.pmod_kv) < sum(layer.total for layer in half.stock_kv)
