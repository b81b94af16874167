"""Promises on several hosts with a shared folder: paths mean the same everywhere, locks know whose they are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import dask
import h5py
import pytest
import zarr

import oocpatch
from oocpatch.outputs.integrity import LEDGER
from oocpatch.storage.locks import STALE, part_lock
from tests.support import hosts
from tests.support.children import Children, file_digests
from tests.support.cluster_child import CONFIG
from tests.support.clusters import BLOCK, OVERLAP, PATCH, SHAPE, Fork, until
from tests.support.crash_child import make_volume
from tests.support.hosts import Host

NET = """
from tests.support.cluster_child import scripted

def net(patches):
    return scripted(patches, {control!r})
"""
DECOY = """
def net(patches):
    return patches
"""
FURTHER = {"volume": "../../shared/volume.zarr", "output": "../../shared/out"}
"""The same places from the working directory of the second host."""
Pair = tuple[Host, Host]
ALLOWED = hosts.allowed()
namespaces = pytest.mark.skipif(not ALLOWED, reason="needs the right to make namespaces of network and name")


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory, children: Children) -> Iterator[Fork]:
    with dask.config.set(CONFIG):
        yield Fork(children, tmp_path_factory.mktemp("hosts"))


@pytest.fixture(params=["two_directories", pytest.param("two_namespaces", marks=namespaces)])
def pair(request: pytest.FixtureRequest, fork: Fork, tmp_path: Path) -> Iterator[Pair]:
    """Two hosts; `shared` lies beside their working directories, and what only the first one has in its own."""
    with getattr(hosts, request.param)(tmp_path) as found:
        shared = tmp_path / "shared"
        shared.mkdir()
        make_volume(shared / "volume.zarr", SHAPE, (8, 8))
        with h5py.File(shared / "volume.h5", "w") as file:
            file.create_dataset("v", data=zarr.open_array(shared / "volume.zarr", mode="r")[:], chunks=(8, 8))
        behave(tmp_path, 0.0)
        (found[0].folder / "net.py").write_text(NET.format(control=str(tmp_path / "control")))
        (found[1].folder / "net.py").write_text(DECOY)
        yield found
        fork.kill_all()


def behave(folder: Path, delay: float) -> None:
    (folder / "control.new").write_text(json.dumps({"delay": delay}))
    (folder / "control.new").rename(folder / "control")


def processes(folder: Path) -> set[int]:
    """Who computed patches."""
    return {json.loads(line)[0] for line in (folder / "control.log").read_text().splitlines()}


def arguments(**options: object) -> dict[str, object]:
    sizes = {"patch_size": PATCH, "patch_overlap": OVERLAP, "block_shape": BLOCK, "output_chunks": 4}
    return {
        "volume": "../shared/volume.zarr",
        "model": "net.py:net",
        "model_id": "net",
        "output": "../shared/out",
        **sizes,
        **options,
    }


def call(fork: Fork, host: Host, address: str = "", **options: object) -> str:
    """How a call of `predict` on a host ends, in words."""
    report = host.folder / "report"
    report.unlink(missing_ok=True)
    pid = fork.start("client", str(report), address, arguments(**options), place=host.place)
    until(lambda: fork.poll(pid) is not None)
    assert report.exists(), (fork.folder / "client.log").read_text()
    return report.read_text()


def prediction(host: Host, output: str) -> dict[str, str]:
    return file_digests(host.folder / output / "prediction")


def test_relative_paths_are_those_of_the_client_whatever_the_directories_of_the_workers(
    fork: Fork, pair: Pair, tmp_path: Path
) -> None:
    assert call(fork, pair[0], output="embedded") == "done"
    expected = prediction(pair[0], "embedded")
    _, address = fork.scheduler(pair[0].address, place=pair[0].place)
    workers = {fork.start("worker", address, 1, host.address, place=host.place) for host in pair}
    behave(tmp_path, 0.01)
    (tmp_path / "control.log").unlink()
    volumes: dict[str, dict[str, object]] = {"relative": {}}
    if not pair[0].holder:  # the network makes no difference to the rest
        volumes |= {
            "absolute": {"volume": str(tmp_path / "shared" / "volume.zarr")},
            "file": {"volume": "../shared/volume.h5"},
            "dask": {"volume": "dask:../shared/volume.zarr"},
        }
    for name, options in volumes.items():
        assert call(fork, pair[0], address, output=name, workspace=f"work-{name}", **options) == "done", name
        digests = prediction(pair[0], name)
        if options:  # the ledger has stamps of another kind of input
            digests[LEDGER] = expected[LEDGER]
        assert digests == expected, name
        behave(tmp_path, 0.0)
    assert workers <= processes(tmp_path)
    assert sorted(path.name for path in pair[1].folder.iterdir() if path.name != "__pycache__") == ["net.py"]


@pytest.mark.parametrize("pair", ["two_namespaces" if ALLOWED else "two_directories"], indirect=True)
def test_parts_on_two_hosts_give_the_bytes_of_one_call(fork: Fork, pair: Pair, tmp_path: Path) -> None:
    assert call(fork, pair[0], output="embedded") == "done"
    (pair[1].folder / "net.py").write_text((pair[0].folder / "net.py").read_text())
    assert call(fork, pair[0], part=[1, 2]) == "done"
    assert oocpatch.status(tmp_path / "shared" / "out").state == "incomplete"
    assert call(fork, pair[1], part=[2, 2], **FURTHER) == "done"
    out = tmp_path / "shared" / "out"
    assert oocpatch.status(out).state == "complete"
    assert file_digests(out / "prediction") == prediction(pair[0], "embedded")
    assert oocpatch.verify(out).passed


@pytest.mark.parametrize("pair", [pytest.param("two_namespaces", marks=namespaces)], indirect=True)
def test_the_lock_of_a_dead_process_is_taken_over_at_once_on_its_host_and_when_silent_on_another(
    fork: Fork, pair: Pair, tmp_path: Path
) -> None:
    one, two = pair
    (two.folder / "net.py").write_text((one.folder / "net.py").read_text())
    out = tmp_path / "shared" / "out"
    lock = part_lock(out, (1, 2))

    def killed() -> None:
        behave(tmp_path, 0.05)
        (tmp_path / "control.log").unlink(missing_ok=True)
        pid = fork.start("client", str(one.folder / "report"), "", arguments(part=[1, 2]), place=one.place)
        until(lambda: (tmp_path / "control.log").exists() and len((tmp_path / "control.log").read_text()) > 100)
        fork.kill(pid)
        behave(tmp_path, 0.0)

    killed()
    assert json.loads(lock.read_text())["host"] == "host-one"
    os.utime(lock)
    ending = call(fork, two, part=[1, 2], **FURTHER)
    assert ending.startswith("OutputBusy: "), ending
    assert "on host-one for part 1/2" in ending
    os.utime(lock, (0, lock.stat().st_mtime - STALE))
    assert call(fork, two, part=[1, 2], **FURTHER) == "done"
    status = oocpatch.status(out)
    assert status.predict_done in (7, 8), "as the first part had them, of 16 blocks with other numbers of patches"
    assert abs(status.patches_done - status.patches_total / 2) <= status.patches_total / 16
    (tmp_path / "shared" / "first").mkdir()
    for name in ("out", "out.oocpatch"):
        (tmp_path / "shared" / name).rename(tmp_path / "shared" / "first" / name)
    killed()
    os.utime(lock)
    assert call(fork, one, part=[1, 2]) == "done", "on its own host nobody waits for a dead process"
