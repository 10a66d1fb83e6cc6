"""The server as its clients see it: answers, streams, faults, clients that leave."""

import asyncio
import json
import threading
from dataclasses import replace

import pytest
from PIL import Image

from pmod_cli.serving.chat import Chat
from pmod_cli.serving.generation import Answerer, Sampling
from pmod_cli.serving.media import Media
from tests.model.models import image
from tests.serving.load import body, data_url

CHAT = "/v1/chat/completions"
PICTURES = [image(64, 40, seed=3), image(32, 64, seed=4), image(64, 64, seed=5)]
QUESTIONS = ("what is the price of ham?", "yes", "which is dearer, ham or tea?", "is there a red ring?", "what?")


def alone(answerer, question: str, *pictures: Image.Image, count: int = 6) -> str:
    return "".join(Chat(answerer).ask(question, pictures, Sampling(count)))


async def ask(client, question: str, *pictures, **more) -> str:
    response = await client.post(CHAT, json=body(question, *map(data_url, pictures), **more))
    found = await response.json()
    assert response.status == 200, found
    return found["choices"][0]["message"]["content"]


async def events(response) -> list[dict]:
    lines = [line[6:] for line in (await response.text()).splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


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


GOOD = data_url(image(16, 16, seed=1))
LARGE = data_url(Image.new("1", (12_000, 9_000)))
FAULTS = [
    (b"{", 400, "the body is no JSON"),
    (b"[" * 100_000, 400, "nested too deeply"),
    (b'{"a": [' + b"[]," * 1_000_000 + b"[]]}", 400, "more than 1,000,000 lists, objects and values"),
    (b'{"a": NaN}', 400, "NaN is no number"),
    (b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', 400, "'utf-8' codec can't decode"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "surrogates not allowed"),
    ([], 400, "expected to be a JSON object"),
    ({}, 400, "messages is expected to be a list"),
    ({"messages": []}, 400, "one message or more"),
    ({"messages": ["x"]}, 400, "messages[0] is expected to be an object whose role is one of"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "system, developer, user, assistant"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content is expected to be a text"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message"),
    (
        {"messages": [{"role": "system", "content": [{"type": "image_url"}]}]},
        400,
        "pictures stand in messages of the user",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "a text, or an image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 3}]}]}, 400, "is expected to hold"),
    (body("x", model="other"), 404, "the model 'other' is not served here; this server has 'tiny'"),
    (body("x", max_tokens=0), 400, "max_tokens is expected to be a whole number of 1 or more"),
    (body("x", max_tokens="6"), 400, "max_tokens"),
    (body("x", temperature=3), 400, "temperature is expected to be a number of 0 to 2"),
    (body("x", top_p=0), 400, "top_p is expected to be above 0"),
    (body("x", seed=1.5), 400, "seed is expected to be a whole number"),
    (body("x", stream="yes"), 400, "stream is expected to be true or false"),
    (body("x", stop=[""]), 400, "stop is expected to be"),
    (body("x", n=2), 400, "n is not supported"),
    (body("x", tools=[{}]), 400, "tools is not supported"),
    (body("x", top_k=5), 400, "top_k is not supported"),
    (body("x", repetition_penalty=1.2), 400, "repetition_penalty is not supported"),
    (body("x", guided_choice=["yes", "no"]), 400, "guided_choice is not supported"),
    (body("x", include_stop_str_in_output=True), 400, "include_stop_str_in_output is not supported"),
    (body("x", prompt_logprobs=2), 400, "prompt_logprobs is not supported"),
    (body("x", truncate_prompt_tokens=5), 400, "truncate_prompt_tokens is not supported"),
    (body("x", skip_special_tokens=False), 400, "skip_special_tokens is not supported"),
    (body("x", response_format={"type": "json_object"}), 400, "response_format is not supported"),
    (body("what is <image>?"), 400, "the text holds <image>"),
    (body("a " * 3000), 400, "tokens, those of its pictures included; the model takes 2,048"),
    (body("a" * 200_000), 400, "the messages have 200,000 characters"),
    (body("x", *[GOOD] * 17), 400, "17 pictures in one request; at most 16"),
    (body("x", "data:image/png;base64,xx!"), 400, "messages[0].content[0]: the data URL is no base64"),
    (body("x", "data:image/png,xx"), 400, "expected as data:image/png;base64"),
    (body("x", "data:image/png;base64,aGVsbG8="), 400, "messages[0].content[0]: the picture is not an image"),
    (body("x", LARGE), 400, "89 megapixels"),
    (body("x", "http://127.0.0.1:1/a.png"), 400, "this server fetches no URLs"),
    (body("x", "ftp://127.0.0.1/a.png"), 400, "not ftp:"),
    (body("x", "/etc/passwd"), 400, "this server reads no files"),
    (body("x", "file:///etc/passwd"), 400, "this server reads no files"),
]


def test_faults_are_sentences(serve, answerer):
    async def use(client):
        for sent, status, told in FAULTS:
            data = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            response = await client.post(CHAT, data=data, headers={"Content-Type": "application/json"})
            found = await response.json()
            assert (response.status, told in found["error"]["message"]) == (status, True), (told, found)
        assert (await client.post(CHAT, data=b"{}", headers={"Content-Type": "text/plain"})).status == 415
        assert (
            await client.post(CHAT, data=b" " * (33 * 2**20), headers={"Content-Type": "application/json"})
        ).status == 413
        assert (await client.get(CHAT)).status == 405
        response = await client.get("/v1/other")
        assert (response.status, (await response.json())["error"]["message"]) == (404, "GET /v1/other: Not Found")
        return await ask(client, QUESTIONS[0], PICTURES[0])

    assert serve(use) == alone(answerer, QUESTIONS[0], PICTURES[0])


def test_files_below_the_media_root_alone(serve, answerer, tmp_path):
    root, outside = tmp_path / "media", tmp_path / "outside.png"
    (root / "in side").mkdir(parents=True)
    PICTURES[0].save(root / "in side" / "a.png")
    PICTURES[0].save(outside)
    (root / "link.png").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")

    async def use(client):
        found = [
            (await (await client.post(CHAT, json=body(QUESTIONS[0], url))).json())["choices"][0]["message"]["content"]
            for url in ("in side/a.png", (root / "in side" / "a.png").as_uri(), str(root / "in side" / "a.png"))
        ]
        for url in (
            "../outside.png",
            str(outside),
            outside.as_uri(),
            "link.png",
            "loop",
            "no.png",
            "in side",
            "a\0b",
            "file:///%2e%2e/outside.png",
            "x" * 5000,
        ):
            response = await client.post(CHAT, json=body(QUESTIONS[0], url))
            assert response.status == 400
            assert "not there, or outside the folder" in (await response.json())["error"]["message"], url
        return found

    assert set(serve(use, media=Media(root))) == {alone(answerer, QUESTIONS[0], PICTURES[0])}


def test_urls_are_fetched_where_that_is_allowed(serve, answerer):
    from aiohttp import web
    from aiohttp.test_utils import TestServer

    async def picture(request):
        if request.path == "/large":
            return web.Response(body=b" " * 21_000_000)
        if request.path == "/file":
            raise web.HTTPFound("file:///etc/passwd")
        return web.Response(body=data_of(PICTURES[0])) if request.path == "/a.png" else web.Response(status=404)

    async def use(client):
        app = web.Application()
        app.router.add_get("/{name}", picture)
        async with TestServer(app) as other:
            told = []
            for name in ("b.png", "large", "file"):
                response = await client.post(CHAT, json=body(QUESTIONS[0], str(other.make_url(f"/{name}"))))
                assert response.status == 400
                told.append((await response.json())["error"]["message"])
            response = await client.post(CHAT, json=body(QUESTIONS[0], str(other.make_url("/a.png"))))
            return told, (await response.json())["choices"][0]["message"]["content"]

    told, answer = serve(use, media=Media(urls=True))
    assert ["status 404" in told[0], "more than 20 MB" in told[1], "cannot be fetched" in told[2]] == [True] * 3
    assert answer == alone(answerer, QUESTIONS[0], PICTURES[0])


def data_of(picture: Image.Image) -> bytes:
    import base64

    return base64.b64decode(data_url(picture).split(",")[1])


def test_a_key_is_demanded(serve):
    async def use(client):
        statuses = []
        for key in (None, "Bearer wrong", "Basic s3cret", "bearer s3cret"):
            headers = {"Authorization": key} if key else {}
            for path in ("/health", "/v1/models", "/metrics"):
                statuses.append((await client.get(path, headers=headers)).status)
            response = await client.post(CHAT, json=body("what?"), headers=headers)
            statuses.append(response.status)
            assert "s3cret" not in await response.text()
        return statuses, repr(client.service.settings)

    statuses, shown = serve(use, api_key="s3cret")
    assert statuses == [200, 401, 401, 401] * 3 + [200] * 4
    assert "s3cret" not in shown


def test_models_and_health(serve):
    async def use(client):
        paths = ("/v1/models", "/v1/models/tiny", "/v1/models/other/model", "/health")
        return [await (await client.get(path)).json() for path in paths]

    models, model, absent, health = serve(use)
    assert models["data"] == [model]
    assert model["id"] == "tiny"
    assert absent["error"]["code"] == "model_not_found"
    assert health == {"status": "ok"}


class Held(Answerer):
    """A real model that waits in front of each prefill until it is told to go on."""

    def __init__(self, answerer: Answerer) -> None:
        super().__init__(answerer.model, answerer.processor)
        self.go, self.asked, self.sizes = threading.Event(), False, []

    def prefill(self, rows):
        self.asked = True
        self.go.wait(30)
        self.sizes.append(len(rows))
        return super().prefill(rows)


def test_what_waits_is_bounded_and_then_prefilled_together(serve, answerer):
    held = Held(answerer)

    async def use(client):
        asked = [asyncio.create_task(client.post(CHAT, json=body(QUESTIONS[0]))) for _ in range(5)]
        while client.service._taken < 5:
            await asyncio.sleep(0.01)
        full = await client.post(CHAT, json=body(QUESTIONS[0]))
        told = await full.json()
        held.go.set()
        return full, told, [response.status for response in await asyncio.gather(*asked)]

    full, told, statuses = serve(use, model=held, max_batch=3, max_queue=2)
    assert (full.status, full.headers["Retry-After"], told["error"]["code"]) == (429, "1", "queue_full")
    assert statuses == [200] * 5
    assert sum(held.sizes) == 5
    assert max(held.sizes) > 1


def test_a_client_that_leaves_harms_nobody(serve, answerer):
    held = Held(answerer)

    async def use(client):
        stays = [asyncio.create_task(ask(client, question, PICTURES[0])) for question in QUESTIONS[:3]]
        leaves = [asyncio.create_task(ask(client, QUESTIONS[3], PICTURES[1], max_tokens=500)) for _ in range(4)]
        while client.service._taken < 7:
            await asyncio.sleep(0.01)
        for task in leaves[:2]:  # in the queue
            task.cancel()
        held.go.set()
        while not client.service.worker._of:
            await asyncio.sleep(0.001)
        for task in leaves[2:]:  # in the batch
            task.cancel()
        found = await asyncio.gather(*stays)
        while client.service.worker._of:
            await asyncio.sleep(0.01)
        return found, client.service._taken, (await (await client.get("/metrics")).text())

    found, left, metrics = serve(use, model=held)
    assert found == [alone(answerer, question, PICTURES[0]) for question in QUESTIONS[:3]]
    assert left == 0
    assert "pmod_disconnects_total 4.0" in metrics


class Failing(Answerer):
    """A real model that fails on a word."""

    def prefill(self, rows):
        if any("ring" in row.prompt.prompt for row in rows):
            raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")
        return super().prefill(rows)


def test_a_request_that_fails_fails_alone(serve, answerer):
    model = Failing(answerer.model, answerer.processor)

    async def use(client):
        bad = [client.post(CHAT, json=body(QUESTIONS[3], stream=stream)) for stream in (False, True)]
        good = [ask(client, question, PICTURES[0]) for question in QUESTIONS[:3]]
        failed, streamed, *answers = await asyncio.gather(*bad, *good)
        return failed.status, await failed.json(), await streamed.text(), answers

    status, told, streamed, answers = serve(use, model=model)
    assert (status, told["error"]["type"]) == (500, "server_error")
    assert "out of memory" in told["error"]["message"]
    assert "out of memory" in streamed
    assert answers == [alone(answerer, question, PICTURES[0]) for question in QUESTIONS[:3]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stopping_server_answers_what_it_has_taken(answerer, stream):
    from aiohttp import ClientSession, web

    from pmod_cli.serving.app import ServeSettings, Service

    async def both():
        held = Held(answerer)
        service = Service(held, ServeSettings("tiny"))
        runner = web.AppRunner(service.app(), handler_cancellation=True, shutdown_timeout=30)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}{CHAT}"
        async with ClientSession() as session:
            sent = body(QUESTIONS[0], data_url(PICTURES[0]), stream=stream)

            async def one():
                async with session.post(address, json=sent) as response:
                    return response.status, await response.text()

            tasks = [asyncio.create_task(one()) for _ in range(3)]
            while service._taken < 3:
                await asyncio.sleep(0.01)
            stopping = asyncio.create_task(runner.cleanup())
            await asyncio.sleep(0.1)
            held.go.set()
            found = await asyncio.gather(*tasks)
            await stopping
            return found

    found = asyncio.run(both())
    assert [status for status, _ in found] == [200] * 3
    assert all(("[DONE]" if stream else '"finish_reason"') in text for _, text in found)


def test_who_withholds_a_body_keeps_no_place(serve, answerer):
    """Three bodies that never come would fill a server of one row and two places for ever."""

    async def withheld(client):
        reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        writer.write(head.encode())
        await writer.drain()
        answer = await reader.readline()
        writer.close()
        return answer

    async def use(client):
        slow = [asyncio.create_task(withheld(client)) for _ in range(3)]
        while client.service._taken < 3:
            await asyncio.sleep(0.01)
        full = (await client.post(CHAT, json=body(QUESTIONS[0]))).status
        said = await asyncio.gather(*slow)
        return full, said, await ask(client, QUESTIONS[0], PICTURES[0])

    full, said, answer = serve(use, max_batch=1, max_queue=2, patience=0.5)
    assert full == 429
    assert all(b"408" in line for line in said)
    assert answer == alone(answerer, QUESTIONS[0], PICTURES[0])


class Forgetful(Answerer):
    """A real model whose batch fails once while rows are taken out of it."""

    def prefill(self, rows):
        batch = super().prefill(rows)
        if any("ring" in row.prompt.prompt for row in rows):

            def fail():
                raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

            batch.drop_finished = fail
        return batch


def test_a_batch_that_fails_between_two_tokens_ends_no_server(serve, answerer):
    async def use(client):
        failed = await client.post(CHAT, json=body(QUESTIONS[3]))
        return failed.status, client.service.worker.alive, await ask(client, QUESTIONS[0], PICTURES[0])

    status, alive, answer = serve(use, model=Forgetful(answerer.model, answerer.processor))
    assert (status, alive) == (500, True)
    assert answer == alone(answerer, QUESTIONS[0], PICTURES[0])


@pytest.mark.parametrize("temperature", [1e-45, 1.2e-38, 1e-9])
def test_the_coldest_draw_is_the_likeliest_token(serve, answerer, temperature):
    async def use(client):
        return await ask(client, QUESTIONS[0], PICTURES[0], temperature=temperature)

    assert serve(use) == alone(answerer, QUESTIONS[0], PICTURES[0])


@pytest.mark.parametrize("url", ["http://[", "file://[", "file://a]b/c", "data://["])
def test_an_address_that_is_none(serve, url, tmp_path):
    async def use(client):
        response = await client.post(CHAT, json=body(QUESTIONS[0], url))
        return response.status, (await response.json())["error"]

    status, error = serve(use, media=Media(tmp_path, urls=True))
    assert status == 400
    assert error["param"].startswith("messages[0]")


def test_a_key_of_other_characters_is_wrong_and_no_fault(serve):
    async def use(client):
        reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        await writer.drain()
        answer = await reader.readline()
        writer.close()
        return answer

    assert b"401" in serve(use, api_key="secret")
