"""Messages of the library name its arguments; the command line prints them as the options of the verb."""

import ast
import re

import pytest

from pmod_cli.core.errors import PmodError, as_flags, explain, is_network_error, require
from tests.conftest import ROOT

OPTIONS = {"out": "--out", "overwrite": "--overwrite", "resume": "--resume", "train.batch_size": "--batch-size"}
FLAG = re.compile(r"(?<![\w-])--?[a-z]")
COMMAND = re.compile(r"(?:pmod [a-z]|hf [a-z]|accelerate |pip |sha256sum |mkdir |python -m )[^;`]*")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("choose another `out`", "choose another --out"),
        ("replace it with `overwrite=True`", "replace it with --overwrite"),
        ("`resume=False` was given", "--no-resume was given"),
        ("lower `train.batch_size`", "lower --batch-size"),
        ("`train.batch_size=4` or `lora.enabled=true`", "--batch-size 4 or --set lora.enabled=true"),
        ("change `data.max_length`", "change data.max_length"),
        ("`out=runs/a b` and `pmod eval --list`", "--out runs/a b and `pmod eval --list`"),
        ("the file `config.json`, `nothing` known", "the file config.json, `nothing` known"),
    ],
)
def test_arguments_become_options(said, shown):
    assert as_flags(said, OPTIONS, settings=True) == shown


def test_the_library_speaks_of_no_flags():
    """No error that it raises names an option: outside whole commands, which begin with a program's name."""
    found = []
    for path in sorted((ROOT / "pmod_cli").rglob("*.py")):
        if "commands" in path.parts or path.name in ("cli.py", "recipe.py"):  # recipe.py repeats what was typed
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("PmodError", "BadRow"):
                texts = [part.value for part in ast.walk(call) if isinstance(part, ast.Constant)]
                message = " ".join(text for text in texts if isinstance(text, str))
                message = COMMAND.sub("", message)
                if FLAG.search(message):
                    found.append(f"{path.name}: {message}")
    assert not found, "\n".join(found)


def test_missing_extra_names_the_install_command():
    with pytest.raises(PmodError, match="no_such_module_a") as caught:
        require("eval", "json", "no_such_module_a")
    assert caught.value.hint == "in the checkout: pip install -e '.[eval]'"
    require("eval", "json")


def test_a_network_that_fails_is_no_pipe_that_nobody_reads():
    assert is_network_error(ConnectionResetError("reset by peer"))
    assert not is_network_error(BrokenPipeError("nobody reads"))
    assert not is_network_error(OSError("a disk"))
    assert explain(ConnectionError("Couldn't reach the hub")).what == "the network failed: Couldn't reach the hub"
