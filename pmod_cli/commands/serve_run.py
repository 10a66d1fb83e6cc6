"""What `pmod serve` does once its options are checked: loads the model, listens, and ends when it is told to."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from pmod_cli.checkpoints import load_model, router_state, toy
from pmod_cli.commands import common
from pmod_cli.core import output
from pmod_cli.core.errors import RUN_FAILED, PmodError
from pmod_cli.serving.app import ServeSettings, Service
from pmod_cli.serving.generation import Answerer
from pmod_cli.serving.media import Media

if TYPE_CHECKING:
    from pmod_cli.checkpoints import Resolved


def run(
    found: Resolved,
    name: str,
    *,
    device: str,
    dtype: str,
    host: str,
    port: int,
    drain: float,
    taking: dict[str, Any],
    media_root: Path | None,
    allow_urls: bool,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then until the requests in progress are answered.

    Raises:
        PmodError: the address cannot be taken.
    """
    model, processor = load_model(found.path, dtype=dtype, device=device)
    if (state := router_state(found.path)) != "stock":
        common.warn_of_ties([(state, model.config.settings.selection)])
    if toy.is_toy(model.config):
        output.note(f"this is {toy.NOTE}")
    settings = ServeSettings(name, media=Media(media_root, allow_urls), **taking)
    service = Service(Answerer(model, processor), settings)

    def ready(address: str) -> None:
        output.note(f"serving {name}; POST {address}/v1/chat/completions")
        output.print_line(address)
        output.stdout.file.flush()

    asyncio.run(_serve(service, host, port, drain, ready))


async def _serve(service: Service, host: str, port: int, drain: float, ready: Callable[[str], None]) -> None:
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # else a traceback for whoever speaks no HTTP
    # A handler is cancelled when its client leaves: then its row leaves the batch.
    # aiohttp waits twice for its handlers, each time as long as it is told; told 0, for ever, and it counts to no inf.
    half = min(max(drain / 2, 0.001), 1e9)
    runner = web.AppRunner(service.app(), handler_cancellation=True, access_log=None, shutdown_timeout=half)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise PmodError(
                f"{host}:{port} cannot be listened on ({error.strerror or error})",
                hint="`port=0`" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "`host=127.0.0.1`",
                code=RUN_FAILED,
            ) from error
        at, taken = runner.addresses[0][:2]
        ready(f"http://{f'[{at}]' if ':' in at else at}:{taken}")
        await _told_to_stop()
        output.note("stopping: no new requests are taken, those in progress are answered")
    finally:
        await runner.cleanup()


async def _told_to_stop() -> None:
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait, nor raise in all that still goes on
