"""What a stranger who reaches the port may not take from others: their memory, their places, their pictures."""

import asyncio
import json
import socket
from dataclasses import replace

import pytest

from pmod_cli.serving import app
from tests.serving.asking import CHAT, PICTURES, QUESTIONS, alone, ask
from tests.serving.load import body
from tests.serving.test_queue import Held


async def waiting(client) -> float:
    page = await (await client.get("/metrics")).text()
    return float(page.partition("\npmod_requests_waiting ")[2].split()[0])


def test_who_leaves_the_queue_leaves_nothing_there(serve, answerer):
    """Else clients that ask, leave and ask again fill the memory with pixels, whatever --max-queue says."""
    held = Held(answerer)

    async def use(client):
        stays = asyncio.create_task(ask(client, QUESTIONS[0], PICTURES[0]))
        while not held.asked:
            await asyncio.sleep(0.01)
        for _ in range(5):
            leaves, before = asyncio.create_task(ask(client, QUESTIONS[1], PICTURES[1])), await waiting(client)
            while await waiting(client) == before:
                await asyncio.sleep(0.01)
            leaves.cancel()
            while client.service._taken > 1:
                await asyncio.sleep(0.01)
        left = await waiting(client)
        held.go.set()
        return left, await stays

    left, answer = serve(use, model=held, max_batch=1, max_queue=1)
    assert left == 0
    assert answer == alone(answerer, QUESTIONS[0], PICTURES[0])


def test_pixels_that_wait_are_bounded(serve, answerer, monkeypatch):
    monkeypatch.setattr(app, "MOST_WAITING", 1)
    monkeypatch.setattr(app, "preparing_threads", lambda: 1)
    held = Held(answerer)

    async def use(client):
        asked = [asyncio.create_task(ask(client, QUESTIONS[n], PICTURES[n % 3])) for n in range(5)]
        while not held.asked or not await waiting(client):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        most = await waiting(client)
        held.go.set()
        return most, await asyncio.gather(*asked)

    most, found = serve(use, model=held, max_batch=1)
    assert most == 1
    assert found == [alone(answerer, QUESTIONS[n], PICTURES[n % 3]) for n in range(5)]


def test_pixels_are_free_once_they_are_seen(serve, answerer):
    async def use(client):
        asked = asyncio.create_task(ask(client, QUESTIONS[0], PICTURES[0], max_tokens=300))
        while not client.service.worker._of:
            await asyncio.sleep(0.001)
        ((ticket, _),) = client.service.worker._of.values()
        await asked
        return ticket.prompt

    prompt = serve(use)
    assert prompt.nbytes == prompt.inputs["input_ids"].nbytes == 8 * prompt.length


@pytest.mark.parametrize("count", [11, 1500])  # 11: what is left to send is so little that only its end waits
def test_who_does_not_read_keeps_no_place(serve, answerer, count):
    async def use(client):
        (site,) = client.server.runner.sites
        for listening in site._server.sockets:  # the system would take megabytes for a client
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.service.settings = replace(client.service.settings, name="tiny" * 2000)  # each event takes 8 kB
        sent = json.dumps(body(QUESTIONS[0], stream=True, max_tokens=count)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
        )
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours.connect((client.server.host, client.server.port))
        _, writer = await asyncio.open_connection(sock=ours, limit=1)
        writer.write(head.encode() + sent)
        while not client.service._taken:
            await asyncio.sleep(0.01)
        while client.service._taken:
            await asyncio.sleep(0.01)
        answer = await ask(client, QUESTIONS[0], PICTURES[0])
        writer.close()
        return answer, (await (await client.get("/metrics")).text())

    answer, metrics = serve(use, max_batch=1, max_queue=0, patience=0.5)
    assert answer == alone(answerer, QUESTIONS[0], PICTURES[0])
    assert "pmod_disconnects_total 1.0" in metrics


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("page.example:8000", 403),
        ("localhost.page.example", 403),
        ("127.0.0.1.page.example", 403),
        ("[page", 403),
        ("", 403),
    ],
)
def test_a_web_page_cannot_ask_by_its_own_name(serve, host, status):
    """DNS rebinding: its name leads to this machine, so for a browser this server is the page's own."""

    async def use(client):
        local = (await client.get("/v1/models", headers={"Host": host})).status
        client.service.settings = replace(client.service.settings, local=False)
        return local, (await client.get("/v1/models", headers={"Host": host})).status

    assert serve(use, local=True) == (status, 200)


def test_a_body_that_is_not_encoded_as_it_says(serve):
    async def use(client):
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        response = await client.post(CHAT, data=b"{}" * 100, headers=headers)
        return response.status, (await response.json())["error"]["message"]

    status, told = serve(use)
    assert (status, "not encoded as its header says" in told) == (400, True)
