"""Predicted KV cache and peak memory, against what real models hold: padded batches and decoded tokens included."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from pmod_cli.checkpoints import builtin_config
from pmod_cli.model import PmodSettings
from pmod_cli.profiling import Routed, Sizes, Workload, load_subject, profile, scaled
from pmod_cli.profiling.count.memory import RESERVE, bytes_per_token, fit, inference_memory
from pmod_cli.profiling.latency_report import predicted_cache
from pmod_cli.profiling.measure.clock import peak_bytes
from pmod_cli.profiling.measure.devices import DEVICES, parse_memory
from pmod_cli.profiling.measure.latency import bytes_read, cache_bytes
from pmod_cli.profiling.measure.phases import PhaseBench, prompt, random_pair
from tests.model import visual

STEPS = 16


@pytest.mark.parametrize("sizes", [((64, 48),), ((64, 48), (300, 20), (30, 400))])
@pytest.mark.parametrize("alias", ["llava-1.5-7b", "llava-next-mistral-7b"])
@torch.inference_mode()
def test_cache_after_a_real_prefill_and_16_decoded_tokens(alias: str, sizes: tuple) -> None:
    """Byte for byte, in every layer, alone and in a batch whose rows are padded to the longest; GQA in Mistral's."""
    subject = scaled(load_subject(alias), hidden_size=256, layers=4)
    before = profile(subject, Workload(sizes, text_tokens=9), dtype="float32")
    after = profile(subject, Workload(sizes, text_tokens=9, new_tokens=STEPS), dtype="float32")
    models = random_pair(subject, device="cpu", dtype="float32", attention="sdpa")
    batch = prompt(subject.stock, before.rows, device="cpu", dtype=torch.float32)
    bench = PhaseBench(models, batch, STEPS)
    for name, counted, then in (("stock", before.stock_kv, after.stock_kv), ("p-mod", before.pmod_kv, after.pmod_kv)):
        cache, mask, ids = bench.filled_cache(name), batch.attention_mask, batch.input_ids[:, :1]
        assert _by_layer(cache) == [layer.total for layer in counted]
        assert cache_bytes(cache) == sum(layer.total for layer in counted)
        for _ in range(STEPS):
            mask = None if mask is None else torch.cat([mask, mask[:, -1:]], dim=1)
            models[name](input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert _by_layer(cache) == [layer.total for layer in then]


def _by_layer(cache: DynamicCache) -> list[int]:
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


@pytest.mark.parametrize("settings", [{}, {"method": "shortv", "mean": 0.5}], ids=["p-mod", "shortv"])
def test_a_decoded_token_reads_the_cache_that_is_held(settings: dict) -> None:
    """The mean of two tokens, which read one and two of their own: ShortV's skipped tokens are among what is read."""
    subject = scaled(load_subject("llava-1.5-7b", settings), hidden_size=64, layers=4)
    counted = profile(subject, Workload(text_tokens=9), dtype="float32")
    models = random_pair(subject, device="cpu", dtype="float32", attention="sdpa")
    batch = prompt(subject.stock, counted.rows, device="cpu", dtype=torch.float32)
    bench = PhaseBench(models, batch, steps=2)
    for name in ("stock", "p-mod"):
        decoder, new = models[name].model.language_model, 1.5 * 4 * bytes_per_token(counted.sizes.decoder, "float32")
        parts = (decoder.layers, decoder.norm, models[name].lm_head)
        weights = sum(parameter.nbytes for part in parts for parameter in part.parameters())
        assert bytes_read(counted, models, name, 2) == weights + cache_bytes(bench.filled_cache(name)) + new


def test_new_tokens_are_no_part_of_the_cache_after_a_prefill(tmp_path: Path) -> None:
    """Of a film whose frames have timestamps between them, which are text beside the text that was asked for."""
    file = tmp_path / "config.json"
    visual.stock_config("qwen3_vl").to_json_file(file)
    subject = load_subject(str(file), {"mean": 0.3})
    counted = profile(subject, Workload(videos=((4, 32, 32),), text_tokens=9, new_tokens=4), dtype="float32")
    models = random_pair(subject, device="cpu", dtype="float32", attention="sdpa")
    bench = PhaseBench(models, prompt(subject.stock, counted.rows, device="cpu", dtype=torch.float32), 4)
    held = tuple(cache_bytes(bench.filled_cache(name)) for name in ("p-mod", "stock"))
    assert predicted_cache(counted) == held


@pytest.mark.parametrize("batch_size", [1, 2])
def test_peak_of_a_real_prefill(batch_size: int) -> None:
    """Cache and work space within a tenth of what a prefill allocates."""
    subject = scaled(load_subject("llava-1.5-7b"), hidden_size=256, layers=4)
    sizes = Sizes.of(subject.stock)
    rows = Workload(text_tokens=30, batch_size=batch_size).rows(sizes)
    models = random_pair(subject, device="cpu", dtype="float32", attention="sdpa")
    bench = PhaseBench(models, prompt(subject.stock, rows, device="cpu", dtype=torch.float32), 1)
    for name, routed in (("stock", None), ("p-mod", Routed.of(subject.pmod))):
        bench.filled_cache(name)
        measured = peak_bytes(lambda name=name: bench.filled_cache(name), "cpu")
        predicted = inference_memory(sizes, rows, "float32", routed=routed)
        assert predicted.cache + predicted.work == pytest.approx(measured, rel=0.1), name


def test_what_fits_is_the_most_that_fits() -> None:
    sizes = Sizes.of(builtin_config("llava-next-7b"))
    (row,) = Workload(text_tokens=58).rows(sizes)
    pmod = Routed(PmodSettings().retention(32))
    device = parse_memory("24GB")
    room = device.memory - RESERVE
    for routed in (None, pmod):
        found = fit(sizes, row, "bfloat16", device.memory, new_tokens=64, routed=routed)
        needed = [
            inference_memory(sizes, [row] * batch, "bfloat16", new_tokens=64, routed=routed).total
            for batch in (found.batch, found.batch + 1)
        ]
        assert needed[0] <= room < needed[1]
    assert found.batch > fit(sizes, row, "bfloat16", device.memory, new_tokens=64).batch
    tight = fit(Sizes.of(builtin_config("llava-next-llama3-8b")), row, "bfloat16", parse_memory("17.5GB").memory)
    assert tight.limited_by == "memory"
    assert row.vision_tokens < tight.context < 8192


def test_a_gpu_has_many_spellings() -> None:
    assert parse_memory("H100") is DEVICES["h100"]
    assert parse_memory("rtx 4090") is DEVICES["rtx-4090"]
    assert parse_memory("24GB").memory == parse_memory("24 GiB").memory == 24 * 2**30
