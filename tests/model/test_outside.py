"""A schedule and a selection of another package: an entry point, or one call, and every verb knows them."""

import importlib
import json
import sys
import tomllib

import pytest
from PIL import Image

from pmod_cli import cli
from pmod_cli.checkpoints import Options, convert, load_model
from pmod_cli.core.errors import explain
from pmod_cli.model import METHODS, SCHEDULES, SELECTIONS, BadPlugin, PmodSettings, registry, retention_schedule
from pmod_cli.visualization.archive import load_npz
from tests import factories
from tests.conftest import ROOT

PACKAGE = '''
from pmod_cli.model import Selection

class Louder(Selection):
    """Keeps the tokens whose hidden state is largest."""

    def scores(self, hidden_states, routing, layer):
        return hidden_states.float().norm(dim=-1)

def halves(num_layers, mean):
    """All of the first half of the layers, equally little of the second."""
    whole = num_layers // 2
    rest = (mean * num_layers - whole) / (num_layers - whole)
    return [1.0] * whole + [rest] * (num_layers - whole)
'''
ENTRY_POINTS = """
[pmod_cli.schedules]
halves = toy_pmod:halves
broken = toy_pmod:not_there

[pmod_cli.selections]
louder = toy_pmod:Louder
"""


@pytest.fixture
def package(tmp_path_factory, monkeypatch):
    """An installed package with entry points, as pip leaves it."""
    for verb in (
        "convert",
        "profile",
        "profile_checks",
        "eval",
        "visualize",
    ):  # help that lists names is written once a process: for other tests, before this
        importlib.import_module(f"pmod_cli.commands.{verb}")
    site = tmp_path_factory.mktemp("site")
    (site / "toy_pmod.py").write_text(PACKAGE)
    info = site / "toy_pmod-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-pmod\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    registry._entry_points.cache_clear()
    yield site
    for known in (SCHEDULES, SELECTIONS):
        for name in ("halves", "broken", "louder"):
            known._known.pop(name, None)
    registry._entry_points.cache_clear()


@pytest.fixture
def tiny_config(workdir):
    """A config.json alone."""
    path = workdir / "config.json"
    factories.config("llava_next", layers=4).to_json_file(path)
    return path


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def test_a_schedule_through_every_verb(package, stock_model, workdir, capsys):
    expected = [1.0, 1.0, 0.075, 0.075]
    assert retention_schedule("halves", 4) == pytest.approx(expected)
    assert run("convert", stock_model(), "-o", "toy", "--schedule", "halves", "--json") == 0
    assert json.loads(capsys.readouterr().out)["retention"] == pytest.approx(expected)
    assert run("profile", "--model", "toy", "--json") == 0
    assert [layer["retention_ratio"] for layer in json.loads(capsys.readouterr().out)["layers"]] == pytest.approx(
        expected
    )
    assert run("profile", "--model", "toy", "--sweep", "schedule=halves,cosine", "--json") == 0
    assert [point["schedule"] for point in json.loads(capsys.readouterr().out)["sweep"]["points"]] == [
        "halves",
        "cosine",
    ]
    quick = ("--max-steps", 1, "--batch-size", 1, "--set", "data.turns=1", "--device", "cpu")
    assert run("finetune", "-r", "tiny", "-m", stock_model(), "-o", "run", "--set", "pmod.schedule=halves", *quick) == 0
    assert json.loads((workdir / "run" / "config.json").read_text())["pmod"]["schedule"] == "halves"
    capsys.readouterr()
    assert run("convert", stock_model(), "-o", "x", "--target-flops", "0.8", "--schedule", "halves", "--dry-run") == 0
    assert run("convert", stock_model(), "-o", "x", "--schedule", "halves", "--target-retention", "0.2") == 2
    assert "schedule 'halves' cannot have a mean retention as low as 0.2" in capsys.readouterr().err


def test_a_selection_through_every_verb(package, stock_model, workdir, capsys, monkeypatch):
    """As the checkpoint's own, with a choice that is held, and beside the routers of another one."""
    assert run("convert", stock_model(), "-o", "mine", "--ratios", "1,0.5,0.5,0.25", "--schedule", "list") == 0
    own = ("--selection", "louder", "--select-at", "1")
    assert run("convert", stock_model(), "-o", "toy", "--ratios", "1,0.5,0.5,0.25", "--schedule", "list", *own) == 0
    assert json.loads((workdir / "toy" / "config.json").read_text())["pmod"]["select_at"] == [1]
    model, _ = load_model(workdir / "toy")
    assert type(model.model.language_model.selection).__name__ == "Louder"
    assert model.config.routed_layers == [1]
    capsys.readouterr()
    assert run("profile", "--model", "toy", "--json") == 0
    counted = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["router_gflops"] > 0 for layer in counted] == [False, True, False, False]

    one_question = ("-t", "tiny_presence", "--limit", 1, "-q")
    assert run("eval", "-m", "mine", "--against", "louder", "-o", "scored", *one_question) == 0
    scored = json.loads((workdir / "scored" / "results.json").read_text())["models"]
    assert [one["selection"] for one in scored.values()] == ["router", "louder"]
    assert run("eval", "-m", "toy", "--against", "none", "-o", "own", *one_question) == 0
    (one,) = json.loads((workdir / "own" / "results.json").read_text())["models"].values()
    assert one["selection"] == "louder"

    Image.effect_mandelbrot((50, 60), (-2, -1.5, 1, 1.5), 30).convert("RGB").save("img.png")
    drawn = ("--layers", "1", "--max-new-tokens", 0, "--npz")
    assert run("visualize", "img.png", "-m", "mine", "--against", "louder", *drawn) == 0
    assert run("visualize", "img.png", "-m", "toy", "-o", "toy.png", *drawn) == 0
    assert load_npz(workdir / "toy.npz").chosen_by == "louder"

    quick = ("--max-steps", 1, "--batch-size", 1, "--set", "data.turns=1", "--device", "cpu")
    assert run("finetune", "-r", "tiny", "-m", "mine", "-o", "run", "--set", "pmod.selection=louder", *quick) == 0
    assert json.loads((workdir / "run" / "config.json").read_text())["pmod"]["selection"] == "louder"
    for asked in (("toy",), (stock_model(), "--before", "louder:0.5")):
        assert run("convert", *asked, "-o", "remote", "--to", "remote-code") == 2
        assert "the selection 'louder' is of another package" in capsys.readouterr().err


def test_a_selection_is_timed_beside_the_routers(package, tiny_config, capsys):
    """Its cost is part of the prefill."""
    words = ("--report", "latency", "--random-weights", "--against", "stock,louder", "--repeats", 1, "--warmup", 0)
    assert run("profile", "--model", tiny_config, *words, "--phases", "prefill", "--json", "--device", "cpu") == 0
    phases = json.loads(capsys.readouterr().out)["latency"]["phases"]
    assert [row["model"] for row in phases] == ["stock", "p-mod", "louder"]


def code_of(page: str, heading: str) -> tuple[str, str]:
    """The first Python and the first TOML block below a heading of a page of docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    return tuple(text.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "toml"))


@pytest.fixture
def documented_method(package, monkeypatch):
    """The package that docs/method.md shows, installed."""
    code, toml = code_of("method.md", "A method of your own")
    assert len([line for line in (code + toml).splitlines() if line.strip()]) <= 30
    (package / "my_method.py").write_text(code)
    info = package / "my_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-method\nVersion: 1.0\n")
    points = tomllib.loads(toml)["project"]["entry-points"]
    lines = (
        f"[{group}]\n" + "".join(f"{name} = {where}\n" for name, where in of.items()) for group, of in points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(lines))
    registry._entry_points.cache_clear()
    yield
    for known in (METHODS, SELECTIONS):
        known._known.pop("outliers", None)


def test_the_method_of_the_documentation(documented_method, stock_model, workdir, capsys):
    """Its 30 lines are all it takes: scored beside random at the same FLOPs, counted, and drawn."""
    assert "outliers" in METHODS
    words = ("--methods", "outliers", "--budgets", "0.8", "--against", "none", "-t", "tiny_presence", "--limit", 2)
    assert run("eval", "-m", stock_model(), *words, "-o", "scored", "-q") == 0
    models = json.loads((workdir / "scored" / "results.json").read_text())["models"]
    mine = models["outliers@0.8"]
    assert (mine["method"], mine["selection"], mine["control"]) == ("outliers", "outliers", "random@0.8")
    assert mine["cost"]["flops"] == pytest.approx(0.8, rel=0.02)
    assert mine["cost"]["selector"] > 0 == models["random@0.8"]["cost"]["selector"]
    Image.effect_noise((96, 64), 90).convert("RGB").save("img.png")
    capsys.readouterr()
    drawn = ("--method", "outliers@0.8", "--max-new-tokens", 0, "--json")
    assert run("visualize", "img.png", "-m", stock_model(), *drawn) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["chosen_by"] == "outliers"
    assert run("profile", "--model", stock_model(), "--method", "outliers", "--target-retention", "0.5", "--json") == 0


def test_plain_transformers_gets_the_ratios(package, stock_model, tmp_path):
    """A checkpoint for plain transformers has no use for a name that only another package knows."""
    settings = PmodSettings(schedule="halves", mean=0.6)
    convert(stock_model(), tmp_path / "remote", settings, Options(to="remote-code"))
    written = json.loads((tmp_path / "remote" / "config.json").read_text())["pmod"]
    assert (written["schedule"], written["mean"]) == ("list", None)
    assert written["values"] == pytest.approx([1.0, 1.0, 0.2, 0.2])


BROKEN = """
import sys
from pmod_cli.model import Method, Selection

number = 42

def raises(num_layers, mean):
    raise KeyError("x")

def nothing(num_layers, mean):
    return None

def free(sizes):
    return 0

class Plain:
    def scores(self, hidden_states, routing, layer):
        return hidden_states.float().norm(dim=-1)

class Unseeded(Selection):
    def __init__(self):
        pass

class Licensed(Selection):
    def __init__(self, seed=0):
        sys.exit("needs a licence")

instance = Selection()
costly = Method("uniform", "constant", cost=free)
unknown = Method("uniform", "nothing_known")
"""


@pytest.fixture
def broken(package):
    """`broken(group, where, name="mine")`: one more package, that brings `where` of `BROKEN` under a name."""
    (package / "bad_pmod.py").write_text(BROKEN)

    def add(group: str, where: str, name: str = "mine", project: str = "bad-pmod") -> None:
        info = package / f"{project.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[pmod_cli.{group}]\n{name} = bad_pmod:{where}\n")
        importlib.invalidate_caches()
        registry._entry_points.cache_clear()

    yield add
    for known in (METHODS, SCHEDULES, SELECTIONS):
        known._known.pop("mine", None)
    sys.modules.pop("bad_pmod", None)


@pytest.mark.parametrize(
    ("group", "where", "settings", "reason"),
    [
        ("selections", "missing", {"selection": "mine"}, "AttributeError: module 'bad_pmod' has no attribute"),
        ("selections", "instance", {"selection": "mine"}, "TypeError: 'Selection' object is not callable"),
        ("selections", "Plain", {"before": "mine:0.5"}, "TypeError: Plain() takes no arguments"),
        ("selections", "Unseeded", {"selection": "mine"}, "TypeError: Unseeded.__init__() got an unexpected"),
        ("selections", "Licensed", {"selection": "mine"}, "SystemExit: needs a licence"),
        ("selections", "free", {"selection": "mine"}, "TypeError: free() got an unexpected keyword argument"),
        ("schedules", "number", {"schedule": "mine"}, "TypeError: 42 is not a callable object"),
        ("schedules", "raises", {"schedule": "mine"}, "KeyError: 'x'"),
        ("schedules", "nothing", {"schedule": "mine"}, "TypeError: 'NoneType' object is not iterable"),
        ("methods", "number", {"method": "mine"}, "TypeError: expected a Method, found 42"),
        ("methods", "unknown", {"method": "mine"}, "ValueError: there is no schedule 'nothing_known'"),
    ],
)
def test_what_cannot_be_used_is_said_of_its_package(broken, group, where, settings, reason):
    """When settings name it, and not when a model is built of them."""
    broken(group, where)
    for _ in range(2):
        with pytest.raises(BadPlugin) as caught:
            PmodSettings(**settings)
        said = explain(caught.value)
        assert said.what.startswith(f"the {group[:-1]} 'mine' of bad-pmod cannot be used ({reason}")
        assert (said.hint, said.code) == ("update or remove the package that it comes from", 2)


@pytest.mark.parametrize(
    ("group", "where", "words"),
    [
        ("selections", "missing", ("convert", "--selection", "mine", "-o", "out")),
        ("selections", "Plain", ("convert", "--before", "mine:0.5", "-o", "out")),
        ("schedules", "raises", ("convert", "--schedule", "mine", "-o", "out")),
        ("methods", "number", ("profile", "--method", "mine")),
        ("methods", "costly", ("profile", "--method", "mine")),
        ("methods", "costly", ("eval", "--methods", "mine", "--budgets", "0.8", "-t", "tiny_presence", "-o", "out")),
    ],
)
def test_commands_refuse_what_cannot_be_used(broken, group, where, words, stock_model, workdir, capsys):
    """With a sentence and exit code 2, and nothing is written."""
    broken(group, where)
    verb, *rest = words
    assert run(verb, *((stock_model(),) if verb == "convert" else ("-m", stock_model())), *rest) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: the {group[:-1]} 'mine' of bad-pmod cannot be used" in said
    assert "update or remove the package that it comes from" in said
    assert not (workdir / "out").exists()


@pytest.mark.parametrize(("known", "name"), [(SELECTIONS, "router"), (SCHEDULES, "cosine"), (METHODS, "fastv")])
def test_a_name_of_ours_is_refused(broken, known, name):
    """It was passed over without a word."""
    broken(known.group.partition(".")[2], "number", name=name)
    for look_up in (known.names, lambda: name in known, lambda: known[name]):
        with pytest.raises(BadPlugin, match=f"two of the {known.what} '{name}', of pmod and of bad-pmod"):
            look_up()


def test_two_packages_with_one_name_are_refused(broken):
    """The last one ranked, whichever that was."""
    broken("selections", "instance", name="louder")
    with pytest.raises(BadPlugin, match=r"two of the selection 'louder', of (toy|bad)-pmod and of (toy|bad)-pmod"):
        PmodSettings(selection="random")


def test_a_package_that_cannot_be_imported_is_named(package):
    with pytest.raises(BadPlugin, match="the schedule 'broken' of toy-pmod cannot be used"):
        PmodSettings(schedule="broken")


def test_a_registration_call():
    @SCHEDULES.register("falling")
    def falling(num_layers, shift):
        return [1 + shift - i / num_layers for i in range(num_layers)]

    try:
        assert "falling" in SCHEDULES.names()
        assert retention_schedule("falling", 4, shift=0.0) == [1.0, 0.75, 0.5, 0.25]
        assert sum(retention_schedule("falling", 32, mean=0.5)) / 32 == pytest.approx(0.5, abs=0.01)
        with pytest.raises(ValueError, match="there is a schedule called 'falling' already"):
            SCHEDULES.register("falling")(falling)
        with pytest.raises(ValueError, match="cosine and linear and falling"):
            retention_schedule("constant", 4, shift=0.5)
    finally:
        SCHEDULES.unregister("falling")
    assert "falling" not in SCHEDULES


def test_a_function_of_another_form_is_a_sentence():
    SCHEDULES.register("odd")(lambda layers, depth: [1.0] * layers)
    try:
        with pytest.raises(ValueError, match=r"its function takes \(layers, depth\); expected the number of layers"):
            PmodSettings(schedule="odd")
    finally:
        SCHEDULES.unregister("odd")
