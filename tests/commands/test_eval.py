"""`pmod eval` as a user runs it: what is on stdout, what on stderr, the exit code and the files."""

import csv
import json

import pytest
from datasets import Dataset, Features, Image, Value

from pmod_cli import cli
from pmod_cli.core import errors
from pmod_cli.data import documents
from tests.evaluation.mirrors import break_pictures


@pytest.fixture
def converted(stock_model, workdir):
    """A p-MoD checkpoint that is the current one of this directory."""
    assert cli.main(["convert", str(stock_model()), "-o", "tiny-pmod", "-q"]) == 0
    return workdir / "tiny-pmod"


def test_tiny_stands_beside_stock(pmod, converted):
    """One real process: nothing but the table on stdout, lmms-eval's talk in its log."""
    ran = pmod(
        "eval", "--tasks", "tiny_doc,tiny_presence", "--limit", "3", "-o", "run", cwd=converted.parent, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert "untrained routers" in ran.stdout.splitlines()[0]
    assert "limited run" in ran.stdout.splitlines()[1]
    assert "INFO" not in ran.stdout
    assert ran.stdout.splitlines()[-1] == "run/results.json"
    assert "tiny-pmod · tiny doc: 3 answers" in ran.stderr
    assert "Traceback" not in ran.stderr

    run = converted.parent / "run"
    results = json.loads((run / "results.json").read_text())
    assert list(results["models"]) == ["tiny-pmod", "stock"]
    assert [model["routers"] for model in results["models"].values()] == ["untrained", "stock"]
    assert results["models"]["stock"]["mean_retention"] == 1.0
    assert results["models"]["tiny-pmod"]["dtype"] == "float32"
    assert {name.lower().replace("-", "_"): version for name, version in results["software"]["packages"].items()}[
        "lmms_eval"
    ] == "0.7.3"
    assert [task["name"] for task in results["tasks"]] == ["tiny_doc", "tiny_presence"]
    assert results["tasks"][0]["scores"]["stock"]["limited"]
    assert results["tasks"][0]["scores"]["stock"]["prompt"].endswith("ASSISTANT:")
    answers = (run / "answers" / "stock" / "tiny_doc.jsonl").read_text().splitlines()
    rows = [json.loads(line)["doc_id"] for line in answers]
    assert len(rows) == 3
    assert rows == sorted(rows)
    assert rows != [0, 1, 2], "drawn, not the first ones"
    own = (run / "answers" / "tiny-pmod" / "tiny_doc.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in own] == rows
    assert not list(run.rglob("*.tmp"))


def evaluate(*arguments) -> int:
    return cli.main(["eval", *map(str, arguments)])


def test_json_is_the_results_file(converted, capsys):
    assert evaluate("--tasks", "tiny_doc", "--limit", 2, "--against", "none", "-o", "run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("folder") == "run"
    assert printed == json.loads((converted.parent / "run" / "results.json").read_text())
    assert list(printed["models"]) == ["tiny-pmod"]

    assert evaluate("--tasks", "tiny_doc", "--limit", 3, "--against", "none", "-o", "run") == 2
    assert "holds another run, with other limit" in capsys.readouterr().err
    assert evaluate("--tasks", "tiny_doc", "--limit", 2, "-o", "run", "--overwrite", "-q", "--against", "none") == 0
    assert capsys.readouterr().out == "run\n"


def test_one_failing_task_does_not_stop_the_others(converted, capsys, monkeypatch):
    """A picture of one task cannot be read: its row says so, the other has its score, the exit code is 3."""
    break_pictures(monkeypatch, "price")
    code = evaluate("--tasks", "tiny_doc,tiny_presence", "--limit", 2, "-o", "run", "--against", "none")
    printed = capsys.readouterr()
    assert code == 3
    assert "1 of 2 benchmark runs failed" in printed.err
    assert "2 of 2 questions could not be asked; row" in printed.err
    assert "image file is truncated" in printed.err
    assert "failed" in printed.out
    scores = json.loads((converted.parent / "run" / "results.json").read_text())["tasks"][1]["scores"]
    assert scores["tiny-pmod"]["score"] is not None
    assert evaluate("--tasks", "tiny_doc", "--limit", 2, "-o", "run2", "--against", "none") == 1


def test_a_benchmark_of_the_paper_runs_from_local_data(stock_model, workdir, capsys):
    """ChartQA from a mirror: the data check passes and lmms-eval scores it; a folder nobody named is not looked at."""
    drawn = [documents.draw("chart", documents.seed_of("train", index)) for index in range(3)]
    columns = {
        "image": [document.image for document in drawn],
        "question": [document.turns[0].question for document in drawn],
        "answer": [document.turns[0].answer for document in drawn],
        "type": ["human_test", "augmented_test", "augmented_test"],
    }
    text = Value("string")
    data = workdir / "lmms-lab-encoder" / "ChartQA" / "data"
    data.mkdir(parents=True)
    features = Features({"image": Image(), "question": text, "answer": text, "type": text})
    Dataset.from_dict(columns, features=features).to_parquet(data / "test-00000-of-00001.parquet")
    assert evaluate("--tasks", "chartqa", "-m", stock_model(), "-o", "run") == 2
    assert "--data-root" in capsys.readouterr().err
    assert evaluate("--tasks", "chartqa", "-m", stock_model(), "-o", "run", "--json", "--data-root", ".") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    (score,) = task["scores"].values()
    assert (task["task"], score["questions"], score["limited"]) == ("chartqa", 3, False)
    assert set(score["metrics"]["chartqa"]) == {
        f"relaxed_{part},none" for part in ("overall", "human_split", "augmented_split")
    }


def test_missing_model_missing_data_missing_extra(stock_model, workdir, capsys, monkeypatch):
    """Three different sentences, exit code 2, and nothing written."""
    assert evaluate("--tasks", "docvqa,chartqa") == 2
    model = capsys.readouterr().err
    assert "no model" in model
    assert "pmod convert" in model

    assert evaluate("--tasks", "docvqa,chartqa", "-m", stock_model()) == 2
    data = capsys.readouterr().err
    assert "the data of DocVQA, ChartQA is not on this machine" in data
    assert "lmms-lab-encoder/DocVQA DocVQA validation (2.3 GB), lmms-lab-encoder/ChartQA test (73 MB)" in data
    assert "pmod eval --fetch-data docvqa,chartqa --data-root DIR" in data

    find_spec = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "lmms_eval" else find_spec(name))
    assert evaluate("--tasks", "docvqa,chartqa", "-m", stock_model()) == 2
    extra = capsys.readouterr().err
    assert "pip install -e '.[eval]'" in extra
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tasks", "docvqq"], "near: docvqa"),
        (["--tasks", "tiny", "--limit", "2.5"], "fraction between 0 and 1"),
        (["--tasks", "tiny", "--limit", "0"], "fraction between 0 and 1"),
        (["--tasks", "tiny", "--dtype", "int8"], "is not a dtype"),
    ],
)
def test_bad_input(stock_model, workdir, capsys, arguments, sentence):
    assert evaluate(*arguments, "-m", stock_model()) == 2
    assert sentence in capsys.readouterr().err


def test_dry_run_writes_nothing(converted, capsys):
    before = sorted(converted.parent.rglob("*"))
    assert evaluate("--tasks", "tiny", "--dry-run") == 0
    assert "stock" in capsys.readouterr().err
    assert sorted(converted.parent.rglob("*")) == before


def test_list_needs_no_extra(capsys, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert evaluate("--list") == 0
    assert "ok_vqa_val2014" in capsys.readouterr().out
    for words in (("--json",), ("--format", "json")):
        assert evaluate("--list", *words) == 0
        assert len(json.loads(capsys.readouterr().out)["benchmarks"]) == 28
    assert evaluate("--list", "--format", "csv") == 0
    listed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(listed) == 28
    assert [row["data"] for row in listed if row["name"] == "docvqa"] == ["lmms-lab-encoder/DocVQA"]
    assert evaluate("--list", "--format", "markdown") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| name | lmms-eval task | data set and split | rows | metric | here |"
    assert len(lines) == 30


def test_dry_run_prints_a_plan(converted, capsys):
    words = ("--tasks", "tiny,pope", "--limit", 10, "--dry-run", "--data-root", ".")
    assert evaluate(*words) == 2  # its data is not there
    capsys.readouterr()
    assert evaluate("--tasks", "tiny", "--limit", 10, "--against", "stock,random", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["schema_version"], plan["dry_run"]) == (1, True)
    assert plan["folder"].startswith("runs/eval-tiny-pmod-")
    assert [model["label"] for model in plan["models"]] == ["tiny-pmod", "stock", "random"]
    assert [model["selection"] for model in plan["models"]] == ["router", "router", "random"]
    assert [task["questions"] for task in plan["tasks"]] == [10] * 7
    assert plan["questions"] == 7 * 10 * 3
    assert plan["settings"]["seed"] == 0
    assert evaluate("--tasks", "tiny", "--against", "none", "--dry-run") == 0
    assert "7,000 questions in all to 1 model" in capsys.readouterr().out
    assert evaluate("--tasks", "tiny_doc", "--limit", 0.25, "--against", "none", "--dry-run", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 250


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda"], "the device is cuda, and no CUDA GPU can be used"),
        (["--device", "cuda", "--num-processes", "4"], "the device is cuda, and no CUDA GPU can be used"),
        (["--attention", "foo"], "no attention kernel is called 'foo'"),
        (["--attention", "flash_attention_2"], "needs a CUDA GPU, and the device is cpu"),
    ],
)
def test_a_dry_run_refuses_what_the_start_refuses(converted, capsys, words, said):
    before = sorted(converted.parent.rglob("*"))
    for more in ([], ["--dry-run"]):
        assert evaluate("--tasks", "tiny_doc", "--limit", 1, "--against", "none", *words, *more) == 2
        assert said in capsys.readouterr().err
    assert sorted(converted.parent.rglob("*")) == before


def test_a_dry_run_refuses_a_folder_that_the_start_refuses(converted, capsys):
    here = converted.parent
    (here / "there").mkdir()
    (here / "there" / "thesis.txt").write_text("years")
    words = ("--tasks", "tiny_doc", "--limit", 1, "--against", "none", "-q")
    assert evaluate(*words, "-o", "run") == 0
    before = sorted(here.rglob("*"))
    for more, said in (
        (["-o", "there"], "there was not written by pmod eval"),
        (["-o", "there", "--overwrite"], "there was not written by pmod eval"),
        (["-o", "tiny-pmod", "--overwrite"], "this run reads"),
        (["-o", "there/thesis.txt/run"], "there/thesis.txt is a file"),
        (["-o", "run", "--seed", 1], "run holds another run, with other seed"),
    ):
        for dry in (["--dry-run"], []):
            capsys.readouterr()
            assert evaluate(*words, *more, *dry) == 2
            printed = capsys.readouterr()
            assert said in printed.err
            assert printed.out == ""
    assert {path for path in here.rglob("*") if not path.name.startswith(".")} == {
        path for path in before if not path.name.startswith(".")
    }
    assert evaluate(*words, "-o", "run", "--dry-run") == 0
    assert evaluate(*words, "-o", "run", "--seed", 1, "--overwrite", "--dry-run") == 0


def test_quiet_prints_the_folder_alone_and_json_wins(pmod, converted, capsys):
    words = ("--tasks", "tiny_doc", "--limit", 1, "--against", "none", "-q", "-o", "run")
    # A process and a cache of its own, so that libraries draw their bars if they are let.
    ran = pmod("eval", *words, cwd=converted.parent, env={"HF_HOME": str(converted.parent / "home")})
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "run\n", "")
    capsys.readouterr()
    for more in (["--dry-run"], []):
        assert evaluate(*words, *more) == 0
        assert capsys.readouterr().out == "run\n"
        assert evaluate(*words, *more, "--json") == 0
        assert json.loads(capsys.readouterr().out)["folder"] == "run"
    assert evaluate(*words, "--json", "--format", "csv") == 2
    assert "two formats: --json and --format csv" in capsys.readouterr().err
