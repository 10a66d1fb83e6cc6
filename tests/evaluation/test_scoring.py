"""Real lmms-eval over the tiny tasks, with answers whose scores are worked out by hand; and what a failure leaves."""

import pytest
from datasets import load_from_disk
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from pmod_cli.data import documents
from pmod_cli.evaluation import scoring, suite, tables, tiny_data
from pmod_cli.evaluation.adapter import Tally
from pmod_cli.evaluation.report import Report

QUESTIONS = 12


class Answers(lmms):
    """Says what it is told to: `answer(target)` is called with the right answer and the number of the question."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests):
        said = []
        for request in requests:
            _, _, _, doc_id, task, split = request.args
            target = self.task_dict[task][split][doc_id]["answer"]
            said.append(GenerationResult(self.answer(target, doc_id), TokenCounts(output_tokens=1)))
        return said

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood
    device = "cpu"

    def take_tally(self):
        return Tally()


def score(task: str, answer, tmp_path, limit=QUESTIONS) -> scoring.Scored:
    (benchmark,) = suite.resolve([task])
    return scoring.score(Answers(answer), benchmark, limit=limit, seed=0, log=tmp_path / "log")


def in_turn(*answers):
    """Question i gets answer i modulo their number; a callable is applied to the right answer."""

    def answer(target, index):
        said = answers[index % len(answers)]
        return said(target) if callable(said) else said

    return answer


def test_anls(tmp_path):
    """Two digits: right 1, one digit wrong 1 - 1/2 (kept at the threshold), both wrong 0, a sentence 0."""
    wrong_end = lambda target: target[0] + "x"  # noqa: E731
    scored = score("tiny_doc", in_turn(lambda target: target, wrong_end, "xx", "it cannot be read"), tmp_path)
    assert scored.error is None
    assert [sample["item"] for sample in scored.samples[:4]] == [1.0, 0.5, 0.0, 0.0]
    assert scored.score == pytest.approx(100 * 1.5 / 4)


def test_relaxed_accuracy(tmp_path):
    """Numbers within 5 % count, words only exactly, a number in a sentence not."""
    questions = [documents.draw("chart", documents.seed_of("test", index)).turns[0] for index in range(40)]

    def answer(target, index):
        if not target.isdigit():
            return target.upper() if index % 2 else target + "s"
        return (f"{float(target) * 1.049:.4f}", f"{float(target) * 1.06:.4f}", f"about {target}")[index % 3]

    expected = [
        float(index % 2 if not turn.answer.isdigit() else index % 3 == 0) for index, turn in enumerate(questions)
    ]
    scored = score("tiny_chart", answer, tmp_path, limit=40)
    assert {0.0, 1.0} == set(expected)
    assert [sample["item"] for sample in scored.samples] == expected
    assert scored.score == pytest.approx(100 * sum(expected) / 40)


def test_exact_match(tmp_path):
    """Case and punctuation do not matter, other words do."""
    answers = (lambda target: f"{target.upper()}.", lambda target: f"a {target}", "", lambda target: target)
    scored = score("tiny_attribute", in_turn(*answers), tmp_path)
    assert [sample["item"] for sample in scored.samples[:4]] == [1.0, 0.0, 0.0, 1.0]
    assert scored.score == pytest.approx(50.0)


def test_f1(tmp_path):
    """Always yes: precision is the share of yes, recall 1."""
    truths = [documents.draw("presence", documents.seed_of("test", index)).turns[0].answer for index in range(40)]
    share = truths.count("yes") / 40
    scored = score("tiny_presence", in_turn("Yes"), tmp_path, limit=40)
    assert scored.score == pytest.approx(100 * 2 * share / (share + 1))
    assert scored.metrics["tiny_presence"]["pope_accuracy,none"] == pytest.approx(share)
    assert score("tiny_presence", in_turn("I see a circle"), tmp_path).score == 0.0


def test_questions_are_the_drawn_ones():
    rows = load_from_disk(tiny_data.folder("doc"))["test"]
    assert len(rows) == tiny_data.QUESTIONS
    document = documents.draw("doc", documents.seed_of("test", 7))
    assert rows[7]["image"].tobytes() == document.image.tobytes()
    assert (rows[7]["question"], rows[7]["answers"]) == (document.turns[0].question, [document.turns[0].answer])


def test_a_limited_run_says_so(tmp_path):
    scored = score("tiny_doc", in_turn("10"), tmp_path, limit=3)
    assert (len(scored.samples), scored.available, scored.limited) == (3, tiny_data.QUESTIONS, True)
    assert not score("tiny_doc", in_turn("10"), tmp_path, limit=None).limited


def test_a_failure_is_an_outcome(tmp_path, capfd):
    def answer(target, index):
        raise ValueError("the image is truncated\nand so on")

    scored = score("tiny_doc", answer, tmp_path)
    assert (scored.score, scored.error) == (None, "ValueError: the image is truncated")
    assert "Traceback" in (tmp_path / "log").read_text()
    assert capfd.readouterr().out == ""

    (benchmark,) = suite.resolve(["tiny_doc"])
    report = Report([benchmark], seed=0)
    report.add_model("m", {"routers": "trained"})
    report.add(benchmark, "m", scored.entry(), scored.samples)
    assert report.results()["failed"] == ["m: tiny doc: ValueError: the image is truncated"]
    assert "failed" in [*tables.score_table(report.results()).columns[2].cells]


def test_a_metric_that_is_not_a_number_is_a_failure(tmp_path):
    benchmark = suite.Benchmark("x", "x", "tiny_doc", "no_such_metric", group="tiny")
    results = {
        "samples": {"tiny_doc": [{"doc_id": 0}]},
        "n-samples": {"tiny_doc": {"original": 1, "effective": 1}},
        "results": {"tiny_doc": {"anls,none": 1.0}},
    }
    with pytest.raises(scoring.PmodError, match="no number for no_such_metric,none"):
        scoring._read(benchmark, results)
    results["n-samples"]["tiny_doc"]["effective"] = 2
    with pytest.raises(scoring.PmodError, match="1 of 2 questions"):
        scoring._read(benchmark, results)
