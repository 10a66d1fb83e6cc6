"""Whole runs: the fourteen tasks without a network, what a damaged picture, a full disk and a second run do."""

import json

import pytest

from pmod_cli import cli
from pmod_cli.checkpoints import bundled_path
from pmod_cli.evaluation import runner, suite
from pmod_cli.evaluation.benchmarks import groups
from pmod_cli.evaluation.results.folder import ResultsFolder
from tests.evaluation import forks, mirrors


def evaluate(*arguments) -> int:
    return cli.main(["eval", *map(str, arguments)])


def results_of(run) -> dict:
    return json.loads((run / "results.json").read_text())


def test_the_fourteen_tasks_without_a_network(workdir):
    """Real lmms-eval, a real model, data from a mirror, in a namespace that has no network at all."""
    root = mirrors.write(workdir / "mirror")
    arguments = ["eval", "--data-root", str(root), "--offline", "-m", str(bundled_path()), "-o", "run", "-b", "4"]
    process = forks.start(arguments, workdir, without_network=True)
    process.join(400)
    without = process.exitcode != forks.NOT_PERMITTED
    if not without:
        process = forks.start(arguments, workdir)
        process.join(400)
    assert process.exitcode == 0, (workdir / "log").read_text()
    results = results_of(workdir / "run")
    asked = {task["name"]: next(iter(task["scores"].values()))["questions"] for task in results["tasks"]}
    expected = {
        benchmark.name: sum(len(rows) for rows in mirrors.mirrored(benchmark.name).rows.values())
        for benchmark in groups()["paper"]
    }
    assert asked == expected
    assert results["failed"] == []
    assert {average["group"] for average in results["averages"]} == {"general", "text-rich"}
    if not without:
        pytest.skip("all fourteen ran offline; a namespace without network is not permitted here")


def test_a_damaged_picture_fails_its_task_and_is_all_that_is_asked_again(workdir, capsys):
    root = mirrors.write(workdir / "mirror", ["docvqa", "chartqa"])
    (source,), made = suite.resolve(["docvqa"])[0].data, mirrors.docvqa()
    whole = made.rows["validation"][5]["image"]
    made.rows["validation"][5]["image"] = {"bytes": b"no picture", "path": None}
    mirrors.write_split(root, source, made.rows["validation"], made.features)
    command = ["-t", "docvqa,chartqa", "--data-root", root, "-m", bundled_path(), "-o", "run"]
    assert evaluate(*command) == 3
    said = capsys.readouterr().err
    assert "1 of 2 benchmark runs failed" in said
    assert "1 of 8 questions could not be asked; row 5 of docvqa_val: its image is damaged" in said
    docvqa, chartqa = (task["scores"]["tiny-llava-next"] for task in results_of(workdir / "run")["tasks"])
    assert docvqa["score"] is None
    assert chartqa["questions"] == 8

    made.rows["validation"][5]["image"] = whole
    mirrors.write_split(root, source, made.rows["validation"], made.features)
    assert evaluate(*command) == 0
    docvqa, chartqa = (task["scores"]["tiny-llava-next"] for task in results_of(workdir / "run")["tasks"])
    assert (docvqa["answers_found"], chartqa["answers_found"]) == (7, 8)
    assert evaluate(*command, "-b", 1) == 0, "the batch size does not make another run"


def test_what_the_tasks_of_lmms_eval_write_does_not_keep_a_run_from_being_replaced(workdir, stock_model, capsys):
    root = mirrors.write(workdir / "mirror", ["mmb", "textvqa"])
    command = ["-t", "mmb,textvqa", "--data-root", root, "-m", stock_model(), "-o", "run", "-q"]
    assert evaluate(*command) == 0
    names = [path.name for path in (workdir / "run").rglob("*.json")]
    assert "mmbench_en_dev_static_results.json" in names
    assert evaluate(*command, "--overwrite", "--seed", 1) == 0, capsys.readouterr().err
    assert results_of(workdir / "run")["settings"]["seed"] == 1
    assert [path.name for path in workdir.iterdir() if path.suffix] == [], "nothing beside the run"


def test_a_full_disk_is_a_sentence(workdir, stock_model):
    (workdir / "small").mkdir()
    words = "eval -t tiny_doc --limit 40 -b 2 --against none -o small/run -q"
    process = forks.start([*words.split(), "-m", str(stock_model())], workdir, small_disk=workdir / "small")
    process.join(120)
    if process.exitcode == forks.NOT_PERMITTED:
        pytest.skip("a small disk cannot be mounted here")
    said = (workdir / "log").read_text()
    assert process.exitcode == 1, said
    assert "no space left on the disk for" in said
    assert "Traceback" not in said


def test_two_runs_into_one_folder(workdir, stock_model, capsys):
    with ResultsFolder(workdir / "run") as held:
        held.prepare({}, [])
        assert evaluate("-t", "tiny_doc", "--limit", 2, "-m", stock_model(), "-o", "run") == 2
    assert "another run is writing run" in capsys.readouterr().err


def test_a_folder_with_another_run(workdir, stock_model, capsys):
    command = ["--limit", 2, "-m", stock_model(), "-o", "run", "-q"]
    assert evaluate("-t", "tiny_doc", *command) == 0
    for other, sentence in (
        (["-t", "tiny_doc", "--seed", 1], "with other seed"),
        (["-t", "tiny_doc", "-m", stock_model("llava")], "with other models"),
        (["-t", "tiny_chart"], "of tiny_doc too"),
    ):
        assert evaluate(*command, *other) == 2
        assert sentence in capsys.readouterr().err
    assert evaluate("-t", "tiny_doc,tiny_chart", *command) == 0
    assert [task["name"] for task in results_of(workdir / "run")["tasks"]] == ["tiny_doc", "tiny_chart"]
    assert evaluate("-t", "tiny_chart", "--overwrite", *command) == 0
    (task,) = results_of(workdir / "run")["tasks"]
    assert next(iter(task["scores"].values()))["answers_found"] == 0


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_that_is_not_of_an_evaluation(workdir, stock_model, capsys, overwrite):
    """Its own `answers`, `journal`, `changed` and `results.md` are somebody's."""
    names = (
        "answers/model/tiny_doc.jsonl",
        "journal/mine",
        "changed/mine",
        "results.md",
        "results.csv",
        "results.json",
    )
    for name in names:
        (workdir / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / "mine" / name).write_text("x")
    assert evaluate("-t", "tiny_doc", "--limit", 2, "-m", stock_model(), "-o", "mine", *overwrite) == 2
    assert "mine was not written by pmod eval" in capsys.readouterr().err
    assert all((workdir / "mine" / name).read_text() == "x" for name in names)
    assert [path.name for path in workdir.iterdir()] == ["mine"]


def test_a_foreign_file_among_our_results(workdir, stock_model, capsys):
    command = ["-t", "tiny_doc", "--limit", 2, "-m", stock_model(), "-o", "run", "-q"]
    assert evaluate(*command) == 0
    (workdir / "run" / "thesis.txt").write_text("x")
    assert evaluate(*command, "--overwrite") == 2
    assert "did not write: thesis.txt" in capsys.readouterr().err
    assert (workdir / "run" / "results.json").is_file()


def test_old_results_stay_until_the_new_ones_are_whole(workdir, stock_model, monkeypatch, capsys):
    """Interrupted or with a failed task, an overwriting run has changed nothing; repeated, it goes on."""
    command = ["-t", "tiny_doc,tiny_chart", "-m", stock_model(), "-o", "run", "-q", "--limit"]
    assert evaluate(*command, 2) == 0
    before = (workdir / "run" / "results.json").read_bytes()
    score = runner.score

    def stopped(benchmark, *others, **options):
        if benchmark.name == "tiny_chart":
            raise KeyboardInterrupt
        return score(benchmark, *others, **options)

    def failing(benchmark, *others, **options):
        if benchmark.name == "tiny_chart":
            raise ValueError("no score")
        return score(benchmark, *others, **options)

    for broken, code in ((stopped, 130), (failing, 3)):
        monkeypatch.setattr(runner, "score", broken)
        assert evaluate(*command, 3, "--overwrite") == code
        assert (workdir / "run" / "results.json").read_bytes() == before
    assert "run was not replaced" in capsys.readouterr().err
    monkeypatch.setattr(runner, "score", score)
    assert evaluate(*command, 3, "--overwrite") == 0
    assert [path.name for path in workdir.iterdir()] == ["run"]
    for task in results_of(workdir / "run")["tasks"]:
        (entry,) = task["scores"].values()
        assert entry["questions"] == entry["answers_found"] == 3


def test_the_same_command_goes_on_in_the_same_folder(workdir, stock_model, capsys):
    command = ["-t", "tiny_doc", "--limit", 2, "-m", stock_model(), "-q"]
    folders = []
    for more in ([], ["-b", 1], ["--seed", 5], ["-t", "tiny_doc,tiny_chart"]):
        assert evaluate(*command, *more) == 0
        folders.append(capsys.readouterr().out.strip())
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_a_run_that_asks_nothing_keeps_what_was_measured(workdir, stock_model):
    """Or leaves it empty, where the run that asked was stopped before it wrote its results."""
    results = workdir / "run" / "results.json"

    def measured():
        assert evaluate("-t", "tiny_doc", "--limit", 2, "-m", stock_model(), "-o", "run", "-q") == 0
        (entry,) = results_of(workdir / "run")["tasks"][0]["scores"].values()
        return entry["answers_found"], entry["seconds"], entry["peak_memory_mib"]

    found, *first = measured()
    assert (found, measured(), measured()) == (0, (2, *first), (2, *first))
    results.unlink()
    assert measured() == (2, None, None)
