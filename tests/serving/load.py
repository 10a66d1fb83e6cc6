"""Load on a server with the bundled model, closed loop: requests a second, time to the first token, equal answers.

    python -m tests.serving.load --model DIR                   # in batches, one by one, and transformers' own server
    python -m tests.serving.load --model DIR --only batches --seconds 600 --clients 16

Needs the [serve] extra. transformers' own server needs fastapi, uvicorn and openai beside it, and is left out without
them. It runs with our class put where it looks for classes, which no user can do from its command line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp

from pmod_cli.data.documents import TASKS, draw, seed_of
from tests.conftest import ROOT
from tests.serving.conftest import body, data_url

CHAT = "/v1/chat/completions"
TRANSFORMERS = """
import sys
sys.modules["torchvision"] = None  # pictures are opened by Pillow, as here; some builds of it open none
from transformers.models.auto import modeling_auto
from pmod_cli.model import modeling
from transformers.cli.serving import model_manager
for record in modeling.FAMILIES.values():
    made = modeling.routed_models(record)[1]
    setattr(model_manager.transformers, made.__name__, made)
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[record.routed_name] = made.__name__
from transformers.cli.serve import Serve
Serve(force_model=sys.argv[1], device="cpu", dtype="float32", port=int(sys.argv[2]))
"""


def mixed(count: int, offset: int = 0) -> list[dict[str, Any]]:
    """Requests of all kinds: the tasks' documents of three sizes, two pictures, none, short answers and long ones."""
    sizes, found = ((96, 96), (144, 48), (96, 48)), []
    for place in range(offset, offset + count):
        document = draw(TASKS[place % len(TASKS)], seed_of("test", place), sizes[place % 3])
        turn = document.turns[place % len(document.turns)]
        pictures = [data_url(document.image)] * (0 if place % 11 == 10 else 2 if place % 13 == 12 else 1)
        found.append(body(turn.question, *pictures, max_tokens=(4, 8, 24, 64)[place % 4]))
    return found


@contextmanager
def pmod(model: Path | str, *options: object) -> Iterator[str]:
    """`pmod serve` as a process of its own; its address."""
    command = [sys.executable, "-m", "pmod_cli", "serve", "-m", str(model), "--device", "cpu", "--dtype", "float32"]
    command += ["--port", "0", *map(str, options)]
    server = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, "the server did not end as it should"
    finally:
        server.kill()


@contextmanager
def transformers_own(model: Path | str, port: int = 8431) -> Iterator[str]:
    """transformers' server; its address."""
    server = subprocess.Popen([sys.executable, "-c", TRANSFORMERS, str(model), str(port)], cwd=ROOT, env=os.environ,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        asyncio.run(_up(f"http://localhost:{port}"))
        yield f"http://localhost:{port}"
    finally:
        server.kill()
        server.wait()


async def _up(address: str) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            try:
                async with session.get(f"{address}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.1)
    raise SystemExit(f"no server at {address}")


async def ask(session: aiohttp.ClientSession, address: str, sent: dict[str, Any]) -> str:
    """The text of one answer."""
    async with session.post(address + CHAT, json=sent) as response:
        found = await response.json()
        assert response.status == 200, found
        return found["choices"][0]["message"]["content"]


async def first_token(session: aiohttp.ClientSession, address: str, sent: dict[str, Any]) -> float:
    """Seconds to the first piece with text in it."""
    started = time.perf_counter()
    async with session.post(address + CHAT, json={**sent, "stream": True}) as response:
        async for line in response.content:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - started
    raise AssertionError("the stream has no text")


async def closed_loop(address: str, clients: int, seconds: float, more: dict[str, Any]) -> dict[str, float]:
    """Each client sends its next request when it has its answer."""
    requests, taken = [{**each, **more} for each in mixed(120)], itertools.count()
    latencies: list[float] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        await ask(session, address, requests[0])
        end = time.perf_counter() + seconds

        async def client() -> None:
            while (started := time.perf_counter()) < end:
                await ask(session, address, requests[next(taken) % len(requests)])
                latencies.append(time.perf_counter() - started)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        took = time.perf_counter() - began
        alone = [await first_token(session, address, requests[place]) for place in (0, 1, 3, 4) * 5]
    latencies.sort()
    return {
        "requests_per_s": len(latencies) / took,
        "latency_p50_s": statistics.median(latencies),
        "latency_p95_s": latencies[int(0.95 * len(latencies))],
        "first_token_alone_s": statistics.median(alone),
    }


async def answers(address: str, requests: Sequence[dict[str, Any]], at_once: int) -> list[str]:
    """The answers to requests, so many in flight at a time."""
    gate = asyncio.Semaphore(at_once)
    async with aiohttp.ClientSession() as session:

        async def one(sent: dict[str, Any]) -> str:
            async with gate:
                return await ask(session, address, sent)

        return await asyncio.gather(*map(one, requests))


def main() -> None:
    """Measure and print one object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava-next")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--equal", type=int, default=200, help="mixed requests that are compared with batch 1")
    parser.add_argument("--only", choices=("batches", "one by one", "transformers"))
    options = parser.parse_args()
    ways = {
        "batches": (pmod, ("--max-batch", 16), {}),
        "one by one": (pmod, ("--max-batch", 1), {}),
        "transformers": (transformers_own, (), {"model": str(options.model)}),
    }
    found: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for name, (start, settings, more) in ways.items():
        missing = [each for each in ("fastapi", "uvicorn", "openai") if find_spec(each) is None]
        if options.only not in (None, name) or (name == "transformers" and missing):
            continue
        with start(options.model, *settings) as address:
            found[name] = asyncio.run(closed_loop(address, options.clients, options.seconds, more))
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
            if name != "transformers" and options.equal:
                at_once = 24 if name == "batches" else 1
                texts[name] = asyncio.run(answers(address, mixed(options.equal, 500), at_once))
    if len(texts) == 2:
        pairs = list(zip(*texts.values(), strict=True))
        found["equal"] = {
            "requests": len(pairs),
            "equal": sum(a == b for a, b in pairs),
            "texts": len({*texts["batches"]}),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
