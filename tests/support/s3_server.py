"""An object store that speaks the part of S3's protocol that is needed, for tests to kill, to start again and to break.

Run as a process: `python -m tests.support.s3_server FOLDER PORT`. Objects are files of the folder, put in place by
renaming, so that they survive the process. How it misbehaves is read from `FOLDER/control` before each
request. It keeps a log of requests. Signatures are not checked; only the name of the key in them is.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 7
"""Keys per page of a listing: few, so that pages are turned."""
KEY_ID = "tester"
"""Access key that everything is allowed to; requests without a signature may only read."""


class Server(ThreadingHTTPServer):
    """The server, and what its requests share."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        self.lock = threading.Lock()
        self.count = 0
        self.changes = Counter[str]()

    def misbehaviour(self, *, changes: bool) -> dict[str, Any]:
        """How to misbehave at this request: `every` so many requests, `status` to answer, or `drop` the connection.

        Or `kill` the process whose number is in a file, before the change numbered `before`, counted from 0.
        """
        try:
            found: dict[str, Any] = json.loads((self.folder / "control").read_text())
        except FileNotFoundError:
            return {}
        with self.lock:
            if "kill" in found:
                number = self.changes[found["kill"]]
                self.changes[found["kill"]] += changes
                return found if changes and number == found["before"] else {}
            self.count += 1
            return found if self.count % found.get("every", 1) == 0 else {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients come and go."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def handle_one_request(self) -> None:
        """Read a request, and answer it or not."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.misbehaviour(changes=self.command not in ("GET", "HEAD"))
        late = fault.get("drop") == "late"
        if "kill" in fault:
            end(Path(fault["kill"]))
        if "kill" in fault or (fault.get("drop") and not late):
            self.close_connection = True
            return
        status, headers, data = self._fault(fault["status"]) if "status" in fault else self._answer(body)
        with self.server.lock, (self.server.folder / "log").open("a") as log:
            log.write(f"{self.command} {self.path} {status}\n")
        if late:  # done, but nobody is told
            self.close_connection = True
            return
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def _fault(self, status: int, code: str = "SlowDown") -> tuple[int, dict[str, str], bytes]:
        text = f"<Error><Code>{code}</Code><Message>{HTTPStatus(status).phrase}</Message></Error>"
        return status, {"Content-Type": "application/xml"}, text.encode()

    def _answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path.lstrip("/")).partition("/")
        signed = self.headers.get("Authorization")
        stranger = signed is not None and f"Credential={KEY_ID}/" not in signed
        if stranger or (signed is None and self.command not in ("GET", "HEAD")):
            return self._fault(403, "AccessDenied")
        folder = self.server.folder / "buckets" / bucket
        if not folder.is_dir():
            return self._fault(404, "NoSuchBucket")
        with self.server.lock:
            return self._do(folder, key, query, body)

    def _do(self, folder: Path, key: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        file, verb = folder / quote(key, safe=""), self.command
        if verb == "GET" and not key:
            return self._list(folder, query)
        if verb in ("GET", "HEAD"):
            return self._get(file)
        if verb == "PUT":
            return self._put(file, body)
        if verb == "POST" and "delete" in query:
            return self._delete(folder, body)
        if verb != "DELETE":
            return self._fault(501, "NotImplemented")
        file.unlink(missing_ok=True)
        return 204, {}, b""

    def _get(self, file: Path) -> tuple[int, dict[str, str], bytes]:
        try:
            data, modified = file.read_bytes(), file.stat().st_mtime
        except FileNotFoundError:
            return self._fault(404, "NoSuchKey")
        headers = {"ETag": etag(data), "Last-Modified": email.utils.formatdate(modified, usegmt=True)}
        if self.command == "HEAD":
            return 200, {**headers, "Content-Length": str(len(data))}, b""
        if found := self.headers.get("Range"):
            first, _, last = found.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]
        return 200, headers, data

    def _put(self, file: Path, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.headers.get("If-None-Match") == "*" and file.exists():
            return self._fault(412, "PreconditionFailed")
        wanted = self.headers.get("If-Match")
        if wanted and (not file.exists() or etag(file.read_bytes()) != wanted):
            return self._fault(412, "PreconditionFailed")
        aside = self.server.folder / "aside" / uuid.uuid4().hex
        aside.write_bytes(body)
        aside.replace(file)
        return 200, {"ETag": etag(body)}, b""

    def _delete(self, folder: Path, body: bytes) -> tuple[int, dict[str, str], bytes]:
        keys = [part.partition("</Key>")[0] for part in body.decode().split("<Key>")[1:]]
        for key in keys:
            (folder / quote(key, safe="")).unlink(missing_ok=True)
        deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return 200, {"Content-Type": "application/xml"}, f"<DeleteResult>{deleted}</DeleteResult>".encode()

    def _list(self, folder: Path, query: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after") or ""
        entries: dict[str, bool] = {}
        for key in sorted(unquote(file.name) for file in folder.iterdir()):
            if key.startswith(prefix):
                rest = key[len(prefix) :]
                shared = bool(delimiter) and delimiter in rest
                entries[prefix + rest.partition(delimiter)[0] + delimiter if shared else key] = shared
        names = [name for name in entries if name > after]
        page = names[: min(PAGE, int(query.get("max-keys", PAGE)))]
        elements = []
        for name in page:
            if entries[name]:
                elements.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
                continue
            with contextlib.suppress(FileNotFoundError):
                data = (folder / quote(name, safe="")).read_bytes()
                elements.append(
                    f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{escape(etag(data))}</ETag><Size>{len(data)}</Size></Contents>"
                )
        more = len(names) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        text = (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>{str(more).lower()}'
            f"</IsTruncated>{token}{''.join(elements)}</ListBucketResult>"
        )
        return 200, {"Content-Type": "application/xml"}, text.encode()


def end(pid_file: Path) -> None:
    """Kill the process whose number is in a file, or is about to be."""
    while not pid_file.exists():
        time.sleep(0.001)
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    (folder / "aside").mkdir(parents=True, exist_ok=True)
    with Server(folder, port) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever(poll_interval=0.05)


if __name__ == "__main__":
    main()
