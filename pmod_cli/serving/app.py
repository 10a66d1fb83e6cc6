"""The server: OpenAI's chat completions over HTTP, in front of the worker that runs the model.

An aiohttp application. Handlers read and check a request, threads decode its pictures and make its prompt, the worker
answers it; pieces come back through a queue of the handler's own.
"""

from __future__ import annotations

import asyncio
import copy
import hmac
import ipaddress
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from pmod_cli.core.errors import PmodError
from pmod_cli.evaluation.prompts import Prompt, preparing_threads
from pmod_cli.serving.chat import check_length, conversation_prompt
from pmod_cli.serving.generation import Answerer
from pmod_cli.serving.media import Media, decode
from pmod_cli.serving.metrics import Metrics
from pmod_cli.serving.requests import BadRequest, ChatRequest, parse
from pmod_cli.serving.worker import Piece, Ticket, Worker

LARGEST_BODY = 32 * 2**20  # bytes; base64 takes 4 for 3
MOST_WAITING = 4 * 2**30  # bytes of prepared prompts; while more wait, no further one is prepared
CHARACTERS_A_TOKEN = 64  # a text with more than these for each token of the context is not even tokenized
LINE_ENDS = {ord(each): f"\\u{ord(each):04x}" for each in "\x85\u2028\u2029"}  # of str.splitlines, beside \r and \n
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServeSettings:
    """How requests are taken.

    Attributes:
        name: of the model, for clients.
        max_batch: rows that are answered together.
        max_queue: requests that may wait besides; one more is answered with 429.
        max_tokens: longest answer that a client may ask for; None: as the context allows.
        api_key: what clients have to send; None: nothing.
        media: where pictures may come from.
        patience: seconds in which the body of a request has to come, and in which a client has to read on.
        local: whether only this machine may ask. Then a request names it by `localhost` or an address.
    """

    name: str
    max_batch: int = 16
    max_queue: int = 64
    max_tokens: int | None = None
    api_key: str | None = field(default=None, repr=False)
    media: Media = field(default_factory=Media)
    patience: float = 60.0
    local: bool = False


class Service:
    """One model and its requests.

    Args:
        answerer: The model; its worker is the only one that runs it.
        settings: How requests are taken.
    """

    def __init__(self, answerer: Answerer, settings: ServeSettings) -> None:
        self.answerer, self.settings, self.metrics = answerer, settings, Metrics()
        self.worker = Worker(answerer, max_batch=settings.max_batch, metrics=self.metrics)
        self._taken = 0
        self._pool = ThreadPoolExecutor(preparing_threads(), thread_name_prefix="prepare")
        self._turns = asyncio.Semaphore(preparing_threads())
        self._of_thread, self._created = threading.local(), int(time.time())

    def app(self) -> web.Application:
        """The application; its start and clean-up start and end the worker."""
        app = web.Application(middlewares=[self._errors, self._host, self._key], client_max_size=LARGEST_BODY)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._show_metrics),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.post("/v1/chat/completions", self._chat),
            ]
        )
        app.on_startup.append(self._start)
        app.on_cleanup.append(self._close)
        return app

    async def _start(self, _: web.Application) -> None:
        self.worker.start()

    async def _close(self, _: web.Application) -> None:
        await asyncio.to_thread(self.worker.close)
        self._pool.shutdown(cancel_futures=True)

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every fault as OpenAI's clients read it."""
        try:
            response = await handler(request)
        except BadRequest as error:
            response = _fault(error.what, error.status, param=error.param, code=error.code)
        except web.HTTPRequestEntityTooLarge:
            response = _fault(f"a request may have {LARGEST_BODY // 2**20} MiB", 413)
        except web.HTTPException as error:
            response = _fault(f"{request.method} {request.path:.80}: {error.reason}", error.status)
        except ConnectionError:  # nobody is there to read an answer
            raise
        except Exception as error:
            response = _fault(f"the request cannot be handled: {type(error).__name__}", 500)
        if request.path == "/v1/chat/completions":
            self.metrics.requests.labels(response.status).inc()
        return response

    @web.middleware
    async def _host(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A web page may ask here as if it were at home, once its own name leads to this machine (DNS rebinding)."""
        if self.settings.local and not _is_local(request.headers.get("Host", "localhost")):
            told = f"without --api-key this server is asked as localhost, not as {request.host!r:.80}"
            raise BadRequest(told, status=403)
        return await handler(request)

    @web.middleware
    async def _key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        key = self.settings.api_key
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if (
            key is not None
            and request.path != "/health"
            and not hmac.compare_digest(given.encode(errors="replace"), key.encode())
        ):
            raise BadRequest("the API key is missing or wrong", status=401, code="invalid_api_key")
        return await handler(request)

    async def _health(self, _: web.Request) -> web.Response:
        if self.worker.alive:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": "the model's thread has ended"}, status=503)

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.page(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: web.Request) -> web.Response:
        if (name := request.match_info["name"]) != self.settings.name:
            told = f"there is no model {name!r:.80} here, only {self.settings.name!r}"
            raise BadRequest(told, status=404, code="model_not_found")
        return web.json_response(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": self._created, "owned_by": "pmod"}

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self._taken >= self.settings.max_batch + self.settings.max_queue:
            raise BadRequest("too many requests wait already; try again later", status=429, code="queue_full")
        if request.content_type != "application/json":  # also what keeps a web page from posting here unasked
            raise BadRequest("the request is expected to have the header Content-Type: application/json", status=415)
        self._taken += 1
        came, ticket = time.perf_counter(), None
        try:
            asked = parse(await self._body(request), served=self.settings.name)
            prompt = await self._prepare(asked)
            limit = check_length(self.answerer, prompt, asked.sampling)
            limit = min(limit, self.settings.max_tokens or limit)
            pieces: asyncio.Queue[Piece] = asyncio.Queue()
            ticket = Ticket(prompt, replace(asked.sampling, max_new_tokens=limit), asked.stop, _into(pieces), came=came)
            self.worker.submit(ticket)
            answer = _Answer(self.settings.name, prompt)
            if not asked.stream:
                return await self._whole(answer, pieces)
            return await self._stream(request, answer, pieces, asked.include_usage)
        except PmodError as error:
            raise BadRequest(error.what) from None
        except (asyncio.CancelledError, ConnectionError):  # the client has left
            self.metrics.disconnects.inc()
            raise
        finally:
            self._taken -= 1
            if ticket is not None:
                self.worker.withdraw(ticket)

    async def _body(self, request: web.Request) -> bytes:
        """The body. Who sends it too slowly would keep a place that others wait for."""
        try:
            return await asyncio.wait_for(request.read(), self.settings.patience)
        except TimeoutError:
            told = f"the request's body has not come within {self.settings.patience:g} seconds"
            raise BadRequest(told, status=408) from None
        except web.RequestPayloadError:
            raise BadRequest("the request's body is not encoded as its header says") from None

    async def _prepare(self, asked: ChatRequest) -> Prompt:
        """The prompt, made in a thread; a file or an address is read here."""
        texts = sum(len(part["text"]) for each in asked.messages for part in each["content"] if part["type"] == "text")
        context = self.answerer.context
        if context is not None and texts > CHARACTERS_A_TOKEN * context:
            raise BadRequest(f"the messages have {texts:,} characters; the model takes {context:,} tokens")
        sources = [await self.settings.media.fetch(url, where) for url, where in asked.images]
        async with self._turns:
            while self.worker.bytes_waiting > MOST_WAITING:
                await asyncio.sleep(0.02)
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._encode, asked, sources)

    def _encode(self, asked: ChatRequest, sources: list) -> Prompt:
        if not hasattr(self._of_thread, "processor"):  # tokenizers are not safe to share between threads
            self._of_thread.processor = copy.deepcopy(self.answerer.processor)
        images = decode(sources, [where for _, where in asked.images])
        processor = self._of_thread.processor
        return conversation_prompt(self.answerer, asked.messages, images, processor=processor, memory=None)

    async def _whole(self, answer: _Answer, pieces: asyncio.Queue[Piece]) -> web.Response:
        text = ""
        async for piece in _until_end(pieces):
            if piece.error:
                raise BadRequest(piece.error, status=500)
            text += piece.text
        return web.json_response(answer.whole(text, piece))

    async def _stream(
        self, request: web.Request, answer: _Answer, pieces: asyncio.Queue[Piece], include_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )

        async def write(data: bytes | None) -> None:
            """Writes, or with None ends; who reads no further would keep a place that others wait for."""
            try:
                async with asyncio.timeout(self.settings.patience):
                    await (response.write_eof() if data is None else response.write(data))
            except TimeoutError:
                if request.transport is not None:
                    request.transport.abort()
                raise ConnectionError("the client does not read") from None

        await response.prepare(request)
        await write(_event(answer.chunk({"role": "assistant", "content": ""})))
        async for piece in _until_end(pieces):
            if piece.error:
                await write(_event(_error_body(piece.error, 500)))
                break
            if piece.text:
                await write(_event(answer.chunk({"content": piece.text})))
            if piece.finished:
                await write(_event(answer.chunk({}, piece.finished)))
                if include_usage:
                    await write(_event({**answer.chunk({}), "choices": [], "usage": answer.usage(piece)}))
                await write(b"data: [DONE]\n\n")
        await write(None)
        return response


class _Answer:
    """The bodies of one answer."""

    def __init__(self, model: str, prompt: Prompt) -> None:
        self._prompt = prompt
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def usage(self, last: Piece) -> dict[str, int]:
        counts = {"prompt_tokens": self._prompt.length, "completion_tokens": last.new_tokens}
        return {**counts, "total_tokens": sum(counts.values())}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": last.finished, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self.usage(last)}

    def chunk(self, delta: Mapping[str, str], finished: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finished, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def _is_local(host: str) -> bool:
    """Whether a `Host` is localhost or an address: a web page of elsewhere is there by another name."""
    try:
        name = urlsplit(f"//{host}").hostname
        return name == "localhost" or bool(ipaddress.ip_address(name or ""))
    except ValueError:
        return False


def _into(pieces: asyncio.Queue[Piece]) -> Callable[[Piece], None]:
    """Delivers from the worker's thread into a handler's queue."""
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return deliver


async def _until_end(pieces: asyncio.Queue[Piece]) -> AsyncIterator[Piece]:
    while True:
        piece = await pieces.get()
        yield piece
        if piece.finished or piece.error:
            return


def _event(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False).translate(LINE_ENDS)
    return b"data: " + text.encode(errors="replace") + b"\n\n"


def _error_body(what: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": what, "type": kind, "param": param, "code": code}}


def _fault(what: str, status: int, *, param: str | None = None, code: str | None = None) -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else None
    return web.json_response(_error_body(what, status, param, code), status=status, headers=headers)
