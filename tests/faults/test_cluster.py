"""Promises on clusters: a real scheduler, real worker processes, and every one of them killed or frozen."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import psutil
import pytest
import torch
import xarray
import zarr
from torch import nn

import oocpatch
from oocpatch.execution import dask_cluster as clusters
from oocpatch.execution import worker, worker_calls
from oocpatch.execution.dask_clients import check_versions, connected, versions_here
from oocpatch.outputs.record import inspect_output
from oocpatch.storage.files import flush_file_system
from oocpatch.storage.paths import LocalPath
from tests.support.children import Children, file_digests
from tests.support.cluster_child import CONFIG
from tests.support.clusters import BLOCK, MIDDLE, MIDDLE_BLOCK, OVERLAP, PATCH, Fork, SmallCluster, until
from tests.support.instance_models import Renumber


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory, children: Children) -> Iterator[Fork]:
    with dask.config.set(CONFIG):
        yield Fork(children, tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def small(fork: Fork, tmp_path: Path) -> Iterator[SmallCluster]:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it tells at length of every process that dies
    yield SmallCluster(fork, tmp_path)
    fork.kill_all()


class Net(nn.Module):
    """A module that travels by value: convolutions round differently with another number of threads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.inner(patches)


def test_a_cluster_gives_the_bytes_of_the_embedded_scheduler(small: SmallCluster, tmp_path: Path) -> None:
    """A spec and a module, in several modes, from disk and from memory, one or more threads per worker."""
    small.add(1, threads=1)
    small.add(1, threads=3)
    data = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    module = {"model": Net(), "model_args": None}
    inputs: dict[str, dict[str, Any]] = {
        "spec": {},
        "crop": {"overlap_mode": "crop", "batch_size": 2},
        "module": {**module, "padding_mode": "reflect", "overlap_mode": "gaussian", "postprocess": "argmax"},
        "memory": {
            **module,
            "volume": data,
            "mask": (data > 0.9)[::4, ::4],
            "preprocess": "zscore",
            "augment": ["x"],
        },
        "resampled": {
            "model": Net(),
            "model_args": None,
            "volume": xarray.DataArray(data, {n: (n, np.arange(32.0)) for n in "yx"}, ("y", "x")),
            "spacing": {"y": 1.5, "x": 0.8},
            "postprocess": "argmax",
        },
        "objects": {
            "model": Renumber(),
            "model_args": None,
            "volume": np.kron(np.arange(100).reshape(10, 10) + 1, np.ones((3, 3), np.int32))[:, :29],
            "overlap_mode": "instances",
        },
    }
    with small.client() as client:
        for name, options in inputs.items():
            small.predict(f"embedded-{name}", **options)
            small.predict(f"out-{name}", **options, client=client)
            assert small.digests(f"out-{name}") == small.digests(f"embedded-{name}"), name
    assert not small.left_behind()
    assert len({pid for pid, _ in small.calls()} - {os.getpid()}) == 2, "both workers took part"


def test_a_cluster_labels_as_the_embedded_scheduler_does(small: SmallCluster, tmp_path: Path) -> None:
    """From disk and from memory, with progress of both stages."""
    small.add(2)
    data = np.random.default_rng(0).random((32, 32)) < 0.5
    zarr.create_array(tmp_path / "mask.zarr", data=data, chunks=(8, 8))
    options: dict[str, Any] = {"block_shape": 8, "output_chunks": 4, "progress": False}
    events: list[oocpatch.TaskDone] = []
    with small.client() as client:
        for name, volume in {"disk": tmp_path / "mask.zarr", "memory": data}.items():
            here = oocpatch.label(volume, tmp_path / f"here-{name}", **options)
            there = oocpatch.label(volume, tmp_path / name, client=client, **{**options, "progress": events.append})
            assert there.attrs["objects"] == here.attrs["objects"]
            assert file_digests(tmp_path / name / "labels") == file_digests(tmp_path / f"here-{name}" / "labels")
            assert sum(event.patches for event in events) == 2 * data.size  # each block is read twice
            events.clear()


def test_workers_measure_objects_as_this_process_would_and_one_of_them_may_die(small: SmallCluster) -> None:
    small.add(3)
    labels = np.random.default_rng(0).integers(0, 50, (96, 96)).astype(np.uint16)
    image = np.random.default_rng(1).random((96, 96), np.float32)
    options = {"intensity": image, "block_shape": 8, "progress": False}
    expected = oocpatch.objects(labels, small.folder / "here.csv", **options).read_bytes()
    with small.client() as client:
        killing = threading.Timer(0.3, lambda: small.fork.kill(small.workers[0]))
        killing.start()
        table = oocpatch.objects(labels, small.folder / "there.csv", client=client, **options)
        assert table.read_bytes() == expected
        killing.join()
        assert len(oocpatch.objects(labels, client=client, **options)) == 49
        with pytest.raises(oocpatch.InvalidVolume, match="got -7"):
            oocpatch.objects(labels.astype(np.int32) - 7, small.folder / "bad.csv", client=client, progress=False)
    assert not [path.name for path in small.folder.glob("*.oocpatch") if path.name.startswith(("here", "there"))]


def test_a_process_works_on_one_block_at_a_time_and_loads_the_model_once(small: SmallCluster) -> None:
    small.add(2, threads=4)
    small.behave(delay=0.01)
    seen: list[int] = []
    watching = threading.Event()
    with small.client() as client:

        def watch() -> None:
            while not watching.wait(0.05):
                seen.append(sum(map(len, client.processing().values())))

        thread = threading.Thread(target=watch)
        thread.start()
        small.predict(client=client)
        watching.set()
        thread.join()
        until(lambda: client.run(open_call) == dict.fromkeys(client.nthreads(), None))
    assert max(seen) == 2, "the scheduler holds a task per process"
    assert Counter(Counter(first for _, first in small.calls()).values()) == {1: 49}


def note_flushes() -> None:
    """Let this process leave a file beside what it flushes."""

    def noted(path: LocalPath) -> None:
        flush_file_system(path)
        (path.parent / f"flushed-by-{os.getpid()}").touch()

    LocalPath.flush = noted  # type: ignore[method-assign]


def test_every_worker_flushes_what_it_wrote(small: SmallCluster) -> None:
    small.add(2)
    with small.client() as client:
        alive = client.run(os.getpid).values()
        client.run(note_flushes)
        small.predict(client=client)
        assert {f"flushed-by-{pid}" for pid in alive} <= {path.name for path in small.folder.glob("flushed-by-*")}
        gone = clusters.ClusterExecutor(client, handle=Any, work=worker.run_in_worker, drop=worker.close_call)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            gone.run_on_all_workers(LocalPath("/nowhere").flush)


def open_call() -> str | None:
    """Return the call that a worker process has open."""
    return worker_calls.open_token()


def test_a_run_survives_the_death_of_a_worker(small: SmallCluster) -> None:
    expected = small.expected()
    small.add(2)
    small.behave(delay=0.02)
    with small.client() as client:
        killer = threading.Thread(
            target=lambda: (until(lambda: len(small.calls()) > 15), small.fork.kill(small.workers[0]))
        )
        killer.start()
        small.predict(client=client)
        killer.join()
    assert small.digests() == expected
    assert not small.left_behind()
    again = [first for first, count in Counter(first for _, first in small.calls()).items() if count > 1]
    assert len(again) <= 4, "a death costs the block in flight"


def test_when_all_workers_die_the_run_says_so_and_goes_on_with_new_ones(
    small: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = small.expected()
    small.add(2)
    small.behave(delay=0.02)
    killer = threading.Thread(
        target=lambda: (until(lambda: len(small.calls()) > 15), [small.fork.kill(pid) for pid in small.workers])
    )
    with dask.config.set({"oocpatch.wait-for-workers": "1s"}), small.client() as client:
        killer.start()
        with pytest.raises(oocpatch.ClusterLost, match=r"no workers for 1 s.*the same call continues"):
            small.predict(client=client)
        killer.join()
        assert oocpatch.status(small.folder / "out").state == "incomplete"
        before = len(small.calls())
        small.workers.clear()
        small.add(2)
        until(lambda: len(client.nthreads()) == 2)
        small.predict(client=client)
    assert small.digests() == expected
    assert not small.left_behind()
    assert len(small.calls()) - before <= 49 - 16 + 2 * 4 + 4


def test_workers_that_come_late_take_part(small: SmallCluster) -> None:
    expected = small.expected()
    small.behave(delay=0.02)
    with small.client() as client:
        late = threading.Timer(0.3, small.add, (2,))
        late.start()
        small.predict(client=client)
        late.join()
    assert small.digests() == expected


def test_a_lost_scheduler_is_one_clear_error_and_the_same_call_goes_on(small: SmallCluster) -> None:
    expected = small.expected()
    small.add(2)
    small.behave(delay=0.02)
    killer = threading.Thread(target=lambda: (until(lambda: len(small.calls()) > 15), small.fork.kill(small.scheduler)))
    client = small.client()
    killer.start()
    with pytest.raises(oocpatch.ClusterLost, match=r"the scheduler is lost.*the same call continues"):
        small.predict(client=client)
    killer.join()
    with contextlib.suppress(Exception):
        client.close(timeout=1)
    done = oocpatch.status(small.folder / "out").predict_done
    assert done > 2
    small.predict()
    assert small.digests() == expected
    assert not small.left_behind()


def test_when_the_client_is_killed_another_one_goes_on(small: SmallCluster, tmp_path: Path) -> None:
    expected = small.expected()
    small.add(2)
    small.behave(delay=0.03)
    first = small.fork.start("client", str(tmp_path / "report"), small.address, small.arguments())
    until(lambda: len(small.calls()) > 15)
    small.fork.kill(first)
    before = len(small.calls())
    with small.client() as client:
        small.predict(client=client)
    assert small.digests() == expected
    assert not small.left_behind()
    assert len(small.calls()) - before <= 49 - 15 + 3 * 4 + 4


@pytest.mark.parametrize("thaws", ["during the run", "after the run"])
def test_a_frozen_worker_that_thaws_after_its_replacement_does_no_harm(small: SmallCluster, thaws: str) -> None:
    expected = small.expected()
    small.add(2)
    small.behave(delay=0.03)
    frozen: list[Any] = []

    def freeze() -> None:
        until(lambda: len([1 for pid, _ in small.calls() if pid == small.workers[0]]) > 5)
        os.kill(small.workers[0], signal.SIGSTOP)
        frozen.append([first for pid, first in small.calls() if pid == small.workers[0]][-1])
        if thaws == "during the run":
            replaced = lambda: any(pid != small.workers[0] and first == frozen[0] for pid, first in small.calls())  # noqa: E731
            until(replaced)
            small.behave(delay=0.1)
            os.kill(small.workers[0], signal.SIGCONT)

    with small.client() as client:
        freezer = threading.Thread(target=freeze)
        freezer.start()
        small.predict(client=client)
        freezer.join()
    assert len([1 for _, first in small.calls() if first == frozen[0]]) >= 2, "its block was computed by another one"
    if thaws == "after the run":
        assert written(small) == expected
        os.kill(small.workers[0], signal.SIGCONT)
    until(lambda: small.fork.poll(small.workers[0]) is not None)  # the scheduler has forgotten it, and it ends
    assert written(small) == expected
    assert small.predict().identical(oocpatch.predict(**small.arguments("embedded"), progress=False))


def written(cluster: SmallCluster) -> dict[str, str]:
    """The files of the output that anybody reads: one frozen or ended in the middle of a write has no chunk's name."""
    return {name: digest for name, digest in cluster.digests().items() if ".partial" not in name}


def test_a_block_that_kills_its_process_is_named_and_no_other_is_blamed(small: SmallCluster) -> None:
    expected = small.expected()
    small.add(5)
    small.behave(delay=0.005, fatal=[MIDDLE])
    with small.client() as client:
        with pytest.raises(oocpatch.BlockFailed, match="3 worker processes died") as caught:
            small.predict(client=client)
        assert set(caught.value.failures) == {MIDDLE_BLOCK}
        assert set(oocpatch.status(small.folder / "out").failed) == {MIDDLE_BLOCK}
        until(lambda: len(client.nthreads()) == 2)
        small.behave()
        before = len(small.calls())
        small.predict(client=client)
    assert small.digests() == expected
    assert {first for _, first in small.calls()[before:]} <= {MIDDLE, *neighbours_of_middle()}


def neighbours_of_middle() -> set[float]:
    """First voxels of the patches of the block in the middle."""
    return {float(y * 32 + x + 1) for y in (8, 12) for x in (16, 20)}


def test_a_fault_that_may_pass_is_tried_again_and_one_that_stays_fails_its_block_only(small: SmallCluster) -> None:
    small.add(2)
    small.behave(failing=[MIDDLE])
    with small.client() as client, pytest.raises(oocpatch.BlockFailed, match="hiccups") as caught:
        small.predict(client=client)
    assert set(caught.value.failures) == {MIDDLE_BLOCK}
    assert len([1 for _, first in small.calls() if first == MIDDLE]) == clusters.ATTEMPTS


def test_batches_that_are_halved_are_counted_over_all_workers(small: SmallCluster) -> None:
    """Blocks in the inside have four patches, those at the border two or one."""
    small.add(2)
    small.behave(room=2)
    with small.client() as client:
        small.predict(client=client, batch_size=4)
    small.predict("embedded", batch_size=4)
    assert small.digests() == small.digests("embedded")
    for name in ("out", "embedded"):
        found = inspect_output(LocalPath(small.folder / name))
        assert found is not None
        assert found.details["halved_batches"] == 9


def test_processes_of_this_machine_see_a_device_each_and_no_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process sees is real; that there are two devices is not."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with connected(None, 2, "cuda") as client:
        client.wait_for_workers(2)
        found = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        blocked = client.run(signal.pthread_sigmask, signal.SIG_BLOCK, ())
    assert sorted(found.values()) == ["4", "7"]
    assert all(signal.SIGINT in signals for signals in blocked.values())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_an_interrupt_while_processes_start_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(psutil.Process().children(recursive=True))
    started = set[psutil.Process]()

    def interrupt(*_: Any, **__: Any) -> None:
        until(lambda: any("spawn_main" in word for child in children() for word in child.cmdline()))
        started.update(children())
        raise KeyboardInterrupt

    def children() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - before

    monkeypatch.setattr(distributed.Client, "wait_for_workers", interrupt)
    with pytest.raises(KeyboardInterrupt), connected(None, 1):
        pass
    assert started
    assert not [child for child in children() if "spawn_main" in " ".join(child.cmdline())]


def test_workers_get_their_number_among_those_of_their_host(
    small: SmallCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of several devices the number says which one to use. A new process takes the place of a dead one."""
    told: list[tuple[str, int]] = []
    submit = distributed.Client.submit

    def noting(self: distributed.Client, *args: Any, **options: Any) -> Any:
        told.append((options["workers"][0], args[3]))
        return submit(self, *args, **options)

    monkeypatch.setattr(distributed.Client, "submit", noting)
    small.add(2)
    small.behave(delay=0.02)

    def replace() -> None:
        until(lambda: len({address for address, _ in told}) == 2)
        small.fork.kill(small.workers.pop())
        small.add(1)

    with small.client() as client:
        killer = threading.Thread(target=replace)
        killer.start()
        small.predict(client=client)
        killer.join()
    places = dict(told)
    assert len(set(told)) == len(places), "a process keeps its place"
    assert set(places.values()) == {0, 1}


def test_a_model_that_cannot_travel_is_refused_before_the_start(small: SmallCluster) -> None:
    small.add(1)
    lock = threading.Lock()

    def model(patches: torch.Tensor) -> torch.Tensor:
        with lock:
            return patches

    with small.client() as client, pytest.raises(ValueError, match=r"model must be a model spec.*file\.py:name"):
        small.predict(model=model, model_args=None, client=client)
    assert not (small.folder / "out").exists()


def test_workers_of_another_version_are_refused_before_the_start(
    small: SmallCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small.add(1)
    with small.client() as client:
        here = versions_here()
        monkeypatch.setattr("oocpatch.execution.payload.versions_here", lambda: {**here, "torch": "9.9"})
        with pytest.raises(ValueError, match=r"torch 9\.9 here, .* there"):
            small.predict(client=client)
        assert not (small.folder / "out").exists()
        check_versions(client, {**here, "zarr": "1.0"})
    assert "zarr 1.0 here" in caplog.text


@pytest.mark.parametrize(
    ("client", "error", "words"),
    [("tcp://127.0.0.1:1", TypeError, "dask.distributed.Client, got str"), (7, TypeError, "got int")],
)
def test_what_is_no_client_is_refused(client: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        oocpatch.predict(np.zeros((8, 8)), nn.Identity(), tmp_path / "out", patch_size=4, client=client)


def test_a_closed_client_is_refused(small: SmallCluster) -> None:
    client = distributed.Client(small.address, set_as_default=False)
    client.close()
    with pytest.raises(ValueError, match="but it is closed"):
        small.predict(client=client)


FACTORY = """
import os, torch

def net():
    with open({log!r}, "a") as log:
        log.write(f"{{os.getpid()}} ")
    torch.manual_seed(0)
    return torch.nn.Conv2d(1, 3, 3, padding=1)
"""


def test_workers_compute_lazy_chunks_with_the_bits_of_predict_and_load_a_model_once(
    small: SmallCluster, tmp_path: Path
) -> None:
    """A spec and a module, from disk and from memory, in several calls of `compute`."""
    log, model = tmp_path / "loads", tmp_path / "net.py"
    model.write_text(FACTORY.format(log=str(log)))
    small.add(1, threads=2)
    settings = {"patch_size": PATCH, "patch_overlap": OVERLAP, "output_chunks": 4, "block_shape": BLOCK}
    data = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    for volume, net in ((small.folder / "volume.zarr", f"{model}:net"), (data, Net())):
        options = {**settings, "postprocess": "argmax", "mask": (data > 0.9)[::4, ::4]}
        expected = oocpatch.predict(volume, net, tmp_path / f"{type(net).__name__}.zarr", progress=False, **options)
        with small.client() as client:
            result = oocpatch.lazy(volume, net, **options)
            for rows in (slice(0, 7), slice(16, 32)):
                part = client.compute(result[rows]).result(timeout=60)
                np.testing.assert_array_equal(part, expected[rows])
    assert [int(pid) for pid in log.read_text().split()].count(small.workers[0]) == 1
