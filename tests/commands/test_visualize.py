"""`pmod visualize` as a user runs it: stdout, stderr, exit code and what is on the disk."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pmod_cli import checkpoints, cli
from pmod_cli.checkpoints import toy
from pmod_cli.core.errors import PmodError
from pmod_cli.data import rows
from pmod_cli.data.conversation import from_row
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.model import PmodSettings
from tests.conftest import ROOT

SETTINGS = PmodSettings(schedule="list", values=(1.0, 0.5, 0.3, 0.15))
SETTINGS_OF_32 = PmodSettings()


def call(*arguments: object) -> int:
    """The program in this process: the cheap way where the start of the program is not the question."""
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def ready(workdir, stock_model):
    """A directory with a p-MoD checkpoint of four layers and a picture."""
    checkpoints.convert(stock_model(), workdir / "routed", SETTINGS)
    Image.effect_noise((96, 64), 90).convert("RGB").save(workdir / "img.png")
    return workdir


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_picture_after_convert(pmod, stock_model, workdir):
    assert pmod("convert", stock_model(), "-o", "routed", cwd=workdir).returncode == 0
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(workdir / "img.png")
    run = pmod("visualize", "img.png", "--layers", "0,2-3", "--question", "what is it?", "--device", "cpu", cwd=workdir)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["layer", "kept", "of", "88", "retention"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "2", "3"]
    assert lines[1].split()[1:] == ["all", "(plain)", "1.000"]
    assert lines[-2].startswith("answer:")
    assert lines[-1] == "wrote img-pmod.png"
    assert "model: routed (.pmod/current)" in run.stderr
    assert "the routers are untrained" in run.stderr
    assert "Traceback" not in run.stderr
    with Image.open(workdir / "img-pmod.png") as picture:
        picture.load()
        assert picture.width > 900
    assert names(workdir) == [".pmod", "img-pmod.png", "img.png", "routed"]


def test_json_and_quiet(ready, capsys):
    options = ("--model", "routed", "--device", "cpu", "--max-new-tokens", 0)
    assert call("visualize", "img.png", "--layers", "all", "--json", "-o", "a.png", *options) == 0
    written = json.loads(capsys.readouterr().out)
    assert set(written) == {"schema_version", "images", "statistics"}
    (report,) = written["images"]
    assert (report["image"], report["files"], report["answer"]) == ("img.png", ["a.png"], None)
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    total = report["vision_tokens"]
    assert len(report["tokens"]) == total
    kept = [layer["kept_tokens"] for layer in report["layers"]]
    assert kept == [total, total // 2, int(0.3 * total), int(0.15 * total)]
    # Untrained routers: every weight ties, the first tokens win.
    assert report["layers"][3]["kept"] == list(range(kept[3]))
    assert report["router_state"] == "untrained"

    assert call("visualize", "img.png", "--quiet", "-o", "b.svg", *options) == 0
    written = capsys.readouterr()
    assert written.out == "b.svg\n"
    assert "</svg>" in (ready / "b.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["img.png", "--layers", "99"], "there is no layer 99; the model's layers are 0..3", "--layers all"),
        (["img.png", "--layers", "9" * 5000], "is neither a layer nor a range", "2,14,26"),
        (["img.png", "--layers", "100000000"], "there is no layer 100000000", "--layers all"),
        (
            ["img.png", "--layers", "2", "--mode", "depth"],
            "--mode depth shows all layers, yet --layers 2 was given",
            "",
        ),
        (
            ["img.png", "--layers", "2-3", "--mode", "schedule"],
            "--mode schedule shows all layers",
            "leave --layers out",
        ),
        (["img.png", "--question", "caf\udcff"], r"the question is no UTF-8: caf\xff", ""),
        (["img.png", "-o", "x" * 300 + ".png"], "a name is too long for the file system: xxx", "choose a shorter one"),
        (["x" * 300], "a name is too long for the file system: xxx", ""),
        (["\x1b[31mred\udcff.png"], r"\x1b[31mred\xff.png: no such image file", ""),
        (["img.png", "--layers", "x"], "'x' is neither a layer nor a range", "2,14,26"),
        (["none.png"], "none.png: no such image file", ""),
        (["words.png"], "words.png is not an image", ""),
        (["img.png", "-o", "img.png"], "img.png is the picture to look at", "--out"),
        (["img.png", "-o", "a.pdf"], "a.pdf: pictures are written as .png or .svg", "a.png"),
        (["img.png", "-o", "page.png", "--html"], "page.html is a folder, expected a file", "--out"),
        (["img.png", "-o", "no/a.png"], "there is no folder no", "mkdir -p no"),
        (["img.png", "-m", "stock"], "stock is a stock LLaVA", "pmod convert stock"),
        (["img.png", "-m", "./nowhere"], "there is no folder ./nowhere", "pmod convert"),
    ],
)
def test_bad_input_is_a_sentence(ready, stock_model, capsys, arguments, what, hint):
    (ready / "stock").symlink_to(stock_model())
    (ready / "words.png").write_text("no picture")
    (ready / "page.html").mkdir()
    before = names(ready)
    options = [] if "-m" in arguments else ["--model", "routed"]
    assert call("visualize", *arguments, *options, "--device", "cpu") == 2
    written = capsys.readouterr()
    assert written.out == ""
    message = " ".join(written.err.split())
    assert "error:" in message
    assert what in message
    assert hint in message
    assert names(ready) == before


def test_one_broken_picture_leaves_the_others(ready, capsys):
    (ready / "broken.png").write_text("no picture")
    options = ("--model", "routed", "--device", "cpu", "--max-new-tokens", 0, "--layers", 3)
    assert call("visualize", "img.png", "broken.png", *options, "-o", "drawn") == 3
    written = capsys.readouterr()
    assert names(ready / "drawn") == ["img-pmod.png", "statistics.json"]
    assert written.out.splitlines()[-1] == "wrote 1 picture and drawn/statistics.json"
    assert "error: broken.png is not an image" in " ".join(written.err.split())
    assert call("visualize", "img.png", "broken.png", *options, "-o", "drawn", "--json") == 3
    written = capsys.readouterr()
    assert [Path(image["image"]).name for image in json.loads(written.out)["images"]] == ["img.png"]
    assert call("visualize", "broken.png", *options) == 2


def test_the_bundled_model_says_what_it_reads(workdir, capsys):
    """Its own documents are read in silence, but for one line and the caption; other pictures give one warning."""
    checkpoints.convert(checkpoints.resolve("tiny-llava-next").path, workdir / "toy", SETTINGS_OF_32)
    options = ("--model", "toy", "--device", "cpu", "--max-new-tokens", 0, "--layers", 3, "-o", "drawn")
    assert call("visualize", ROOT / "samples", *options) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "toy: a toy model, which reads its own synthetic documents and nothing else" in err
    assert "means nothing; samples/" not in err
    for name in ("a.png", "b.png"):
        Image.effect_noise((96, 64), 90).convert("RGB").save(name)
    assert call("visualize", "a.png", "b.png", *options, "--json") == 0
    written = capsys.readouterr()
    assert " ".join(written.err.split()).count("means nothing; samples/") == 1
    assert all("a toy model" in image["notes"][-1] for image in json.loads(written.out)["images"])


def test_samples_are_documents_of_unseen_seeds():
    rows = json.loads((ROOT / "samples" / "rows.json").read_text())
    assert {row["image"] for row in rows} == {path.name for path in (ROOT / "samples").glob("*.png")}
    for row, task in zip(rows, ("doc", "chart", "attribute", "dearer"), strict=True):
        document = draw(task, seed_of("test", 0))
        with Image.open(ROOT / "samples" / row["image"]) as picture:
            assert picture.convert("RGB").tobytes() == document.image.tobytes()
            assert toy.is_document(picture)
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        assert (question, answer, row["boxes"][0]) in [
            (turn.question, turn.answer, list(turn.region or ())) for turn in document.turns
        ]


def test_samples_are_rows_that_every_command_takes(capsys):
    assert call("profile", "-m", "tiny-llava-next", "--from-data", ROOT / "samples" / "rows.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 4


def test_letters_without_a_font_are_told_once(ready, capsys):
    options = ("--model", "routed", "--device", "cpu", "--max-new-tokens", 0, "--layers", 3, "-o", "drawn")
    Image.new("RGB", (64, 64)).save(ready / "b.png")
    assert call("visualize", "img.png", "b.png", "--question", "what is \U000e0fff?", *options) == 0
    assert " ".join(capsys.readouterr().err.split()).count("no installed font has \U000e0fff") == 1


def test_names_of_any_bytes_and_length(ready, capfd):
    """A name that would clear the screen, one that is no UTF-8, and the longest there can be."""
    picture = (ready / "img.png").read_bytes()
    names_in = [f"pictures/{name}.png" for name in ("a\x1b[2J\udcff", "x" * 251)]
    (ready / "pictures").mkdir()
    for name in names_in:
        (ready / name).write_bytes(picture)
    options = ("--html", "--npz", "--layers", 3, "--max-new-tokens", 0, "--model", "routed", "--device", "cpu")
    for name in names_in:
        assert call("visualize", name, *options) == 0
    written = capfd.readouterr()
    assert "\x1b" not in written.out + written.err
    assert r"wrote a\x1b[2J\xff-pmod.npz" in written.out
    stems = ["a\x1b[2J\udcff-pmod", "x" * 220 + "-pmod"]
    assert names(ready) == sorted(
        ["img.png", "pictures", "routed", *(stem + end for stem in stems for end in (".html", ".npz", ".png"))]
    )
    (ready / "routed").rename(ready / "r\x1b[31m")
    options = (*options[:-4], "--model", "r\x1b[31m", "--device", "cpu")
    assert call("visualize", "pictures", *options, "--json") == 0
    assert json.loads(capfd.readouterr().out)["images"][0]["model"] == r"r\x1b[31m"


def test_rows_become_a_folder_with_statistics_and_are_drawn_again(ready, capsys):
    """Rows with boxes into pictures, pages and arrays; the arrays again, without the model."""
    ready.joinpath("rows.json").write_text(
        json.dumps(
            [
                {"image": "img.png", "boxes": [[0, 0, 48, 32]], "conversations": [{"from": "human", "value": "what?"}]},
                {"image": "img.png"},
            ]
        )
    )
    options = ("--device", "cpu", "--max-new-tokens", 0)
    assert call("visualize", "rows.json", "--html", "--npz", "--model", "routed", *options) == 0
    written = capsys.readouterr()
    assert written.out.splitlines()[-1] == "wrote 2 pictures and rows-pmod/statistics.json"
    assert "kept tokens that lie on the boxes: " in written.out
    assert "as many tokens of each part" in written.out
    made = [f"{name}{ending}" for name in ("img-2-pmod", "img-pmod") for ending in (".html", ".npz", ".png")]
    assert names(ready / "rows-pmod") == [*made, "statistics.json"]
    statistics = json.loads((ready / "rows-pmod/statistics.json").read_text())
    assert (statistics["images"], statistics["images_with_regions"]) == (2, 1)
    assert "what?" in (ready / "rows-pmod/img-pmod.html").read_text()

    first, second = (f"rows-pmod/{name}.npz" for name in ("img-pmod", "img-2-pmod"))
    assert call("visualize", first, "--mode", "depth", "-o", "rows-pmod/img-pmod.png", "-q") == 0  # beside its source
    assert call("visualize", first, second, "--json", "-o", "again") == 0
    output = capsys.readouterr().out
    again = json.loads(output[output.index("{") :])
    assert [image["question"] for image in again["images"]] == ["what?", "What is shown in this image?"]
    assert statistics == {"schema_version": 2, "models": ["routed"], **again["statistics"]}
    assert call("visualize", first, "--against", second, "--layers", 3, "-o", "both.png") == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "100%"  # untrained routers: both keep the first


def test_saved_selections_are_held_to_what_is_asked_before_anything_is_drawn(ready, capsys):
    options = ("--device", "cpu", "--max-new-tokens", 0)
    assert call("visualize", "img.png", "--npz", "--model", "routed", *options, "-o", "a.png") == 0
    assert call("visualize", "a.npz", "--question", "what else?", "-o", "b.png") == 2
    assert "a.npz is saved: it cannot be asked another question" in " ".join(capsys.readouterr().err.split())
    checkpoints.convert(checkpoints.resolve("tiny-llava-next").path, ready / "deep", SETTINGS_OF_32)
    before = names(ready)
    assert call("visualize", "img.png", "a.npz", "--model", "deep", *options, "-o", "drawn") == 2
    assert "models with different numbers of layers" in capsys.readouterr().err
    assert names(ready) == before


def test_what_is_compared(ready, stock_model, capsys):
    options = ("--model", "routed", "--device", "cpu", "--max-new-tokens", 0, "--json", "-o", "a.png")
    assert call("visualize", "img.png", "--against", "stock", *options) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    assert (image["against"]["chosen_by"], image["against"]["router_state"]) == ("attention", "stock")
    assert [layer["kept_tokens"] for layer in image["against"]["layers"]] == [
        layer["kept_tokens"] for layer in image["layers"]
    ]
    assert call("visualize", "img.png", "--against-question", "and that?", *options) == 0
    written = capsys.readouterr()
    assert "no layer knew them: both selections are the same" in " ".join(written.err.split())
    (image,) = json.loads(written.out)["images"]
    assert image["against"]["question"] == "and that?"
    assert [layer["in_common"] for layer in image["against"]["layers"]] == [1, 1, 1, 1]


def test_the_chance_of_a_model_that_routes_tiles_alone_knows_the_whole_image(ready, stock_model, capsys):
    """Both rows keep every token of the whole image, so that random tokens share them too; and nothing of nothing."""
    settings = PmodSettings(schedule="list", values=(1.0, 0.5, 0.25, 0.0), target_tokens="vision_hr")
    checkpoints.convert(stock_model(), ready / "tiles", settings)
    options = ("--model", "tiles", "--device", "cpu", "--max-new-tokens", 0, "--npz", "-o", "a.png")
    assert call("visualize", "img.png", "--against", "random", "--json", *options) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    base = sum(token["part"] == "base" for token in image["tokens"])
    tiles = len(image["tokens"]) - base
    for layer, ratio in enumerate(settings.values):
        drawn, told = int(ratio * tiles), image["against"]["layers"][layer]
        assert told["kept_tokens"] == base + drawn
        assert told["in_common_by_chance"] == pytest.approx((base + drawn**2 / tiles) / (base + drawn), abs=1e-4)
    checkpoints.convert(stock_model(), ready / "none", PmodSettings(schedule="list", values=(1.0, 0.5, 0.0, 0.0)))
    assert call("visualize", "img.png", "--model", "none", "--against", "random", *options[2:]) == 0
    assert capsys.readouterr().out.splitlines()[3].split() == ["2", "0", "0.000", "-"]


@pytest.mark.parametrize("name", ["stock", "routed"])
def test_a_method_is_drawn_at_a_share_of_the_flops(ready, stock_model, capsys, name):
    """On stock weights or on a p-MoD's; beside random tokens of the same numbers."""
    (ready / "stock").symlink_to(stock_model())
    options = ("--model", name, "--device", "cpu", "--max-new-tokens", 0, "--json", "-o", "a.png")
    Image.new("RGBA", (96, 64), (255, 0, 0, 9)).save("img.png")
    assert call("visualize", "img.png", "--method", "divprune@0.7", "--against", "random", *options) == 0
    (image,) = json.loads(capsys.readouterr().out)["images"]
    kept = [layer["kept_tokens"] for layer in image["layers"]]
    assert len(set(kept)) == 1, "one choice in front of all layers"
    assert (image["chosen_by"], image["against"]["chosen_by"]) == ("divprune", "random")
    assert [layer["kept_tokens"] for layer in image["against"]["layers"]] == kept
    of_picture, of_model = "transparency dropped, as the model is given it", "divprune at 70 % of the stock FLOPs"
    assert image["notes"] == image["against"]["notes"] == [of_picture, of_model]
    for other in ("stock", "routed"):  # which run under no method
        assert call("visualize", "img.png", "--method", "divprune@0.7", "--against", other, *options) == 0
        assert json.loads(capsys.readouterr().out)["images"][0]["against"]["notes"] == [of_picture]
    capsys.readouterr()
    assert call("visualize", "img.png", "--method", "divprune@0.9", *options) == 0
    written = capsys.readouterr()
    (dearer,) = json.loads(written.out)["images"]
    assert dearer["layers"][0]["kept_tokens"] > kept[0]
    assert "misses its share" not in written.err
    assert call("visualize", "img.png", "--method", "divprune@0.01", *options) == 0
    written = capsys.readouterr()
    near = re.fullmatch(
        r"on this prompt divprune comes as near as (\d+\.\d+) %", json.loads(written.out)["images"][0]["notes"][-1]
    )
    assert near
    assert float(near[1]) > 5
    assert "misses its share of the FLOPs" in " ".join(written.err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "best@0.4"], "expected a method and a share of the FLOPs: fastv, "),
        (["--method", "fastv"], "--method fastv@0.4"),
        (["--method", "fastv@0.4", "--mode", "weights"], "fastv has no routers, whose weights could be drawn"),
    ],
)
def test_a_method_that_cannot_be_drawn(ready, capsys, words, said):
    assert call("visualize", "img.png", "--model", "routed", *words) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_question_before_the_image_is_no_blind_one(ready, capsys):
    options = ("--model", "routed", "--device", "cpu", "--max-new-tokens", 0, "-o", "a.png")
    asked = ("--question", "what is red in <image>?", "--against-question", "what is blue in <image>?")
    assert call("visualize", "img.png", *asked, *options) == 0
    assert "no layer knew them" not in capsys.readouterr().err


def test_the_example_of_the_documentation(workdir):
    """docs/visualize.md, its Python as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "visualize.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    stock = checkpoints.resolve("tiny-llava-next").path
    checkpoints.convert(stock, workdir / "checkpoints/tiny-llava-next-pmod", PmodSettings())
    Image.effect_noise((96, 64), 90).convert("RGB").save(workdir / "img.png")
    exec(compile(example, "visualize.md", "exec"), {})
    assert names(workdir) == ["checkpoints", "img-pmod.html", "img-pmod.npz", "img-pmod.png", "img.png"]


def test_without_a_checkpoint_convert_is_named(workdir, capsys):
    Image.new("RGB", (8, 8)).save(workdir / "img.png")
    assert call("visualize", "img.png") == 2
    assert "pmod convert" in capsys.readouterr().err
    assert names(workdir) == ["img.png"]


def test_drawn_documents_as_rows(ready, capsys, monkeypatch):
    """`python -m pmod_cli.data.rows`, as docs/visualize.md has it, and what `visualize` makes of its folder."""
    monkeypatch.setattr("sys.argv", ["rows", "--task", "presence", "--count", "2", "--out", "doc"])
    rows.main()
    written = json.loads(Path("doc/rows.json").read_text())
    assert [row["conversations"][1]["value"] for row in written] == ["yes", "yes"]  # what is not there has no place
    assert all(Image.open(Path("doc", row["image"])).size == (96, 96) for row in written)
    assert [len(from_row(row).images) for row in written] == [1, 1], "finetune and calibrate read them too"
    assert call("visualize", "doc/rows.json", "--model", "routed", "--device", "cpu", "--max-new-tokens", 0) == 0
    assert "kept tokens that lie on the boxes: " in capsys.readouterr().out
    with pytest.raises(PmodError, match="exists"):
        rows.main()
