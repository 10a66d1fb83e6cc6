"""Numbers that nobody would type: whatever an option of `convert` or `profile` is given, the answer is a sentence."""

import json
import os
from pathlib import Path

import pytest
import typer

from pmod_cli.cli import build_app, main
from tests import factories

NUMBERS = ("nan", "-inf", "-1", "0", "1e300", "9" * 30, "9" * 5000, "\u0663", "")
FORMS = {
    "ratios": "{0},{0},{0},{0}",
    "image_size": "{0}x{0}",
    "router_init": "normal:{0}",
    "sweep": "shift={0}:{0}:{0}",
}
WITH = {"ratios": ["--schedule", "list"], "gpu_memory": ["--report", "memory"], "limit": ["--from-data", "rows.json"]}
ELSEWHERE = {"out", "html", "plot", "revision", "cache_dir"}  # names of files and hub revisions are not numbers
MEASURED = {"phases", "against", "repeats", "warmup", "threads", "device", "attention", "gpu"}


def options(verb: str) -> list[tuple[str, str]]:
    """Name and flag of each option with a value."""
    command = typer.main.get_command(build_app(verb)).commands[verb]
    return [
        (option.name, min((flag for flag in option.opts if flag.startswith("--")), key=len))
        for option in command.params
        if any(flag.startswith("--") for flag in option.opts) and not getattr(option, "is_flag", False)
    ]


@pytest.fixture
def place(workdir: Path, stock_model) -> Path:
    factories.config("llava_next", layers=2).to_json_file("config.json")
    Path("rows.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}]}]))
    return workdir


@pytest.mark.parametrize(
    ("verb", "name", "flag"),
    [
        *(("convert", *option) for option in options("convert") if option[0] not in ELSEWHERE),
        *(("profile", *option) for option in options("profile") if option[0] not in ELSEWHERE | MEASURED),
    ],
)
def test_any_number_ends_in_a_sentence(verb, name, flag, place, stock_model, capsys):
    common = {
        "convert": [str(stock_model()), "--dry-run"] if name != "llm" else ["--dry-run"],
        "profile": [] if name == "model" else ["-m", "config.json"],
    }[verb]
    if verb == "profile" and name not in ("sweep", "report", "limit", "gpu_memory", "from_data", "runs", "images_root"):
        common = [*common, *(["--sweep", "schedule=cosine"] if name not in ("layers", "hidden_size") else [])]
    for number in NUMBERS:
        value = FORMS.get(name, "{0}").format(number)
        code = main([verb, *common, *WITH.get(name, []), flag, value])
        out, err = capsys.readouterr()
        assert code in (0, 2), (flag, value[:40], err)
        assert (code == 0) == bool(out), (flag, value[:40], err)
        assert ("error: " in err) == (code == 2), (flag, value[:40], err)
    assert not os.path.exists(".pmod")


@pytest.mark.parametrize("number", ["nan", "-1", "9" * 30])
@pytest.mark.parametrize("flag", ["--threads", "--device", "--repeats", "--warmup", "--phases", "--attention", "--gpu"])
def test_of_a_measured_report_too(flag, number, place, capsys):
    if number.isdigit() and flag in ("--repeats", "--warmup"):
        pytest.skip("so many rounds are what was asked for")
    assert main(["profile", "-m", "config.json", "--report", "latency", "--random-weights", flag, number]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--budget", "--target-retention"])
def test_of_a_budget_of_calibrate_too(flag, workdir, stock_model, capsys):
    for number in filter(None, NUMBERS):
        assert main(["calibrate", str(stock_model()), flag, number]) == 2, number[:40]
        out, err = capsys.readouterr()
        assert (out, "expected shares above 0 and at most 1" in err) == ("", True), err
    assert list(workdir.iterdir()) == []
