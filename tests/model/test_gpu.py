"""On a CUDA device: parity with the CPU's float32, batch N = 1, compiled decoding with a static cache, KV = count."""

from importlib.util import find_spec

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig, DynamicCache

from pmod_cli.model import capture_selection, kept_tokens
from tests.model.models import IMAGES, ROUTED_FROM_START, ROWS, batch, pmod_model, single

pytestmark = pytest.mark.gpu

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
HEADS = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 64: the flash kernels take no smaller ones of the tests' usual width."""
FLOAT32 = {"atol": 1e-4, "rtol": 1e-4}
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Norm of the difference of logits over their norm, where the same tokens were kept."""
BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32: the CPU has none."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def on_gpu(inputs, dtype=torch.float32):
    return {key: value.to("cuda", dtype if value.is_floating_point() else None) for key, value in inputs.items()}


def compared(attention: str, dtype: torch.dtype, backend: SDPBackend | None, uniform: bool) -> float:
    """Norm of the difference of the GPU's logits from the CPU's in float32, over the norm of these.

    With routers, low precision may choose another token of nearly equal weight; `uniform` selection cannot.
    """
    model = pmod_model(attention="sdpa", **HEADS)
    model.set_selection("uniform" if uniform else "router")
    inputs = batch("llava_next", ROWS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
    model = model.to("cuda", dtype)
    model.set_attn_implementation({"text_config": attention})  # flex attention takes no heads as small as the tower's
    with torch.no_grad():
        if backend is None:
            logits = model(**on_gpu(inputs, dtype)).logits
        else:
            with sdpa_kernel([backend, SDPBackend.MATH] if backend is not SDPBackend.MATH else [backend]):
                logits = model(**on_gpu(inputs, dtype)).logits
    difference = logits.float().cpu()[real] - expected
    return float(difference.norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_of_sdpa_agree_with_the_cpu(backend, dtype):
    assert compared("sdpa", dtype, BACKENDS[backend], uniform=dtype != torch.float32) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attention_agrees_with_the_cpu(attention, dtype):
    assert compared(attention, dtype, None, uniform=dtype != torch.float32) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_flash_attention_agrees_with_the_cpu(dtype):
    if find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    assert compared("flash_attention_2", dtype, None, uniform=True) < CLOSE[dtype]


def test_kept_tokens_are_the_cpus():
    model, inputs = pmod_model(), batch("llava_next", ROWS)
    with torch.no_grad(), capture_selection(model) as expected:
        model(**inputs)
    model.cuda()
    with torch.no_grad(), capture_selection(model) as found:
        model(**on_gpu(inputs))
    for layer, selected in expected.layers.items():
        assert torch.equal(found.layers[layer].kept.cpu(), selected.kept)


def test_ties_keep_the_lowest_positions():
    model = pmod_model(router_std=0.0).cuda()
    with torch.no_grad(), capture_selection(model) as record:
        model(**on_gpu(batch("llava_next", ROWS[:1])))
    for selected in record.layers.values():
        kept = selected.kept[0][record.vision_mask[0]]
        assert kept[: int(selected.K)].all()
        assert not kept[int(selected.K) :].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single_rows(side):
    model, inputs = pmod_model().cuda(), batch("llava_next", ROWS, side)
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0).cuda()
    with torch.no_grad():
        logits = model(**on_gpu(inputs), position_ids=positions).logits
        for row in range(len(ROWS)):
            expected = model(**on_gpu(single(inputs, row, IMAGES[row]))).logits[0]
            torch.testing.assert_close(logits[row][inputs["attention_mask"][row].bool().cuda()], expected, **FLOAT32)


def test_static_cache_in_one_compiled_graph_speaks_as_eager():
    model = pmod_model(pmod=ROUTED_FROM_START).cuda()
    compiled = CompileConfig(fullgraph=True, dynamic=True, mode="default")
    for size in [(64, 64), (64, 32), (20, 50)]:
        inputs = on_gpu(batch("llava_next", [("what is the value of a?", [size])]))
        expected = model.generate(**inputs, **GREEDY)
        static = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compiled)
        assert torch.equal(static, expected)


def test_the_cache_holds_what_is_counted():
    model, inputs = pmod_model().bfloat16().cuda(), batch("llava_next", ROWS[:1])
    cache = DynamicCache()
    with torch.no_grad():
        model(**on_gpu(inputs, torch.bfloat16), past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    config = model.config.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for ratio, layer in zip(model.config.retention, cache.layers, strict=True):
        slots = length - vision + kept_tokens(vision, ratio)
        counted = slots * config.num_key_value_heads * head * 2  # bytes of bfloat16
        assert layer.keys.untyped_storage().nbytes() == layer.values.untyped_storage().nbytes() == counted
