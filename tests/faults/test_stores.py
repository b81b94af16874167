"""Promises on object stores: a volume there is as good as one on disk, and its faults are waited out or told.

The server is `tests.support.s3_server`, a process that keeps objects on disk; the client is the real one.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
import zarr

import oocpatch
from oocpatch.planning.box import Box
from oocpatch.storage import object_store as objects
from tests.conftest import Command
from tests.support.children import file_digests
from tests.support.stores import Bucket, served, with_environment
from tests.without_linux import needs_fork

DATA = np.arange(1, 24 * 32 + 1, dtype=np.float32).reshape(24, 32)
ODD = "a name/with #1 50% %20 ü & <more>?.zarr"
"""As the names of objects may be."""
OPTIONS = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 4, "progress": False}


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with served(tmp_path / "server") as found:
        yield found


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A group with coordinates, on disk."""
    path = tmp_path / "volume.zarr"
    group = zarr.create_group(path)
    group.create_array("scan", data=DATA, chunks=(8, 8), dimension_names=("y", "x"), attributes={"who": "me"})
    group.create_array("y", data=np.arange(24) * 0.5, dimension_names=("y",), attributes={"units": "um"})
    return path


def test_a_volume_behind_a_url_is_the_one_on_disk_also_in_another_process(bucket: Bucket, volume: Path) -> None:
    here, there = oocpatch.Volume(volume), oocpatch.Volume(bucket.upload(volume, ODD))
    web = oocpatch.Volume(bucket.web(f"{quote(ODD)}/scan"))
    box = Box((-2, 3), (20, 40))
    travelled = pickle.loads(pickle.dumps(there))  # noqa: S301 - its own
    for found in (there, web, travelled):
        assert np.array_equal(found.read(box), here.read(box))
    assert there.names == here.names
    assert there.source.attrs == here.source.attrs
    assert there.source.coords["y"].identical(here.source.coords["y"])
    assert there.fingerprint == oocpatch.Volume(bucket.upload(volume, ODD)).fingerprint, "the ETag is of the content"
    assert b"secret" not in pickle.dumps(there), "credentials do not travel"
    scan = oocpatch.Subject(scan=there)
    assert torch.equal(oocpatch.GridSampler(scan, 8)[5].scan.data[0], torch.from_numpy(DATA[8:16, 8:16]))


def test_a_run_over_a_volume_behind_a_url_gives_the_bytes_of_a_local_one(
    bucket: Bucket, volume: Path, tmp_path: Path
) -> None:
    url, mask = bucket.upload(volume, "volume.zarr"), tmp_path / "mask.zarr"
    zarr.create_array(mask, data=np.tri(6, 8, dtype=np.uint8), dimension_names=("y", "x"))
    bucket.behave(every=5, status=503)
    oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "here", mask=mask, **OPTIONS)
    oocpatch.predict(url, torch.nn.Identity(), tmp_path / "there", mask=bucket.upload(mask, "mask.zarr"), **OPTIONS)
    assert any(line.endswith(" 503") for line in bucket.requests())
    arrays = [file_digests(tmp_path / name / "prediction") for name in ("here", "there")]
    for found in arrays:
        found.pop("oocpatch.ledger")
    assert arrays[0] == arrays[1]
    assert len(arrays[0]) > 20


def test_a_volume_that_cannot_be_read_is_one_message(
    bucket: Bucket, volume: Path, monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    url = bucket.upload(volume, "volume.zarr")
    settings = ("--model", "identity", "--patch-size", "8")

    def said(address: str) -> str:
        code, out, err = command("plan", address, tmp_path / "out", *settings)
        assert (code, out) == (2, "")
        assert address in err
        assert len(err.splitlines()) == 1
        return err

    assert "nothing is at" in said(bucket.url("nowhere.zarr"))
    assert "holds no Zarr" in said(bucket.url("volume.zarr/y/c"))
    assert "NoSuchBucket" in said("s3://nobody/volume.zarr")
    assert "must be a Zarr" in said(bucket.url("scan.h5"))
    with_environment(monkeypatch, AWS_ACCESS_KEY_ID="stranger")
    assert "access denied" in said(url)
    with_environment(monkeypatch, AWS_ACCESS_KEY_ID=None)
    assert "AWS_ACCESS_KEY_ID" in said(url)
    with_environment(monkeypatch, AWS_ALLOW_HTTP="false", AWS_ACCESS_KEY_ID="tester")
    assert "AWS_ALLOW_HTTP" in said(url)
    with_environment(monkeypatch, AWS_ALLOW_HTTP="true", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert "AWS_ENDPOINT_URL" in said(url)
    monkeypatch.setattr(objects, "installed", lambda: False)
    assert "oocpatch[s3]" in said(url)


@needs_fork
def test_a_forked_process_gets_an_error_instead_of_hanging(bucket: Bucket, volume: Path) -> None:
    scan = oocpatch.Subject(scan=oocpatch.Volume(bucket.upload(volume, "volume.zarr")))
    loader = torch.utils.data.DataLoader(oocpatch.GridSampler(scan, 8), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="multiprocessing_context='spawn'"):
        next(iter(loader))
