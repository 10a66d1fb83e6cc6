"""`pmod convert` as a user runs it: stdout, stderr, exit code, files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmod_cli.checkpoints import files, load_model
from pmod_cli.cli import main
from pmod_cli.commands.common import default_model
from pmod_cli.core.errors import PmodError
from tests.conftest import ROOT


def test_human_output(stock_model, workdir, capsys):
    source = stock_model()
    assert main(["convert", str(source), "--out", "out"]) == 0
    out, err = capsys.readouterr()
    assert "pmod_llava_next over llama, 4 layers, 3 of them with a router" in out
    assert "mean 0.5375" in out
    assert f"source: {source} (folder)" in err
    assert "next: pmod finetune" in err
    assert "untrained" in err
    assert Path(".pmod/current").read_text() == "out\n"


def test_default_folder_json_and_quiet(stock_model, workdir, capsys):
    source = stock_model()
    assert main(["convert", str(source), "--json", "--schedule", "constant"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 2
    assert report["target"] == f"checkpoints/{source.name}-pmod"
    assert report["retention"] == [0.5375] * 4
    assert main(["convert", str(source), "--quiet", "--overwrite"]) == 0
    assert capsys.readouterr() == (f"checkpoints/{source.name}-pmod\n", "")


def test_options_reach_the_checkpoint(stock_model, workdir):
    options = "--schedule list --ratios 1,0.5,0.25,1 --norm sigmoid --no-string --target-tokens vision_hr --max_ratio 2"
    assert main(["convert", str(stock_model()), "-o", "out", *options.split()]) == 0
    settings = json.loads(Path("out/config.json").read_text())["pmod"]
    assert settings["values"] == [1.0, 0.5, 0.25, 1.0]
    assert (settings["norm"], settings["string"], settings["max_ratio"]) == ("sigmoid", False, 2.0)
    assert settings["target_tokens"] == "vision_hr"


def test_dry_run_writes_nothing(stock_model, workdir, capsys):
    assert main(["convert", str(stock_model()), "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert list(workdir.iterdir()) == []


def test_existing_target_is_refused(stock_model, workdir, capsys):
    command = ["convert", str(stock_model()), "-o", "out"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "out exists" in err
    assert "--overwrite" in err


def test_bad_settings_are_sentences(stock_model, workdir, capsys):
    for options, told in (
        (["--schedule", "cosin"], "unknown schedule 'cosin'"),
        (["--norm", "softplus"], "norm must be one of"),
        (["--schedule", "list", "--ratios", "1,x"], "expected numbers separated by commas"),
        (["--target-retention", "2"], "mean retention"),
    ):
        assert main(["convert", str(stock_model()), *options]) == 2
        assert told in capsys.readouterr().err
    assert list(workdir.iterdir()) == []


def test_the_hugging_face_layout_needs_no_torch(stock_model, workdir):
    code = (
        "import sys; from pmod_cli.cli import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "convert", str(stock_model()), "--target-flops", "0.6"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_a_path_that_is_no_utf8(stock_model, workdir, capfdbinary):
    """Its bytes come back as they are where programs read them, and escaped where people do."""
    name = b"model-\xff\xe9"
    Path(os.fsdecode(name)).symlink_to(stock_model("llava"))
    assert main(["convert", os.fsdecode(name), "-o", os.fsdecode(name + b"-pmod"), "-q"]) == 0
    assert capfdbinary.readouterr().out == name + b"-pmod\n"
    assert Path(".pmod/current").read_bytes() == name + b"-pmod\n"
    assert default_model() == Path(os.fsdecode(name + b"-pmod"))
    assert main(["convert", str(default_model()), "--to", "stock", "-o", os.fsdecode(name + b"-stock")]) == 0
    out, err = capfdbinary.readouterr()
    assert b"model-\\xff\\xe9-stock" in out
    assert b"source: model-\\xff\\xe9-pmod (folder)" in err
    provenance = files.read_json(Path(os.fsdecode(name + b"-stock"), "pmod_provenance.json"))
    with pytest.raises(PmodError, match="no UTF-8, and transformers cannot read"):
        load_model(default_model())
    assert provenance["source"] == r"model-\xff\xe9-pmod"


def test_a_target_whose_name_is_too_long(stock_model, workdir, capsys):
    for length in (248, 249, 250, 256):
        assert main(["convert", str(stock_model("llava")), "-o", "n" * length]) == 2
        assert "too long" in capsys.readouterr().err
    assert list(workdir.iterdir()) == []


def test_list_and_no_name(workdir, capsys):
    assert main(["convert", "--list"]) == 0
    assert "llava-hf/llava-v1.6-vicuna-7b-hf" in capsys.readouterr().out
    assert main(["convert", "--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aliases"]["tiny-llava-next"]["repo"] == "bundled"
    assert main(["convert"]) == 2
    assert "--list" in capsys.readouterr().err
    assert main(["convert", "--list", "llava"]) == 2  # and not a list that passes for one of "llava"
    assert "takes no model" in capsys.readouterr().err


def test_an_export_is_not_the_current_model(stock_model, workdir):
    """Later commands would silently use it."""
    assert main(["convert", str(stock_model()), "-o", "out"]) == 0
    for to in ("stock", "remote-code"):  # `published` goes the same way, and takes 32 layers
        assert main(["convert", "out", "--to", to, "-o", f"export-{to}", "-q"]) == 0
    assert Path(".pmod/current").read_text() == "out\n"


def test_a_directory_that_cannot_be_written_is_no_failure(stock_model, workdir, capsys, monkeypatch):
    source, place = stock_model(), workdir / "here"
    place.mkdir()
    (place / ".pmod").touch()  # in the way of the folder, so that it cannot be written by root either
    monkeypatch.chdir(place)
    assert main(["convert", str(source), "-o", str(workdir / "out"), "-q"]) == 0
    assert "warning: .pmod/current cannot be written here" in capsys.readouterr().err
    assert (workdir / "out" / "config.json").is_file()


def test_a_symlink_to_what_would_be_replaced(stock_model, workdir, capsys):
    """`b` reads the weights of `a`: to replace `a` by a conversion of `b` would leave neither."""
    assert main(["convert", str(stock_model()), "-o", "a", "--to", "stock", "--copy", "-q"]) == 0
    assert main(["convert", "a", "-o", "b", "--to", "stock", "--symlink", "-q"]) == 0
    assert main(["convert", "b", "-o", "a", "--overwrite", "-q"]) == 2
    assert "this run reads" in capsys.readouterr().err
    assert main(["convert", "b", "-o", "c", "-q"]) == 0
