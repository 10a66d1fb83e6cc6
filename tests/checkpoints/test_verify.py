"""`--verify` sees a flipped bit, a lost tensor and a wrong file, and says what it compared."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmod_cli.checkpoints import Options, convert
from pmod_cli.checkpoints import verify as module
from pmod_cli.checkpoints.conversion_plan import make_plan
from pmod_cli.checkpoints.files import read_tensors
from pmod_cli.checkpoints.layouts import read_source
from pmod_cli.core.errors import PmodError
from tests.checkpoints.originals import twins


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"link": "copy"},
        {"to": "stock", "max_shard_bytes": 50_000},
        {"to": "published"},
    ],
)
def test_what_is_written_passes(options, stock_model, tmp_path):
    layers = 32 if options.get("to") == "published" else 4  # the published code's schedule is one of 32 layers
    report = convert(stock_model(layers=layers), tmp_path / "out", options=Options(verify=True, **options))
    assert report.verified
    if options.get("to") != "published":
        assert "bit for bit stock" in report.verified[-1]


def test_the_original_layout_passes(tmp_path):
    twins(tmp_path / "original", "llava_next", weights="pickle", tower="beside", dtype=torch.float16)
    report = convert(tmp_path / "original", tmp_path / "out", options=Options(verify=True))
    assert "rewritten tensors: bit for bit" in report.verified[0]
    assert "bit for bit stock" in report.verified[-1]


def damage(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_flipped_bit_is_found(dtype, tmp_path):
    twins(tmp_path / "original")
    options, target = Options(dtype=dtype), tmp_path / "out"
    convert(tmp_path / "original", target, options=options)
    plan = make_plan(read_source(tmp_path / "original"), None, options)
    tensor = read_tensors(target)["language_model.model.layers.1.mlp.up_proj.weight"]
    assert module.verify(plan, target)
    damage(tensor.path, tensor.offset + 10)
    with pytest.raises(PmodError, match=r"layers\.1\.mlp\.up_proj\.weight differs") as caught:
        module.verify(plan, target)
    assert caught.value.code == 1


def test_a_copy_that_differs_is_found(stock_model, tmp_path):
    options, target = Options(link="copy"), tmp_path / "out"
    convert(stock_model(), target, options=options)
    plan = make_plan(read_source(stock_model()), None, options)
    damage(target / "model-00001-of-00001.safetensors", -1)
    with pytest.raises(PmodError, match="it differs from"):
        module.verify(plan, target)


def test_resume_keeps_what_was_made_the_same_way(stock_model, tmp_path):
    target = tmp_path / "out"
    convert(stock_model(), target)
    before = json.loads((target / "pmod_provenance.json").read_text())
    report = convert(stock_model(), target, resume=True, options=Options(verify=True))
    assert "kept" in report.notes[-1]
    assert report.verified
    assert json.loads((target / "pmod_provenance.json").read_text()) == before
    with pytest.raises(PmodError, match="made otherwise: dtype"):
        convert(stock_model(), target, resume=True, options=Options(dtype="float16"))


def test_resume_keeps_no_routers_of_another_seed(stock_model, tmp_path):
    drawn = {"router_init": "normal:0.1"}
    convert(stock_model(), tmp_path / "out", options=Options(**drawn, seed=1))
    assert "kept" in convert(stock_model(), tmp_path / "out", resume=True, options=Options(**drawn, seed=1)).notes[-1]
    for seed in (0, 2):
        with pytest.raises(PmodError, match="made otherwise: seed differ"):
            convert(stock_model(), tmp_path / "out", resume=True, options=Options(**drawn, seed=seed))
    convert(stock_model(), tmp_path / "zero", options=Options(seed=1))
    convert(stock_model(), tmp_path / "zero", resume=True, options=Options(seed=2))  # zeros are of no seed


def test_resume_keeps_nothing_of_another_tokenizer(tmp_path):
    twins(tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "out")
    with pytest.raises(PmodError, match="made otherwise: tokenizer differ"):
        convert(tmp_path / "original", tmp_path / "out", resume=True, options=Options(tokenizer=tmp_path / "original"))


@pytest.mark.parametrize("options", [{}, {"link": "copy"}, {"dtype": "bfloat16"}], ids=str)
def test_resume_keeps_nothing_that_was_made_of_other_weights(options, stock_model, tmp_path):
    """Of the same names, shapes and sizes, as a model has them that was trained once more."""
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(stock_model(), source)
    convert(source, target, options=Options(**options))
    convert(source, target, resume=True, options=Options(**options))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PmodError, match=r"source/model\.safetensors was written after .*out had been made of it"):
        convert(source, target, resume=True, options=Options(**options))
    with pytest.raises(PmodError, match="is not what it should be"):
        convert(source, target, resume=True, options=Options(**options, verify=True))
