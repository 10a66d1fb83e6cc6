"""Tiny random Qwen-VL with its own processor and chat template: it answers, streams, and keeps the conversation."""

import asyncio
import json
import re

import pytest
import torch
from PIL import Image

from pmod_cli import cli
from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.prompts import collate
from pmod_cli.serving.chat import Chat, conversation_prompt
from pmod_cli.serving.generation import Answerer, Sampling
from tests import visual_processors
from tests.model.models import image
from tests.model.visual import routed
from tests.serving.load import CHAT, body, data_url
from tests.serving.test_chat import user

KINDS = ("qwen2_5_vl", "qwen3_vl")
QUESTIONS = ("what is the price of ham?", "and of tea?")


@pytest.fixture(scope="module", params=KINDS)
def answerer(request) -> Answerer:
    """In float64: no rounding error may decide between two tokens."""
    model = routed(visual_processors.model(request.param)).double()
    return Answerer(model, visual_processors.processor(request.param))


def generated(answerer: Answerer, messages: list[dict], images: list[Image.Image]) -> str:
    """The answer by `generate` of transformers, from the start."""
    inputs = collate([conversation_prompt(answerer, messages, images)], answerer.pad_id)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.inference_mode():
        ids = answerer.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return answerer.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_conversation_goes_on_from_the_cache(answerer):
    conversation, shown, messages = Chat(answerer), image(24, 16, seed=3), []
    for place, question in enumerate(QUESTIONS):
        pieces = list(conversation.ask(question, [] if place else [shown], Sampling(6)))
        messages.append(user(question, [] if place else [shown]))
        assert "".join(pieces) == generated(answerer, messages, [shown])
        assert len(pieces) > 1 or len("".join(pieces)) < 2, "it comes in pieces"
        assert (conversation.stats.reused_tokens > conversation.stats.vision_tokens) == (place > 0)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}]})


def test_a_server_answers_and_streams(answerer, serve):
    """Two pictures of unlike sizes at once, one of them in a later turn."""
    shown = [image(24, 16, seed=3), image(16, 32, seed=4)]
    first = body(QUESTIONS[0], data_url(shown[0]))
    later = body(QUESTIONS[1], data_url(shown[1]))
    later["messages"] = [*first["messages"], {"role": "assistant", "content": "ham"}, *later["messages"]]

    async def use(client) -> tuple[list[str], str]:
        async def whole(sent: dict) -> str:
            response = await client.post(CHAT, json=sent)
            return (await response.json())["choices"][0]["message"]["content"]

        answers = await asyncio.gather(whole(first), whole(later))
        streamed = await (await client.post(CHAT, json={**later, "stream": True})).text()
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        return answers, "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    answers, streamed = serve(use, model=answerer)
    said = [user(QUESTIONS[0], shown[:1]), {"role": "assistant", "content": [{"type": "text", "text": "ham"}]}]
    assert answers[0] == generated(answerer, said[:1], shown[:1])
    assert answers[1] == streamed == generated(answerer, [*said, user(QUESTIONS[1], shown[1:])], shown)
    assert answers[0] != answers[1]


def test_the_command_asks_a_checkpoint_on_disk(tmp_path, monkeypatch, capsys):
    """Converted from the stock layout, its own processor and template with it."""
    monkeypatch.chdir(tmp_path)
    visual_processors.save_stock(tmp_path / "stock", "qwen2_5_vl")
    image(24, 16, seed=3).save("a.png")
    assert cli.main(["convert", "stock", "-o", "routed", "--schedule", "list", "--ratios", "1,0.6,0.4,0.2"]) == 0
    capsys.readouterr()
    arguments = ["a.png", QUESTIONS[0], "--max-new-tokens", "4", "--stats", "--device", "cpu"]
    assert cli.main(["ask", *arguments, "-m", "routed", "--against", "stock"]) == 0
    written = capsys.readouterr()
    assert "stock" in written.out
    assert "first token after" in written.err
    assert "a layer keeps" in written.err


def test_what_cannot_be_asked_is_a_sentence(answerer):
    conversation = Chat(answerer)
    with pytest.raises(PmodError, match="refuses this input: absolute aspect ratio"):
        list(conversation.ask(QUESTIONS[0], [Image.new("RGB", (900, 2))]))
    for mark in ("<|image_pad|>", "<|video_pad|>"):
        with pytest.raises(PmodError, match=f"the text holds {re.escape(mark)}"):
            list(conversation.ask(f"what does {mark} mean?", [image(24, 16, seed=3)]))
    assert "".join(conversation.ask(QUESTIONS[0], [image(24, 16, seed=3)], Sampling(2)))


def test_a_picture_that_the_processor_refuses(answerer, serve):
    """Qwen-VL takes none that is more than 200 times as wide as high."""

    async def use(client):
        response = await client.post(CHAT, json=body(QUESTIONS[0], data_url(Image.new("RGB", (900, 2)))))
        return response.status, (await response.json())["error"]["message"]

    status, told = serve(use, model=answerer)
    assert status == 400
    assert "aspect ratio" in told
