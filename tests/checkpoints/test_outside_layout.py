"""A checkpoint layout from outside the package, read and written through the command line.

The toy layout has a prefix before every tensor's name, one number in its config.json, and a file of its own.
"""

import importlib
import json
import sys

import pytest

from pmod_cli import cli
from pmod_cli.checkpoints.files import read_tensors
from pmod_cli.checkpoints.layouts import LAYOUTS, register_layout
from pmod_cli.core.errors import PmodError

PACKAGE = '''\
"""A layout as another package writes it."""

from dataclasses import replace

from pmod_cli.checkpoints import files
from pmod_cli.checkpoints.layouts import Layout
from pmod_cli.checkpoints.layout import TensorSource, Source, files_of


def recognises(config, options):
    return config.get("model_type") == "toy_llava"


def read(folder, config, options):
    tensors = files.read_tensors(folder)
    return Source(
        folder=folder,
        layout="toy",
        config=config["stock"],
        parts={name.removeprefix("toy."): TensorSource(tensor) for name, tensor in tensors.items()},
        files=files_of(tensors),
        small_files=[path for path in folder.glob("*.json") if path.name != "config.json"],
    )


def arrange(draft):
    parts = {"toy." + name: part for name, part in draft.parts.items()}
    return replace(draft, parts=parts, config={"model_type": "toy_llava", "stock": draft.config})


def finish(draft, folder, progress):
    (folder / "toy.txt").write_text(str(len(draft.parts)))
    return ["the toy code has to be told its name"]


TOY = Layout(
    "toy",
    recognises=recognises,
    read=read,
    model_types=lambda: ["toy_llava"],
    takes=("tokenizer",),
    arrange=arrange,
    finish=finish,
    summary="for the toy code",
    usage="The toy code reads it.",
    routed=False,
    loads=False,
)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package on the path, with its entry point; what it registers is forgotten after the test."""
    importlib.import_module(
        "pmod_cli.commands.convert"
    )  # its help lists layouts, once a process: those of this package
    monkeypatch.setattr(LAYOUTS, "_items", dict(LAYOUTS._items))
    folder = tmp_path / "site"
    information = folder / "toy_layout-1.0.dist-info"
    information.mkdir(parents=True)
    (folder / "toy_layout.py").write_text(PACKAGE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-layout\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[pmod_cli.layouts]\ntoy = toy_layout:TOY\n")
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("toy_layout", None)


def test_there_and_back(package, stock_model, workdir, monkeypatch, capsys):
    monkeypatch.setattr(LAYOUTS, "_complete", False)
    stock = stock_model()
    assert cli.main(["convert", str(stock), "--to", "toy", "-o", "toy", "--verify", "--json"]) == 0
    written = capsys.readouterr()
    report = json.loads(written.out)
    assert (report["layout"], report["to"], report["settings"]) == ("huggingface", "toy", {})
    assert "toy.txt" in report["written"]
    assert "the toy code has to be told its name" in written.err
    before = read_tensors(stock)
    assert {name.removeprefix("toy.") for name in read_tensors(workdir / "toy")} == set(before)
    assert "The toy code reads it." in (workdir / "toy" / "README.md").read_text()

    assert cli.main(["convert", "toy", "-o", "back", "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["layout"], report["to"], report["router_state"]) == ("toy", "pmod", "untrained")
    assert {name for name in read_tensors(workdir / "back") if ".router." not in name} == set(before)
    assert any("one forward pass" in line for line in report["verified"])


def test_everything_that_lists_layouts_names_it(package, stock_model, workdir, monkeypatch, capsys):
    from toy_layout import TOY

    register_layout(TOY)
    with pytest.raises(PmodError, match="two of the checkpoint layout 'toy'"):
        register_layout(type(TOY)("toy"))
    stock = str(stock_model())
    assert cli.main(["convert", stock, "--to", "onnx"]) == 2
    assert "expected one of pmod, stock, published, remote-code, toy" in capsys.readouterr().err
    assert cli.main(["convert", stock, "--to", "toy", "--schedule", "linear"]) == 2
    assert "--to toy writes a plain LLaVA, without --schedule" in capsys.readouterr().err
    assert cli.main(["convert", stock, "--tokenizer", "x"]) == 2
    assert "--tokenizer is for the layout original, published, parts or toy" in capsys.readouterr().err
    assert cli.main(["convert", stock, "--to", "toy", "-o", "toy", "-q"]) == 0
    assert cli.main(["profile", "-m", "toy"]) == 2
    assert "is in the toy layout, which has to be converted first" in capsys.readouterr().err
    (workdir / "toy" / "config.json").write_text('{"model_type": "other"}')
    assert cli.main(["convert", "toy", "-o", "again"]) == 2
    assert "toy_llava" in capsys.readouterr().err
