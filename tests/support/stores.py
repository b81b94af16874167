"""A server of objects for a test to kill and to break, with a bucket in it, and what is in the bucket."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from oocpatch.storage import object_store as objects
from tests.support.children import Children, report
from tests.support.crash_child import Job
from tests.support.s3_server import KEY_ID

ROOT = Path(__file__).parents[2]
BUCKET = "bucket"


class Bucket:
    """A running server with one bucket, and how to misbehave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._objects = folder / "buckets" / BUCKET
        self._objects.mkdir(parents=True)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start the server, on the same port as before."""
        command = [sys.executable, "-m", "tests.support.s3_server", str(self.folder), str(self.port)]
        self._server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        self.port = int(self._server.stdout.readline())

    def kill(self) -> None:
        """End the server as a power cut would; what it has is on disk."""
        self._server.send_signal(signal.SIGKILL)
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def signal(self, number: int) -> None:
        """Freeze or thaw the server."""
        self._server.send_signal(number)

    def outage(self, connections: int = 3) -> None:
        """Kill the server; begin to start it again when so many connections were made in vain."""
        self.kill()
        deaf = socket.create_server(("127.0.0.1", self.port))

        def wait() -> None:
            for _ in range(connections):
                deaf.accept()[0].close()
            deaf.close()
            self.start()

        self._restart = threading.Thread(target=wait, daemon=True)
        self._restart.start()

    def back(self) -> None:
        """Wait for the end of an outage."""
        self._restart.join(60)
        assert not self._restart.is_alive(), "nobody tried to connect while the server was away"

    def behave(self, **settings: Any) -> None:
        """Tell the server how to answer from now on; see `tests.support.s3_server`."""
        aside = self.folder / "control.new"
        aside.write_text(json.dumps(settings))
        aside.replace(self.folder / "control")

    def url(self, key: str) -> str:
        return f"s3://{BUCKET}/{key}"

    def web(self, key: str) -> str:
        return f"http://127.0.0.1:{self.port}/{BUCKET}/{key}"

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """All objects whose names begin with a prefix, by the rest of their names."""
        files = {unquote(file.name): file for file in self._objects.iterdir()}
        return {n.removeprefix(prefix): files[n].read_bytes() for n in sorted(files) if n.startswith(prefix)}

    def digests(self, prefix: str) -> dict[str, str]:
        """As `objects`, with their digests."""
        return {n: hashlib.sha256(content).hexdigest() for n, content in self.objects(prefix).items()}

    def put(self, key: str, content: bytes) -> None:
        (self._objects / quote(key, safe="")).write_bytes(content)

    def delete(self, key: str) -> None:
        (self._objects / quote(key, safe="")).unlink()

    def age(self, key: str, seconds: float) -> None:
        """Let an object be as old as that."""
        then = time.time() - seconds
        os.utime(self._objects / quote(key, safe=""), (then, then))

    def upload(self, folder: Path, key: str) -> str:
        """Put all files of a folder under a key; its URL."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return self.url(key)

    def changes(self) -> int:
        """How many requests that change something were answered so far."""
        return len([line for line in self.requests() if not line.startswith(("GET", "HEAD"))])

    def requests(self, verb: str = "") -> list[str]:
        """What was asked for so far: verb, path, status."""
        log = self.folder / "log"
        return [line for line in log.read_text().splitlines() if line.startswith(verb)] if log.exists() else []


def killed_before(children: Children, bucket: Bucket, job: Job, change: int) -> bool:
    """Run a job that is killed before a change of what is in the bucket; whether it was."""
    pid_file = bucket.folder / f"{uuid.uuid4().hex}.pid"
    bucket.behave(kill=str(pid_file), before=change)
    pid = children.start(job)
    pid_file.with_suffix(".new").write_text(str(pid))
    pid_file.with_suffix(".new").rename(pid_file)
    code = children.wait(pid)
    bucket.behave()
    assert code in {0, -signal.SIGKILL}, report(job)
    return code != 0


SETTINGS = {
    "AWS_ACCESS_KEY_ID": KEY_ID,
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@contextmanager
def served(folder: Path) -> Iterator[Bucket]:
    """A bucket, and the environment that leads to it."""
    found = Bucket(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {**SETTINGS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}"}.items():
            patch.setenv(name, value)
        objects._client.cache_clear()
        try:
            yield found
        finally:
            objects._client.cache_clear()
            found.kill()


def with_environment(patch: pytest.MonkeyPatch, **settings: str | None) -> None:
    """Change the environment that clients are made of, until what was patched is put back."""
    for name, value in settings.items():
        if value is None:
            patch.delenv(name)
        else:
            patch.setenv(name, value)
    # Clients of the old environment stay with it, and those of the new one go with it.
    patch.setattr(objects, "_client", functools.lru_cache(objects._client.__wrapped__))
