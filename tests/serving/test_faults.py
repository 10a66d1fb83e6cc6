"""Requests that the server refuses: a sentence each, and no harm."""

import asyncio
import json

import pytest
from PIL import Image

from pmod_cli.serving.media import Media
from tests.model.models import image
from tests.serving.asking import CHAT, PICTURES, QUESTIONS, alone, ask
from tests.serving.load import body, data_url

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
