"""Conversion: bit-equal to stock where it must be, nothing copied, nothing half-written, nothing taken on trust."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pmod_cli import cli
from pmod_cli.checkpoints import Options, changes, convert, load_model, load_processor, router_state
from pmod_cli.checkpoints.conversion import PROVENANCE, ROUTERS
from pmod_cli.checkpoints.files import CONFIG, INDEX, SINGLE, read_tensors
from pmod_cli.checkpoints.writing import write_routers
from pmod_cli.core.errors import PmodError
from pmod_cli.model import PmodSettings
from tests.factories import DECODERS, KINDS

EVERY_LAYER_ROUTED = PmodSettings(schedule="list", values=(1.0,) * 4, max_ratio=1.5)


def inputs_of(processor):
    image = Image.effect_mandelbrot((50, 60), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    return processor(images=image, text="USER: <image>\nwhat is this ASSISTANT:", return_tensors="pt")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_ratio_1_logits_are_bit_equal_to_stock(kind, decoder, stock_model, tmp_path):
    source = stock_model(kind, decoder)
    convert(source, tmp_path / "pmod", EVERY_LAYER_ROUTED)
    stock, processor = load_model(source)
    ours, _ = load_model(tmp_path / "pmod")
    new = {name for name, _ in ours.named_parameters()} - {name for name, _ in stock.named_parameters()}
    assert new == {f"model.language_model.layers.{n}.router.{kind}" for n in range(4) for kind in ("weight", "bias")}
    inputs = inputs_of(processor)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_what_is_written(max_shard_size, stock_model, tmp_path):
    source = stock_model(max_shard_size=max_shard_size)
    target = tmp_path / "pmod"
    report = convert(source, target, PmodSettings())
    before, after = read_tensors(source), read_tensors(target)
    routers = [f"language_model.model.layers.{n}.router.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")]
    assert set(after) - set(before) == set(routers)
    assert {name: (t.dtype, t.shape) for name, t in after.items() if name in before} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    assert len(report.linked) == len(list(source.glob("*.safetensors")))
    for name in report.linked:
        assert (target / name).stat().st_nlink >= 2
    assert not (target / SINGLE).exists()  # it would be loaded alone, without the routers
    config = json.loads((target / CONFIG).read_text())
    assert (config["model_type"], config["router_state"]) == ("pmod_llava_next", "untrained")
    assert report.router_parameters == 3 * 33
    assert report.mean_retention == pytest.approx(0.5375)
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_routers_are_zero_in_the_dtype_of_the_checkpoint(dtype, name, stock_model, tmp_path):
    convert(stock_model(dtype=dtype), tmp_path / "pmod", PmodSettings())
    with safe_open(tmp_path / "pmod" / ROUTERS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        assert {file.get_slice(key).get_dtype() for key in tensors} == {name}
    assert all(not tensor.any() for tensor in tensors.values())
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(1, 32), (1,)}
    model, _ = load_model(tmp_path / "pmod")
    assert model.dtype == dtype


def large(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = -99840.0
    return tensor


def test_a_number_beyond_float16_is_refused_and_nothing_is_left(stock_model, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_PIECE", 256)  # bytes: it stands in a later piece than the first
    source = tmp_path / "source"
    shutil.copytree(stock_model(dtype=torch.bfloat16, max_shard_size="60KB"), source)
    rewrite(source, UP, large)
    with pytest.raises(PmodError, match=f"{UP} holds a number that is too large for float16") as caught:
        convert(source, tmp_path / "half", PmodSettings(), Options(dtype="float16"))
    assert "`dtype=bfloat16`" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    for dtype in (None, "float32"):
        convert(source, tmp_path / f"{dtype}", PmodSettings(), Options(dtype=dtype))
        with safe_open(read_tensors(tmp_path / f"{dtype}")[UP].path, framework="pt") as file:
            assert file.get_tensor(UP).view(-1)[-1] == -99840.0


def test_a_router_beyond_float16_is_refused(tmp_path):
    given = {"a.router.weight": np.array([1.0, 1e6], dtype=np.float32)}
    shapes = {"a.router.weight": (1, 2)}
    write_routers(tmp_path / "wide", shapes, "BF16", 0.0, 0, given)
    with pytest.raises(PmodError, match=r"a\.router\.weight holds a number that is too large for float16"):
        write_routers(tmp_path / "half", shapes, "F16", 0.0, 0, given)


def test_provenance_and_state(stock_model, tmp_path):
    source = stock_model()
    convert(source, tmp_path / "pmod", PmodSettings(shift=0.4), origin="org/name@0123")
    provenance = json.loads((tmp_path / "pmod" / PROVENANCE).read_text())
    assert provenance["source"] == "org/name@0123"
    assert provenance["settings"]["shift"] == 0.4
    assert provenance["source_shards"][SINGLE]["bytes"] == (source / SINGLE).stat().st_size
    assert len(provenance["source_files_sha256"][CONFIG]) == 64
    assert router_state(source) == "stock"
    assert router_state(tmp_path / "pmod") == "untrained"


def test_small_files_are_copies(stock_model, tmp_path):
    source = stock_model()
    convert(source, tmp_path / "pmod", PmodSettings())
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "pmod" / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / "pmod" / name).samefile(source / name)


def test_further_chat_templates_are_carried_on(stock_model, tmp_path):
    source = tmp_path / "stock"
    shutil.copytree(stock_model(), source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].role }}")
    for overwrite in (False, True):
        report = convert(source, tmp_path / "pmod", PmodSettings(), overwrite=overwrite)
        assert load_processor(tmp_path / "pmod").chat_template["short"] == "{{ messages[0].role }}"
    assert "additional_chat_templates" in report.written


def test_a_source_without_a_tokenizer_is_told(stock_model, tmp_path):
    shutil.copytree(stock_model(), tmp_path / "source")
    assert not convert(tmp_path / "source", tmp_path / "whole").notes
    (tmp_path / "source" / "tokenizer.json").unlink()
    (note,) = convert(tmp_path / "source", tmp_path / "pmod").notes
    assert "holds no tokenizer, so none is written" in note
    (tmp_path / "source" / "processor_config.json").unlink()
    (note,) = convert(tmp_path / "source", tmp_path / "bare").notes
    assert "holds no tokenizer and no image processor" in note


def test_another_file_system_is_copied_and_said(stock_model, tmp_path, monkeypatch):
    def cross_device(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", cross_device)
    report = convert(stock_model(), tmp_path / "pmod", PmodSettings())
    assert (report.linked, report.copied) == ([], ["model-00001-of-00001.safetensors"])
    load_model(tmp_path / "pmod")


def test_dry_run_checks_and_writes_nothing(stock_model, tmp_path):
    report = convert(stock_model(), tmp_path / "deep" / "pmod", PmodSettings(), dry_run=True)
    assert report.routed_layers == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_converting_twice_is_refused(stock_model, tmp_path):
    convert(stock_model(), tmp_path / "pmod", PmodSettings())
    with pytest.raises(PmodError, match="exists"):
        convert(stock_model(), tmp_path / "pmod", PmodSettings())
    with pytest.raises(PmodError, match="p-MoD checkpoint already"):
        convert(tmp_path / "pmod", tmp_path / "again", PmodSettings())
    convert(stock_model(), tmp_path / "pmod", PmodSettings(shift=0.4), overwrite=True)
    assert json.loads((tmp_path / "pmod" / CONFIG).read_text())["pmod"]["shift"] == 0.4


def test_overwrite_never_removes_what_is_not_ours(stock_model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(PmodError, match="not written by pmod convert"):
        convert(stock_model(), tmp_path / "photos", PmodSettings(), overwrite=True)
    source = tmp_path / "photos" / "model"
    shutil.copytree(stock_model(), source)
    with pytest.raises(PmodError, match="this run reads"):
        convert(source, tmp_path / "photos", PmodSettings(), overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weight_map(folder: Path, **files) -> None:
    edit(folder / INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | files)


def twice_in_index(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    name = next(iter(json.loads(text)["weight_map"]))
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "x.safetensors",', 1))


def swap_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def rewrite(folder: Path, name: str, change) -> None:
    """Replace one tensor by what `change` makes of it."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file, metadata={"format": "pt"})


def double(folder: Path) -> None:
    """Put a tensor of the first shard into the second one as well."""
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second, metadata={"format": "pt"})


NORM, UP = "language_model.model.norm.weight", "language_model.model.layers.1.mlp.up_proj.weight"
HEAD = "language_model.lm_head.weight"
DAMAGE = {
    "unknown model": (lambda f: edit(f / CONFIG, model_type="idefics"), "model_type is 'idefics', expected one of"),
    "no vision part": (lambda f: edit(f / CONFIG, vision_config=None), "vision_config is absent"),
    "no tower named": (lambda f: edit(f / CONFIG, model_type="llava_llama"), "mm_vision_tower is absent"),
    "unknown decoder": (lambda f: edit(f / CONFIG, text_config={"model_type": "gemma"}), "is 'gemma'"),
    "sliding window": (
        lambda f: edit(f / CONFIG, text_config={"model_type": "mistral", "sliding_window": 64}),
        "sliding-window",
    ),
    "quantised": (lambda f: edit(f / CONFIG, quantization_config={"bits": 4}), "quantised"),
    "config no JSON": (lambda f: (f / CONFIG).write_text("{"), "is not JSON"),
    "config absent": (lambda f: (f / CONFIG).unlink(), "has no config.json"),
    "layers differ": (lambda f: edit(f / CONFIG, text_config={"num_hidden_layers": 5}), "layers 0-3, expected 0-4"),
    "file escapes": (lambda f: weight_map(f, x="../../etc/passwd"), "names '../../etc/passwd'"),
    "absolute file": (lambda f: weight_map(f, x="/tmp/x.safetensors"), "expected a .safetensors file in the same"),
    "tensor absent": (lambda f: weight_map(f, ghost="model-00001-of-00006.safetensors"), "lack: ghost"),
    "no map": (lambda f: edit(f / INDEX, weight_map=[]), "no weight_map"),
    "shard absent": (lambda f: next(f.glob("model-00002*")).unlink(), "lacks model-00002"),
    "shard cut": (lambda f: os.truncate(next(f.glob("model-00002*")), 20000), "not a whole safetensors file"),
    "shard empty": (lambda f: os.truncate(next(f.glob("model-00002*")), 0), "not a whole safetensors file"),
    "shards swapped": (swap_shards, "tensors that its files lack"),
    "tensor twice in the index": (twice_in_index, "twice"),
    "tensor in two shards": (double, "tensors twice"),
    "wrong shape": (lambda f: rewrite(f, UP, lambda t: t[:-1]), f"{UP} has shape [63, 32], expected [64, 32]"),
    "wrong dtype": (lambda f: rewrite(f, NORM, lambda t: t.to(torch.int8)), f"{NORM} is I8, expected F32, BF16 or F16"),
    "4 bit": (
        lambda f: edit(f / CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is quantised (bitsandbytes)",
    ),
    "gptq": (lambda f: edit(f / CONFIG, quantization_config={"quant_method": "gptq"}), "is quantised (gptq)"),
    "shard is noise": (lambda f: next(f.glob("model-00002*")).write_bytes(b"\xff" * 64), "not a whole"),
    "pickled": (
        lambda f: [(f / INDEX).rename(f / "pytorch_model.bin"), *(p.unlink() for p in f.glob("*.safetensors"))],
        "loading such a pickle can run any code",
    ),
    "no weights": (lambda f: (f / INDEX).unlink(), "has no weights"),
    "head of a tied model cut": (
        lambda f: [edit(f / CONFIG, tie_word_embeddings=True), rewrite(f, HEAD, lambda t: t[:-1])],
        f"{HEAD} has shape",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_source_is_refused_before_anything_is_written(name, stock_model, tmp_path):
    damage, told = DAMAGE[name]
    source = tmp_path / "source"
    shutil.copytree(stock_model(max_shard_size="60KB"), source)
    damage(source)
    with pytest.raises(PmodError) as caught:
        convert(source, tmp_path / "pmod", PmodSettings())
    assert told in caught.value.what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_that_alone_is_called_tied(kind, stock_model, tmp_path):
    """As transformers 4 wrote it; today's LLaVA-NeXT looks for it at the top alone, and would draw a head."""
    source = tmp_path / "source"
    shutil.copytree(stock_model(kind), source)
    text = json.loads((source / CONFIG).read_text())["text_config"]
    edit(source / CONFIG, tie_word_embeddings=False, text_config=text | {"tie_word_embeddings": True})
    tensors = load_file(source / SINGLE)
    del tensors[HEAD]
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    convert(source, tmp_path / "ours", EVERY_LAYER_ROUTED, Options(verify=True))
    model, _ = load_model(tmp_path / "ours")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_settings_that_do_not_fit_are_refused(stock_model, tmp_path):
    with pytest.raises(PmodError, match="do not fit 4 decoder layers"):
        convert(stock_model(), tmp_path / "pmod", PmodSettings(schedule="list", values=(0.5,) * 32))
    with pytest.raises(PmodError, match="anyres"):
        convert(stock_model("llava"), tmp_path / "pmod", PmodSettings(target_tokens="vision_hr"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"before": "fastv:0.5"}, "fastv reads the attention of a layer"),
        ({"before": "visionzip:0.5", "target_tokens": "vision_hr"}, "target_tokens vision_hr spares the first"),
        ({"selection": "visionzip", "target_tokens": "vision_hr"}, "target_tokens vision_hr spares the first"),
    ],
)
def test_a_selection_that_the_model_cannot_have_is_refused(settings, told, stock_model, tmp_path):
    """Before anything is written, and not when the result is loaded."""
    with pytest.raises(PmodError, match=told):
        convert(stock_model(), tmp_path / "pmod", PmodSettings(**settings), dry_run=True)


def test_a_lost_router_is_not_filled_in(stock_model, tmp_path):
    target = tmp_path / "pmod"
    convert(stock_model(), target, PmodSettings())
    index = json.loads((target / INDEX).read_text())
    lost = "language_model.model.layers.2.router.weight"
    del index["weight_map"][lost]
    (target / INDEX).write_text(json.dumps(index))
    shutil.copy(target / ROUTERS, target / "aside")
    tensors = load_file(target / "aside")
    del tensors[lost]
    save_file(tensors, target / ROUTERS, metadata={"format": "pt"})
    with pytest.raises(PmodError, match=r"lacks 1 tensors: .*layers\.2\.router\.weight"):
        load_model(target)


def test_a_lost_bias_does_not_cost_the_routers_of_the_source(stock_model, tmp_path):
    """Zero biases are added in a file of their own, whose name must not be that of a hard link."""
    convert(stock_model(), tmp_path / "pmod", PmodSettings(), Options(router_init="normal:1"))
    routers = tmp_path / "pmod" / ROUTERS
    weights = {name: tensor for name, tensor in load_file(routers).items() if name.endswith("weight")}
    save_file(weights, routers, metadata={"format": "pt"})
    index = json.loads((tmp_path / "pmod" / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "router.bias" not in name}
    (tmp_path / "pmod" / INDEX).write_text(json.dumps(index))
    before = routers.read_bytes()
    convert(tmp_path / "pmod", tmp_path / "remote", None, Options(to="remote-code", verify=True))
    assert routers.read_bytes() == before
    found = {name: tensor for name, tensor in read_tensors(tmp_path / "remote").items() if ".router." in name}
    written = {name: load_file(tensor.path)[name] for name, tensor in found.items()}
    assert all(written[name].equal(tensor) for name, tensor in weights.items())
    assert not any(tensor.any() for name, tensor in written.items() if name.endswith("bias"))


def test_a_router_on_a_plain_layer_is_not_dropped(stock_model, tmp_path):
    target = tmp_path / "pmod"
    convert(stock_model(), target, PmodSettings())
    edit(target / CONFIG, pmod=PmodSettings(schedule="list", values=(1.0, 1.0, 0.5, 0.5)).to_dict())
    with pytest.raises(PmodError, match=r"calls plain.*layers\.1\.router"):
        load_model(target)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("selection", "outliers", "selection must be one of"),
        ("alpha", "x", "alpha must be a number"),
        ("nothing", 1, ""),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["visualize", "img.png"],
        ["finetune", "tiny", "--dry-run"],
        ["ask", "img.png", "what?"],
        ["profile"],
        ["eval", "-t", "tiny_doc"],
    ],
    ids=lambda command: command[0],
)
def test_settings_that_nothing_here_knows_are_a_sentence(stock_model, workdir, capsys, field, value, told, command):
    """A package that is missing, or a damaged file: the same for every command that opens the model."""
    convert(stock_model(), workdir / "own", PmodSettings(schedule="list", values=(1.0, 0.5, 0.5, 0.25)))
    config = json.loads((workdir / "own" / "config.json").read_text())
    (workdir / "own" / "config.json").write_text(json.dumps(config | {"pmod": config["pmod"] | {field: value}}))
    Image.new("RGB", (20, 20)).save(workdir / "img.png")
    assert cli.main([*command, "-m", "own"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert told in message
    assert "own" in message
    assert "Traceback" not in message
