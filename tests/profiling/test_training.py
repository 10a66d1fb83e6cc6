"""Predicted training FLOPs and peak memory, against torch's counter and against what real steps allocate."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pmod_cli.checkpoints import builtin_config
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from pmod_cli.profiling import (
    Routed,
    Sizes,
    TrainingSetup,
    Workload,
    load_subject,
    scaled,
    training_flops,
    training_memory,
)
from pmod_cli.profiling.count.formulas import parameters
from pmod_cli.profiling.count.trace import meta_model
from pmod_cli.profiling.count.training import PARTS
from pmod_cli.profiling.measure.clock import peak_bytes
from pmod_cli.profiling.measure.phases import PromptBatch, prompt, random_pair


def step(model: PreTrainedModel, batch: PromptBatch, *, low: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False, **batch.pixels).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def train_mode(model: PreTrainedModel, setup: TrainingSetup) -> None:
    model.requires_grad_(True).train()
    model.model.vision_tower.requires_grad_("vision_tower" not in setup.frozen)
    model.model.multi_modal_projector.requires_grad_("projector" not in setup.frozen)
    if setup.checkpointing:
        model.model.language_model.activation_checkpointing_enable()


@pytest.mark.parametrize(
    "setup",
    [
        TrainingSetup(),
        TrainingSetup(checkpointing=True),
        TrainingSetup(frozen=frozenset({"vision_tower", "projector"})),
    ],
)
def test_flops_of_a_real_step(setup: TrainingSetup) -> None:
    """Forward, backward and recomputation, of stock and p-MoD: exactly what torch counts while they run."""
    subject = scaled(load_subject("llava-1.5-7b"), hidden_size=64, layers=3)
    sizes = Sizes.of(subject.stock)
    rows = Workload(text_tokens=9).rows(sizes)
    models = random_pair(subject, device="cpu", dtype="float32", attention="eager")
    batch = prompt(subject.stock, rows, device="cpu", dtype=torch.float32)
    for model, routed in ((models.stock, None), (models.pmod, Routed.of(subject.pmod))):
        train_mode(model, setup)
        with FlopCounterMode(display=False) as counter:
            step(model, batch)
        counted = training_flops(sizes, rows, setup, routed).step
        assert counter.get_total_flops() == pytest.approx(counted, rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("hidden_size", "inner", "vocabulary"), [(128, 1024, 500), (128, 320, 1500)])
def test_memory_of_a_real_step(
    precision: str, checkpointing: bool, hidden_size: int, inner: int, vocabulary: int
) -> None:
    """What a step holds at its peak beyond weights, within a tenth. Optimizer states are arithmetic."""
    subject = scaled(load_subject("llava-1.5-7b"), hidden_size=hidden_size, layers=4)
    for config in (subject.stock, subject.pmod):
        config.vision_config.num_hidden_layers = 6
        config.text_config.vocab_size = vocabulary
        config.text_config.intermediate_size = inner
        config.image_token_index = config.image_token_id = vocabulary - 1
    sizes = Sizes.of(subject.stock)
    rows = Workload(text_tokens=30).rows(sizes)
    models = random_pair(subject, device="cpu", dtype="float32", attention="sdpa")
    batch = prompt(subject.stock, rows, device="cpu", dtype=torch.float32)
    setup = TrainingSetup(precision=precision, checkpointing=checkpointing)
    for model, routed in ((models.stock, None), (models.pmod, Routed.of(subject.pmod))):
        train_mode(model, setup)
        step(model, batch, low=precision == "bfloat16")
        measured = peak_bytes(lambda model=model: step(model, batch, low=precision == "bfloat16"), "cpu")
        predicted = training_memory(sizes, rows, setup, routed)
        held = parameters(sizes, sum(routed.has_router) if routed else 0)
        beyond = predicted.total - 4 * held.total - 8 * (held.total - held.tower)
        assert beyond == pytest.approx(measured, rel=0.1), (predicted, measured)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_of_a_step_whose_skipped_tokens_give_keys(precision: str) -> None:
    subject = scaled(load_subject("llava-1.5-7b", {"method": "shortv", "mean": 0.5}), hidden_size=128, layers=4)
    for config in (subject.stock, subject.pmod):
        config.vision_config.num_hidden_layers = 6
        config.text_config.vocab_size, config.text_config.intermediate_size = 500, 320
        config.image_token_index = config.image_token_id = 499
    sizes, setup = Sizes.of(subject.stock), TrainingSetup(precision=precision)
    rows = Workload(text_tokens=30).rows(sizes)
    model = random_pair(subject, device="cpu", dtype="float32", attention="sdpa").pmod
    batch = prompt(subject.stock, rows, device="cpu", dtype=torch.float32)
    train_mode(model, setup)
    step(model, batch, low=precision == "bfloat16")
    measured = peak_bytes(lambda: step(model, batch, low=precision == "bfloat16"), "cpu")
    held = parameters(sizes, 0)
    beyond = training_memory(sizes, rows, setup, Routed.of(subject.pmod)).total
    assert beyond - 4 * held.total - 8 * (held.total - held.tower) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("method", ["pmod", "shortv"])
def test_flops_of_a_real_step_with_adapters(method: str) -> None:
    settings = {"method": "shortv", "mean": 0.5} if method == "shortv" else {}
    subject = scaled(load_subject("llava-1.5-7b", settings), hidden_size=64, layers=3)
    sizes, setup = Sizes.of(subject.stock), TrainingSetup(lora_rank=8)
    rows = Workload(text_tokens=9).rows(sizes)
    model = random_pair(subject, device="cpu", dtype="float32", attention="eager").pmod
    targets = rf".*\.language_model\.layers\.\d+\.\w+\.({'|'.join(setup.lora_targets)})"
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, lora_dropout=0.0))
    for name, parameter in adapted.named_parameters():
        if "router" in name or "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    batch = prompt(subject.stock, rows, device="cpu", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        step(adapted.train(), batch)
    assert counter.get_total_flops() == pytest.approx(
        training_flops(sizes, rows, setup, Routed.of(subject.pmod)).step, rel=1e-3
    )


def test_numbers_of_weights() -> None:
    for alias in ("llava-1.5-7b", "llava-next-34b"):
        subject = load_subject(alias)
        real = sum(parameter.numel() for parameter in meta_model(subject.pmod).parameters())
        counted = parameters(Sizes.of(subject.stock), len(subject.pmod.routed_layers)).total
        assert counted == pytest.approx(real, rel=1e-4)


def test_what_shares_and_what_freezes_needs_less() -> None:
    sizes = Sizes.of(builtin_config("llava-next-7b"))
    rows = Workload(text_tokens=200, batch_size=4).rows(sizes)
    pmod = Routed(PmodSettings().retention(32))

    def total(routed: Routed | None = None, **setup) -> float:
        return training_memory(sizes, rows, TrainingSetup(precision="bfloat16", **setup), routed).total / 2**30

    assert total() > total(pmod)
    assert total() > total(checkpointing=True)
    assert total(checkpointing=True, accumulation=2) >= total(checkpointing=True)
    engines = [total(checkpointing=True, engine=engine, devices=8) for engine in ("ddp", "zero1", "zero2", "zero3")]
    assert engines == sorted(engines, reverse=True)
    whole, lora = (total(checkpointing=True, **more) for more in ({}, {"lora_rank": 128, "frozen_dtype": "bfloat16"}))
    qlora = total(checkpointing=True, lora_rank=128, frozen_dtype="nf4")
    assert whole > 80
    assert qlora < lora < whole / 2


def test_a_frozen_decoder_saves_the_gradients_of_its_weights() -> None:
    sizes = Sizes.of(builtin_config("llava-1.5-7b"))
    rows = Workload(batch_size=2).rows(sizes)
    whole = training_flops(sizes, rows, TrainingSetup())
    adapted = training_flops(sizes, rows, TrainingSetup(lora_rank=16))
    assert 2.8 * whole.forward < whole.step < 3 * whole.forward
    assert adapted.backward < 0.6 * whole.backward
    assert adapted.forward > whole.forward


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"precision": "fp8"}, "precision 'fp8' is unknown"),
        ({"engine": "zero9"}, "engine 'zero9' is unknown"),
        ({"frozen": frozenset({"tower"})}, f"frozen 'tower' is unknown: expected {', '.join(PARTS)}"),
    ],
)
def test_an_unknown_setting_is_a_sentence(setting: dict, sentence: str) -> None:
    with pytest.raises(PmodError, match=sentence):
        TrainingSetup(**setting)
