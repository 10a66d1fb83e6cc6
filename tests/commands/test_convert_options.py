"""Options of `pmod convert` that reach files: targets solved for the shift, dtype, shards, links, routers, layouts."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pmod_cli.checkpoints.files import read_tensors
from pmod_cli.cli import main
from pmod_cli.model import PmodSettings
from pmod_cli.profiling import Routed, Sizes, Workload, prefill
from tests.checkpoints.originals import twins


def settings_of(folder: str) -> PmodSettings:
    return PmodSettings.from_dict(json.loads(Path(folder, "config.json").read_text())["pmod"])


def share_of(folder: str) -> float:
    """Decoder FLOPs beside stock, of an image of 672x672 and 58 text tokens."""
    config = json.loads(Path(folder, "config.json").read_text())
    sizes = Sizes.of(config)
    rows = Workload(image_sizes=((672, 672),), text_tokens=58).rows(sizes)
    routed = Routed.by(settings_of(folder), sizes.decoder.layers)
    return prefill(sizes, rows, routed).decoder / prefill(sizes, rows).decoder


@pytest.mark.parametrize(
    ("schedule", "target"), [("cosine", 0.55), ("linear", 0.7), ("constant", 0.5), ("stepped", 0.6)]
)
def test_target_flops(schedule, target, workdir, capsys):
    options = ["--schedule", schedule, "--target-flops", str(target), "-o", "out"]
    assert main(["convert", "tiny-llava-next", *options]) == 0
    assert share_of("out") == pytest.approx(target, abs=0.01)
    solved = settings_of("out")
    assert (solved.shift is None) == (schedule not in ("cosine", "linear"))


def test_target_flops_count_what_is_dropped_in_front(workdir):
    options = ["--before", "divprune:0.6", "--target-flops", "0.4", "-o", "out", "-q"]
    assert main(["convert", "tiny-llava-next", *options]) == 0
    assert settings_of("out").before == "divprune:0.6"
    assert share_of("out") == pytest.approx(0.4, abs=0.01)


def test_target_retention_becomes_a_shift(workdir, capsys):
    assert main(["convert", "tiny-llava-next", "--target-retention", "0.54", "-o", "out"]) == 0
    settings = settings_of("out")
    assert settings.mean is None
    assert 0.5 < settings.shift < 0.51
    assert sum(settings.retention(32)) / 32 == pytest.approx(0.54, abs=1e-6)
    assert f"shift {settings.shift:.4g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target-flops", "1.5"], "expected a share above 0 and at most 1"),
        (["--target-flops", "0.01"], "is outside what this schedule reaches: 0."),
        (["--target-flops", "0.5", "--shift", "0.5"], "--target-flops is solved for the shift"),
        (["--shift", "nan"], "shift must be a number in -1e6 ... 1e6, found nan"),
        (["--shift", "inf"], "shift must be a number in -1e6 ... 1e6, found inf"),
        (["--max-ratio", "nan"], "max_ratio must be a number in -1e6 ... 1e6, found nan"),
        (["--alpha", "1e300"], "alpha must be a number in -1e6 ... 1e6, found 1e+300"),
        (["--alpha", "5", "--norm", "none"], "--norm none has none"),
        (["--dtype", "int8"], "'int8' is not a dtype. Known: auto, bfloat16, float16, float32"),
        (["--max-shard-size", "9" * 400 + "GB"], "--max-shard-size '9999"),
        (["--max-shard-size", "much"], "--max-shard-size 'much'"),
        (["--max-shard-size", "0"], "--max-shard-size '0'"),
        (["--router-init", "normal:1e999"], "expected zero, or normal:STD"),
        (["--seed", "9" * 30], "--seed"),
        (
            ["--vision-tower", "foo"],
            "a checkpoint with its own vision tower: --vision-tower is for the layout original, published or parts",
        ),
        (["--tokenizer", "foo"], "its own tokenizer: --tokenizer is for the layout original, published or parts"),
        (["--revision", "main"], "tiny-llava-next is part of this program, and has no revision 'main'"),
        (["--no-merge"], "--no-merge keeps an --adapter apart"),
        (["--to", "stock", "--shift", "0.4"], "--to stock writes a plain LLaVA, without --shift"),
        (["--to", "stock", "--target-retention", "0.4"], "without --target-retention"),
        (["--to", "stock", "--router-init", "normal:1"], "--to stock has no routers for --router-init"),
        (["--router-init", "normal"], "expected zero, or normal:STD"),
        (["--to", "onnx"], "--to 'onnx': expected one of pmod, stock, published, remote-code"),
        (["--copy", "--symlink"], "exclude each other"),
        (["--projector", "x.bin"], "--llm and --projector go together"),
        (["--adapter", "nowhere"], "nowhere has no adapter_config.json"),
        (["--max-ratio", "0.1"], "min_ratio <= max_ratio"),
        (["--min-ratio", "-0.1"], "0 <= min_ratio"),
        (["--schedule", "list", "--ratios", ",".join(["0.5"] * 31 + ["1.5"])], "must be within 0 ... 1, found 1.5"),
    ],
)
def test_what_cannot_be_is_a_sentence(options, told, workdir, capsys):
    assert main(["convert", "tiny-llava-next", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, told in err) == ("", True), err
    assert list(workdir.iterdir()) == []


def test_dtype_and_shard_size(stock_model, workdir, capsys):
    command = ["convert", str(stock_model()), "--dtype", "bf16", "--max-shard-size", "40KB", "-o", "out"]
    assert main(command) == 0
    before, after = read_tensors(stock_model()), read_tensors(Path("out"))
    assert {tensor.dtype for tensor in after.values()} == {"BF16"}
    assert before.keys() < after.keys()
    assert all(path.stat().st_size < 60_000 for path in Path("out").glob("*.safetensors"))
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    expected = load_file(stock_model() / "model.safetensors")
    for path in Path("out").glob("model-0*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.equal(expected[name].bfloat16())


@pytest.mark.parametrize(
    ("option", "way"), [("--copy", "copied"), ("--symlink", "symlinked"), ("--no-progress", "linked")]
)
def test_links(option, way, stock_model, workdir, capsys):
    assert main(["convert", str(stock_model()), option, "-o", "out", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report[way] == ["model-00001-of-00001.safetensors"]
    file = Path("out", report[way][0])
    assert file.is_symlink() == (way == "symlinked")
    assert file.samefile(stock_model() / "model.safetensors") == (way != "copied")
    assert file.read_bytes() == (stock_model() / "model.safetensors").read_bytes()


def test_routers_that_are_drawn(stock_model, workdir, capsys):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ["--router-init", "normal:0.5", "--seed", str(seed), "-o", out]
        assert main(["convert", str(stock_model()), *options]) == 0
    a, b, c = (load_file(Path(out, "model-routers.safetensors")) for out in "abc")
    name = "language_model.model.layers.1.router.weight"
    assert a[name].equal(b[name])
    assert not a[name].equal(c[name])
    assert 0.3 < a[name].std() < 0.8
    assert not a[name.replace("weight", "bias")].any()


def test_dry_run_of_the_original_layout(workdir, capsys):
    twins(workdir / "original", "llava_next")
    before = sorted(path.name for path in workdir.iterdir())
    assert main(["convert", "original", "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["layout"], report["streamed"]) == ("original", ["model-00001-of-00001.safetensors"])
    assert 0 < report["streamed_bytes"] <= report["read_bytes"] < report["free_bytes"]
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_too_little_disk(stock_model, workdir, capsys, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert main(["convert", str(stock_model()), "--dtype", "bf16", "-o", "out"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"has 1 B free, and this needs ([\d.]+ [kM]B): \1 more", said), said
    assert main(["convert", str(stock_model()), "-o", "out"]) == 0  # links take none


def test_targets_that_cannot_be(stock_model, workdir, capsys):
    Path("file").touch()
    assert main(["convert", str(stock_model()), "-o", "file", "--overwrite"]) == 2
    assert "file is a file" in capsys.readouterr().err
    assert main(["convert", str(stock_model()), "-o", "file/inside"]) == 2
    assert "file" in capsys.readouterr().err


def test_what_comes_next(stock_model, workdir, capsys):
    assert main(["convert", str(stock_model()), "--to", "stock"]) == 0
    out, err = capsys.readouterr()
    assert f"checkpoints/{stock_model().name}-stock" in out
    assert "hf upload" in err
    assert "untrained" not in err
    assert main(["convert", str(stock_model())]) == 0
    pmod = f"checkpoints/{stock_model().name}-pmod"
    assert main(["convert", pmod]) == 2
    assert "p-MoD checkpoint already" in capsys.readouterr().err
    assert main(["convert", pmod, "--shift", "0.4", "--to", "remote-code"]) == 2
    assert "settings that its routers were made for" in capsys.readouterr().err


def test_overwrite_and_resume_contradict_each_other(stock_model, workdir, capsys):
    assert main(["convert", str(stock_model()), "-o", "out", "--overwrite", "--resume"]) == 2
    assert "give one" in capsys.readouterr().err
    assert not list(workdir.iterdir())


@pytest.mark.parametrize("routers", [False, True])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_folder_that_is_not_whole_is_not_kept(stock_model, workdir, capsys, damage, routers):
    assert main(["convert", str(stock_model()), "-o", "out", "--copy", "-q"]) == 0
    weights = next(path for path in Path("out").glob("*.safetensors") if ("routers" in path.name) == routers)
    Path(".pmod/current").unlink()
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-9])
    capsys.readouterr()
    assert main(["convert", str(stock_model()), "-o", "out", "--copy", "--resume"]) == 2
    told = capsys.readouterr().err
    assert weights.name in told
    assert "--overwrite" in told
    assert not Path(".pmod/current").exists()
    assert main(["convert", str(stock_model()), "-o", "out", "--copy", "--overwrite", "--verify"]) == 0
