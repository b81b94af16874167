"""Promises on outputs in object stores: the bytes of a local run, whatever the server and the process go through.

The server is `tests.support.s3_server`, which keeps objects on disk and is killed for real; the client is the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr

import oocpatch
from oocpatch.errors import OutputBusy, OutputExists, RunMismatch
from oocpatch.storage.locks import STALE, locks
from oocpatch.storage.object_path import ObjectPath
from oocpatch.storage.paths import output_path
from tests.conftest import Command
from tests.support.children import Children, calls, report
from tests.support.clusters import until
from tests.support.crash_child import Job, make_volume
from tests.support.stores import BUCKET, Bucket, served, with_environment

SHAPE = (16, 24)
DATA = np.arange(1, 16 * 24 + 1, dtype=np.float32).reshape(SHAPE)
OPTIONS: dict[str, Any] = {
    "patch_size": 8,
    "patch_overlap": 4,
    "block_shape": 8,
    "output_chunks": 4,
    "workers": 1,
    "progress": False,
}
"""15 patches in 6 blocks, of which 5 receive seams; 24 chunks."""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume, in the current directory."""
    monkeypatch.chdir(tmp_path)
    make_volume(tmp_path / "volume.zarr", SHAPE, (8, 8))
    return tmp_path / "volume.zarr"


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def assert_same(there: dict[str, bytes], here: dict[str, bytes]) -> None:
    """The same files with the same bytes; of the group's metadata all but what tells of the call itself."""
    assert there.keys() == here.keys()
    assert [name for name in here if name != "zarr.json" and there[name] != here[name]] == []
    documents = [json.loads(found["zarr.json"]) for found in (there, here)]
    for one in documents:
        record = one["attributes"]["oocpatch"]
        record["workspace"] = ""
        for name in ("settings", "seconds", "process_peak_memory", "metadata_crc"):
            del record["details"][name]
    assert documents[0] == documents[1]


def half(patches: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"same": patches, "half": torch.nn.functional.avg_pool2d(patches, 2), "big": (patches > 200).float()}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (torch.nn.Identity(), {"overlap_mode": "hann"}),
        (torch.nn.Identity(), {"overlap_mode": "crop", "output_format": "ome-zarr"}),
        (half, {"overlap_mode": "average", "postprocess": {"big": "threshold"}}),
    ],
    ids=["hann", "ome-zarr", "heads of two scales"],
)
def test_an_output_in_an_object_store_has_the_bytes_of_a_local_one(
    model: Any, options: dict[str, Any], bucket: Bucket, volume: Path, tmp_path: Path
) -> None:
    name = f"results #1 50%/{options['overlap_mode']} ü.zarr"
    here = oocpatch.predict(volume, model, tmp_path / "out", **OPTIONS, **options)
    there = oocpatch.predict(volume, model, bucket.url(name), **OPTIONS, **options)
    assert_same(bucket.objects(f"{name}/"), files(tmp_path / "out"))
    if isinstance(there, xarray.DataTree):  # the attributes of its root tell of the call
        assert [there[n].identical(here[n]) for n in ("same", "half", "big")] == [True] * 3
    else:
        assert there.identical(here)
        assert np.allclose(there, DATA, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "volume.zarr"], "the workspace is gone"
    assert [key for key in bucket.objects() if key.startswith(f"{name}.")] == [], "the lock is gone"
    assert oocpatch.verify(bucket.url(name)).passed
    assert oocpatch.status(bucket.url(name)).state == "complete"
    puts = len(bucket.requests("PUT"))
    oocpatch.predict(volume, model, bucket.url(name), **OPTIONS, **options)
    assert len(bucket.requests("PUT")) == puts, "a complete output is opened, and nothing is written"


def test_a_server_that_is_killed_and_started_again_midway_changes_no_byte(
    bucket: Bucket, volume: Path, tmp_path: Path
) -> None:
    count = 0

    def model(patches: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 5:
            bucket.outage()
        if count == 9:
            bucket.back()
            bucket.behave(every=7, status=503)
        return patches * 2

    volume_there, url = bucket.upload(volume, "outage-volume.zarr"), bucket.url("outage.zarr")
    oocpatch.predict(volume_there, model, url, **OPTIONS)
    bucket.behave()
    oocpatch.predict(volume_there, lambda patches: patches * 2, tmp_path / "out", **OPTIONS)
    there, here = bucket.objects("outage.zarr/prediction/c/"), files(tmp_path / "out" / "prediction" / "c")
    assert there == here
    assert len(here) == 24
    assert any(line.endswith(" 503") for line in bucket.requests())
    assert oocpatch.verify(url).passed


def test_a_server_that_freezes_midway_changes_no_byte(
    bucket: Bucket, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_environment(monkeypatch, AWS_TIMEOUT="1s")
    count = 0

    def model(patches: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 5:
            bucket.signal(signal.SIGSTOP)
            threading.Timer(2.5, bucket.signal, [signal.SIGCONT]).start()
        return patches * 2

    options = {**OPTIONS, "model_id": "doubles"}  # the bucket that the model holds changes
    oocpatch.predict(volume, model, bucket.url("frozen.zarr"), **options)
    oocpatch.predict(volume, model, tmp_path / "out", **options)
    assert_same(bucket.objects("frozen.zarr/"), files(tmp_path / "out"))


def test_of_two_that_find_a_lock_only_one_has_it(bucket: Bucket) -> None:
    lock = ObjectPath.of(bucket.url("some/lock"))
    assert [lock.put_if(content, None) for content in (b"a", b"b", b"a")] == [True, False, True]
    state = lock.state()
    assert state is not None
    content, tag, _ = state
    assert content == b"a"
    assert [lock.put_if(content, tag) for content in (b"c", b"d")] == [True, False]
    assert not ObjectPath.of(bucket.url("some/other")).put_if(b"c", tag)
    assert list(ObjectPath.of(bucket.url("some/loc")).list_siblings("lock")) == [lock]
    lock.unlink()
    lock.unlink(missing_ok=True)
    assert lock.state() is None


@pytest.mark.parametrize("how", [True, "late"], ids=["before it was done", "after it was done"])
def test_answers_that_are_lost_change_no_byte_and_lose_no_lock(
    how: bool | str, bucket: Bucket, volume: Path, tmp_path: Path
) -> None:
    name = f"lost-{how}.zarr"
    bucket.behave(every=9, drop=how)
    oocpatch.predict(volume, torch.nn.Identity(), bucket.url(name), **OPTIONS)
    bucket.behave()
    oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out", **OPTIONS)
    assert_same(bucket.objects(f"{name}/"), files(tmp_path / "out"))
    assert not bucket.objects(f"{name}.oocpatch")


def test_a_run_that_is_killed_is_resumed_to_the_same_bytes_and_one_at_work_is_left_alone(
    bucket: Bucket, volume: Path, children: Children, tmp_path: Path
) -> None:
    place = {"workspace": str(tmp_path / "work")}
    job = Job(str(volume), str(tmp_path / "out"), str(tmp_path / "calls"), str(tmp_path / "report"))
    options = {name: value for name, value in OPTIONS.items() if name != "progress"}
    assert children.run(dataclasses.replace(job, options=options)) == 0
    Path(job.log).unlink()
    job = dataclasses.replace(job, output=bucket.url("killed.zarr"), options={**options, **place}, delay=0.005)
    for kill in (4, 9):
        pid = children.start(job)
        until(lambda kill=kill: len(calls(job)) >= kill)
        if kill == 9:
            # The lock is known by the process that holds it; on another host, by how long ago it was touched.
            os.kill(pid, signal.SIGSTOP)
            refused = children.start(dataclasses.replace(job, report=f"{job.report}.second"))
            assert children.wait(refused) == 1
            said = report(dataclasses.replace(job, report=f"{job.report}.second"))
            assert (said.error, f"process {pid} on" in said.message) == ("OutputBusy", True)
        children.kill(pid)
    assert bucket.objects("killed.zarr.oocpatch.lock"), "the lock of a process that was killed"
    assert not json.loads(bucket.objects("killed.zarr/")["zarr.json"])["attributes"]["oocpatch"]["complete"]
    assert children.run(job) == 0, report(job)
    assert bucket.objects("killed.zarr/prediction/") == {
        name.removeprefix("prediction/"): content
        for name, content in files(tmp_path / "out").items()
        if name.startswith("prediction/")
    }
    assert not bucket.objects("killed.zarr.oocpatch")
    assert len(calls(job)) < 2 * 15, "what was done before a kill is not done again"


def test_a_lock_of_another_host_is_left_alone_while_it_is_touched_and_then_taken_over(
    bucket: Bucket, volume: Path
) -> None:
    url = bucket.url("locked.zarr")
    lock = "locked.zarr.oocpatch.lock"
    bucket.put(lock, json.dumps({"token": "0", "host": "elsewhere", "pid": 1, "started": 0, "part": ""}).encode())
    with pytest.raises(OutputBusy, match="process 1 on elsewhere"):
        oocpatch.predict(volume, torch.nn.Identity(), url, **OPTIONS)
    assert oocpatch.status(url).state == "absent"
    bucket.age(lock, STALE + 2)
    assert np.allclose(oocpatch.predict(volume, torch.nn.Identity(), url, **OPTIONS), DATA, rtol=1e-6)
    assert not bucket.objects(lock)


def test_parts_of_a_run_share_an_output_in_an_object_store(bucket: Bucket, volume: Path, tmp_path: Path) -> None:
    url, options = bucket.url("parts.zarr"), {**OPTIONS, "output_shards": 8}
    for number in (2, 1):
        options["workspace"] = tmp_path / "work"
        there = oocpatch.predict(volume, torch.nn.Identity(), url, part=(number, 2), **options)
    here = oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out", **{**options, "workspace": None})
    assert np.array_equal(there, here)  # zarrs, which writes local shards, puts the chunks in them in another order
    assert bucket.objects("parts.zarr/prediction/c/").keys() == files(tmp_path / "out" / "prediction" / "c").keys()
    bucket.put("parts.zarr.oocpatch.lock.part-1-of-2", b"{}")
    bucket.put("parts.zarr.oocpatch.lock.part-of-mine", b"{}")
    bucket.put("parts.zarr.oocpatch.locksmith", b"{}")
    names = [path.name for path in locks(output_path("output", url))]
    assert names == ["parts.zarr.oocpatch.lock", "parts.zarr.oocpatch.lock.part-1-of-2"]


def test_damaged_objects_are_found_and_mended(bucket: Bucket, volume: Path) -> None:
    url = bucket.url("damaged.zarr")
    oocpatch.predict(volume, torch.nn.Identity(), url, **OPTIONS)
    whole = bucket.objects("damaged.zarr/prediction/c/")
    flipped = bytearray(whole["2/3"])
    flipped[5] ^= 1
    bucket.put("damaged.zarr/prediction/c/2/3", bytes(flipped))
    bucket.delete("damaged.zarr/prediction/c/0/0")
    found = oocpatch.verify(url, repair=True)
    assert {(damage.key, damage.problem) for damage in found.damaged} == {
        ("c/2/3", "is not what was written"),
        ("c/0/0", "is missing"),
    }
    oocpatch.predict(volume, torch.nn.Identity(), url, **OPTIONS)
    assert bucket.objects("damaged.zarr/prediction/c/") == whole
    assert oocpatch.verify(url).passed


def test_an_output_in_an_object_store_is_looked_at_as_a_local_one(bucket: Bucket, volume: Path, tmp_path: Path) -> None:
    url, there = bucket.url("seen.zarr"), bucket.upload(volume, "looked-at.zarr")
    (tmp_path / "here").mkdir()
    for output in (url, tmp_path / "here" / "seen.zarr"):
        oocpatch.predict(there, torch.nn.Identity(), output, **OPTIONS)
    pictures = oocpatch.view(url), oocpatch.view(tmp_path / "here" / "seen.zarr")
    assert pictures[0] == Path("seen.zarr.png")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert "seen.zarr" in oocpatch.report(url).read_text()
    assert Path("seen.zarr.report.html").exists()


def test_only_what_oocpatch_wrote_is_ever_replaced(bucket: Bucket, volume: Path) -> None:
    bucket.put("mine.zarr/notes.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match="holds other data"):
            oocpatch.predict(volume, torch.nn.Identity(), bucket.url("mine.zarr"), overwrite=overwrite, **OPTIONS)
    assert bucket.objects("mine.zarr") == {"/notes.txt": b"mine"}
    url = bucket.url("replaced.zarr")
    oocpatch.predict(volume, torch.nn.Identity(), url, **OPTIONS)
    zarr.create_array((output_path("output", url)).store(), name="foreign", data=np.arange(3))
    before = bucket.objects("replaced.zarr/foreign")
    with pytest.raises(RunMismatch, match="overlap_mode"):
        oocpatch.predict(volume, torch.nn.Identity(), url, overlap_mode="crop", **OPTIONS)
    options = {**OPTIONS, "output_chunks": 8}
    result = oocpatch.predict(volume, torch.nn.Identity(), url, overlap_mode="crop", overwrite=True, **options)
    assert np.array_equal(result, DATA)
    assert bucket.objects("replaced.zarr/foreign") == before
    assert len(bucket.objects("replaced.zarr/prediction/c/")) == 6


def test_an_output_that_cannot_be_written_is_one_message(
    bucket: Bucket, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def said(output: str, *more: str, source: object = volume) -> str:
        settings = ("--model", "identity", "--patch-size", 8, "--progress", "none")
        code, out, err = command("predict", source, output, *settings, *more)
        assert (code, out) == (2, "")
        return err.splitlines()[-1]

    url = bucket.url("refused.zarr")
    assert "NoSuchBucket" in said("s3://nobody/out.zarr")
    assert "must have a name in its bucket" in said(f"s3://{BUCKET}")
    assert "must be a path, or a URL that begins with s3://" in said(bucket.web("out.zarr"))
    assert "workspace must be a path, or a URL that begins" in said(url, "--workspace", bucket.web("work"))
    assert "workspace cannot be written: s3://nobody" in said(url, "--workspace", "s3://nobody/work")
    there = bucket.upload(volume, "a/volume.zarr")
    for inside in (there, f"{there}/out", bucket.url("a")):
        assert "must not be the input volume, contain it, or be inside it" in said(inside, source=there)
    with_environment(monkeypatch, AWS_SKIP_SIGNATURE="true")
    assert "access denied" in said(url)
    assert not bucket.objects("refused.zarr")
