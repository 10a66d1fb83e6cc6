"""A server in the test's own process, and what clients send to it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pmod_cli.serving.app import ServeSettings, Service
from pmod_cli.serving.generation import Answerer
from tests import factories
from tests.model.models import pmod_model

UNKNOWN = 3  # the id of <unk>


def talkative(pmod: dict | None = None, kind: str = "llava_next", **options: Any) -> Answerer:
    """A p-MoD model with random routers, in float64: no rounding error may decide between two tokens.

    A random model may end every answer at once; this one ends it at <unk>, which is no likelier than any other word.
    """
    model = pmod_model(kind, pmod=pmod, **options).double()
    model.generation_config.eos_token_id = UNKNOWN
    return Answerer(model, factories.processor(kind))


@pytest.fixture(scope="session")
def answerer() -> Answerer:
    """One for all tests."""
    return talkative()


@pytest.fixture
def serve(answerer) -> Callable[..., Any]:
    """`serve(use, **settings)` runs `await use(client)` beside a server, and returns what it returns."""

    def run(use: Callable[[TestClient], Awaitable[Any]], *, model: Answerer = answerer, **settings: Any) -> Any:
        async def both() -> Any:
            service = Service(model, ServeSettings("tiny", **settings))
            server = TestServer(service.app())
            async with TestClient(server) as client:
                client.service = service
                return await asyncio.wait_for(use(client), 60)

        return asyncio.run(both())

    return run
