"""LoRA: what is adapted, what is trained whole, what is saved, and that merging changes nothing but the form."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from pmod_cli.checkpoints import load_model, load_processor, router_state
from pmod_cli.core.errors import PmodError
from pmod_cli.data.collator import Collator
from pmod_cli.data.conversation import from_messages
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.model import PmodSettings
from pmod_cli.training import folder
from pmod_cli.training.adapters import add_adapters, merge
from pmod_cli.training.parts import PartCount, count, part_of
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune
from pmod_cli.training.run_data import SyntheticDocuments
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Watch


def lora_settings(model, *overrides):
    common = ["data.turns=1", "train.max_steps=3", "train.batch_size=2", "train.learning_rate=1e-2", "train.seed=1"]
    common += ["train.warmup_steps=0", "train.report_to=none", "train.log_steps=1", "lora.enabled=true", "lora.rank=4"]
    return load_settings(None, [f"model.name={model}", *common, *overrides])


def weights(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_adapters_lie_on_the_decoder_alone_and_routers_and_projector_are_whole(routed):
    model, _ = load_model(routed)
    adapted = add_adapters(model, lora_settings(routed))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    adapters = {name for name in trained if "lora_" in name}
    assert len(adapters) == 4 * 7 * 2
    assert all("language_model.layers" in name for name in adapters)
    whole = trained - adapters
    assert sum(".router." in name for name in whole) == 2 * 3
    assert sum("multi_modal_projector" in name for name in whole) == 4
    assert len(whole) == 10


def test_parts_that_are_trained_whole_are_counted_once(routed):
    model, _ = load_model(routed)
    before = count(model)
    after = count(add_adapters(model, lora_settings(routed)))
    for part in ("router", "projector"):  # but for image_newline, which is no module
        assert after[part].parameters == before[part].parameters
        assert after[part].trained == sum(
            value.numel() for name, value in model.named_parameters() if part_of(name) == part and value.requires_grad
        )
    assert after["vision_tower"] == PartCount(before["vision_tower"].parameters, 0)


def test_a_lora_run_ends_in_a_checkpoint_whose_base_changed_by_low_rank_only(routed, tmp_path, recwarn):
    report = finetune(lora_settings(routed), tmp_path / "run")
    assert not [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    assert (report.status, router_state(report.path)) == ("finished", "trained")
    assert 0 < report.parameters["language_model"].trained < 0.2 * report.parameters["language_model"].parameters
    before, after = weights(routed), weights(report.path)
    assert before.keys() == after.keys()
    for name in before:
        change = after[name] - before[name]
        if "layers.1.self_attn.q_proj" in name and "vision" not in name:
            assert 0 < torch.linalg.matrix_rank(change) <= 4
        if "vision_tower" in name or "embed_tokens" in name or "norm" in name:
            assert not change.any(), name
        if ".layers.1.router." in name or "multi_modal_projector" in name:
            assert change.any(), name
    assert not (report.path / folder.STATE).exists()
    assert json.loads((report.path / folder.ADAPTER / "adapter_config.json").read_text())["r"] == 4


def with_moved_adapters(source, settings, out):
    """A trainer, its model whose trained parts are no longer what they started as, and the processor."""
    base, processor = load_model(source)
    model = add_adapters(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    arguments = training_arguments(settings, out, "cpu")
    return PmodTrainer(train=settings.train, watch=Watch(), model=model, args=arguments), model, processor


def test_distillation_adds_the_divergence_from_the_stock_model(routed, stock_model, tmp_path):
    """Adapters, routers and projector are moved first: the teacher is the stock checkpoint still."""
    settings = lora_settings(routed, "train.loss=distill", "lora.dropout=0")
    trainer, model, processor = with_moved_adapters(routed, settings, tmp_path)
    batch = Collator(processor)([SyntheticDocuments(settings.data, 2)[index] for index in range(2)])
    loss = trainer.compute_loss(model, dict(batch))
    stock, _ = load_model(stock_model("llava_next", "llama"))
    answers = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        teacher, student = stock(**batch).logits, model(**batch)
        p, q = (logits[:, :-1][answers].log_softmax(-1) for logits in (teacher, student.logits))
    expected = student.loss + (p.exp() * (p - q)).sum() / answers.sum()
    assert (p - q).abs().max() > 0.01
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert any(parameter.grad.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    with pytest.raises(PmodError, match=r"train\.loss"):
        lora_settings(routed, "train.loss=distill", "lora.enabled=false")


def test_the_teacher_leaves_frozen_what_is_frozen(routed, tmp_path):
    """peft takes all that is saved whole for trained when its adapters are on again: frozen routers had gradients."""
    settings = lora_settings(routed, "train.loss=distill", "model.freeze=[vision_tower,router]")
    trainer, model, processor = with_moved_adapters(routed, settings, tmp_path)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    asked = []
    model.get_base_model().lm_head.register_forward_hook(
        lambda *_: asked.append({name: parameter.requires_grad for name, parameter in model.named_parameters()})
    )
    batch = Collator(processor)([SyntheticDocuments(settings.data, 2)[index] for index in range(2)])
    trainer.compute_loss(model, dict(batch)).backward()
    assert asked == [before, before]  # of the teacher, and of the student
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not any(before[name] for name in before if ".router." in name)
    assert all(p.grad is None for name, p in model.named_parameters() if ".router." in name)


def test_the_teacher_of_a_batch_of_text_uses_the_tower_too(routed, tmp_path):
    """Otherwise FSDP2 and ZeRO-3 wait for its weights, where the batch of another process has images."""
    settings = lora_settings(routed, "train.loss=distill", "lora.dropout=0")
    trainer, model, _ = with_moved_adapters(routed, settings, tmp_path)
    ids = torch.tensor([[1, 5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    runs = []
    model.get_base_model().model.vision_tower.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    loss = trainer.compute_loss(model, dict(batch))
    assert loss.isfinite()
    assert runs == [False, True]


def test_distillation_weighs_as_much_in_several_processes(routed, tmp_path, monkeypatch):
    """Each sees a part of a step's rows, and what all return is averaged: the mean is what one alone returns."""
    settings = lora_settings(routed, "train.loss=distill", "lora.dropout=0")
    trainer, model, processor = with_moved_adapters(routed, settings, tmp_path)
    rows = [SyntheticDocuments(settings.data, 2)[index] for index in range(2)]
    batch, parts = Collator(processor)(rows), [Collator(processor)([row]) for row in rows]
    tokens = (batch["labels"][:, 1:] != -100).sum()
    alone = trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    both = [trainer.compute_loss(model, dict(part), num_items_in_batch=tokens) for part in parts]
    assert (sum(both) / 2).item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_merged_model_answers_as_the_adapted_one(routed, tmp_path):
    settings = lora_settings(routed, "lora.merge=false", "lora.dropout=0")
    report = finetune(settings, tmp_path / "run")
    assert folder.adapter_of(report.path)
    assert not folder.is_checkpoint(report.path)
    assert finetune(settings, tmp_path / "run").status == "already finished"
    base, processor = load_model(routed)
    adapted = PeftModel.from_pretrained(base, report.path / folder.ADAPTER)
    batch = Collator(processor)([SyntheticDocuments(settings.data, 2)[index] for index in range(2)])
    with torch.no_grad():
        expected = adapted(**batch).logits
    (routed / "tokenizer.model").write_bytes(b"sentences")
    merge(report.path)
    (routed / "tokenizer.model").unlink()
    assert (report.path / "tokenizer.model").read_bytes() == b"sentences"
    merged, _ = load_model(report.path)
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-4)
    whole = finetune(lora_settings(routed, "lora.dropout=0"), tmp_path / "whole")
    one, other = weights(report.path), weights(whole.path)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("overrides", [["lora.enabled=false"], [], ["lora.merge=false"]])
def test_the_result_reads_pictures_as_the_run_did(stock_model, tmp_path, overrides):
    """LLaVA-1.5's stock processor crops the centre; it is trained on whole pictures, padded to a square."""
    settings = lora_settings(stock_model("llava", "llama"), "train.max_steps=1", *overrides)
    out = finetune(settings, tmp_path / "run").path
    if "lora.merge=false" in overrides:
        merge(out)
    picture = Image.effect_mandelbrot((96, 32), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    encode = RowEncoder(load_processor(stock_model("llava", "llama")))
    answer = {"role": "assistant", "content": "two"}
    row = from_messages({"messages": [{"role": "user", "content": "what?"}, answer], "images": [picture]})
    seen = load_processor(out).image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(seen, encode(row)["pixel_values"])


@pytest.mark.parametrize("lora", ["true", "false"])
def test_the_result_keeps_the_selection_it_was_trained_with(routed, tmp_path, lora):
    settings = lora_settings(routed, f"lora.enabled={lora}", "pmod.selection=uniform", "train.max_steps=1")
    model, _ = load_model(finetune(settings, tmp_path / "run").path)
    assert model.config.settings == replace(PmodSettings(), selection="uniform")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_interrupted_lora_run_ends_where_an_unbroken_one_does(stock_model, tmp_path, precision):
    """Started from a stock model, which the run converts. What is trained goes on in float32 in any case."""
    own = ("pmod.enabled=true", "model.gradient_checkpointing=true", f"model.precision={precision}")
    settings = lora_settings(stock_model("llava_next", "llama"), *own)
    finetune(settings, tmp_path / "whole")

    def interrupt(step):
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert finetune(settings, tmp_path / "broken", on_step=interrupt).status == "interrupted"
    state = tmp_path / "broken" / folder.STATE / "checkpoint-2"
    assert (state / "adapter_model.safetensors").is_file()
    assert not (state / "model.safetensors").exists()
    assert finetune(settings, tmp_path / "broken").status == "finished"
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert any(".router." in name for name in whole)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_an_adapter_that_was_left_apart_is_merged_by_the_same_run_without_a_step(routed, tmp_path):
    settings = lora_settings(routed, "lora.merge=false")
    finetune(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    settings.lora.merge, seen = True, []
    assert finetune(settings, tmp_path / "run", on_step=seen.append).status == "already finished"
    assert not seen
    assert router_state(tmp_path / "run") == "trained"
    assert not (tmp_path / "run" / folder.STATE).exists()
    finetune(settings, tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_beside_a_tower_that_is_trained_each_trained_parameter_gets_a_gradient(routed, tmp_path):
    """Several processes wait for each that they expect; what lies above the features that are taken never has one."""
    settings = lora_settings(routed, "model.freeze=[]")
    trainer, model, processor = with_moved_adapters(routed, settings, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    trainer.compute_loss(model, dict(Collator(processor)([SyntheticDocuments(settings.data, 1)[0]]))).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("vision_tower" in name for name in trained) > 20
    assert not [name for name, parameter in model.named_parameters() if name in trained and parameter.grad is None]
    again = add_adapters(load_model(routed)[0], settings, tmp_path / "adapter")
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == trained


def test_routers_that_are_fitted_and_frozen_are_in_the_result(routed, tmp_path):
    """Of a run that was interrupted too: the model that it started from has not got them."""
    overrides = ["model.freeze=[vision_tower, router]", "model.router_start=attention", "data.rows=4"]
    settings = lora_settings(routed, *overrides, "train.max_steps=2")

    def interrupt(step):
        if step.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert finetune(settings, tmp_path / "run", on_step=interrupt).status == "interrupted"
    assert finetune(settings, tmp_path / "run").status == "finished"
    finetune(lora_settings(routed, *overrides, "lora.enabled=false", "train.max_steps=1"), tmp_path / "full")
    adapted, full = weights(tmp_path / "run"), weights(tmp_path / "full")
    routers = [name for name in full if ".router." in name]
    assert any(full[name].any() for name in routers)
    assert all(torch.equal(adapted[name], full[name]) for name in routers)


@pytest.mark.parametrize("lora", [False, True])
def test_routers_that_are_frozen_at_zero_stay_untrained(routed, tmp_path, lora):
    overrides = ["model.freeze=[vision_tower, router]", f"lora.enabled={lora}", "train.max_steps=1"]
    finetune(lora_settings(routed, *overrides), tmp_path / "run")
    assert router_state(tmp_path / "run") == "untrained"


def test_merging_what_is_no_lora_run(routed, tmp_path):
    with pytest.raises(PmodError, match="is not a run"):
        merge(tmp_path)
    finetune(lora_settings(routed, "lora.enabled=false", "train.max_steps=1"), tmp_path / "full")
    with pytest.raises(PmodError, match="no LoRA run"):
        merge(tmp_path / "full")


def test_targets_that_the_decoder_has_not(routed):
    model, _ = load_model(routed)
    with pytest.raises(PmodError, match="has no k_projection"):
        add_adapters(model, lora_settings(routed, "lora.targets=[q_proj, k_projection]"))


def test_four_bits_need_a_gpu(routed, tmp_path):
    with pytest.raises(PmodError, match="needs a CUDA GPU, and the device is cpu"):
        finetune(lora_settings(routed, "model.quantize=nf4"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_four_bits_train_and_merge(routed, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes; it is not installed")
    report = finetune(lora_settings(routed, "model.quantize=nf4"), tmp_path / "run", device="cuda")
    assert (report.status, router_state(report.path)) == ("finished", "trained")
