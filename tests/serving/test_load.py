"""The server under load, as a process of its own, with the bundled model: nobody notices anybody."""

import asyncio
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import ClientSession

from pmod_cli import checkpoints
from pmod_cli.evaluation.prompts import collate
from pmod_cli.model import PmodSettings
from pmod_cli.serving.chat import conversation_prompt
from pmod_cli.serving.generation import Answerer
from pmod_cli.serving.media import Media, decode
from pmod_cli.serving.requests import parse
from tests.serving.load import CHAT, answers, mixed, pmod

SOAK_SECONDS = float(os.environ.get("PMOD_SOAK_SECONDS", "600"))


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """The bundled model with routers that are no zeros, so that no two tokens tie."""
    folder = tmp_path_factory.mktemp("load") / "routed"
    checkpoints.convert(checkpoints.bundled_path(), folder, PmodSettings(schedule="cosine"))
    model, _ = checkpoints.load_model(folder, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".router.weight" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    model.config.router_state = "trained"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(routed) -> Iterator[str]:
    with pmod(routed, "--max-batch", 8, "--max-queue", 64) as (found, _):
        yield found


@pytest.mark.slow
def test_mixed_requests_are_answered_as_by_generate(routed, address):
    """In float32, 24 at once; beside `generate` of transformers on one prompt at a time."""
    requests = mixed(200)
    together = asyncio.run(answers(address, requests, at_once=24))
    answerer = Answerer(*checkpoints.load_model(routed, dtype="float32"))
    alone = [generated(answerer, sent) for sent in requests]
    assert together == alone
    assert len(set(together)) > 20


def generated(answerer: Answerer, sent: dict) -> str:
    """The text that transformers' own loop gives for a request."""
    asked = parse(json.dumps(sent).encode(), served="routed")
    pictures = decode(
        [asyncio.run(Media().fetch(url, where)) for url, where in asked.images], ["" for _ in asked.images]
    )
    inputs = collate([conversation_prompt(answerer, asked.messages, pictures)], answerer.pad_id)
    with torch.inference_mode():
        ids = answerer.model.generate(**inputs, max_new_tokens=asked.sampling.max_new_tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return answerer.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_clients_that_are_cut_off_harm_nobody(address):
    """Twenty connections break while their answers come; ten others get theirs."""
    stays, leaves = mixed(10), [{**sent, "max_tokens": 400, "stream": True} for sent in mixed(20, offset=40)]

    async def cut(session: ClientSession, sent: dict) -> None:
        response = await session.post(address + CHAT, json=sent)
        await response.content.readline()
        response.close()  # the connection, not the answer

    async def both() -> tuple[list[str], list[str], str]:
        alone = await answers(address, stays, at_once=1)
        async with ClientSession() as session:
            together, *_ = await asyncio.gather(answers(address, stays, 10), *(cut(session, sent) for sent in leaves))
            for _ in range(600):  # rows of those who left go at their next token
                async with session.get(f"{address}/metrics") as response:
                    metrics = await response.text()
                if "pmod_requests_running 0.0" in metrics and "pmod_requests_waiting 0.0" in metrics:
                    break
                await asyncio.sleep(0.1)
        return alone, together, metrics

    alone, together, metrics = asyncio.run(both())
    assert together == alone
    assert "pmod_requests_running 0.0" in metrics
    assert "pmod_kv_cache_bytes 0.0" in metrics


@pytest.mark.soak
def test_hours_of_questions_leave_no_trace(routed):
    """At the concurrency where the server is full, with OpenAI's own client: nothing is lost, memory stays flat."""
    openai = pytest.importorskip("openai", reason="pip install openai: the client that this test is about")
    counts = {"answered": 0, "queue_full": 0}
    requests = mixed(160)

    async def client(address: str, first: int, end: float) -> None:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=None) as api:
            for place in itertools.count(first):
                if time.monotonic() > end:
                    return
                sent = requests[place % len(requests)]
                try:
                    found = await api.chat.completions.create(model="routed", **sent)
                except openai.RateLimitError:
                    counts["queue_full"] += 1
                    await asyncio.sleep(1)  # as `Retry-After` says
                else:
                    assert found.choices[0].finish_reason in ("stop", "length")
                    counts["answered"] += 1

    async def clients(address: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(address, 10 * number, end) for number in range(16)))

    with pmod(routed, "--max-batch", 8, "--max-queue", 4) as (address, process):
        asyncio.run(clients(address, SOAK_SECONDS / 4))  # caches and arenas fill
        before = resident(process)
        asyncio.run(clients(address, 3 * SOAK_SECONDS / 4))
        after = resident(process)
    print(f"{counts}; resident {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB")
    assert counts["answered"] > 16
    assert counts["queue_full"] > 0
    assert after < 1.1 * before


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
