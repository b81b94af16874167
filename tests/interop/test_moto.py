"""Another server and another client agree: moto's S3 keeps what is written, and s3fs reads the bytes of a local run.

Both live in the environment of `tests.interop.test_readers`, see there. moto keeps objects in memory, so it is not
killed here but frozen; `tests.support.s3_server` is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import oocpatch
from oocpatch.storage.paths import ObjectPath
from tests.faults.test_stores_output import OPTIONS, SHAPE, assert_same, files
from tests.support.clusters import until
from tests.support.crash_child import make_volume
from tests.support.stores import SETTINGS, with_environment

S3FS = """
import json, os, s3fs, sys
fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
root = sys.argv[1]
print(json.dumps({name.removeprefix(root + "/"): fs.cat_file(name).hex() for name in fs.find(root)}))
"""


class Moto:
    """A running server."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [os.environ["OOCPATCH_READERS"], "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.endpoint = f"http://127.0.0.1:{port}"
        until(self._answers)
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/bucket", method="PUT")).close()  # noqa: S310

    def _answers(self) -> bool:
        assert self.process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(self.endpoint).close()  # noqa: S310 - http, to this host
        except OSError:
            return False
        return True


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moto]:
    found = Moto(tmp_path_factory.mktemp("moto"))
    with pytest.MonkeyPatch.context() as patch:
        with_environment(patch, **SETTINGS, AWS_ENDPOINT_URL=found.endpoint, AWS_TIMEOUT="1s")
        yield found
    found.process.kill()
    found.process.wait()


def seen_by_s3fs(key: str) -> dict[str, bytes]:
    """All objects below a key of the bucket."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [os.environ["OOCPATCH_READERS"], "-c", S3FS, f"bucket/{key}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: bytes.fromhex(content) for name, content in json.loads(done.stdout).items()}


@pytest.mark.readers
def test_a_server_that_freezes_midway_keeps_the_bytes_of_a_local_run(moto: Moto, tmp_path: Path) -> None:
    make_volume(tmp_path / "volume.zarr", SHAPE, (8, 8))
    volume = ObjectPath.of("s3://bucket/data/volume.zarr")
    for name, content in files(tmp_path / "volume.zarr").items():
        (volume / name).write_bytes(content)
    count = 0

    def model(patches: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 5:
            moto.process.send_signal(signal.SIGSTOP)
            threading.Timer(2.5, moto.process.send_signal, [signal.SIGCONT]).start()
        return patches * 2

    there = oocpatch.predict(volume.url, model, "s3://bucket/results/out.zarr", **OPTIONS)
    here = oocpatch.predict(volume.url, model, tmp_path / "out", **OPTIONS)
    assert there.identical(here)
    assert_same(seen_by_s3fs("results/out.zarr"), files(tmp_path / "out"))
    assert oocpatch.verify("s3://bucket/results/out.zarr").passed
    assert [name for name in ObjectPath.of("s3://bucket").files() if "oocpatch" in name] == [
        "results/out.zarr/prediction/oocpatch.ledger"
    ]


@pytest.mark.readers
def test_of_two_that_find_a_lock_only_one_has_it(moto: Moto) -> None:
    lock = ObjectPath.of("s3://bucket/some/lock")
    assert [lock.put_if(content, None) for content in (b"a", b"b", b"a")] == [True, False, True]
    state = lock.state()
    assert state is not None
    content, tag, _ = state
    assert content == b"a"
    assert tag.strip('"') == hashlib.md5(b"a", usedforsecurity=False).hexdigest()
    assert [lock.put_if(content, tag) for content in (b"c", b"d")] == [True, False]
    assert not ObjectPath.of("s3://bucket/some/other").put_if(b"c", tag)
    assert list(ObjectPath.of("s3://bucket/some/loc").siblings("lock")) == [lock]
    lock.unlink()
    lock.unlink(missing_ok=True)
    assert lock.state() is None
