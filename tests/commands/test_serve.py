"""`pmod serve` as its operator runs it: a process that listens, answers and ends on SIGTERM."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from aiohttp import ClientSession, ServerDisconnectedError

from pmod_cli import checkpoints, cli
from pmod_cli.commands import serve_run
from pmod_cli.data.documents import draw, seed_of
from pmod_cli.model import PmodSettings
from pmod_cli.serving.app import ServeSettings, Service
from tests.checkpoints.test_resolve import REPO, fill_cache
from tests.conftest import ROOT
from tests.serving.conftest import talkative
from tests.serving.load import body, data_url
from tests.serving.test_queue import Held


def call(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def post(address: str, sent: dict) -> dict:
    data = json.dumps(sent).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_it_answers_and_ends_when_it_is_told_to(workdir):
    document = draw("doc", seed_of("test", 0))
    command = [sys.executable, "-m", "pmod_cli", "serve", "-m", "tiny-llava-next", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PMOD_API_KEY": "s3cret\n"}  # as from a file
    with subprocess.Popen(
        command, cwd=workdir, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        for turn in document.turns[:2]:
            found = post(address, body(turn.question, data_url(document.image), model="tiny-llava-next"))
            assert found["choices"][0]["message"]["content"] == turn.answer
        for garbage in (b"GET / HTTP/1.1\r\nA: " + b"x" * 100_000, b"GET / HTTP/1.1\r\nHost: page.example\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as stranger:
                stranger.sendall(garbage)
                assert b" 40" in stranger.recv(100)
        server.send_signal(signal.SIGTERM)
        out, err = server.communicate(timeout=60)
    assert (server.returncode, out) == (0, "")
    assert f"serving tiny-llava-next; POST {address}/v1/chat/completions" in err
    assert "those in progress are answered" in err
    assert "s3cret" not in err
    assert "Traceback" not in err


def test_a_second_ctrl_c_does_not_wait(workdir):
    """Nor does it tell of each request that it ends in a traceback."""
    command = [sys.executable, "-m", "pmod_cli", "serve", "-m", "tiny-llava-next", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=workdir, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        port = int(server.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as unfinished:
            head = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\nExpect: 100-continue"
            unfinished.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head + b"\r\n\r\n")
            assert b"100 Continue" in unfinished.recv(100)
            server.send_signal(signal.SIGINT)
            told = [server.stderr.readline() for _ in range(3)]
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=20)
    assert "those in progress are answered" in told[-1]
    assert (server.returncode, err) == (-signal.SIGINT, "")


@pytest.fixture
def told_to_stop():
    """`told_to_stop(drain, then)` ends a server while it answers; what `then(answer, held model)` returns."""

    async def use(drain, then):
        held, ready = Held(talkative()), asyncio.Queue()
        serving = asyncio.create_task(
            serve_run._serve(Service(held, ServeSettings("tiny")), "127.0.0.1", 0, drain, ready.put_nowait)
        )
        address = await ready.get()
        async with ClientSession() as session:
            asking = asyncio.create_task(session.post(f"{address}/v1/chat/completions", json=body("what?")))
            while not held.asked:
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            found = await then(asking, held)
        held.go.set()
        await serving
        return found

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda drain, then: asyncio.run(use(drain, then))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("drain", [0.0, 2.0])
def test_what_is_in_progress_may_take_as_long_as_it_says(told_to_stop, drain):
    async def then(asking, _):
        told = time.perf_counter()
        with pytest.raises(ServerDisconnectedError):
            await asking
        return time.perf_counter() - told

    assert drain - 0.1 < told_to_stop(drain, then) < drain + 1.6


def test_what_is_in_progress_may_take_without_end(told_to_stop):
    async def then(asking, held):
        await asyncio.sleep(0.2)
        held.go.set()
        return (await asking).status

    assert told_to_stop(float("inf"), then) == 200


@pytest.fixture
def routed(workdir, stock_model):
    checkpoints.convert(stock_model(), workdir / "routed", PmodSettings(schedule="cosine"))
    return workdir / "routed"


@pytest.mark.parametrize(
    ("typed", "name"), [(f"{REPO}@main", REPO), ("llava-next-7b", "llava-next-7b"), ("./folder", "folder")]
)
def test_a_model_is_called_as_its_user_knows_it(stock_model, workdir, monkeypatch, typed, name):
    """In the cache of the hub, the folder of a repository has the name of a commit."""
    fill_cache(workdir / "cache", stock_model())
    shutil.copytree(stock_model(), workdir / "folder")
    served = []

    async def listen(service, *_):
        served.append(service.settings.name)

    monkeypatch.setattr(serve_run, "_serve", listen)
    assert call("serve", "-m", typed, "--device", "cpu", "--cache-dir", "cache") == 0
    assert served == [name]


@pytest.mark.parametrize(
    ("host", "key", "local"),
    [("127.0.0.1", None, True), ("localhost", None, True), ("0.0.0.0", None, False), ("127.0.0.1", "s3cret", False)],
)
def test_a_server_of_this_machine_alone_is_asked_by_its_name(routed, monkeypatch, host, key, local):
    taken = []

    async def listen(service, *_):
        taken.append(service.settings.local)

    monkeypatch.setattr(serve_run, "_serve", listen)
    assert call("serve", "-m", routed, "--device", "cpu", "--host", host, *(("--api-key", key) if key else ())) == 0
    assert taken == [local]


def test_a_port_that_is_taken(routed, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert call("serve", "-m", routed, "--device", "cpu", "--port", other.getsockname()[1]) == 1
    written = capsys.readouterr()
    assert "cannot be listened on" in written.err
    assert "--port 0" in written.err
    assert "the routers are untrained" in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--media-root", "nowhere"], "--media-root nowhere: there is no such folder"),
        (["--api-key", " "], "the API key is empty"),
        (["--port", "99999"], "--port"),
        (["-m", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_bad_options_are_sentences(workdir, capsys, arguments, told):
    assert call("serve", *arguments, *([] if "-m" in arguments else ["-m", "tiny-llava-next"])) == 2
    assert told in capsys.readouterr().err


def test_other_machines_without_a_key_is_warned_of(workdir, capsys):
    assert call("serve", "--host", "0.0.0.0", "-m", "./nowhere") == 2
    assert "warning: whoever reaches 0.0.0.0 may ask" in capsys.readouterr().err
