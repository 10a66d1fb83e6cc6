"""Requests beside each other: what waits, what fails, who leaves, a server that stops."""

import asyncio
import threading

import pytest

from pmod_cli.serving.generation import Answerer
from tests.serving.asking import CHAT, PICTURES, QUESTIONS, alone, ask
from tests.serving.load import body, data_url


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
