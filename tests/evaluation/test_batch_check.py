"""The flip rate: nothing in float32, what really differs where a batch is made to matter, and its interval."""

import pytest
import torch
from lmms_eval.api.instance import Instance

from pmod_cli.checkpoints import load_model
from pmod_cli.evaluation.adapter import PmodModel
from pmod_cli.evaluation.asking import changed_answers
from pmod_cli.evaluation.intervals import rate_interval
from tests.evaluation.mirrors import break_pictures

DOCS = [{"question": f"{'what is the value of rye and ' * (place % 4)}what is bar {place}?"} for place in range(12)]


@pytest.fixture
def model(stock_model):
    loaded, processor = load_model(stock_model(), dtype="float32")
    adapted = PmodModel(str(stock_model()), 4, model=loaded, processor=processor)
    adapted.task_dict["t"] = {"test": DOCS}
    return adapted


def requests():
    settings = {"max_new_tokens": 6, "temperature": 0}
    return [
        Instance(
            "generate_until",
            (doc["question"], settings, lambda doc: [], place, "t", "test"),
            idx=0,
            metadata={"task": "t", "doc_id": place, "repeats": 1},
        )
        for place, doc in enumerate(DOCS)
    ]


def answers(model):
    return dict(pair for batch in model.answers(requests()) for pair in batch)


def test_none_in_float32(model):
    found = changed_answers(model, requests(), answers(model), seed=0, questions=8)
    assert found == {"questions": 8, "changed": 0, "batch_size": 4}
    assert model.batch_size == 4


def test_a_dependence_on_the_batch_is_found(model, monkeypatch):
    """Padding that is seen: rows that were padded in their batch answer otherwise alone."""
    generate = model.model.generate

    def unmasked(**inputs):
        return generate(**{**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})

    monkeypatch.setattr(model.model, "generate", unmasked)
    said = answers(model)
    monkeypatch.undo()
    alone = PmodModel(model.name, 1, model=model.model, processor=model.processor)
    alone.task_dict["t"] = {"test": DOCS}
    single = answers(alone)
    differing = sum(said[place].text != single[place].text for place in said)
    assert differing > 0
    assert changed_answers(model, requests(), said, seed=0)["changed"] == differing


def test_answers_that_were_alone_are_not_checked(model):
    model.batch_size = 1
    assert changed_answers(model, requests(), answers(model), seed=0) == {"questions": 0, "changed": 0, "batch_size": 1}


def test_a_question_that_cannot_be_asked_again_has_another_answer(model, monkeypatch):
    said = answers(model)
    break_pictures(monkeypatch, "rye")
    gone = sum("rye" in DOCS[place]["question"] for place in said)
    assert changed_answers(model, requests(), said, seed=0)["changed"] == gone > 0


def test_interval_of_a_rate():
    """Wilson's interval for 0 of 10 and 5 of 10, from its textbook formula."""
    assert rate_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert rate_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert rate_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
