"""Finished runs side by side, from their files: common questions, unequal settings, and folders that hold no run."""

import json

import pytest

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import suite
from pmod_cli.evaluation.compare import compare
from pmod_cli.evaluation.report import SCHEMA_VERSION, Report
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
    answers = folder / "answers" / "m" / "docvqa.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
