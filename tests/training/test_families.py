"""`pmod finetune` on the families that take several images and videos: rows of a file, to a checkpoint that loads."""

import json

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file
from transformers.quantizers.quantizers_utils import should_convert_module

from pmod_cli import cli
from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.checkpoints.aliases import builtin_config
from pmod_cli.data.collator import Collator
from pmod_cli.data.conversation import from_messages
from pmod_cli.data.dataset import RowEncoder
from pmod_cli.families.configs import known_family
from pmod_cli.families.sizes import Sizes, image_tokens
from pmod_cli.model import PmodSettings
from pmod_cli.training.adapters import merge
from pmod_cli.training.cost import row_of
from pmod_cli.training.parts import freeze, gathered_alone, part_of
from pmod_cli.training.recipe import load_settings
from pmod_cli.training.run import finetune, four_bits
from pmod_cli.training.trainer import PmodTrainer, training_arguments
from pmod_cli.training.watch import Watch
from tests.model.models import pmod_twin
from tests.visual_processors import KINDS, save_stock
from tests.visual_processors import model as stock_model

COLOURS = ("red", "green", "blue")


def write_rows(folder):
    """Twelve rows: one image, two, a clip, and words alone; what is seen decides the answer."""
    rows = []
    for number in range(12):
        colour = COLOURS[number % 3]
        picture = Image.new("RGB", (16 + 4 * (number % 2), 12), colour)
        answer = {"role": "assistant", "content": colour}
        row = {"messages": [{"role": "user", "content": "<image>which colour?"}, answer], "images": [f"{number}.png"]}
        if number % 4 == 1:
            row["messages"][0]["content"] = "<image><image>which colour?"
            row["images"] *= 2
        if number % 4 == 2:
            row = {"video": f"clip{number}", "conversations": [{"from": "human", "value": "<video>\\nwhich colour?"}]}
            row["conversations"].append({"from": "gpt", "value": colour})
            (folder / f"clip{number}").mkdir()
            for frame in range(2 + number):
                picture.save(folder / f"clip{number}" / f"{frame:02}.png")
        elif number % 4 == 3:
            row = {"messages": [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]}
        else:
            picture.save(folder / f"{number}.png")
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss_and_leave_a_checkpoint(kind, workdir, capsys):
    """Every kind of row in a batch; every part of the model is trained, and moves."""
    save_stock(workdir / "stock", kind)
    rows = write_rows(workdir)
    settings = ["data.kind=llava", f"data.path={rows}", "data.video_frames=4", "train.max_steps=12"]
    settings += ["train.batch_size=4", "train.learning_rate=5e-3", "train.log_steps=1", "train.report_to=none"]
    settings += ["model.freeze=[]", "pmod.enabled=true", "train.warmup_steps=0"]
    sets = [part for setting in settings for part in ("--set", setting)]
    code = cli.main(["finetune", "--model", "stock", "-o", "run", "--device", "cpu", *sets])
    assert code == 0, capsys.readouterr().err
    log = [json.loads(line) for line in (workdir / "run" / "training_log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert any(line.get("vision_tokens_kept", 0) < line["vision_tokens"] for line in log if line.get("vision_tokens"))

    trained, processor = load_model(workdir / "run", dtype="float32")
    before, _ = load_model(workdir / "stock", dtype="float32")
    assert type(trained).__name__ == f"Pmod{type(before).__name__}"
    assert processor.video_processor is not None
    family = known_family(trained.config).title
    assert f"A p-MoD {family} model, fine-tuned" in (workdir / "run" / "README.md").read_text()
    old = dict(before.named_parameters())
    moved = {name for name, value in trained.named_parameters() if name in old and not torch.equal(value, old[name])}
    still = set(old) - moved
    assert not [name for name in still if "post_layernorm" not in name and ".layers.2." not in name], still
    assert any(layer.router.weight.any() for layer in trained.model.language_model.layers if layer.router is not None)


@pytest.mark.parametrize(
    ("kind", "frozen"), [("qwen2_5_vl", ["vision_tower"]), ("qwen3_vl", []), ("qwen3_vl", ["projector"])]
)
def test_beside_adapters_what_is_not_frozen_is_trained_whole(kind, frozen, tmp_path):
    """A Qwen-VL holds its projector in its tower. What was trained whole is in the merged model, to the bit."""
    save_stock(tmp_path / "stock", kind)
    settings = ["data.kind=llava", f"data.path={write_rows(tmp_path)}", "data.video_frames=4", "train.max_steps=2"]
    settings += ["train.batch_size=4", "train.learning_rate=5e-3", "train.warmup_steps=0", "train.report_to=none"]
    settings += [f"model.name={tmp_path / 'stock'}", f"model.freeze={frozen}", "pmod.enabled=true"]
    settings += ["lora.enabled=true", "lora.rank=2", "lora.dropout=0", "lora.merge=false"]
    out = finetune(load_settings(None, settings), tmp_path / "run").path
    merge(out)
    before, after = (dict(load_model(path)[0].named_parameters()) for path in (tmp_path / "stock", out))
    moved = {part_of(name) for name in before if "visual" in name and not torch.equal(before[name], after[name])}
    assert moved == {"projector", "vision_tower"} - {*frozen}
    still = [name for name in before if part_of(name) in moved and torch.equal(before[name], after[name])]
    assert not still
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    whole = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items() if "lora_" not in name}
    assert {part_of(name) for name in whole} == moved | {"router"}
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_four_bits_are_for_the_layers_of_the_decoder(kind):
    """By the rule that transformers reads the list by."""
    model, skipped = pmod_twin(stock_model(kind), {}), four_bits().llm_int8_skip_modules
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    held = {name for name in linear if should_convert_module(name, skipped)}
    assert held == {name for name in linear if ".language_model.layers." in name}


@pytest.mark.parametrize("frozen", [[], pytest.param(["vision_tower"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_reaches_every_trained_parameter(kind, frozen, tmp_path):
    """Of text alone, of a film alone, of an image alone: a process that lacks a gradient would make others wait."""
    convert(save_stock(tmp_path / "stock", kind), tmp_path / "routed", PmodSettings(), Options(router_init="normal:1"))
    settings = load_settings(None, [f"model.name={tmp_path / 'routed'}", "train.max_steps=1", "train.report_to=none"])
    model, processor = load_model(tmp_path / "routed", dtype="float32")
    freeze(model, frozen)
    arguments = training_arguments(settings, tmp_path / "run", "cpu")
    trainer = PmodTrainer(train=settings.train, watch=Watch(), model=model.train(), args=arguments)
    Image.new("RGB", (16, 12), "red").save(tmp_path / "a.png")
    answer = {"role": "assistant", "content": "blue"}
    encode, collate = RowEncoder(processor, video_frames=4), Collator(processor)
    for pictures in ({}, {"videos": [["a.png", "a.png"]]}, {"images": ["a.png"]}):
        row = {"messages": [{"role": "user", "content": "which?"}, answer], **pictures}
        batch = collate([encode(from_messages(row), tmp_path)])
        loss = trainer.compute_loss(model, dict(batch))
        assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (name, pictures)
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_gathered_alone(kind, routed):
    """What accelerate makes of the names: it refuses one that the model lacks, as it did those of all LLaVAs."""
    model = stock_model(kind)
    model = pmod_twin(model, {}) if routed else model
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    plugin.transformer_cls_names_to_wrap = gathered_alone(model)
    plugin.set_auto_wrap_policy(model)
    alone = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    decoder, tower = (
        model.model.language_model,
        getattr(model.model, "vision_tower", getattr(model.model, "visual", None)),
    )
    assert {type(layer) for layer in decoder.layers} < alone
    assert any(isinstance(module, tuple(alone)) for module in tower.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_take_the_step_of_one_large_batch(kind, tmp_path):
    """Rows of few and of many answer tokens: each token weighs the same, whichever pass it is in."""
    save_stock(tmp_path / "stock", kind)
    asked = {"role": "user", "content": "which?"}
    rows = [{"messages": [asked, {"role": "assistant", "content": "red blue " * many}]} for many in (1, 9, 2, 1)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    steps = []
    for size in (4, 1):
        more = [f"train.batch_size={size}", "train.global_batch_size=4", "train.max_steps=1", "train.report_to=none"]
        own = [f"model.name={tmp_path / 'stock'}", "data.kind=llava", f"data.path={tmp_path / 'rows.json'}"]
        finetune(load_settings(None, [*own, *more, "pmod.enabled=true"]), tmp_path / str(size))
        lines = map(json.loads, (tmp_path / str(size) / "training_log.jsonl").read_text().splitlines())
        steps += [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)


@pytest.mark.parametrize("sizes", [(), ((100, 100),), ((672, 336),), ((672, 672),), ((1008, 336),), ((672, 672),) * 3])
@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b"])
def test_a_plan_counts_the_tiles_that_give_so_many_tokens(name, sizes):
    shapes = Sizes.of(builtin_config(name))
    images = [image_tokens(shapes, size) for size in sizes]
    vision = sum(image.tokens for image in images)
    row = row_of(shapes, vision, vision + 40)
    assert (row.tiles, row.vision_tokens) == (sum(image.tiles for image in images), vision)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b", "llava-onevision-7b"])
def test_a_plan_counts_the_tower_for_the_tokens_that_rows_have(name):
    sizes = Sizes.of(builtin_config(name))
    rows = [row_of(sizes, vision, vision + 40) for vision in (100, 400)]
    assert [(row.vision_tokens, row.text_tokens) for row in rows] == [(100, 40), (400, 40)]
    if name.startswith("qwen"):
        patches = [sizes.tower.patches(row.images[0]) for row in rows]
        assert patches == [4 * 100, 4 * 400]
