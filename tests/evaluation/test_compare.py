"""Finished runs side by side, from their files: common questions, unequal settings, and folders that hold no run."""

import json

import pytest

from pmod_cli.core import folders
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import suite
from pmod_cli.evaluation.results.comparison import compare
from pmod_cli.evaluation.results.folder import ResultsFolder
from pmod_cli.evaluation.results.markdown import warnings
from pmod_cli.evaluation.results.report import Report
from pmod_cli.evaluation.results.stored import SCHEMA_VERSION
from tests.evaluation import reports


def write_run(folder, items, *, model=reports.PMOD, score=None, questions=None, settings=None, packages=None):
    """A run of DocVQA as the runner leaves it: question n has the answer `a<item>`."""
    (benchmark,) = suite.resolve(["docvqa"])
    rows = [
        {**record, "doc_id": place, "question": f"q{place}?"}
        for place, record in zip(
            questions or range(len(items)), reports.records([f"a{item}" for item in items], items), strict=True
        )
    ]
    report = Report([benchmark], seed=0)
    report.add_model("m", model)
    score = 100 * sum(items) / len(items) if score is None else score
    report.add(benchmark, "m", reports.entry(score, len(items), 9, prompt="USER"), rows)
    return write(folder, report, {"docvqa": rows}, settings, packages)


def write(folder, report, rows, settings=None, packages=None):
    """The answers of model `m` by benchmark, and the report, as the runner leaves them."""
    answers = folder / "answers" / "m"
    answers.mkdir(parents=True)
    for name, records in rows.items():
        (answers / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    header = {
        "schema_version": SCHEMA_VERSION,
        "settings": {"seed": 0, "limit": None, "batch_size": 8, **(settings or {})},
        "software": {"packages": {"torch": "2.13.0", "lmms_eval": "0.7.3", **(packages or {})}},
    }
    (folder / "results.json").write_text(json.dumps(header | report.results()))
    return folder


def test_the_same_questions(tmp_path):
    first = write_run(tmp_path / "a", [1.0, 1.0, 1.0, 0.0])
    second = write_run(tmp_path / "b", [1.0, 0.0, 0.0, 0.0], model=reports.STOCK)
    results = compare([first, second / "results.json"])
    assert list(results["models"]) == ["a", "b"]
    assert results["runs"] == {"a": str(first), "b": str(second)}
    assert results["unequal"] == []
    (task,) = results["tasks"]
    assert task["scores"]["b"]["score"] == 25.0
    found = task["differences"]["b"]
    assert (found["difference"], found["questions"], found["changed_answers"]) == (50.0, 4, 2)
    assert found["low"] == 0.0
    assert found["high"] == 100.0


def test_other_questions_are_named_and_left_out(tmp_path):
    """Common are 2 and 3: the first scores 1 and 0 there, the second 0 and 0, so the difference is 50 points."""
    first = write_run(tmp_path / "a", [1.0, 1.0, 1.0, 0.0])
    second = write_run(tmp_path / "b", [0.0, 0.0, 1.0, 1.0], questions=range(2, 6))
    results = compare([first, second])
    assert results["tasks"][0]["scores"]["b"]["score"] == 50.0
    found = results["tasks"][0]["differences"]["b"]
    assert (found["difference"], found["questions"], found["changed_answers"]) == (50.0, 2, 1)
    assert results["unequal"] == [
        "DocVQA: a answered 4 questions, b 4; the difference is over the 2 in common",
    ]


def test_means_by_kind_are_those_of_the_runs(tmp_path):
    """MME's points are divided by 20 in a comparison too, and what is known of a benchmark is said there."""
    runs = []
    for name, mme in (("a", 1500.0), ("b", 1400.0)):
        report = Report(suite.resolve(["mme", "gqa", "pope"]), seed=0)
        report.add_model("m", reports.PMOD)
        rows = {}
        for benchmark, score in zip(report.benchmarks, (mme, 60.0, 80.0), strict=True):
            rows[benchmark.name] = reports.records(["a"], [None])
            report.add(benchmark, "m", reports.entry(score, 1), rows[benchmark.name])
        runs.append(write(tmp_path / name, report, rows))
    alone = json.loads((runs[0] / "results.json").read_text())
    beside = compare(runs)
    means = {kind["title"]: kind["scores"]["m"]["score"] for kind in alone["kinds"]}
    assert means == {"general": 67.5, "hallucination": 80.0, "mean of tasks": pytest.approx(215 / 3)}
    assert {kind["title"]: kind["scores"]["a"]["score"] for kind in beside["kinds"]} == means
    assert beside["kinds"][0]["scores"]["b"]["score"] == 65.0
    assert warnings(beside) == warnings(alone)
    assert any("MME: the data has 1 questions, the benchmark 2,374" in line for line in warnings(beside))


def test_no_question_in_common(tmp_path):
    first = write_run(tmp_path / "a", [1.0, 1.0])
    second = write_run(tmp_path / "b", [1.0, 1.0], questions=range(5, 7))
    found = compare([first, second])["tasks"][0]["differences"]["b"]
    assert (found["difference"], found["low"], found["questions"]) == (None, None, 0)


def test_unequal_settings_are_named(tmp_path):
    first = write_run(tmp_path / "a", [1.0, 0.0, 1.0, 0.0])
    model = {**reports.PMOD, "dtype": "float32"}
    second = write_run(
        tmp_path / "b", [1.0, 0.0, 1.0, 0.0], model=model, settings={"batch_size": 1}, packages={"torch": "2.14.0"}
    )
    assert compare([first, second])["unequal"] == [
        "dtype: bfloat16 (a); float32 (b)",
        "batch_size: 8 (a); 1 (b)",
        "torch: 2.13.0 (a); 2.14.0 (b)",
    ]


def test_equal_values_are_named_once_and_other_prompts_counted(tmp_path):
    runs = [write_run(tmp_path / name, [1.0, 0.0, 1.0, 0.0]) for name in "ab"]
    runs.append(write_run(tmp_path / "c", [1.0, 0.0, 1.0, 0.0], settings={"batch_size": 1}))
    path = runs[2] / "answers" / "m" / "docvqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"prompt": "Human: q"}) + "\n" for row in rows[:3]) + json.dumps(rows[3]))
    assert compare(runs)["unequal"] == [
        "batch_size: 8 (a, b); 1 (c)",
        "DocVQA: 3 of 4 prompts differ between a and c",
    ]


def test_runs_of_one_name(tmp_path):
    first = write_run(tmp_path / "x" / "run", [1.0, 0.0, 1.0, 0.0])
    second = write_run(tmp_path / "y" / "run", [1.0, 0.0, 1.0, 1.0])
    assert list(compare([first, second])["models"]) == ["run", "run (2)"]


def test_what_cannot_be_compared(tmp_path):
    run = write_run(tmp_path / "a", [1.0, 0.0, 1.0, 0.0])
    with pytest.raises(PmodError, match="one model alone"):
        compare([run])
    with pytest.raises(PmodError, match="no finished run"):
        compare([run, tmp_path / "gone"])
    other = write_run(tmp_path / "b", [1.0, 0.0, 1.0, 0.0])
    (other / "answers" / "m" / "docvqa.jsonl").unlink()
    with pytest.raises(PmodError, match=r"docvqa\.jsonl cannot be read"):
        compare([run, other])
    old = write_run(tmp_path / "c", [1.0, 0.0, 1.0, 0.0])
    (old / "results.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(PmodError, match="schema version 1, expected 2"):
        compare([run, old])
    (old / "results.json").write_text("{")
    with pytest.raises(PmodError, match="is not JSON"):
        compare([run, old])


def test_answers_with_the_other_line_separators_are_read_back(tmp_path):
    """As `runner` writes them, characters outside ASCII as they are."""
    runs = [write_run(tmp_path / name, [1.0, 0.0, 1.0, 0.0]) for name in "ab"]
    path = runs[1] / "answers" / "m" / "docvqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    rows[0]["answer"] = "one\u2028two\u2029three\x85four"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert compare(runs)["tasks"][0]["differences"]["b"]["changed_answers"] == 1


def damage(value, keys, change):
    """A copy of a JSON value in which `change` was made to the object that `keys` lead to."""
    value = json.loads(json.dumps(value))
    target = value
    for key in keys:
        target = target[key]
    change(target)
    return value


@pytest.mark.parametrize(
    ("keys", "change", "said"),
    [
        ([], lambda it: it.pop("models"), "the key 'models' is missing"),
        ([], lambda it: it.update(models=[]), "models: expected an object, found []"),
        ([], lambda it: it.update(tasks={}), "tasks: expected a list, found {}"),
        ([], lambda it: it.pop("settings"), "the key 'settings' is missing"),
        (["software"], lambda it: it.pop("packages"), "software: the key 'packages' is missing"),
        (["tasks", 0], lambda it: it.pop("title"), "tasks[0]: the key 'title' is missing"),
        (["tasks", 0], lambda it: it.update(name="../../x"), "tasks[0].name: expected a file name"),
        (["tasks", 0], lambda it: it.update(scale="1"), "tasks[0].scale: expected a number"),
        (["tasks", 0, "scores", "m"], lambda it: it.pop("questions"), "scores.m: the key 'questions' is missing"),
        (["tasks", 0, "scores", "m"], lambda it: it.update(score="high"), "scores.m.score: expected a number"),
        (["tasks", 0, "scores", "m"], lambda it: it.update(score=None), "scores.m: the key 'error' is missing"),
        (["tasks", 0, "scores", "m"], lambda it: it.update(limited=3), "scores.m.limited: expected true or false"),
        (["tasks", 0, "scores", "m"], lambda it: it.update(seconds=[]), "scores.m.seconds: expected a number"),
        (["tasks", 0, "scores", "m"], lambda it: it.update(questions=3), "holds 4 answers, and results.json names 3"),
        (["models"], lambda it: it.update({"../m": it.pop("m")}), "models: expected file names as keys"),
        (["models", "m"], lambda it: it.update(mean_retention="x"), "models.m.mean_retention: expected a number"),
    ],
)
def test_a_key_that_is_missing_or_holds_something_else_is_named(tmp_path, keys, change, said):
    runs = [write_run(tmp_path / name, [1.0, 0.0, 1.0, 0.0]) for name in "ab"]
    path = runs[1] / "results.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()), keys, change)))
    with pytest.raises(PmodError) as caught:
        compare(runs)
    assert said in caught.value.what
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda it: it.pop("answer"), "answer 0: the key 'answer' is missing"),
        (lambda it: it.update(answer=["x"]), "answer 0.answer: expected text"),
        (lambda it: it.update(doc_id=[]), "answer 0.doc_id: expected a count or text"),
        (lambda it: it.update(item=10**40), "answer 0.item: expected a value without numbers beyond 1e15"),
    ],
)
def test_a_record_that_holds_something_else_is_named(tmp_path, change, said):
    runs = [write_run(tmp_path / name, [1.0, 0.0, 1.0, 0.0]) for name in "ab"]
    path = runs[1] / "answers" / "m" / "docvqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    change(rows[0])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PmodError, match=r"docvqa\.jsonl cannot be read") as caught:
        compare(runs)
    assert said in caught.value.what


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 2, "tasks": [{}]}'])
def test_a_folder_with_damaged_results_is_not_taken_over(tmp_path, text):
    (benchmark,) = suite.resolve(["docvqa"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(text)
    folders.mark(tmp_path / "run", "evaluation", ["results.json"])
    with ResultsFolder(tmp_path / "run") as folder, pytest.raises(PmodError, match="whose results cannot be read"):
        folder.prepare({}, [benchmark])


def test_items_that_are_no_numbers_leave_the_scores(tmp_path):
    runs = [write_run(tmp_path / name, [1.0, 0.0, 1.0, 0.0]) for name in "ab"]
    path = runs[1] / "answers" / "m" / "docvqa.jsonl"
    path.write_text(path.read_text().replace('"item": 1.0', '"item": "nan"'))
    (task,) = compare(runs)["tasks"]
    assert (task["scores"]["b"]["score"], task["scores"]["b"]["low"]) == (50.0, None)
    assert task["differences"]["b"]["low"] is None
