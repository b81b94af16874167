"""Serve a result to neuroglancer's own client, in a browser of this machine: pages, and files of the Zarr directories.

```text
 /v/<token>/...               the client, from the package neuroglancer
 /events/<token>              says nothing, and stays open: the client asks whether somebody is there
 /data/<token>/<layer>/...    files of the directory of a layer
```

It listens on 127.0.0.1 only. The token is new each time and in every address, so that neither other users of the
machine nor pages from elsewhere can ask for anything; whoever asks by another name than this machine's is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import posixpath
import re
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from oocpatch.visualization.scene import Layer, state_of

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
HOSTS = frozenset({"127.0.0.1", "localhost"})
ALIVE_SECONDS = 15.0


def client_folder() -> Path:
    """Where the client's files are.

    Raises:
        ValueError: when the package is not installed.
    """
    spec = importlib.util.find_spec("neuroglancer")  # found, not imported: its own server is not needed
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place, "static", "client")
        if (folder / "index.html").is_file():
            return folder
    raise ValueError("serving needs neuroglancer's client: pip install 'oocpatch[serve]'")


def file_in(folder: Path, path: str) -> Path | None:
    """The file of a directory that a decoded path names; None when it is none, or lies elsewhere.

    >>> file_in(Path("/"), "etc/../etc/passwd") is None, file_in(Path("/proc"), "version")
    (True, PosixPath('/proc/version'))
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        return None
    found = Path(os.path.realpath(folder.joinpath(*parts)))
    inside = found.is_relative_to(os.path.realpath(folder))  # also when a link leads out
    return found if inside and found.is_file() else None


def part_of(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte that a `Range` asks for; None: all.

    Raises:
        ValueError: when there are no such bytes.

    >>> part_of("bytes=2-5", 10), part_of("bytes=-3", 10), part_of("bytes=8-99", 10), part_of(None, 10)
    ((2, 5), (7, 9), (8, 9), None)
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        first, last = max(0, size - int(found[2])), size - 1
    else:
        first, last = int(found[1]), min(size - 1, int(found[2] or size - 1))
    if first > last:
        raise ValueError(f"a range must lie in the {size} bytes of the file, got {header}")
    return first, last


class Server(ThreadingHTTPServer):
    """Serves layers; `url` shows them.

    Args:
        layers: what to show.
        port: to listen on; 0: any that is free.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, layers: list[Layer], port: int = 0) -> None:
        self.token = secrets.token_urlsafe(16)
        self.stopped = threading.Event()
        self.client = client_folder()
        self.folders = {str(number): layer.folder for number, layer in enumerate(layers)}
        super().__init__(("127.0.0.1", port), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        data = f"{self.address}/data/{self.token}"
        places = (f"{number}/{quote(layer.inside)}".rstrip("/") for number, layer in enumerate(layers))
        sources = [f"{data}/{place}/|{_format(layer)}:" for place, layer in zip(places, layers, strict=True)]
        state = json.dumps(state_of(layers, sources), separators=(",", ":"))
        self.url = f"{self.address}/v/{self.token}/#!{quote(state, safe='')}"

    def server_close(self) -> None:
        self.stopped.set()
        super().server_close()


def _format(layer: Layer) -> str:
    place = layer.folder / layer.inside
    return "zarr3" if (place / "zarr.json").exists() else "zarr2"


def serve(server: Server, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        server: what to serve.
        ready: is told the address.
    """
    with server:
        ready(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "oocpatch", ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        """Say nothing: a viewer asks for thousands of files, and many of them need not be there."""

    def _answer(self, *, body: bool) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        parts = urlsplit(self.path).path.split("/", 3)
        what, token, rest = (unquote(part) for part in [*parts[1:], "", "", ""][:3])
        if host not in HOSTS or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
        elif what == "events":
            self._wait()
        elif what == "v":
            self._send(file_in(self.server.client, rest or "index.html"), body=body)
        else:
            layer, _, path = rest.partition("/")
            folder = self.server.folders.get(layer) if what == "data" else None
            self._send(None if folder is None else file_in(folder, path), body=body)

    def _send(self, file: Path | None, *, body: bool) -> None:
        if file is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        try:
            opened = file.open("rb")
        except OSError:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with opened:
            size = os.fstat(opened.fileno()).st_size
            try:
                part = part_of(self.headers.get("Range"), size)
            except ValueError:
                self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}"})
                return
            first, last = part or (0, size - 1)
            self.send_response(HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Type", TYPES.get(posixpath.splitext(file.name)[1], "application/octet-stream"))
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Cache-Control", "no-cache")  # a run may still be writing
            if part is not None:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if body:
                self._copy(opened, first, last - first + 1)

    def _copy(self, file: BinaryIO, first: int, count: int) -> None:
        try:
            file.seek(first)
            if count < 1 << 20:
                self.wfile.write(file.read(count))
            else:
                while count > 0 and (piece := file.read(min(count, 1 << 20))):
                    self.wfile.write(piece)
                    count -= len(piece)
        except ConnectionError:  # the viewer has scrolled on
            self.close_connection = True

    def _wait(self) -> None:
        """Keep a stream of events open that has none."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.wfile.write(b":\n\n")
            while not self.server.stopped.wait(ALIVE_SECONDS):
                self.wfile.write(b":\n\n")
        except ConnectionError:
            return

    def _refuse(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
