"""Pre-training of the tiny Qwen3-VL: its parts are the stock model's, and an interrupted run ends like a whole one."""

import pytest
import torch
import yaml
from transformers import Qwen3VLForConditionalGeneration

from pmod_cli.data.collator import Collator
from pmod_cli.data.documents import TASKS
from pmod_cli.data.rows import row
from tests.beds.interrupted import ends_as_a_whole_run
from tests.beds.tiny_llava_next.grounding import LOSSES, Grounding
from tests.beds.tiny_qwen3_vl import pretrain as module
from tests.beds.tiny_qwen3_vl.batches import TinyBatches, document_of, with_looks
from tests.beds.tiny_qwen3_vl.pretrain import RECIPE, compute_losses, decoded
from tests.beds.tiny_qwen3_vl.processor import build_processor
from tests.beds.tiny_qwen3_vl.start import build_model

KINDS = {
    "stills": [document_of(task, "train", 3, (96, 64)) for task in TASKS],
    "pairs": [document_of("which", "train", index) for index in range(2)],
    "films": [document_of("moving", "train", index) for index in range(4)],  # of four and of six frames
}


@pytest.fixture(scope="module")
def recipe():
    """The real one with two layers and two rows a group, and few steps."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["decoder"]["num_hidden_layers"] = 2
    recipe |= {"turns": 2, "log_every": 1, "save_every": 2}
    grounding = {"shown": 0, "up": [[0, 1]], "first": [[0, 0]], "last": [[1, 1]], "probed": 1}
    for stage in recipe["stages"]:
        stage |= {"steps": 3, "warmup": 1}
        for group in stage["groups"]:
            group["rows"] = 2
        if "takes" in stage.get("grounding", {}):
            stage["grounding"] |= {"takes": [[1, 0]], "sought": 1}
        if "grounding" in stage:
            stage["grounding"] |= grounding
    return recipe


@pytest.fixture(scope="module")
def processor(recipe):
    return build_processor(recipe["image"])


@pytest.fixture
def model(recipe, processor):
    torch.manual_seed(0)
    return build_model(recipe, processor).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_fast_batches_equal_the_collator(recipe, processor, kind):
    documents = KINDS[kind]
    fast = TinyBatches(processor, recipe)(documents)
    slow = Collator(processor)([row(document, document.turns[: recipe["turns"]]) for document in documents])
    assert torch.equal(fast.labels, slow["labels"])
    for name in fast.inputs.keys() - {"position_ids"}:
        assert torch.allclose(fast.inputs[name], slow[name], atol=1e-6), name
    assert slow.keys() == fast.inputs.keys() - {"position_ids"} | {"labels", "attention_mask", "mm_token_type_ids"}
    assert torch.equal(fast.patches >= 0, slow["mm_token_type_ids"] > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_hidden_states_are_the_stock_models(recipe, processor, model, kind):
    batch = TinyBatches(processor, recipe)(KINDS[kind])
    given = {name: value for name, value in batch.inputs.items() if name != "position_ids"}
    there = batch.inputs["input_ids"] != processor.tokenizer.pad_token_id
    kinds = (batch.patches >= 0).long() * (2 if kind == "films" else 1)
    grids = {name: given[name] for name in given if name.endswith("grid_thw")}
    positions, _ = model.model.get_rope_index(given["input_ids"], kinds, **grids, attention_mask=there)
    assert torch.equal(positions[:, there], batch.inputs["position_ids"][:, there])
    with torch.no_grad():
        wanted = model.model(**given, mm_token_type_ids=kinds, attention_mask=there, use_cache=False).last_hidden_state
        assert torch.allclose(decoded(model, batch)[there], wanted[there], atol=1e-4)
        model.model.language_model.set_attn_implementation("causal_formula")
        assert torch.allclose(decoded(model, batch)[there], wanted[there], atol=1e-4)


def test_look_ups_lead_to_what_is_asked(recipe, processor):
    documents = [with_looks(document) for document in (*KINDS["pairs"], document_of("attribute", "train", 1))]
    for document in documents:
        batch = TinyBatches(processor, recipe)([document])
        ids, turns = batch.inputs["input_ids"][0], document.turns[: recipe["turns"]]
        for turn, (_, position), tokens in zip(turns, batch.first.tokens.tolist(), batch.first.looked_at, strict=True):
            assert processor.decode(ids[position]) in turn.question
            seen = {processor.decode(word) for words in (batch.shows, batch.belongs) for word in words[0][tokens]}
            assert len(seen) == 2, "a colour and a shape"
            assert all(word in f"{turn.question} {turn.answer}" for word in seen if document.task == "which")
            assert turn.answer.startswith(processor.decode(batch.tells[0, position]))


def test_what_a_word_was_told_reaches_the_tokens_of_the_answer(recipe, processor):
    for document in (document_of("above", "train", 2), with_looks(document_of("where", "train", 3))):
        batch = TinyBatches(processor, recipe)([document])
        ids = batch.inputs["input_ids"][0]
        takes = list(zip(batch.takes.tokens[:, 1].tolist(), batch.takes.looked_at, strict=True))
        assert len(takes) == 2 * recipe["turns"], "two tokens an answer"
        for turn, pair in zip(document.turns[: recipe["turns"]], (takes[:2], takes[2:]), strict=True):
            assert all(ids[word].tolist() == processor.tokenizer.encode(turn.looks[0].word) for _, word in pair)
            sought = [processor.decode(batch.seeks[0, position]) for position, _ in pair]
            label = turn.looks[0].tells
            assert sought == ([label, label] if document.task == "above" else [label[0], f"##{label[1]}"])


def test_the_cells_of_an_object_tell_its_field(recipe, processor):
    document = document_of("where", "train", 3)
    batch = TinyBatches(processor, recipe)([document])
    for turn, tokens in zip(document.turns, batch.last.looked_at.view(-1, 2, len(batch.labels[0])), strict=False):
        for told in (batch.row, batch.column):
            assert len(set(told[0, tokens.any(0)].tolist())) == 1
        words = [processor.decode(told[0, tokens.any(0)][0]) for told in (batch.row, batch.column)]
        assert "".join(words).replace("##", "") == turn.answer


def test_the_last_look_of_a_film_is_in_its_last_frames(recipe, processor):
    for document in KINDS["films"]:
        batch = TinyBatches(processor, recipe)([document])
        tokens = batch.last.looked_at[0].nonzero()[:, 0]  # of the first question: what did it read at the end?
        assert len(tokens) == 1
        assert processor.decode(batch.shows[0, tokens[0]]) == document.turns[0].answer
        assert batch.patches[0, tokens[0]] >= batch.patches.max() - 35, "one of the 36 cells of the last two frames"


def test_grounding_reaches_heads_that_have_norms(recipe, processor, model):
    stage = recipe["stages"][2]
    grounding = Grounding(model, stage["grounding"])
    documents = [with_looks(document) for document in KINDS["stills"]]
    losses, right = compute_losses(model, grounding, TinyBatches(processor, recipe)(documents), stage, 0)
    assert all(losses[name] > 0 for name in LOSSES)
    assert len(right) == len(documents)
    losses["looks"].backward()
    attention = model.model.language_model.layers[1].self_attn
    assert all(part.weight.grad.abs().sum() > 0 for part in (attention.q_proj, attention.q_norm))
    grounding.detach()


@pytest.mark.slow
def test_an_interrupted_run_ends_where_a_whole_one_does(recipe, tmp_path, monkeypatch):
    broken = ends_as_a_whole_run(module, recipe, tmp_path, monkeypatch)
    assert Qwen3VLForConditionalGeneration.from_pretrained(broken).config.text_config.num_hidden_layers == 2
