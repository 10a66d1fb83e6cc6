"""Pictures of a request: data in the request itself; files below one folder, and web addresses, only where allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL.Image import Image

from pmod_cli.core.errors import PmodError
from pmod_cli.core.images import MOST_PIXELS, image_size, in_data_url, load_image
from pmod_cli.serving.requests import BadRequest

LARGEST = 20_000_000  # bytes of one picture from a web address
PATIENCE = 20  # seconds for one
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,18}):")


@dataclass(frozen=True)
class Media:
    """Where pictures may come from, besides the request.

    Attributes:
        root: folder whose files may be read; None: none.
        urls: whether web addresses are fetched.
    """

    root: Path | None = None
    urls: bool = False

    async def fetch(self, url: str, where: str) -> bytes | Path:
        """The encoded bytes of a picture, or its file. Nothing is decoded.

        Raises:
            BadRequest: It is none that may be read.
        """
        found = _SCHEME.match(url)
        scheme = found[1].lower() if found else ""
        if scheme == "data":
            try:
                return in_data_url(url)
            except ValueError as error:
                raise BadRequest(f"{where}: {error}", param=where) from None
        if scheme in ("http", "https"):
            if not self.urls:
                raise BadRequest(f"{where}: this server fetches no URLs; send the picture as a data URL", param=where)
            return await _from_web(url, where)
        if scheme not in ("", "file"):
            raise BadRequest(f"{where}: a URL begins with data:, file:// or http(s)://, not {scheme}:", param=where)
        return self._file(url, where)

    def _file(self, url: str, where: str) -> Path:
        if self.root is None:
            raise BadRequest(f"{where}: this server reads no files; send the picture as a data URL", param=where)
        root = self.root.resolve()
        outside = BadRequest(f"{where}: the file is not there, or outside the folder that may be read", param=where)
        try:
            name = unquote(urlsplit(url).path) if url.lower().startswith("file:") else url
            path = (root / name).resolve()  # links are followed first
            if not path.is_relative_to(root) or not path.is_file():
                raise outside
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
            raise outside from None
        return path


def decode(sources: Sequence[bytes | Path], places: Sequence[str]) -> list[Image]:
    """The pictures of a request as every verb opens them.

    Raises:
        BadRequest: One is no picture, or they are too large together.
    """
    pictures, pixels = [], 0
    for source, where in zip(sources, places, strict=True):
        try:
            width, height = image_size(source, f"{where}: the picture")
            pixels += width * height
            if pixels > MOST_PIXELS:
                raise BadRequest(f"the pictures of a request may have {MOST_PIXELS // 10**6} megapixels", param=where)
            pictures.append(load_image(source, f"{where}: the picture").pixels)
        except PmodError as error:
            raise BadRequest(error.what, param=where) from None
    return pictures


async def _from_web(url: str, where: str) -> bytes:
    import aiohttp

    try:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url, max_redirects=3) as response:
            if response.status != 200:
                raise BadRequest(f"{where}: the URL answers with status {response.status}", param=where)
            data = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > LARGEST:
                    raise BadRequest(f"{where}: the URL gives more than {LARGEST // 10**6} MB", param=where)
            return bytes(data)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise BadRequest(f"{where}: the URL cannot be fetched ({type(error).__name__})", param=where) from None
