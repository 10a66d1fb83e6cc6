"""Several questions about one picture: the kept cache gives what a computation from the start gives."""

import pytest
import torch
from PIL import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.model.cache import CACHE_NAME
from pmod_cli.serving.chat import Chat, conversation_prompt
from pmod_cli.serving.generation import Answerer, Sampling
from tests import factories
from tests.model import visual
from tests.model.models import ROUTED_FROM_START, image
from tests.serving.conftest import talkative

FASTV = {"method": "fastv", "mean": 0.6}
QUESTIONS = ("what is the price of ham?", "which is dearer, ham or tea?", "is there a red ring?")


def asked(conversation: Chat, question: str, *pictures: Image.Image, count: int = 6) -> str:
    return "".join(conversation.ask(question, pictures, Sampling(count)))


def from_start(answerer: Answerer, turns: list[tuple[str, str, list[Image.Image]]], question: str, images) -> str:
    """The answer to a last question by `generate` of transformers, on the whole conversation at once."""
    messages, pictures = [], []
    for said, answer, shown in turns:
        messages += [user(said, shown), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        pictures += shown
    prompt = conversation_prompt(answerer, [*messages, user(question, images)], [*pictures, *images])
    inputs = {
        name: value if name != "pixel_values" else value.double()
        for name, value in prompt.inputs.items()
        if name != "input_ids"
    }
    ids = prompt.inputs["input_ids"][None]
    mask = torch.ones_like(ids)
    written = answerer.model.generate(input_ids=ids, attention_mask=mask, **inputs, max_new_tokens=6, do_sample=False)
    return answerer.processor.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def user(text: str, images) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]}


@pytest.mark.parametrize("pmod", [ROUTED_FROM_START, {"schedule": "cosine", "selection": "uniform"}, FASTV])
@pytest.mark.parametrize("kind", factories.KINDS)
def test_later_questions_are_answered_as_from_the_start(pmod, kind):
    model, shown = talkative(pmod, kind), image(64, 40, seed=3)
    conversation, turns = Chat(model), []
    for place, question in enumerate(QUESTIONS):
        new = [] if place else [shown]
        answer = asked(conversation, question, *new)
        assert answer == from_start(model, turns, question, new)
        assert len(answer) > 5
        stats = conversation.stats
        # FastV chooses by what the question attends to, so it begins anew; a router does not.
        assert (stats.reused_tokens > stats.vision_tokens) == (place > 0 and pmod is not FASTV)
        turns.append((question, answer, new))


def test_a_cache_may_be_kept_where_that_changes_what_is_seen():
    conversation = Chat(talkative(FASTV), keep_cache=True)
    asked(conversation, QUESTIONS[0], image(64, 40, seed=3))
    asked(conversation, QUESTIONS[1])
    assert conversation.stats.reused_tokens > conversation.stats.vision_tokens


def test_a_later_picture_is_answered_as_from_the_start():
    model, shown = talkative(), [image(64, 40, seed=3), image(32, 64, seed=4)]
    conversation = Chat(model)
    first = asked(conversation, QUESTIONS[0], shown[0])
    assert asked(conversation, QUESTIONS[1], shown[1]) == from_start(
        model, [(QUESTIONS[0], first, shown[:1])], QUESTIONS[1], shown[1:]
    )
    assert conversation.stats.reused_tokens == 0


@pytest.mark.parametrize("quota", ["row", "per_image"])
def test_why_a_later_picture_begins_anew(quota):
    """On a kept cache each picture has its K; from the start the pictures of a prompt share one, unless K is apart."""
    kind, rows = "llava", [visual.Row([(8, 8)]), visual.Row([(8, 8), (8, 8)])]
    model = visual.routed(visual.stock(kind).double(), {**ROUTED_FROM_START, "quota": quota})
    inputs = visual.prompt(kind, model.config, rows, dtype=torch.float64)
    whole = visual.alone(kind, model.config, rows, 1, inputs)
    ids = whole["input_ids"][0]
    tail = ((ids[:-1] == visual.WORDS) & (ids[1:] == visual.IMAGE)).nonzero()[-1].item()  # the second picture
    with torch.no_grad():
        expected = model(**whole).logits[:, -1]
        head = {"input_ids": whole["input_ids"][:, :tail], "pixel_values": whole["pixel_values"][:1]}
        cache = model(**head, use_cache=True)[CACHE_NAME]
        rest = {"input_ids": whole["input_ids"][:, tail:], "pixel_values": whole["pixel_values"][1:]}
        found = model(**rest, **{CACHE_NAME: cache}).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-9) == (quota == "per_image")


def test_statistics_are_counted():
    model = talkative()
    conversation = Chat(model)
    asked(conversation, QUESTIONS[0], image(64, 40, seed=3))
    stats, vision = conversation.stats, conversation.stats.vision_tokens
    assert stats.kept_tokens == sum(int(ratio * vision) for ratio in (0.6, 1.0, 0.35, 0.15)) / 4
    words = stats.prompt_tokens - vision + stats.new_tokens - 1
    assert stats.kv_bytes == (words + stats.kept_tokens) * 4 * 2 * 2 * 8 * 8  # layers, K and V, heads, width, bytes
    assert stats.first_token_s > 0


def test_an_answer_that_is_not_read_to_its_end_is_forgotten():
    model, shown = talkative(), image(64, 40, seed=3)
    conversation = Chat(model)
    expected = asked(conversation, QUESTIONS[0], shown)
    next(iter(conversation.ask(QUESTIONS[1], sampling=Sampling(6))))
    answer = asked(conversation, QUESTIONS[2])
    assert answer == from_start(model, [(QUESTIONS[0], expected, [shown])], QUESTIONS[2], [])


def test_what_cannot_be_asked_is_a_sentence():
    model = talkative(max_position_embeddings=96)
    with pytest.raises(PmodError, match="the model takes 96"):
        asked(Chat(model), QUESTIONS[0], image(64, 64, seed=1))
    with pytest.raises(PmodError, match="the mark of a picture's place"):
        asked(Chat(model), "what is <image>?")


def test_a_turn_that_is_forgotten_was_not_there():
    model, shown, other = talkative(), image(64, 40, seed=3), image(32, 64, seed=4)
    conversation = Chat(model)
    asked(conversation, QUESTIONS[1], shown)
    conversation.forget()
    first = asked(conversation, QUESTIONS[0], shown)
    assert first == from_start(model, [], QUESTIONS[0], [shown])
    for pictures in ([], [other]):  # the last turn is taken back, with what it brought
        asked(conversation, QUESTIONS[1], *pictures)
        conversation.forget()
    assert asked(conversation, QUESTIONS[2]) == from_start(model, [(QUESTIONS[0], first, [shown])], QUESTIONS[2], [])
