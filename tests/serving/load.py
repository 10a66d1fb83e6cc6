"""Load on a server with the bundled model, closed loop: requests a second, time to the first token, equal answers.

    python -m tests.serving.load --model DIR                   # in batches, one by one, and transformers' own server
    python -m tests.serving.load --model DIR --tokens 32       # the same with answers of 32 tokens each
    python -m tests.serving.load --model DIR --only batches --requests 5000 --clients 16

Needs the [serve] extra. transformers' own server needs fastapi, uvicorn and openai beside it, and is left out without
them. It runs with our class put where it looks for classes, which no user can do from its command line.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

from pmod_cli.data.documents import TASKS, draw, seed_of

ROOT = Path(__file__).parents[2]  # not of tests.conftest, which sets the number of threads
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


def data_url(picture: Image.Image) -> str:
    """A picture as requests hold it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def body(question: str, *urls: str, **more: Any) -> dict[str, Any]:
    """A request with pictures in front of a question."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **more}


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
def pmod(model: Path | str, *options: object) -> Iterator[tuple[str, int]]:
    """`pmod serve` as a process of its own; its address and process id."""
    command = [sys.executable, "-m", "pmod_cli", "serve", "-m", str(model), "--device", "cpu", "--dtype", "float32"]
    command += ["--port", "0", *map(str, options)]
    server = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield server.stdout.readline().strip(), server.pid
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, "the server did not end as it should"
    finally:
        server.kill()


@contextmanager
def transformers_own(model: Path | str, port: int = 8431) -> Iterator[tuple[str, int]]:
    """transformers' server; its address and process id."""
    server = subprocess.Popen([sys.executable, "-c", TRANSFORMERS, str(model), str(port)], cwd=ROOT, env=os.environ,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        asyncio.run(_up(f"http://localhost:{port}"))
        yield f"http://localhost:{port}", server.pid
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


def cpu_seconds(process: int) -> float:
    """What a process has taken so far, all its threads: other work on the machine does not change it much."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def closed_loop(address: str, process: int, clients: int, count: int, more: dict[str, Any]) -> dict[str, float]:
    """Each client sends its next request when it has its answer, until so many are sent."""
    requests = [{**each, **more} for each in mixed(min(count, 120))]
    left = itertools.islice(itertools.cycle(requests), count)
    latencies: list[float] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await ask(session, address, requests[0])

        async def client() -> None:
            for sent in left:
                started = time.perf_counter()
                await ask(session, address, sent)
                latencies.append(time.perf_counter() - started)

        began, cpu = time.perf_counter(), cpu_seconds(process)
        await asyncio.gather(*(client() for _ in range(clients)))
        took, cpu = time.perf_counter() - began, cpu_seconds(process) - cpu
        alone = [await first_token(session, address, requests[place]) for place in (0, 1, 3, 4)]
    latencies.sort()
    return {
        "requests": len(latencies),
        "requests_per_s": len(latencies) / took,
        "requests_per_cpu_s": len(latencies) / cpu,
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
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--tokens", type=int, help="length of all answers; the bundled model's own have three tokens")
    parser.add_argument("--equal", type=int, default=200, help="mixed requests that are compared with batch 1")
    parser.add_argument("--only", choices=("batches", "one by one", "transformers"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(endless(options.model, Path(folder)) if options.tokens else options.model, options)


def endless(model: str, folder: Path) -> str:
    """A copy of a checkpoint that ends no answer: its generation settings name an end token that it never writes."""
    shutil.copytree(model, folder / "endless")
    settings = folder / "endless" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": 3}))
    return str(folder / "endless")


def measure(model: str, options: argparse.Namespace) -> None:
    """All ways that are asked for, one after another."""
    longer = {"max_tokens": options.tokens} if options.tokens else {}
    ways = {
        "batches": (pmod, ("--max-batch", 16), longer),
        "one by one": (pmod, ("--max-batch", 1), longer),
        "transformers": (transformers_own, (), {"model": model, **longer}),
    }
    found: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for name, (start, settings, more) in ways.items():
        missing = [each for each in ("fastapi", "uvicorn", "openai") if find_spec(each) is None]
        if options.only not in (None, name) or (name == "transformers" and missing):
            continue
        with start(model, *settings) as (address, process):
            found[name] = asyncio.run(closed_loop(address, process, options.clients, options.requests, more))
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
