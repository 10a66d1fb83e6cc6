"""`pmod serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pmod_cli.commands import common
from pmod_cli.core import output
from pmod_cli.core.errors import PmodError, require

EXAMPLES = """\
pmod serve
pmod serve --model ./checkpoints/llava-next-7b-pmod --port 8000 --max-batch 16
pmod serve --media-root ./pictures --max-queue 100
pmod serve --host 0.0.0.0 --api-key "$KEY"
"""
_listen = common.option_under("Where it listens")
_take = common.option_under("What it takes")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: common.ModelOpt = None,
    host: Annotated[str, _listen(metavar="HOST", help="Address; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, _listen(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        _listen(
            metavar="KEY",
            envvar="PMOD_API_KEY",
            help="What clients have to send. The variable does not show in the list of processes.",
        ),
    ] = None,
    drain: Annotated[
        float, _listen(min=0, metavar="SECONDS", help="How long requests in progress may take after SIGTERM.")
    ] = 60.0,
    max_batch: Annotated[int, _take(min=1, max=1024, metavar="N", help="Requests that are answered together.")] = 16,
    max_queue: Annotated[int, _take(min=0, metavar="N", help="Requests that may wait; one more gets a 429.")] = 64,
    max_tokens: Annotated[
        int | None,
        _take(min=1, metavar="N", help="Longest answer. (default: as the context allows)", show_default=False),
    ] = None,
    media_root: Annotated[
        Path | None,
        _take(metavar="DIR", help="Folder whose pictures a request may name. (default: none)", show_default=False),
    ] = None,
    allow_urls: Annotated[
        bool, _take("--allow-urls", help="Fetch http(s) pictures: whoever may ask can make this machine fetch.")
    ] = False,
    name: Annotated[
        str | None, _take(metavar="NAME", help="What clients call the model. (default: its own)", show_default=False)
    ] = None,
    device: common.DeviceOpt = "auto",
    dtype: common.DtypeOpt = "auto",
    revision: common.RevisionOpt = None,
    offline: common.OfflineOpt = False,
    cache_dir: common.CacheDirOpt = None,
    quiet: common.QuietOpt = False,
) -> None:
    """Serve a model: /v1/chat/completions with pictures, /v1/models, /health and /metrics.

    Requests that come together are answered together, each as it would be alone. SIGTERM or Ctrl-C ends the server
    when the requests in progress are answered.
    """
    require("serve", "aiohttp", "prometheus_client")
    if media_root is not None and not media_root.is_dir():
        raise PmodError(f"--media-root {media_root}: there is no such folder")
    if api_key is not None and not api_key.strip():
        raise PmodError("the API key is empty", hint="leave --api-key out, or give one")
    api_key = None if api_key is None else api_key.strip()  # a key from a file ends in a newline
    if host not in LOOPBACK and api_key is None:
        output.warn(f"whoever reaches {host} may ask: --api-key demands a key")
    from pmod_cli import checkpoints
    from pmod_cli.commands import serve_run

    chosen = common.model_or_default(model)
    found = checkpoints.resolve(chosen, revision=revision, offline=offline, cache_dir=cache_dir)
    serve_run.run(
        found,
        name or found.alias or found.repo or found.path.resolve().name,
        device=common.pick_device(device),
        dtype=dtype,
        host=host,
        port=port,
        drain=drain,
        taking={
            "max_batch": max_batch,
            "max_queue": max_queue,
            "max_tokens": max_tokens,
            "api_key": api_key,
            "local": host in LOOPBACK and api_key is None,
        },
        media_root=media_root,
        allow_urls=allow_urls,
    )
