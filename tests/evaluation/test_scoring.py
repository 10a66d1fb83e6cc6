"""Real lmms-eval over answers whose scores are worked out by hand: the tiny tasks, and the fourteen from mirrors."""

import pytest
from datasets import load_from_disk

from pmod_cli.core.errors import PmodError
from pmod_cli.data import documents
from pmod_cli.evaluation import intervals, questions, scoring, suite, tiny_data
from pmod_cli.evaluation.benchmarks import Benchmark, groups, sums_of
from pmod_cli.evaluation.journal import Answer
from pmod_cli.evaluation.outcome import Outcome
from tests.evaluation import mirrors

QUESTIONS = 12


def score(task: str, answer, tmp_path, limit=QUESTIONS, root=None) -> Outcome:
    """Score what `answer(right answer, row)` says to each question; the rows are the first ones of the task."""
    (benchmark,) = suite.resolve([task])
    opened = questions.load(benchmark, limit=limit, seed=0, data_root=root, log=tmp_path / "log")
    said = {}
    for place, request in enumerate(opened.requests):
        doc = opened.tasks[request.task_name].eval_docs_no_media[request.doc_id]
        text = answer(doc.get("answer"), opened.row_of(request), request.task_name)
        said[place] = Answer(text, "prompt", 10, 1)
    return scoring.score(benchmark, opened, said, seed=0, log=tmp_path / "log")


@pytest.fixture(autouse=True)
def first_rows(monkeypatch, request):
    """The expected scores below are of the first rows; which rows a limit draws is tested in test_questions."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr(
            questions, "drawn_rows", lambda task, docs, limit, seed: list(range(min(len(docs), limit or len(docs))))
        )


def in_turn(*answers):
    """Question i gets answer i modulo their number; a callable is applied to the right answer."""

    def answer(target, index, task):
        said = answers[index % len(answers)]
        return said(target) if callable(said) else said

    return answer


def test_anls(tmp_path):
    """Two digits: right 1, one digit wrong 1 - 1/2 (kept at the threshold), both wrong 0, a sentence 0."""
    wrong_end = lambda target: target[0] + "x"  # noqa: E731
    scored = score("tiny_doc", in_turn(lambda target: target, wrong_end, "xx", "it cannot be read"), tmp_path)
    assert [sample["item"] for sample in scored.samples[:4]] == [1.0, 0.5, 0.0, 0.0]
    assert scored.score == pytest.approx(100 * 1.5 / 4)


def test_relaxed_accuracy(tmp_path):
    """Numbers within 5 % count, words only exactly, a number in a sentence not."""
    questions = [documents.draw("chart", documents.seed_of("test", index)).turns[0] for index in range(40)]

    def answer(target, index, task):
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


def test_a_missing_answer_is_no_wrong_answer(tmp_path):
    (benchmark,) = suite.resolve(["tiny_doc"])
    opened = questions.load(benchmark, limit=3, seed=0, log=tmp_path / "log")
    with pytest.raises(PmodError, match="1 of 3 questions have no answer"):
        scoring.score(benchmark, opened, {0: Answer("a"), 2: Answer("b")}, seed=0, log=tmp_path / "log")


def test_a_metric_that_is_not_a_number_is_a_failure(tmp_path):
    (benchmark,) = suite.resolve(["tiny_doc"])
    opened = questions.load(benchmark, limit=1, seed=0, log=tmp_path / "log")
    unknown = Benchmark("x", "x", "tiny_doc", "no_such_metric", group="tiny")
    with pytest.raises(PmodError, match="no number for no_such_metric,none"):
        scoring.score(unknown, opened, {0: Answer("a")}, seed=0, log=tmp_path / "log")


def test_lmms_eval_says_nothing_on_stdout(tmp_path, capfd):
    score("tiny_doc", in_turn("10"), tmp_path)
    assert capfd.readouterr().out == ""
    assert "tiny_doc" in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mirrors.write(tmp_path_factory.mktemp("mirror"))


@pytest.mark.parametrize("benchmark", groups()["paper"], ids=lambda benchmark: benchmark.name)
def test_scores_of_the_paper_are_those_worked_out_by_hand(benchmark, root, tmp_path):
    """Right, wrong and unparseable answers to a mirror of each benchmark, through lmms-eval."""
    made = mirrors.mirrored(benchmark.name)
    splits = {task: split for task, split in zip(_tasks(benchmark), made.said, strict=True)}
    outcome = score(
        benchmark.name, lambda target, row, task: made.said[splits[task]][row], tmp_path, limit=None, root=root
    )
    assert outcome.score == pytest.approx(made.score, abs=1e-3)
    if made.items is not None:
        assert [float(record["item"]) for record in outcome.samples] == pytest.approx(made.items)
    asked = [said for split in made.said.values() for said in split]
    assert [record["answer"] for record in outcome.samples] == asked
    assert (len(outcome.samples), outcome.limited) == (len(asked), False)
    part = intervals.summands(outcome.samples, sums_of(benchmark, benchmark.metric))
    assert benchmark.scale * part.value() == pytest.approx(outcome.score, abs=1e-3), "so that there is an interval"
    assert outcome.guesses.drawn == (1 if benchmark.name == "mmmu" else 0)
    assert outcome.guesses.unread == {"mmb": 2, "rwqa": 1}.get(benchmark.name, 0)


def _tasks(benchmark: Benchmark) -> list[str]:
    """lmms-eval's tasks, in the order of the mirror's splits."""
    return {"pope_full": ["pope_adv", "pope_pop", "pope_random"]}.get(benchmark.task, [benchmark.task])
