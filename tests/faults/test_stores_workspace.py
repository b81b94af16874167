"""Promises on runs whose workspace is in an object store, too: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import oocpatch
from oocpatch.outputs.integrity import LEDGER
from oocpatch.storage.paths import output_path
from oocpatch.workspace.ledger import segments
from oocpatch.workspace.workspace import Workspace
from tests.support.children import Children, file_digests, report
from tests.support.clusters import Fork, SmallCluster, until
from tests.support.crash_child import Job, make_volume
from tests.support.small_run import MIDDLE, MOST_IN_BLOCK, TINY, all_patches, patch_calls, small_run
from tests.support.stores import Bucket, killed_before, served, with_environment


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, children: Children) -> tuple[Job, dict[str, str]]:
    """The run over two axes, and the bytes of its output when it is done here."""
    job = small_run(tmp_path_factory.mktemp("local"))
    assert children.run(job) == 0
    return job, file_digests(Path(job.output) / "prediction")


def there(job: Job, bucket: Bucket, name: str, **options: Any) -> Job:
    """The same run with its output, and so its workspace, in the bucket."""
    Path(job.log).unlink(missing_ok=True)
    return dataclasses.replace(job, output=bucket.url(name), options={**job.options, **options})


def assert_done(bucket: Bucket, name: str, expected: dict[str, str]) -> None:
    assert bucket.digests(f"{name}/prediction/") == expected
    assert [key for key in bucket.objects() if key.startswith(f"{name}.")] == [], "workspace and lock are gone"


def partials(bucket: Bucket, name: str) -> list[str]:
    """Keys of the chunks of all partials of a run."""
    return [
        key for key in bucket.objects() if key.startswith(f"{name}.oocpatch/") and "/c." in key and "/blocks/" in key
    ]


def test_a_run_that_is_killed_before_any_change_of_the_store_goes_on_to_the_same_bytes(
    bucket: Bucket, children: Children, tmp_path: Path
) -> None:
    """Every 12th change here, in another file system than the output; the campaign does all of them."""
    make_volume(tmp_path / "volume.zarr", (16,), (8,))
    job = Job(str(tmp_path / "volume.zarr"), "", str(tmp_path / "log"), str(tmp_path / "report"), options=TINY)
    before = bucket.changes()
    assert children.run(there(job, bucket, "tiny.zarr")) == 0
    changes, expected = bucket.changes() - before, bucket.digests("tiny.zarr/prediction/")
    assert changes > 20
    for change in range(3, changes, 12):
        name = f"tiny-{change}.zarr"
        one = there(job, bucket, name)
        assert killed_before(children, bucket, one, change)
        assert children.run(one) == 0, report(one)
        assert_done(bucket, name, expected)


def test_what_was_done_before_a_kill_is_not_done_again_by_another_machine(
    bucket: Bucket, children: Children, local: tuple[Job, dict[str, str]], tmp_path: Path
) -> None:
    job = there(dataclasses.replace(local[0], delay=0.15), bucket, "killed.zarr")
    pid = children.start(job)
    # Records are put five seconds after they were made, or when many partials can be deleted.
    until(lambda: len(segments(output_path("workspace", next_root(bucket, "killed.zarr")))) > 0)
    children.kill(pid)
    done = len(patch_calls(job))
    status = oocpatch.status(job.output)
    assert (status.state, status.predict_total) == ("incomplete", 16)
    assert 0 < status.predict_done < 16
    assert status.workspace.startswith(bucket.url("killed.zarr.oocpatch/"))
    elsewhere = dataclasses.replace(job, report=str(tmp_path / "elsewhere"), delay=0.0)
    assert children.run(elsewhere) == 0
    assert len(patch_calls(job)) - len(all_patches()) <= done - status.patches_done, "only what was not recorded"
    assert_done(bucket, "killed.zarr", local[1])


def next_root(bucket: Bucket, name: str) -> str:
    """The workspace of a run that has begun; else a place where nothing is."""
    found = {key.split("/")[1] for key in bucket.objects() if key.startswith(f"{name}.oocpatch/")}
    return bucket.url(f"{name}.oocpatch/{found.pop() if found else 'nothing'}")


def incomplete(bucket: Bucket, children: Children, job: Job, name: str) -> Job:
    """A run in the bucket whose middle block fails: its neighbours' partials wait for it."""
    one = there(dataclasses.replace(job, fail_on=(MIDDLE,)), bucket, name)
    assert children.run(one) == 1
    assert report(one).error == "BlockFailed"
    assert partials(bucket, name)
    Path(one.log).unlink()
    return dataclasses.replace(one, fail_on=())


@pytest.mark.parametrize("harm", ["cut", "delete", "swap", "manifest"])
def test_damaged_partials_are_found_and_computed_anew(
    harm: str, bucket: Bucket, children: Children, local: tuple[Job, dict[str, str]]
) -> None:
    name = f"damaged-{harm}.zarr"
    job = incomplete(bucket, children, local[0], name)
    keys = partials(bucket, name)
    whole = {key: bucket.objects(key)[""] for key in keys}
    for key, other in zip(keys, [*keys[1:], keys[0]], strict=True):
        data = bytearray(whole[key])
        if harm == "cut":
            del data[-4:]
        elif harm == "swap":
            data = bytearray(whole[other])
        bucket.put(key, bytes(data))
        if harm == "delete":
            bucket.delete(key)
    for key in [key for key in bucket.objects() if harm == "manifest" and key.startswith(f"{name}.oocpatch/")]:
        if key.endswith("manifest.json"):
            bucket.put(key, b"{}")
    assert children.run(job) == 0, report(job)
    assert len(patch_calls(job)) > MOST_IN_BLOCK, "more than the block that failed was computed"
    assert_done(bucket, name, local[1])


def test_parts_share_a_workspace_in_the_bucket_and_one_that_dies_is_run_again(
    bucket: Bucket, children: Children, local: tuple[Job, dict[str, str]]
) -> None:
    job = there(dataclasses.replace(local[0], delay=0.01), bucket, "parts.zarr")
    parts = [
        dataclasses.replace(job, report=f"{job.report}-{i}", options={**job.options, "part": (i, 3)}) for i in (1, 2, 3)
    ]
    first, second = children.start(parts[0]), children.start(parts[1])
    until(lambda: len(patch_calls(job)) > 4)
    children.kill(second)
    assert children.wait(first) == 0, report(parts[0])
    assert children.run(parts[2]) == 0, report(parts[2])
    assert oocpatch.status(job.output).state == "incomplete"
    assert children.run(parts[1]) == 0, report(parts[1])
    assert_done(bucket, "parts.zarr", local[1])


def test_workers_of_a_cluster_share_a_workspace_in_the_bucket(
    bucket: Bucket, children: Children, tmp_path: Path
) -> None:
    fork = Fork(children, tmp_path)
    small = SmallCluster(fork, tmp_path)
    expected = small.expected()
    small.add(2)
    small.behave(delay=0.01)
    volume = zarr.open_array(small.folder / "volume.zarr", mode="r")[:]  # in memory: it is stored for them, too
    with small.client() as client:
        small.predict(output=bucket.url("cluster.zarr"), volume=volume, axes="yx", client=client)
    fork.kill_all()
    assert {pid for pid, _ in small.calls()} == set(small.workers), "both of them took part"
    expected[LEDGER] = bucket.digests("cluster.zarr/prediction/")[LEDGER]  # with stamps of an array in memory
    assert_done(bucket, "cluster.zarr", expected)


def test_that_the_store_does_not_answer_is_no_reason_to_start_afresh(
    bucket: Bucket, children: Children, local: tuple[Job, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = incomplete(bucket, children, local[0], "silent.zarr")
    root = output_path("workspace", next_root(bucket, "silent.zarr"))
    assert Workspace.find(root) is not None
    monkeypatch.setattr("oocpatch.storage.object_store.RETRIES", 1)
    with_environment(monkeypatch)
    bucket.behave(every=1, status=503)
    with pytest.raises(ConnectionError):
        Workspace.find(root)
    bucket.behave()
    assert children.run(job) == 0
    assert len(patch_calls(job)) <= MOST_IN_BLOCK, "only the block that failed was computed"
    assert_done(bucket, "silent.zarr", local[1])


def test_a_block_costs_requests_for_what_it_reads_and_writes_and_a_few_more(bucket: Bucket, tmp_path: Path) -> None:
    """8 blocks of 2 x 2 x 2 chunks: along each axis one reads its two chunks, and the other the one below them, too."""
    data = np.random.default_rng(0).random((64, 64, 64), dtype=np.float32)
    zarr.create_array(tmp_path / "volume.zarr", data=data, chunks=(16, 16, 16))
    volume, output = bucket.upload(tmp_path / "volume.zarr", "counted.zarr"), bucket.url("counts.zarr")
    planned = oocpatch.plan(
        volume, torch.nn.Identity(), output, patch_size=16, patch_overlap=8, block_shape=32, progress=False, workers=1
    )
    assert planned.blocks == 8
    before = len(bucket.requests())
    planned.run()
    asked = [line.partition("?")[0] for line in bucket.requests()[before:]]
    data_in = [line for line in asked if line.startswith("GET") and "/counted.zarr/c/" in line]
    data_out = [line for line in asked if line.startswith("PUT") and "/counts.zarr/prediction/c/" in line]
    sums = [line for line in asked if "/blocks/" in line and "/c." in line]
    assert (len(data_in), len(data_out)) == ((2 + 3) ** 3, 4**3), "each chunk that a block reads, and each unit, once"
    assert len([line for line in sums if line.startswith("PUT")]) == len(sums) / 2, "all sums are read once"
    metadata = [line for line in asked if "/blocks/" in line and ".json" in line]
    assert len(metadata) <= len(sums)
    pages = asked.count("GET /bucket")  # of lists of objects, with seven on a page
    rest = len(asked) - len(data_in) - len(data_out) - len(sums) - len(metadata) - pages
    assert rest <= 64 + 2 * planned.blocks
