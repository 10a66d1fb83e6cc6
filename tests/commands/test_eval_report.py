"""What `pmod eval` reports: controls beside the model, formats of one run, finished runs, no secrets in any file."""

import csv
import io
import json

import pytest

from pmod_cli import cli
from pmod_cli.evaluation.results import tables

ASKED = 3  # questions of each task


def evaluate(*arguments) -> int:
    return cli.main(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(stock_model, tmp_path_factory):
    """One run of two tiny tasks with every control, made with a token in the environment."""
    place = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HF_TOKEN", "hf_aSecretThatNobodyMayRead")
        patch.setenv("OPENAI_API_KEY", "sk-aSecretThatNobodyMayRead")
        assert cli.main(["convert", str(stock_model()), "-o", "tiny-pmod", "-q"]) == 0
        against = "stock,random,uniform,downsample"
        code = evaluate(
            "-t",
            "tiny_doc,tiny_presence",
            "--limit",
            ASKED,
            "--against",
            against,
            "-o",
            "run",
            "-q",
            "--check-batching",
        )
    assert code == 0
    return place / "run"


def results_of(run) -> dict:
    return json.loads((run / "results.json").read_text())


def test_every_control_answers_the_same_questions(run):
    results = results_of(run)
    assert list(results["models"]) == ["tiny-pmod", "stock", "random", "uniform", "downsample"]
    asked = {
        label: [json.loads(line)["question"] for line in (run / "answers" / label / "tiny_doc.jsonl").open()]
        for label in results["models"]
    }
    assert len(set(map(tuple, asked.values()))) == 1
    assert len(asked["stock"]) == ASKED
    down = results["models"]["downsample"]
    assert (
        down["downsampled"]["tokens_left"]
        == down["mean_retention"]
        == results["models"]["downsample"]["mean_retention"]
    )
    assert down["path"] == results["models"]["stock"]["path"]
    assert results["models"]["random"]["weights_sha256"] == results["models"]["tiny-pmod"]["weights_sha256"]


def test_changed_answers_are_in_a_file(run):
    results = results_of(run)
    for task in results["tasks"]:
        for label, found in task["differences"].items():
            lines = [json.loads(line) for line in (run / "changed" / label / f"{task['name']}.jsonl").open()]
            assert len(lines) == found["changed_answers"]
            assert all(line["answer"] != line["other_answer"] for line in lines)
    assert any(found["changed_answers"] for task in results["tasks"] for found in task["differences"].values())


def test_a_score_says_what_it_depends_on(run):
    results = results_of(run)
    assert {"settings", "software", "machine", "models", "tasks", "averages", "started_at", "finished_at"} <= {*results}
    for model in results["models"].values():
        assert {"commit", "weights_sha256", "config_sha256", "dtype", "attention", "image_backend", "device"} <= {
            *model
        }
        assert model["image_backend"] in ("Pillow", "torchvision")
    score = results["tasks"][0]["scores"]["stock"]
    assert {"prompt", "task_versions", "seconds", "tokens_per_second", "peak_memory_mib", "limited"} <= {*score}
    assert score["peak_memory_mib"] > 10
    assert results["settings"]["batch_size"] == 8


def test_no_file_holds_a_secret(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if b"aSecretThatNobodyMayRead" in path.read_bytes()] == []


def test_batching_was_checked(run):
    """Float32: the questions of each task went together, and none is answered otherwise alone."""
    results = results_of(run)
    checks = [entry["batching"] for task in results["tasks"] for entry in task["scores"].values()]
    assert checks == [{"questions": ASKED, "changed": 0, "batch_size": ASKED}] * 10
    assert f"stock: 0 of {2 * ASKED} answers change when asked one at a time" in (run / "results.md").read_text()


def test_formats_agree(run):
    results = results_of(run)
    read = list(csv.DictReader(io.StringIO((run / "results.csv").read_text())))
    assert [(line["benchmark"], line["model"]) for line in read] == [
        (row["benchmark"], row["model"]) for row in tables.rows(results)
    ]
    assert [float(line["score"]) for line in read] == [row["score"] for row in tables.rows(results)]
    assert "| tiny doc | stock |" in (run / "results.md").read_text()


def test_finished_runs_side_by_side(run, workdir, capsys):
    stock = results_of(run)["models"]["stock"]["path"]
    settings = ("--limit", ASKED - 1, "--dtype", "bf16", "--against", "none", "-q")
    assert evaluate("-t", "tiny_doc", "-m", stock, "-o", "other", *settings) == 0
    capsys.readouterr()
    assert evaluate("--compare", run, "other") == 0
    printed = capsys.readouterr()
    assert "tiny-pmod" in printed.out
    assert "run: tiny-pmod" not in printed.out, "one run alone has this model"
    assert "dtype: float32" in printed.err
    assert f"{ASKED - 1} in common" in printed.err

    assert evaluate("--compare", run, "other", "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["tasks"][0]["differences"]["other"]["questions"] == ASKED - 1
    assert compared["tasks"][0]["differences"]["stock"]["difference"] == pytest.approx(
        results_of(run)["tasks"][0]["differences"]["stock"]["difference"]
    )
    assert evaluate("--compare", run, "other", "--format", "markdown") == 0
    assert "| tiny doc | other |" in capsys.readouterr().out
    assert evaluate("--compare", run, "other", "--format", "csv") == 0
    assert capsys.readouterr().out.startswith("benchmark,task,metric,model,score,")


def test_the_folder_of_a_comparison(run, workdir, capsys):
    """--quiet prints it alone; another one is not replaced; --dry-run, which a comparison has not, writes nothing."""
    assert evaluate("--compare", run, "-o", "dry", "--dry-run") == 2
    assert "--dry-run belongs to a call without --compare" in capsys.readouterr().err
    assert not (workdir / "dry").exists()

    assert evaluate("--compare", run, "-o", "both", "-q") == 0
    assert capsys.readouterr().out == "both\n"
    (workdir / "theirs").mkdir()
    (workdir / "theirs" / "thesis.txt").write_text("years")
    assert evaluate("--compare", run, "-o", "theirs", "--overwrite") == 2
    assert "theirs was not written by pmod eval --compare" in capsys.readouterr().err
    (workdir / "both" / "notes.txt").write_text("years")
    assert evaluate("--compare", run, "-o", "both", "--overwrite") == 2
    assert "both holds what pmod eval --compare did not write: notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compare", "gone", "gone2", "--limit", "3"], "--limit belongs to a call without --compare"),
        (["--compare", "gone", "gone2", "-m", "mine"], "--model belongs to a call without --compare"),
        (["--list", "gone"], "RUN belongs to a call without --list"),
        (["--fetch-data", "gqa", "--data-root", "d", "--dry-run"], "--dry-run belongs to a call without --fetch-data"),
        (["--compare", "gone", "gone2"], "no finished run"),
        (["gone"], "unexpected: gone"),
        (["--tasks", "tiny", "--format", "xml"], "is not a format. Known: table, json, markdown, csv"),
    ],
)
def test_bad_input(workdir, capsys, arguments, sentence):
    assert evaluate(*arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not list(workdir.iterdir())
