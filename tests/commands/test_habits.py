"""Habits at the prompt: values are completed, pipes end early, terminals are narrow, `--quiet` is quiet."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from pmod_cli import cli
from pmod_cli.core import output
from pmod_cli.data.documents import draw, seed_of
from tests.conftest import ROOT

COMPLETIONS = [
    ("eval --tasks docvqa,ch", "docvqa,chartqa"),
    ("eval --tasks docvqa,chartqa,docv", ""),
    ("eval --tasks ti", "tiny tiny-several"),
    ("eval --methods fastv,sho", "fastv,shortv"),
    ("eval --methods p", "pyramiddrop"),
    ("eval --against downsample,llava-1.5-1", "downsample,llava-1.5-13b"),
    ("convert llava-next-m", "llava-next-mistral-7b"),
    ("convert --schedule interl", "interleaved"),
    ("convert --norm shif", "shifted_softmax"),
    ("convert a --to remote", "remote-code"),
    ("convert llava-1.5-13b --select-at 8,3", "8,3 8,30 8,31 8,32 8,33 8,34 8,35 8,36 8,37 8,38 8,39"),
    ("calibrate tiny", "tiny-llava-next"),
    ("finetune ti", "tiny"),
    ("finetune --recipe llava-1.5-7b-", "llava-1.5-7b-baseline"),
    ("finetune --sweep abl", "ablations"),
    ("finetune --eval tiny_d", "tiny_doc tiny_dearer"),
    ("finetune --gpu a100-8", "a100-80gb"),
    ("recipes show qlo", "qlora-24gb"),
    ("visualize a.png --mode sch", "schedule"),
    ("visualize a.png --parts me", "merged"),
    ("visualize a.png --model tiny-llava-next --layers 2,14-3", "2,14-3 2,14-30 2,14-31"),
    ("visualize a.png --model tiny-llava-next --layers a", "all"),
    ("profile --method pyr", "pyramiddrop"),
    ("profile --report me", "memory"),
    ("profile --tasks tiny_ch", "tiny_chart"),
    ("profile --selection att", "attention"),
]


def completed(line: str, monkeypatch, capsys) -> list[str]:
    """What bash is told when the tabulator is pressed behind a line."""
    monkeypatch.setenv("COMP_WORDS", f"pmod {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    monkeypatch.setenv("_PMOD_COMPLETE", "complete_bash")
    assert cli.main([]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(("line", "expected"), COMPLETIONS)
def test_values_are_completed(line, expected, workdir, monkeypatch, capsys):
    found = completed(line, monkeypatch, capsys)
    assert found[: len(expected.split()) or None] == expected.split()


def test_layers_are_those_of_the_current_model(workdir, monkeypatch, capsys):
    assert completed("visualize a.png --layers 1", monkeypatch, capsys) == []
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 12}}))
    Path(".pmod").mkdir()
    Path(".pmod/current").write_text("mine")
    assert completed("visualize a.png --layers 1", monkeypatch, capsys) == ["1", "10", "11"]


def test_each_choice_is_an_option_of_a_verb():
    from pmod_cli.commands.completing import VALUES

    taken = set()
    for verb in cli.VERBS:
        command = typer.main.get_command(cli.build_app(verb)).commands[verb]
        for child in getattr(command, "commands", {"": command}).values():
            taken |= {name for option in child.params for name in (option.name, f"{verb} {option.name}")}
    assert set(VALUES) <= taken


def test_completion_imports_no_torch(tmp_path):
    code = (
        "import os, sys\nfrom pmod_cli.cli import main\n"
        f"for line in {[line for line, _ in COMPLETIONS]!r}:\n"
        "    os.environ.update(COMP_WORDS=f'pmod {line}', COMP_CWORD=str(len(line.split())))\n"
        "    main([])\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "_PMOD_COMPLETE": "complete_bash"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "lmms_eval", "datasets"} & set(run.stderr.split())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes(shell, tmp_path):
    """The script that --install-completion installs, run by bash; zsh's protocol, which has another variable."""
    program = f"{sys.executable} -m pmod_cli"
    (tmp_path / "pmod").write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    (tmp_path / "pmod").chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if shell == "bash":
        script = """
            eval "$(_PMOD_COMPLETE=source_bash pmod)"
            COMP_WORDS=(pmod eval --tasks docvqa,ch) COMP_CWORD=3
            _pmod_completion pmod
            echo "${COMPREPLY[@]}"
        """
    else:
        script = '_TYPER_COMPLETE_ARGS="pmod eval --tasks docvqa,ch" _PMOD_COMPLETE=complete_zsh pmod'
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "docvqa,chartqa" in run.stdout, run.stderr


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_names_every_option_in_full(verb, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([verb, "--help"]) == 0
    words = set(re.split(r"[^\w-]+", capsys.readouterr().out))
    for option in typer.main.get_command(cli.build_app(verb)).commands[verb].params:
        assert {flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("-")} <= words


def numbers(text: str) -> list[str]:
    """Every number of the tables, by its size."""
    return sorted(re.findall(r"[0-9][0-9,]*\.?[0-9]*", text))


def test_sixty_columns_show_whole_numbers_and_small_sizes_are_not_zero(workdir, monkeypatch):
    shown = {}
    for columns in (60, 200):
        console = Console(file=io.StringIO(), width=columns, highlight=False)
        monkeypatch.setattr(output, "stdout", console)
        assert cli.main(["profile", "--report", "all", "--model", "tiny-llava-next", "--quiet"]) == 0
        shown[columns] = console.file.getvalue()
    tables = shown[60].partition("\n\n")[2]
    assert max(map(len, tables.splitlines())) <= 60
    assert "…" not in tables
    assert set(numbers(shown[60])) == set(numbers(shown[200]))
    assert "Inference, MiB" in tables
    assert " 0.00 " not in tables.partition("Inference")[2]


def test_profile_quiet(workdir, capsys):
    quiet = ["profile", "--model", "tiny-llava-next", "--quiet"]
    assert cli.main(quiet) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "KV cache" in out
    assert "multiply-add" not in out
    assert cli.main([*quiet, "--html", "cost.html", "--plot", "cost.svg"]) == 0
    assert capsys.readouterr() == ("cost.svg\ncost.html\n", "")


def test_an_alias_in_any_case(workdir, capsys):
    assert cli.main(["convert", "Tiny-LLaVA-NeXT", "--dry-run"]) == 0
    capsys.readouterr()
    assert cli.main(["profile", "--model", "TINY-llava-next", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["name"] == "tiny-llava-next"


def test_a_recipe_that_is_no_text_is_a_sentence(workdir, capsys):
    Path("mine.yaml").write_bytes(b"train: \xff\n")
    assert cli.main(["recipes", "show", "mine.yaml"]) == 2
    written = capsys.readouterr()
    assert (written.out, "mine.yaml is no recipe: it is not UTF-8" in written.err) == ("", True)


def test_a_recipe_is_named_with_or_without_its_option(workdir, capsys):
    told = []
    for words in (["tiny"], ["--recipe", "tiny"], []):
        assert cli.main(["finetune", *words, "--print-config"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] != ""
    assert cli.main(["finetune", "tiny", "--recipe", "lora"]) == 2
    assert "two recipes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("recipes ls | true", 0),
        ("recipes show tiny | head -1", 0),
        ("convert --list | head -1", 0),
        ("eval --tasks nothing-like-it 2>&1 | true", 2),
        ("recipes ls > /dev/full", 1),
    ],
)
def test_a_reader_that_leaves_and_a_full_disk(words, code, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"set -o pipefail; {sys.executable} -m pmod_cli {words} >> read"
    if "/dev/full" in words:
        command = command.removesuffix(" >> read")
    run = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)


def test_a_recipe_that_cannot_be_written_is_not_begun(tmp_path):
    """`ulimit -f 0` stands for a full disk; an empty file would also stand in the way of the next try."""
    copy = f"{sys.executable} -m pmod_cli recipes cp tiny ."
    run = shell(f"trap '' XFSZ; ulimit -f 0; {copy}", tmp_path)
    assert run.returncode == 1
    assert "larger than files may be here" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())
    assert shell(copy, tmp_path).returncode == 0


def test_questions_from_a_stdin_that_is_closed(tmp_path):
    draw("doc", seed_of("test", 0)).image.save(tmp_path / "doc.png")
    run = shell(f"{sys.executable} -m pmod_cli ask doc.png -i -m tiny-llava-next --device cpu <&-", tmp_path)
    assert run.returncode == 2
    assert "there is no stdin" in run.stderr
    assert "Traceback" not in run.stderr


IN_HINTS = {"quote", "join", "again", "others", "saved", "command"}
"""What a hint may have in a command: what is quoted, and words of our own."""


def names_in(value: ast.expr) -> set[str]:
    if isinstance(value, ast.Call):
        called = value.func
        return {called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "?")}
    return {getattr(value, "id", "?")}


def test_a_command_in_a_hint_survives_a_path_with_blanks():
    """Whatever a hint puts into a command goes through `quote`, so that it can be pasted as it stands."""
    bare = []
    for path in (ROOT / "pmod_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            hint = node.value if isinstance(node, ast.keyword) and node.arg == "hint" else None
            if not isinstance(hint, ast.JoinedStr) or "pmod " not in ast.unparse(hint):
                continue
            command = ast.unparse(hint).partition("pmod ")[2]
            for part in hint.values:
                if not isinstance(part, ast.FormattedValue) or names_in(part.value) <= IN_HINTS:
                    continue
                if ast.unparse(part.value) in command:
                    bare.append(f"{path.name}:{node.lineno}: {ast.unparse(part.value)}")
    assert not bare
