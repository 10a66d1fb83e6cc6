"""A hub on this machine: repositories that are folders, over the part of the Hugging Face hub's protocol that is read.

The client is the real one of `huggingface_hub`, pointed here by `HF_ENDPOINT`. The server remembers what it was asked,
and can fail as a network does: answer late, break off in the middle of a file, refuse, send other bytes than it
announces.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = (".safetensors", ".bin", ".parquet")  # what a hub keeps apart, under its SHA-256


@dataclass
class Hub:
    """Repositories by kind (`models`, `datasets`) and name, each a folder a revision.

    Attributes:
        endpoint: For `HF_ENDPOINT`.
        asked: Method, path and range of each request.
        gated: Repositories that are refused without a token.
        cut: Bytes of a file that are sent before each answer with it breaks off.
        damaged: Files whose last byte is sent wrong.
        late: Seconds before each answer that is no file.
    """

    endpoint: str = ""
    folders: dict[tuple[str, str], dict[str, Path]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    late: float = 0.0

    def add(self, kind: str, name: str, folder: Path, revision: str = "main") -> None:
        """Publish a folder as it is when it is asked for."""
        self.folders.setdefault((kind, name), {})[revision] = folder

    def find(self, kind: str, name: str, revision: str) -> tuple[Path, str] | None:
        """Folder and commit of a revision, which may be named by its commit too."""
        known = {r: (folder, _commit(folder)) for r, folder in self.folders.get((kind, name), {}).items()}
        return known.get(revision) or next((found for found in known.values() if found[1] == revision), None)

    def files_sent(self) -> list[str]:
        """The files that were asked for with their bytes, each as often as it was."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers on loopback for as long as this lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _commit(folder: Path) -> str:
    return hashlib.sha1(
        "".join(f"{name}{entry['oid']}" for name, entry in _entries(folder).items()).encode()
    ).hexdigest()


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of a folder as a listing of the hub has them."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content, name = file.read_bytes(), file.relative_to(folder).as_posix()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        found[name] = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            found[name]["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}
    return found


class _Handler(BaseHTTPRequestHandler):
    """Answers for `hub`, one connection a request."""

    hub: Hub

    def log_message(self, *_: object) -> None:
        """Nothing: `asked` has it."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        listed = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path
        )
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if path == "/":
            self._json({})
        elif listed:
            time.sleep(self.hub.late)
            kind, name, what, revision, below = listed.groups()
            self._listing(kind, name, what or "revision", revision or "main", below or "", parse_qs(url.query))
        elif file:
            kind, name, revision, rest = file.groups()
            self._file("datasets" if kind else "models", name, revision, rest)
        else:
            self._refuse(404, "EntryNotFound", f"{path} is none of the addresses that are read")

    def _found(self, kind: str, name: str, revision: str) -> tuple[Path, str] | None:
        if name in self.hub.gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo", f"Access to {name} is restricted.")
        elif (kind, name) not in self.hub.folders:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif not (found := self.hub.find(kind, name, revision)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found
        return None

    def _listing(self, kind: str, name: str, what: str, revision: str, below: str, query: dict[str, list[str]]) -> None:
        if (found := self._found(kind, name, revision)) is None:
            return
        folder, commit = found
        entries = _entries(folder)
        if what == "revision":
            files = [
                {"rfilename": file, "size": entry["size"], "blobId": entry["oid"]}
                | ({"lfs": entry["lfs"]} if "lfs" in entry else {})
                for file, entry in entries.items()
            ]
            self._json({"id": name, "sha": commit, "private": False, "siblings": files, "tags": []})
            return
        folders = {parent.as_posix() for file in entries for parent in Path(file).parents} - {"."}
        everything = [{"type": "directory", "path": one, "size": 0, "oid": "0" * 40} for one in sorted(folders)]
        everything += list(entries.values())
        if what == "paths-info":
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length).decode()
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            self._json([entry for entry in everything if entry["path"] in wanted])
            return
        inside = [entry for entry in everything if entry["path"].startswith(f"{below}/" if below else "")]
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            inside = [e for e in inside if "/" not in e["path"][len(below) :].strip("/")]
        self._json(inside)

    def _file(self, kind: str, name: str, revision: str, file: str) -> None:
        if (found := self._found(kind, name, revision)) is None:
            return
        folder, commit = found
        entry = _entries(folder).get(file)
        if entry is None:
            self._refuse(404, "EntryNotFound", f"{file} does not exist")
            return
        content = (folder / file).read_bytes()
        if file in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        begin = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        tag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = begin + self.hub.cut.get(file, len(content))
        self.wfile.write(content[begin:end])
        self.close_connection = True

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()
