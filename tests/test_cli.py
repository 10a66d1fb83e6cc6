"""The program as a user meets it: help, versions, wrong words, interruptions, streams and exit codes."""

import errno
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

from pmod_cli import __version__, cli
from pmod_cli.commands import env as env_command
from pmod_cli.core import errors
from pmod_cli.core.errors import PmodError, explain
from tests import reference
from tests.conftest import ROOT

HEAVY = ("torch", "transformers", "matplotlib", "lmms_eval", "datasets", "numpy")


def imported_by(*commands: list[str], cwd: Path) -> set[str]:
    """The heavy modules that are imported after running `pmod` with each of the argument lists."""
    runs = "; ".join(f"main({arguments!r})" for arguments in commands)
    code = f"import sys; from pmod_cli.cli import main; {runs}; print(*sys.modules, file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return set(HEAVY) & set(run.stderr.split())


def parse(line: str) -> list[str]:
    """Check a command line against the real options without running it, and return its words.

    `&&` joins two commands, of which the first is checked; a redirection and a comment are the shell's.
    """
    words = shlex.split(line.split(" && ")[0].split(" > ")[0], comments=True)
    group = typer.main.get_command(cli.build_app(words[1]))
    with group.make_context("pmod", words[1:]) as context:
        verb, command, rest = group.resolve_command(context, words[1:])
        command.make_context(verb, rest, parent=context)
    return words


@pytest.mark.timing
def test_help_imports_nothing_heavy_and_is_quick(tmp_path):
    assert imported_by(["--help"], cwd=tmp_path) == set()
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pmod_cli", "--help"], cwd=tmp_path, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) <= 0.3, f"CPU seconds of `pmod --help`: {times}"


def test_help_of_the_verbs_imports_nothing_heavy(tmp_path):
    assert imported_by(*([verb, "--help"] for verb in cli.VERBS), cwd=tmp_path) == set()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb_ends_in_examples(verb, capsys):
    assert cli.main([verb, "-h"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Examples:" in out
    assert out.rstrip().splitlines()[-1].strip().startswith(f"pmod {verb}")
    assert "\x1b[" not in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_examples_are_valid_command_lines(verb, workdir):
    Path("img.png").touch()
    for line in import_module(f"pmod_cli.commands.{verb}").EXAMPLES.strip().splitlines():
        assert parse(line)[:2] == ["pmod", verb]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda page: page.name)
def test_commands_and_links_of_the_docs(page, workdir):
    Path("img.png").touch()
    text = page.read_text()
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^pmod .*", block.replace("\\\n", " "), flags=re.MULTILINE):
            parse(line)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_arguments_shows_help_and_exits_2(capsys):
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


def test_version(pmod, tmp_path):
    result = pmod("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"pmod {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["convrt"], "Did you mean 'convert'"),
        (["convert", "x", "--shedule", "linear"], "--schedule"),
        (["convert", "x", "--shift", "much"], "--shift"),
        (["recipes", "lst"], "'ls'"),
        (["--bogus"], "--bogus"),
    ],
)
def test_wrong_words_name_the_right_ones(arguments, told, capsys, workdir):
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "--help" in err


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "~nobody/model"],
        ["convert", "tiny-llava-next", "-o", "~nobody/out", "--dry-run"],
        ["profile", "-m", "~nobody/model"],
        ["eval", "-t", "~nobody/suite.yaml", "-m", "tiny-llava-next", "--dry-run"],
        ["finetune", "~nobody/recipe.yaml", "--dry-run"],
        ["calibrate", "tiny-llava-next", "--data", "~nobody/pictures"],
    ],
)
def test_the_home_of_nobody_is_a_name_like_any_other(words, capsys, workdir):
    """`Path.expanduser` ends in a RuntimeError there."""
    code, err = cli.main(words), capsys.readouterr().err
    assert code == (0 if "-o" in words else 2), err
    assert "home directory" not in err


def test_underscores_in_long_options(capsys, workdir):
    for spelling in ("--dry_run", "--dry-run"):
        assert cli.main(["convert", "nothing-here", spelling]) == 2
        assert "No such option" not in capsys.readouterr().err


def test_interrupt_says_one_line_and_exits_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(env_command, "collect", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted\n")


def test_debug_shows_the_traceback(pmod, tmp_path):
    result = pmod("convert", "./absent", cwd=tmp_path, env={"PMOD_DEBUG": "1"})
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "PmodError" in result.stderr


def test_unknown_exceptions_keep_their_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(env_command, "collect", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["env"])


def test_closed_pipe_is_quiet(tmp_path):
    for words, reader in (
        ("recipes show llava-1.5-7b", "head -c 1"),
        ("recipes ls", "head -1"),
        ("recipes ls", "true"),
    ):
        command = f"set -o pipefail; {sys.executable} -m pmod_cli {words} | {reader} > {os.devnull}"
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")


def test_env_reports_json(pmod, tmp_path):
    result = pmod("env", "--json", cwd=tmp_path)
    report = json.loads(result.stdout)
    assert (result.returncode, report["schema_version"], report["pmod"]) == (0, 1, __version__)
    assert report["packages"]["torch"]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (PmodError("told", hint="next"), 2, "told"),
        (KeyboardInterrupt(), errors.INTERRUPTED, "interrupted"),
        (MemoryError(), errors.RUN_FAILED, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out.bin"), errors.RUN_FAILED, "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "no permission for /root/x"),
        (OSError(errno.EROFS, "Read-only file system", "/proc/x"), 2, "read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file", "img.png"), 2, "img.png"),
    ],
)
def test_known_exceptions_become_sentences(error, code, told):
    known = explain(error)
    assert known is not None
    assert (known.code, told in known.what) == (code, True)


def test_torch_and_safetensors_errors_become_sentences(tmp_path):
    import safetensors
    import torch

    known = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert known.code == errors.RUN_FAILED
    assert "`batch_size`" in known.hint
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.safe_open(tmp_path / "broken.safetensors", framework="np")
    assert "safetensors" in explain(caught.value).what


def test_unknown_exception_is_not_explained():
    assert explain(ValueError("some bug")) is None


def test_the_page_of_commands_is_what_the_commands_say():
    assert (ROOT / "docs" / "commands.md").read_text() == reference.page(), "run `make reference`"
