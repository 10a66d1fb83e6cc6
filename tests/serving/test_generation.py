"""Rows that join and leave a batch are answered as alone: beside `generate` of transformers, one row at a time."""

import pytest
import torch

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.prompts import OF_TEXT, Prompt
from pmod_cli.serving.generation import Answerer, Batch, BatchRow, Sampling
from tests import factories
from tests.model import visual
from tests.model.models import ROUTED_FROM_START, pmod_model

BEFORE = {"schedule": "list", "values": [1.0, 0.6, 0.6, 0.3], "before": "divprune:0.5"}
SETTINGS = {
    "routed from layer 0": ROUTED_FROM_START,
    "held": {"schedule": "list", "values": [1.0, 0.6, 0.35, 0.15], "select_at": [1]},
    "dropped before the decoder": BEFORE,
    "keys kept": {"method": "shortv", "mean": 0.5},
    "attention": {"method": "fastv", "mean": 0.5},
    "none left": {"method": "vtw", "mean": 0.5},
    "renumbered": {"method": "fastv", "mean": 0.5, "positions": "renumbered"},
    "each image": {**ROUTED_FROM_START, "quota": "per_image"},
}


class Tokens:
    """What `Answerer` reads of a processor where prompts are ids."""

    tokenizer = type("Tokenizer", (), {"eos_token_id": 2, "pad_token_id": 0})()


def prompts(kind: str, config, rows: list[visual.Row]) -> list[Prompt]:
    inputs = visual.prompt(kind, config, rows, dtype=torch.float64)
    singles = [visual.alone(kind, config, rows, place, inputs) for place in range(len(rows))]
    for single in singles:
        single.pop("attention_mask")
        single |= {name: single[name][0] for name in OF_TEXT if name in single}
    return [Prompt(place, "", single) for place, single in enumerate(singles)]


def alone(model, prompt: Prompt, count: int) -> list[int]:
    """The ids that transformers' own `generate` gives for one prompt."""
    inputs = {name: value[None] if name in OF_TEXT else value for name, value in prompt.inputs.items()}
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    written = model.generate(attention_mask=mask, **inputs, max_new_tokens=count, do_sample=False)
    return written[0, ids.shape[1] :].tolist()


def run(batch: Batch, steps: int = 10**6) -> None:
    while batch.rows and steps:
        batch.drop_finished()
        if batch.rows:
            batch.step()
        steps -= 1


@pytest.mark.parametrize("kind", visual.KINDS)
def test_rows_that_come_and_go_are_answered_as_alone(kind):
    model = visual.routed(visual.stock(kind).double())
    check(model, prompts(kind, model.config, visual.rows_of(kind)))


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_stock_model_is_batched_too(kind):
    model = visual.stock(kind).double()
    check(model, prompts(kind, model.config, visual.rows_of(kind)))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_kind_of_cache_layer(name):
    kind = "llava_next"
    model = visual.routed(visual.stock(kind).double(), SETTINGS[name])
    rows = [visual.Row([(8, 16), (8, 8)], words=9), visual.Row([(8, 8)]), visual.Row(words=7)]
    check(model, prompts(kind, model.config, rows))


def check(model, asked: list[Prompt]) -> None:
    """Some begin together, others join one by one, and the lengths of the answers differ."""
    answerer = Answerer(model, Tokens())
    asked = [*asked, asked[0]]
    lengths = [2 + 3 * (place % 3) for place in range(len(asked))]
    expected = [alone(model, prompt, count) for prompt, count in zip(asked, lengths, strict=True)]
    rows = [BatchRow(prompt, Sampling(count)) for prompt, count in zip(asked, lengths, strict=True)]
    batch = answerer.prefill(rows[:2])
    run(batch, 2)
    for row in rows[2:]:
        batch.join(answerer.prefill([row]))
        run(batch, 1)
        for layer, cached in enumerate(batch.cache.layers):  # no slot is held for a row that has left
            assert cached.keys.shape[-2] == max(each.slots_now(layer) for each in batch.rows)
    run(batch)
    assert [row.ids for row in rows] == expected
    assert {row.finished for row in rows} <= {"stop", "length"}


def test_a_row_may_be_stopped_from_outside():
    model = pmod_model("llava").double()
    asked = prompts("llava", visual.stock_config("llava"), [visual.Row(words=7), visual.Row(words=5)])
    answerer = Answerer(model, Tokens())
    rows = [BatchRow(prompt, Sampling(8)) for prompt in asked]
    batch = answerer.prefill(rows)
    rows[0].finished = "dropped"
    assert batch.drop_finished() == [rows[0]]
    run(batch)
    assert rows[1].ids == alone(model, asked[1], 8)


def test_equal_seeds_draw_equal_tokens_in_any_company():
    model = pmod_model("llava").double()
    asked = prompts("llava", visual.stock_config("llava"), [visual.Row(words=7), visual.Row(words=5)])
    answerer, drawn = Answerer(model, Tokens()), Sampling(6, temperature=1.5, top_p=0.95, seed=7)
    rows = [BatchRow(asked[0], drawn), BatchRow(asked[1], Sampling(6)), BatchRow(asked[0], drawn)]
    run(answerer.prefill(rows))
    single = BatchRow(asked[0], drawn)
    run(answerer.prefill([single]))
    assert rows[0].ids == rows[2].ids == single.ids
    others = [BatchRow(asked[0], Sampling(6, temperature=1.5, seed=seed)) for seed in range(8)]
    run(answerer.prefill(others))
    assert len({tuple(row.ids) for row in others}) > 1


def test_a_repetition_penalty_of_the_checkpoint_counts():
    model = visual.routed(visual.stock("llava").double())
    model.generation_config.repetition_penalty = 1.8
    check(model, prompts("llava", model.config, visual.rows_of("llava")))


def test_a_sliding_window_is_refused_in_batches():
    model = factories.model("llava", "mistral", sliding_window=4).double()
    answerer = Answerer(model, Tokens())
    rows = [BatchRow(prompt, Sampling(4)) for prompt in prompts("llava", model.config, [visual.Row(words=7)] * 2)]
    first, second = (answerer.prefill([row]) for row in rows)
    with pytest.raises(PmodError, match="cannot be answered in batches"):
        first.join(second)
