"""Tables that packages add to by entry points: what does not fit is said of its package, every time."""

import os
import sys
from dataclasses import dataclass

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.core.plugins import PluginRegistry
from tests.conftest import ROOT


@dataclass
class Thing:
    name: str


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(code, group, **entries)`: a package as pip leaves it, whose objects are named as they stand in it."""

    def add(code: str, group: str = "toys", **entries: str) -> None:
        (tmp_path / "toy_things.py").write_text(code)
        info = tmp_path / "toy_things-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-things\nVersion: 1.0\n")
        lines = "".join(f"{name} = toy_things:{where}\n" for name, where in entries.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")

    monkeypatch.syspath_prepend(tmp_path)
    yield add
    sys.modules.pop("toy_things", None)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys; sys.exit('needs a licence')", "SystemExit: needs a licence"),
        ("A = 42", "a thing has to be a Thing, found 42"),
        ("class A: name = 'a'", "a thing has to be a Thing, found <class 'toy_things.A'>"),
        ("from tests.core.test_plugins import Thing; A = Thing('ours')", "there are two of the thing 'ours'"),
    ],
)
def test_what_cannot_be_used_is_refused_at_every_look_up(install, code, reason):
    """The second one went on without the package, and without all that come behind it."""
    things = PluginRegistry("thing", "toys", Thing)
    ours = things.add(Thing("ours"))
    install(code, first="A")
    for _ in range(2):
        with pytest.raises(PmodError) as caught:
            _ = "good" in things
        assert caught.value.what == f"the entry point first of toys (toy_things:A) cannot be used: {reason}"
        assert caught.value.hint == "update or remove the package that it comes from"
    assert things._items == {"ours": ours}


def test_a_follower_that_fails_is_said_of_the_entry_point(install):
    things = PluginRegistry("thing", "toys", Thing)
    things.add(Thing("ours"))
    install("from tests.core.test_plugins import Thing; A = Thing('theirs')", first="A")
    assert list(things) == ["ours", "theirs"]
    refused, seen = "theirs", []

    def follower(thing):
        if thing.name == refused:
            raise AttributeError("module transformers has no attribute OldConfig")
        seen.append(thing.name)

    for _ in range(2):
        with pytest.raises(PmodError, match=r"first of toys \(toy_things:A\) cannot be used: AttributeError: module"):
            things.follow(follower)
    refused = "ours"  # a bug of ours keeps its traceback
    with pytest.raises(AttributeError):
        things.follow(follower)
    refused, seen[:] = None, []
    things.follow(follower)
    things.add(things["theirs"])  # it is there already: nothing follows again
    assert seen == ["ours", "theirs"]


def test_a_verb_whose_help_lists_what_cannot_be_used(install, tmp_path, pmod):
    """`convert` reads the layouts when its module is imported."""
    install("import no_such_module", "pmod_cli.layouts", mine="A")
    run = pmod("convert", "--help", cwd=tmp_path, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])})
    assert (run.returncode, run.stdout) == (2, "")
    assert "error: the entry point mine of pmod_cli.layouts (toy_things:A) cannot be used" in run.stderr
    assert "Traceback" not in run.stderr
