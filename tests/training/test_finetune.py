"""A fine-tuning run as a library call, on small random models and the real documents."""

import json
import os
import shutil
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmod_cli.checkpoints import convert, load_model, router_state
from pmod_cli.core.errors import PmodError
from pmod_cli.data.collator import Collator
from pmod_cli.model import PmodSettings, capture_selection
from pmod_cli.training.folder import LOG, SETTINGS, STATE
from pmod_cli.training.parts import PARTS, freeze, parameter_groups, part_of, repeat_in_backward
from pmod_cli.training.plan import model_of
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune
from pmod_cli.training.run_data import Counting, SyntheticDocuments
from pmod_cli.training.run_settings import PmodArgs, Settings
from pmod_cli.training.start import source_of
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Watch


def run_settings(model: Path, **train) -> Settings:
    """Three constant-rate steps of two images, and what the test changes."""
    settings = load_settings(None, [f"model.name={model}", "data.turns=1", "train.max_steps=3", "train.report_to=none"])
    changes = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-3, "lr_schedule": "constant_with_warmup"}
    for key, value in {**changes, "warmup_steps": 0.0, "log_steps": 1, **train}.items():
        setattr(settings.train, key, value)
    return settings


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def log(folder: Path) -> list[dict]:
    return [line for line in map(json.loads, (folder / LOG).read_text().splitlines()) if "loss" in line]


def test_the_first_step_moves_each_part_by_its_own_rate(routed, tmp_path):
    """AdamW's first step is the learning rate times the sign of the gradient, whatever the gradient's size."""
    settings = run_settings(routed, max_steps=1, projector_learning_rate=1e-4, router_learning_rate=1e-2)
    finetune(settings, tmp_path / "run")
    before, after = weights(routed), weights(tmp_path / "run")
    moved = {part: 0.0 for part in PARTS}
    for name in before:
        part = part_of(name)
        moved[part] = max(moved[part], (after[name] - before[name]).abs().max().item())
    assert moved["language_model"] == pytest.approx(1e-3, rel=0.01)
    assert moved["projector"] == pytest.approx(1e-4, rel=0.01)
    assert moved["router"] == pytest.approx(1e-2, rel=0.01)
    assert moved["vision_tower"] == 0.0


def test_frozen_parts_keep_every_bit_and_the_others_all_move(routed, tmp_path):
    settings = run_settings(routed)
    settings.model.freeze = ["language_model", "vision_tower"]
    finetune(settings, tmp_path / "run")
    before, after = weights(routed), weights(tmp_path / "run")
    for name in before:
        # What the last layer does to a vision token reaches no answer, so its router has no gradient.
        frozen = part_of(name) in settings.model.freeze or ".layers.3.router." in name
        assert torch.equal(before[name], after[name]) == frozen, name


def test_the_loss_falls(routed, tmp_path):
    settings = run_settings(routed, max_steps=20, batch_size=4, learning_rate=1e-2, log_steps=5)
    settings.data.rows = 4
    finetune(settings, tmp_path / "run")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]


def test_the_run_folder_is_a_checkpoint_with_trained_routers(routed, tmp_path):
    (routed / "tokenizer.model").write_bytes(b"sentences")  # no library of ours writes one: it is carried on
    report = finetune(run_settings(routed), tmp_path / "run")
    (routed / "tokenizer.model").unlink()
    assert (report.path / "tokenizer.model").read_bytes() == b"sentences"
    assert (report.status, report.step, report.path) == ("finished", 3, tmp_path / "run")
    assert router_state(routed) == "untrained"
    assert router_state(report.path) == "trained"
    assert not (report.path / STATE).exists()
    model, processor = load_model(report.path)
    rows = [SyntheticDocuments(run_settings(routed).data, 1)[0]]
    assert torch.isfinite(model(**Collator(processor)(rows)).loss)
    original, _ = load_model(routed)
    config = original.config.to_dict() | {"router_state": "trained", "_name_or_path": None}
    assert model.config.to_dict() | {"_name_or_path": None} == config
    assert any(layer.router.weight.any() for layer in model.model.language_model.layers if layer.router is not None)


def test_the_stock_model_trains_on_the_same_data_and_stays_stock(stock, routed, tmp_path):
    finetune(run_settings(stock), tmp_path / "stock")
    finetune(run_settings(routed), tmp_path / "routed")
    assert router_state(tmp_path / "stock") == "stock"
    assert weights(tmp_path / "stock").keys() == weights(stock).keys()
    lines = zip(log(tmp_path / "stock"), log(tmp_path / "routed"), strict=True)
    for of_stock, of_routed in lines:
        assert of_stock["num_input_tokens_seen"] == of_routed["num_input_tokens_seen"]
        assert of_stock["vision_tokens_kept"] == of_stock["vision_tokens"] == of_routed["vision_tokens"]
        assert of_routed["vision_tokens_kept"] < of_routed["vision_tokens"]


@pytest.mark.parametrize(
    "stated", [{"quota": "row"}, {"alpha": 0.2, "string": True}, {"target_tokens": "vision_all", "schedule": "cosine"}]
)
def test_a_routing_may_be_stated_that_a_checkpoint_has(routed, stated):
    settings = run_settings(routed)
    settings.pmod = PmodArgs(**stated)
    assert source_of(settings) == (routed, False)
    settings.pmod.quota = "per_image"
    with pytest.raises(PmodError, match=r"another routing:\n  pmod\.quota: 'row' -> 'per_image'$"):
        source_of(settings)


def test_a_selection_alone_makes_a_stock_model_a_routed_one(stock, tmp_path):
    """As every setting of `pmod` does."""
    settings = run_settings(stock, max_steps=1)
    settings.pmod.selection = "uniform"
    finetune(settings, tmp_path / "run")
    assert router_state(tmp_path / "run") == "trained"
    assert load_model(tmp_path / "run")[0].config.settings == PmodSettings(selection="uniform")
    assert model_of(settings)[1]
    with pytest.raises(PmodError, match=r"pmod\.enabled: false, yet pmod\.selection is given"):
        load_settings(None, ["pmod.enabled=false", "pmod.selection=uniform"])


@pytest.mark.parametrize("named", [True, False])
def test_weights_keep_the_dtype_of_the_source(stock_model, tmp_path, named):
    """Also where its config.json does not say which that is."""
    source = shutil.copytree(stock_model("llava_next", "llama", dtype=torch.bfloat16), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for part in () if named else (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (source / "config.json").write_text(json.dumps(config))
    report = finetune(run_settings(source, max_steps=1, log_steps=10), tmp_path / "run")
    assert report.loss > 0  # also of a run that ends before the log's first interval
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}


def test_a_run_that_was_interrupted_ends_where_an_unbroken_one_does(routed, tmp_path):
    settings = run_settings(routed, max_steps=5, lr_schedule="cosine")
    finetune(settings, tmp_path / "whole")

    def interrupt(step):
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    report = finetune(settings, tmp_path / "broken", on_step=interrupt)
    assert (report.status, report.step) == ("interrupted", 2)
    assert not (tmp_path / "broken" / "config.json").exists()
    assert router_state(tmp_path / "broken" / STATE / "checkpoint-2") == "trained"
    report = finetune(load_settings(tmp_path / "broken" / SETTINGS), tmp_path / "broken")
    assert (report.status, report.step) == ("finished", 5)
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert [line["loss"] for line in log(tmp_path / "whole")] == [line["loss"] for line in log(tmp_path / "broken")]
    assert finetune(settings, tmp_path / "broken").status == "already finished"


def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(routed, tmp_path, monkeypatch):
    """The disk fills up in the second save: the run fails, and goes on from the first."""
    saved = PmodTrainer._save_rng_state

    def full(self, folder):
        if self.state.global_step == 2:
            raise OSError(28, "No space left on device", folder)
        saved(self, folder)

    settings = run_settings(routed, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(PmodTrainer, "_save_rng_state", full)
        with pytest.raises(PmodError, match=r"disk is full.*step 2 could not be saved.*checkpoint-1 stays"):
            finetune(settings, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / STATE).glob("checkpoint-*")) == ["checkpoint-1"]
    assert not list((tmp_path / "run" / STATE).glob("incomplete*"))
    seen = []
    finetune(settings, tmp_path / "run", on_step=lambda step: seen.append(step.step))
    assert seen == [2, 3]


def test_a_loss_that_is_no_number_stops_the_run(routed, tmp_path):
    with pytest.raises(PmodError, match=r"the loss is (nan|inf) at step \d") as caught:
        finetune(run_settings(routed, learning_rate=1e30, max_grad_norm=0.0, max_steps=5), tmp_path / "run")
    assert caught.value.code == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_with_other_settings_is_not_continued(routed, tmp_path):
    finetune(run_settings(routed, max_steps=1), tmp_path / "run")
    with pytest.raises(PmodError, match=r"train\.seed: 0 -> 1"):
        finetune(run_settings(routed, max_steps=1, seed=1), tmp_path / "run")
    with pytest.raises(PmodError, match="`resume=False`"):
        finetune(run_settings(routed, max_steps=1), tmp_path / "run", resume=False)
    again = finetune(run_settings(routed, max_steps=1, seed=1), tmp_path / "run", overwrite=True)
    assert again.status == "finished"


def test_a_folder_that_is_no_run_is_left_alone(routed, tmp_path):
    (tmp_path / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(PmodError, match=r"is not a run|was not written by pmod finetune"):
            finetune(run_settings(routed), tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def trainer_for(model, settings: Settings, folder: Path) -> PmodTrainer:
    freeze(model, settings.model.freeze)
    arguments = training_arguments(settings, folder, "cpu")
    return PmodTrainer(train=settings.train, watch=Watch(), model=model, args=arguments)


def test_a_text_only_batch_reaches_every_trained_parameter(routed, tmp_path):
    settings = run_settings(routed)
    model, processor = load_model(routed)
    trainer = trainer_for(model.train(), settings, tmp_path)
    said = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    said = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in said]
    batch = Collator(processor)([{"images": [], "messages": said}])
    assert "pixel_values" not in batch
    loss = trainer.compute_loss(model, dict(batch))
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if part_of(name) in ("router", "projector"):
            assert not parameter.grad.any(), name


VARIANTS = {
    "published": PmodSettings(),
    "dropped before": PmodSettings(before="divprune:0.33"),
    "of tiles alone": PmodSettings(target_tokens="vision_hr"),
    "of each image": PmodSettings(quota="per_image"),
    "attention": PmodSettings(selection="attention"),
    **{name: PmodSettings(method=name, mean=0.6) for name in ("fastv", "pyramiddrop", "dart", "shortv")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_vision_tokens_counted_are_those_the_layers_keep(stock, tmp_path, variant):
    convert(stock, routed := tmp_path / "model", VARIANTS[variant])
    settings = run_settings(routed)
    model, processor = load_model(routed)
    trainer = trainer_for(model, settings, tmp_path)
    collate = Counting(Collator(processor), processor, [model.config.image_token_id])
    batch = collate([SyntheticDocuments(settings.data, 2)[index] for index in range(2)])
    trainer.watch.count(batch.pop("counts"))
    with capture_selection(model) as record:
        trainer.compute_loss(model, dict(batch))
    layers = len(model.model.language_model.layers)
    is_vision = batch["input_ids"] == model.config.image_token_id
    vision = is_vision.sum().item()
    kept = sum((selection.kept & is_vision).sum().item() for selection in record.layers.values())
    assert trainer.watch._local[:2] == [batch["attention_mask"].sum(), vision]
    assert trainer.watch._local[2] == pytest.approx((kept + vision * (layers - len(record.layers))) / layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_padding_changes_neither_loss_nor_gradients(stock, tmp_path, variant):
    """The trainer gives the model no mask where none is needed; rows of unequal length, with and without it."""
    convert(stock, routed := tmp_path / "model", VARIANTS[variant])
    settings = run_settings(routed)
    settings.data.turns = None
    documents = SyntheticDocuments(settings.data, 4)
    model, processor = load_model(routed)
    for layer in model.model.language_model.layers:
        if layer.router is not None:  # a zero router ties every token
            torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(0))
    trainer = trainer_for(model, settings, tmp_path)
    batch = Collator(processor)([documents[index] for index in range(4)])
    assert not batch["attention_mask"].all()
    gradients = []
    for loss in (trainer.compute_loss(model, dict(batch)), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_gradient_checkpointing_changes_nothing_but_memory(routed, tmp_path):
    plain, saving = run_settings(routed), run_settings(routed)
    saving.model.gradient_checkpointing = True
    finetune(plain, tmp_path / "plain")
    finetune(saving, tmp_path / "saving")
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "saving")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("frozen", [["vision_tower"], []])
def test_gradient_checkpointing_leaves_a_frozen_tower_alone(routed, frozen):
    """Otherwise it would be run twice, and differentiated for nothing."""
    settings = run_settings(routed)
    model, processor = load_model(routed)
    freeze(model, frozen)
    repeat_in_backward(model, frozen)
    model.train()
    ran: list[str] = []
    for part, tower in (("tower", model.model.vision_tower.encoder), ("decoder", model.model.language_model)):
        tower.layers[0].mlp.register_forward_pre_hook(lambda *_, part=part: ran.append(part))
    documents = SyntheticDocuments(settings.data, 2)
    model(**Collator(processor)([documents[index] for index in range(2)])).loss.backward()
    assert (ran.count("tower"), ran.count("decoder")) == (1 if frozen else 2, 2)


def test_accumulated_batches_take_the_step_of_one_large_batch(routed, tmp_path):
    large, small = run_settings(routed, batch_size=4), run_settings(routed, batch_size=2, gradient_accumulation=2)
    finetune(large, tmp_path / "large")
    finetune(small, tmp_path / "small")
    losses = [[line["loss"] for line in log(tmp_path / run)] for run in ("large", "small")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_weight_decay_leaves_biases_and_norms_alone(routed):
    model, _ = load_model(routed)
    train = deepcopy(run_settings(routed).train)
    train.weight_decay = 0.1
    groups = parameter_groups(model, train, decayed=["lm_head.weight"])
    assert sum(len(group["params"]) for group in groups if group["weight_decay"] == 0.1) == 1
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_documents_repeat_and_differ_from_what_the_bundled_model_saw(routed):
    data = run_settings(routed).data
    documents = SyntheticDocuments(data, 8)
    assert documents[3]["messages"] == SyntheticDocuments(data, 8)[3]["messages"]
    assert [len(documents[index]["messages"]) for index in range(8)] == [2] * 8
    assert documents[0]["images"][0].tobytes() != documents[4]["images"][0].tobytes()
