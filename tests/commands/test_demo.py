"""`pmod demo` as a user runs it, cut short: every verb, one folder, and a second run that does nothing again."""

import json

import pytest
from PIL import Image

from pmod_cli import cli
from pmod_cli.checkpoints.digests import weights_sha256
from pmod_cli.commands import demo

pytest.importorskip("lmms_eval", reason="needs the eval extra")


@pytest.mark.slow
def test_demo_runs_all_verbs_and_goes_on(pmod, workdir):
    arguments = ("demo", "--out", "all", "--samples", 8, "--limit", 1)
    first = pmod(*arguments, cwd=workdir, timeout=600)
    assert first.returncode == 0, first.stderr
    for said in ("tiny doc", "tiny presence", "paper convention", "all/kept.png"):
        assert said in first.stdout
    for written in ("p-mod/config.json", "p-mod/calibration.json", "eval/results.json", "kept.png", "image.png"):
        assert (workdir / "all" / written).is_file(), written
    assert json.loads((workdir / "all" / "p-mod" / "config.json").read_text())["router_state"] == "calibrated"

    second = pmod(*arguments, cwd=workdir, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("done before:") == 4
    assert second.stdout == first.stdout

    third = pmod("demo", "--out", "all", "--samples", 12, "--limit", 1, cwd=workdir, timeout=600)
    assert third.returncode == 0, third.stderr
    assert "done before:" not in third.stderr  # scores and pictures would be of the model that is gone
    made = json.loads((workdir / "all" / "p-mod" / "calibration.json").read_text())
    assert made["asked_for"]["samples"] == 12
    weights = json.loads((workdir / "all" / "eval" / "results.json").read_text())["models"]["p-mod"]
    assert weights["weights_sha256"] == weights_sha256(workdir / "all" / "p-mod")


@pytest.mark.slow
def test_the_training_part(pmod, workdir):
    done = pmod(
        "demo", "--out", "all", "--samples", 8, "--train", "--max-steps", 1, "--limit", 1, cwd=workdir, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "all" / "trained" / "config.json").read_text())["router_state"] == "trained"
    report = json.loads((workdir / "all" / "eval" / "results.json").read_text())
    assert "all/trained" in json.dumps(report)


def test_a_picture_of_somebody_else_is_not_replaced(workdir, capsys):
    Image.new("RGB", (8, 8), "red").save(workdir / "image.png")
    before = (workdir / "image.png").read_bytes()
    assert cli.main(["demo", "--out", "."]) == 2
    assert "image.png is there already" in capsys.readouterr().err
    assert (workdir / "image.png").read_bytes() == before


def test_a_command_whose_text_is_gone_runs_again(workdir, monkeypatch, capsys):
    ran = []

    def run(step, out):
        ran.append(step.name)
        (out / f"{step.name}.txt").write_text(f"what {step.name} says")
        return 1.0

    monkeypatch.setattr(demo, "_run", run)  # of a verb, minutes long; which of them run is the question
    assert cli.main(["demo", "--out", "all"]) == 0
    (workdir / "all" / "eval.txt").unlink()
    ran.clear()
    assert cli.main(["demo", "--out", "all"]) == 0
    assert ran == ["eval", "profile", "visualize"]


def test_what_is_typed_next_works_in_any_folder(workdir, monkeypatch, capsys):
    def run(step, out):
        (out / f"{step.name}.txt").write_text("")
        return 1.0

    monkeypatch.setattr(demo, "_run", run)
    assert cli.main(["demo", "--out", "my demo"]) == 0
    assert "next: pmod visualize 'my demo/image.png' --model 'my demo/p-mod' --mode" in capsys.readouterr().err


def test_steps_without_training_are_refused(workdir, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_run", lambda step, out: pytest.fail("it has started"))
    assert cli.main(["demo", "--max-steps", "9"]) == 2
    assert "--max-steps belongs to --train" in capsys.readouterr().err
    assert not list(workdir.iterdir())
