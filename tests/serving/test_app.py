"""The server as its clients see it: answers, streams, conversations."""

import asyncio
from dataclasses import replace

import pytest

from pmod_cli.serving.chat import Chat
from pmod_cli.serving.generation import Sampling
from tests.serving.asking import CHAT, PICTURES, QUESTIONS, alone, ask, events
from tests.serving.load import body, data_url


def test_an_answer(serve, answerer):
    async def use(client):
        response = await client.post(CHAT, json=body(QUESTIONS[0], data_url(PICTURES[0]), model="tiny", top_k=-1))
        assert response.status == 200
        return await response.json()

    found = serve(use)
    assert (found["object"], found["model"]) == ("chat.completion", "tiny")
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone(answerer, QUESTIONS[0], PICTURES[0])}
    assert choice["finish_reason"] in ("stop", "length")
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] <= 6


def test_a_stream_is_the_answer_in_pieces(serve, answerer):
    async def use(client):
        asked = body(QUESTIONS[0], data_url(PICTURES[0]), stream=True, stream_options={"include_usage": True})
        response = await client.post(CHAT, json=asked)
        assert (response.status, response.content_type) == (200, "text/event-stream")
        return await events(response)

    *chunks, usage = serve(use)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == alone(answerer, QUESTIONS[0], PICTURES[0])
    assert len(deltas) > 3
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends[:-1] == [None] * (len(ends) - 1)
    assert ends[-1] in ("stop", "length")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] <= 6


def test_an_event_is_one_line_for_any_client(serve):
    """As for those whose `iter_lines` is `str.splitlines`, httpx's: an answer may hold other ends of lines too."""
    name = "a\x85b\u2028c\u2029d é"

    async def use(client):
        client.service.settings = replace(client.service.settings, name=name)
        return await events(await client.post(CHAT, json=body(QUESTIONS[0], stream=True)))

    assert {chunk["model"] for chunk in serve(use)} == {name}


def test_requests_that_come_together_are_answered_as_alone(serve, answerer):
    asked = [(QUESTIONS[n % 5], PICTURES[n % 4 : n % 4 + 1], 2 + n % 7) for n in range(24)]

    async def use(client):
        found = await asyncio.gather(*(ask(client, q, *shown, max_tokens=count) for q, shown, count in asked))
        return found, (await (await client.get("/metrics")).text())

    found, metrics = serve(use, max_batch=6)
    assert found == [alone(answerer, question, *shown, count=count) for question, shown, count in asked]
    assert "pmod_requests_running 0.0" in metrics
    assert "pmod_requests_waiting 0.0" in metrics
    assert 'pmod_requests_total{status="200"} 24.0' in metrics
    steps = {line.split()[0]: float(line.split()[1]) for line in metrics.splitlines() if "decode_rows" in line[:20]}
    assert steps["pmod_decode_rows_sum"] > 2 * steps["pmod_decode_rows_count"]  # several rows a step


def test_a_conversation_and_a_system_message(serve, answerer):
    conversation = Chat(answerer)
    first = "".join(conversation.ask(QUESTIONS[0], PICTURES[:1], Sampling(6)))
    second = "".join(conversation.ask(QUESTIONS[1], (), Sampling(6)))

    async def use(client):
        asked = body(QUESTIONS[0], data_url(PICTURES[0]))
        asked["messages"] += [{"role": "assistant", "content": first}, {"role": "user", "content": QUESTIONS[1]}]
        plain = await (await client.post(CHAT, json=asked)).json()
        asked["messages"].insert(0, {"role": "system", "content": "answer in one word"})
        other = await (await client.post(CHAT, json=asked)).json()
        return plain, other

    plain, other = serve(use)
    assert plain["choices"][0]["message"]["content"] == second
    assert other["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]


def test_stop_strings_limits_and_seeds(serve, answerer):
    whole = alone(answerer, QUESTIONS[0], PICTURES[0], count=12)
    word = whole.split()[2]

    async def use(client):
        stopped = await ask(client, QUESTIONS[0], PICTURES[0], max_tokens=12, stop=[word])
        capped = await client.post(CHAT, json=body(QUESTIONS[0], max_tokens=10**6))
        drawn = [await ask(client, QUESTIONS[0], temperature=2, seed=n) for n in (1, 1, 2, 3)]
        return stopped, await capped.json(), drawn

    stopped, capped, drawn = serve(use, max_tokens=3)
    assert stopped == whole[: whole.index(word)].rstrip() or len(stopped.split()) <= 3
    assert capped["usage"]["completion_tokens"] <= 3
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_a_stop_string_ends_the_answer(serve, answerer):
    whole = alone(answerer, QUESTIONS[0], PICTURES[0], count=12)
    word = whole.split()[2]

    async def use(client):
        response = await client.post(CHAT, json=body(QUESTIONS[0], data_url(PICTURES[0]), max_tokens=12, stop=word))
        return (await response.json())["choices"][0]

    choice = serve(use)
    assert choice["message"]["content"] == whole[: whole.index(word)].rstrip()
    assert choice["finish_reason"] == "stop"


def test_models_and_health(serve):
    async def use(client):
        paths = ("/v1/models", "/v1/models/tiny", "/v1/models/other/model", "/health")
        return [await (await client.get(path)).json() for path in paths]

    models, model, absent, health = serve(use)
    assert models["data"] == [model]
    assert model["id"] == "tiny"
    assert absent["error"]["code"] == "model_not_found"
    assert health == {"status": "ok"}


@pytest.mark.parametrize("temperature", [1e-45, 1.2e-38, 1e-9])
def test_the_coldest_draw_is_the_likeliest_token(serve, answerer, temperature):
    async def use(client):
        return await ask(client, QUESTIONS[0], PICTURES[0], temperature=temperature)

    assert serve(use) == alone(answerer, QUESTIONS[0], PICTURES[0])
