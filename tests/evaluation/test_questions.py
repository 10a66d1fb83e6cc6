"""Which questions a limited run asks, and what an answer is known by."""

import pytest
from datasets import Dataset

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation import questions, suite
from tests.evaluation import mirrors


def opened(name: str, tmp_path, **options):
    return questions.load(suite.resolve([name])[0], log=tmp_path / "log", **options)


def test_a_limit_draws_by_the_seed(tmp_path):
    drawn = opened("tiny_doc", tmp_path, limit=20)
    (rows,) = drawn.rows.values()
    assert rows == sorted(set(rows))
    assert len(rows) == len(drawn.requests) == 20
    assert rows != list(range(20))
    assert opened("tiny_doc", tmp_path, limit=20).rows == drawn.rows
    assert opened("tiny_doc", tmp_path, limit=20, seed=1).rows != drawn.rows
    assert len(opened("tiny_doc", tmp_path, limit=0.0123).requests) == 13
    assert len(questions.drawn_rows("chartqa", range(2500), 0.07, 0)) == 175, "no rounding error adds one"
    assert drawn.available == {"tiny_doc": 1000}
    task = drawn.tasks["tiny_doc"]
    whole = opened("tiny_doc", tmp_path)
    for request in drawn.requests:
        row = drawn.row_of(request)
        assert task.eval_docs[request.doc_id]["question_id"] == row
        assert request.args[0] == whole.requests[row].args[0]


def test_pictures_of_mme_are_drawn_with_both_questions():
    docs = Dataset.from_dict(
        {"category": ["a"] * 12 + ["b"] * 8, "question_id": [f"{place // 2}" for place in range(20)]}
    )
    for wanted in (1, 2, 7, 20, 100):
        rows = questions.drawn_rows("mme", docs, wanted, seed=3)
        assert {row ^ 1 for row in rows} == set(rows)
        assert min(wanted, 20) <= len(rows) <= wanted + 1


def test_a_key_is_of_the_question_and_of_who_answers(tmp_path):
    root = mirrors.write(tmp_path / "mirror", ["docvqa", "pope"])
    whole = opened("docvqa", tmp_path, data_root=root)
    keys = whole.keys("me")
    assert len(set(keys)) == len(keys) == 8
    assert not set(keys) & set(whole.keys("you"))
    part = opened("docvqa", tmp_path, data_root=root, limit=3)
    assert [keys[row] for row in part.rows["docvqa_val"]] == part.keys("me")
    pope = opened("pope", tmp_path, data_root=root)
    assert len(set(pope.keys("me"))) == 24, "the splits of POPE ask the same words about other pictures"

    made = mirrors.docvqa()
    made.rows["validation"][2]["question"] = "what else?"
    mirrors.write_split(root, suite.resolve(["docvqa"])[0].data[0], made.rows["validation"], made.features)
    changed = opened("docvqa", tmp_path, data_root=root).keys("me")
    assert [place for place in range(8) if changed[place] != keys[place]] == [2]


def test_only_what_can_be_asked(tmp_path, monkeypatch):
    whole = opened("tiny_doc", tmp_path, limit=1)
    (task,) = whole.tasks.values()
    for change, sentence in ((("request_type", "loglikelihood"), "by loglikelihood"), (("repeats", 4), "4 times")):
        with monkeypatch.context() as patch:
            patch.setattr(task.instances[0], *change)
            with pytest.raises(PmodError, match=sentence):
                questions._add(whole, "tiny_doc", task)


@pytest.mark.parametrize("name", ["chartqa", "gqa"])
def test_other_pictures_are_another_question(tmp_path, name):
    """Same texts, other pictures: no answer may be taken over. Of GQA the pictures lie in files of their own."""
    for place in ("a", "b", "c"):
        mirrors.write(tmp_path / place, [name])
    made, benchmark = mirrors.mirrored(name), suite.resolve([name])[0]
    source = benchmark.data[-1]
    rows = [dict(row) for row in (made.rows[source.split] if name == "chartqa" else made.pictures)]
    for row in rows:
        row["image"] = mirrors.picture(77)
    features = made.features if name == "chartqa" else {"id": mirrors.TEXT, "image": mirrors.PICTURE}
    mirrors.write_split(tmp_path / "b", source, rows, features)
    first, other, same = (opened(name, tmp_path, data_root=tmp_path / place).digests for place in ("a", "b", "c"))
    assert first == same
    assert not set(first) & set(other)
