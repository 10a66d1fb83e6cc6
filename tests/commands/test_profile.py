"""`pmod profile` as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pmod_cli.cli import main
from tests import factories


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main(["profile", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def tiny(workdir: Path) -> Path:
    """A config.json alone: no weights, six layers."""
    path = workdir / "config.json"
    factories.config("llava_next", layers=6).to_json_file(path)
    return path


def measured(workdir: Path, *arguments: str) -> tuple[str, str, float, int]:
    """(stdout, stderr, CPU seconds, peak bytes) of the command in a process of its own."""
    with open(workdir / "out", "w") as out, open(workdir / "err", "w") as err:
        command = [sys.executable, "-m", "pmod_cli", "profile", *arguments]
        process = subprocess.Popen(command, cwd=workdir, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
    shown, notes = ((workdir / name).read_text() for name in ("out", "err"))
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, notes
    return shown, notes, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024  # maxrss is in KiB on Linux


def test_the_default_prints_the_papers_figures_within_its_budget(workdir: Path) -> None:
    """On an empty directory, offline: at most 10 s of CPU time and 1.5 GB."""
    shown, notes, seconds, peak = measured(workdir, "--report", "flops")
    assert "model: llava-next-7b, from its built-in configuration" in notes
    paper = next(line for line in shown.splitlines() if line.startswith("paper convention  "))
    assert paper.split() == ["paper", "convention", "39.46", "21.92", "55.5", "%", "39.46", "->", "21.94"]
    assert any(line.startswith("full convention") for line in shown.splitlines())
    kv = next(line for line in shown.splitlines() if line.startswith("paper convention: mean retention"))
    assert kv.split()[-4:] == ["53.8", "%", "53.8", "%"]
    assert "…" not in shown  # nothing is cut off in a pipe
    assert peak < 1.5e9
    if seconds >= 10:  # neighbours that share the caches of a core add CPU time of their own: once more
        seconds = measured(workdir, "--report", "flops")[2]
    assert seconds < 10


def test_json_is_one_object_with_units_in_its_keys(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = run(capsys, "-m", str(tiny), "--json", "--new-tokens", "4", "--image-size", "50x37")
    report = json.loads(out)
    assert code == 0
    assert report["schema_version"] == 2
    assert report["workload"]["rows"][0]["vision_tokens"] == 16 + 6 * (8 + 1)  # base; 6 of 8 rows, each with a newline
    assert len(report["layers"]) == 6
    assert report["kv_cache"]["pmod_total_mib"] < report["kv_cache"]["stock_total_mib"]
    full = report["flops"]["conventions"]["full"]
    assert full["pmod_tflops"] < full["stock_tflops"]
    assert report["flops"]["decoder_by_closed_formula"]["pmod_tflops"] > 0
    assert "published_stock_tflops" not in report["flops"]["conventions"]["paper"]  # not the paper's case


def test_a_pmod_checkpoint_keeps_its_own_schedule_and_options_replace_it(
    stock_model: Callable, workdir: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        main(["convert", str(stock_model()), "-o", "mine", "--schedule", "constant", "--target-retention", "0.4"]) == 0
    )
    capsys.readouterr()
    code, out, err = run(capsys, "--json")  # the checkpoint that convert wrote last here
    assert code == 0
    assert "model: mine" in err
    assert json.loads(out)["model"]["mean_retention_ratio"] == pytest.approx(0.4)
    code, out, _ = run(capsys, "--json", "--target-retention", "0.6")
    assert json.loads(out)["model"]["mean_retention_ratio"] == pytest.approx(0.6)
    code, out, _ = run(capsys, "--json", "--schedule", "cosine")
    assert json.loads(out)["layers"][0]["retention_ratio"] == 1.0


@pytest.mark.parametrize("report", ["flops", "kv", "all"])
def test_reports(tiny: Path, capsys: pytest.CaptureFixture, report: str) -> None:
    code, out, _ = run(capsys, "-m", str(tiny), "--report", report)
    assert code == 0
    assert ("Prefill" in out) == (report != "kv")
    assert ("KV cache of each layer" in out) == (report != "flops")
    assert "KV cache, KiB in bfloat16" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-m", "llava-next-7bb"], "is no folder and no alias. Near: llava-next-7b"),
        (["-m", "./nowhere"], "there is no folder ./nowhere"),
        (["--image-size", "0x672"], "--image-size 0x672 is empty"),
        (["--image-size", "672"], "'672' is not WIDTHxHEIGHT"),
        (["--text-tokens", "-1"], "--text-tokens -1 is negative"),
        (["--new-tokens", "-3"], "--new-tokens -3 is negative"),
        (["-m", "llava-1.5-7b", "--text-tokens", "4000"], "the prompt does not fit: 576 vision + 4000 text"),
        (["--report", "speed"], "'speed' is not a report. Known: flops, kv, latency, all"),
        (["--schedule", "sine"], "unknown schedule 'sine'"),
        (["--schedule", "constant", "--shift", "0.4"], "a shift belongs to the schedules cosine and linear"),
        (["-m", "llava-1.5-7b", "--target-tokens", "vision_hr"], "vision_hr"),
        (["-m", "text.json"], "text.json is not JSON"),
        (["-m", "list.json"], "list.json holds no configuration"),
        (["-m", "bert.json"], "is not a LLaVA: model_type is 'bert'"),
        (["-m", "half.json"], "half.json: text_config and vision_config are JSON objects"),
        (["-m", "gemma.json"], "gemma.json: the decoder gemma is unknown: expected one of llama, mistral, qwen2"),
    ],
)
def test_bad_input_is_a_sentence(
    workdir: Path, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    Path("text.json").write_text("not json")
    Path("list.json").write_text("[]")
    Path("bert.json").write_text('{"model_type": "bert"}')
    Path("half.json").write_text('{"model_type": "llava", "text_config": 3}')
    Path("gemma.json").write_text('{"model_type": "llava", "text_config": {"model_type": "gemma"}}')
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err
