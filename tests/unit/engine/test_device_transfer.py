"""Promises on copies to the device and back: through buffers or without, a run gives the same bytes.

There is no GPU where these tests run. The CPU stands in for a device with memory of its own: all that is read and
written then goes through the same buffers, by the same calls, in whole runs. The order of copies and kernels, which
only shows where these overlap, is checked on streams that do nothing until somebody waits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import oocpatch
from oocpatch.engine import device_transfer
from oocpatch.engine.buffers import FutureGroup
from oocpatch.engine.device_transfer import HostStaging, Transfer
from oocpatch.engine.partial_sums import slabs
from oocpatch.planning.memory import pinned_bytes
from oocpatch.planning.plan import human
from tests.support.children import file_digests

SHAPE = (29, 28, 22)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels of numbers; nothing is stored of some chunks."""
    data = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)
    data[:, :16, 16:] = 0
    path = tmp_path_factory.mktemp("volume") / "volume.zarr"
    zarr.create_array(path, data=data, chunks=(2, 8, 8, 8), dimension_names=("c", "z", "y", "x"))
    return path


class Heads(nn.Module):
    """Two outputs of different channels and scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.mix(patches)
        return {"scores": scores, "small": nn.functional.avg_pool3d(scores[:, :1], 2)}


MASK = np.zeros(SHAPE, bool)
MASK[4:20, 10:20, 5:] = True
COMMON: dict[str, Any] = {"patch_size": 12, "patch_overlap": 4, "output_chunks": 8, "block_shape": (16, 16, 22)}
RUNS: dict[str, dict[str, Any]] = {
    "hann": {},
    "crop": {"overlap_mode": "crop", "padding_mode": "reflect"},
    "skipped patches": {"skip_empty": True},
    "mask, labels": {"mask": MASK, "batch_size": 3, "postprocess": {"scores": "argmax"}},
    "one at a time": {"workers": 1, "max_memory": "8MiB"},
}


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on all goes through buffers, planned and counted; the bytes of each that was taken."""
    taken: list[int] = []
    allocate = Transfer.allocate

    def count(self: Transfer, size: int) -> torch.Tensor:
        memory = allocate(self, size)
        taken.append(memory.numel())
        return memory

    monkeypatch.setattr(Transfer, "allocate", count)
    for module in ("configuration.make_plan", "execution.task_context"):
        monkeypatch.setattr(f"oocpatch.{module}.is_staged", lambda _: True)
    monkeypatch.setattr("oocpatch.configuration.make_plan.device_memory", lambda *_: 8 << 30)
    return taken


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_through_buffers_the_bytes_are_the_same_and_what_they_take_was_planned(
    options: dict[str, Any], volume: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    arguments = {**COMMON, **options, "progress": False}
    oocpatch.predict(volume, Heads(), tmp_path / "direct", **arguments)
    taken = request.getfixturevalue("staged")
    plan = oocpatch.plan(volume, Heads(), tmp_path / "staged", **arguments)
    assert plan.blocks > 1
    plan.run()
    uploads, downloads = dict(plan.memory_parts)["uploads"], sum(map(pinned_bytes, plan.landing_bytes))
    assert taken
    assert sum(taken) <= uploads + plan.blocks * downloads
    assert max(taken) <= max(uploads, downloads)
    direct, through = (file_digests(tmp_path / name) for name in ("direct", "staged"))
    # which tells when it was written
    assert direct.pop("zarr.json") != through.pop("zarr.json")
    assert direct == through


def test_copies_that_are_made_as_late_as_they_may_be_do_not_change_a_byte(
    staged: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When somebody waits for them, and slowly: till then the model goes on, and memory must not be used again."""
    # one long block of many slabs, whose memory the next but one takes over
    long = np.random.default_rng(0).random((2, 96, 16, 16), dtype=np.float32)
    arguments = {**COMMON, "axes": "czyx", "block_shape": long.shape[1:], "progress": False}
    oocpatch.predict(long, Heads(), tmp_path / "expected", **arguments)
    late = []

    def copy(self: Transfer, stream: Any, after: Any, pairs: Any) -> Any:
        todo, turn = list(pairs), threading.Lock()

        def copy_done() -> None:
            with turn:
                if todo:
                    time.sleep(0.02)
                    late.append(len(todo))
                while todo:
                    target, source = todo.pop()
                    target.data.copy_(source)

        return copy_done

    monkeypatch.setattr(Transfer, "_copy", copy)
    oocpatch.predict(long, Heads(), tmp_path / "late", **arguments)
    assert len(late) > 30
    for name in ("scores", "small"):
        assert file_digests(tmp_path / "late" / name) == file_digests(tmp_path / "expected" / name)


def planned(volume: Path, output: Path, **options: Any) -> oocpatch.PlannedRun:
    return oocpatch.plan(volume, Heads(), output, **{**COMMON, "postprocess": {"scores": "argmax"}, **options})


def test_memory_of_the_device_is_planned_by_itself(staged: list[int], volume: Path, tmp_path: Path) -> None:
    """Together they are what the CPU needs, and what values are copied through."""
    plan = planned(volume, tmp_path / "out", workers=2)
    assert plan.concurrency == 2
    here, there = dict(plan.memory_parts), dict(plan.device_parts)
    assert {"uploads", "chunks", "normalize"} <= set(here)
    assert {"input", "model", "batch", "libraries"} <= set(there)
    assert {"model", "batch", "input"}.isdisjoint(here)
    of_task = sum(there[name] for name in ("input", "sums", "staged", "tile", "batch"))
    assert plan.task_device_memory == of_task
    assert plan.projected_device_memory == sum(there.values()) + of_task
    assert json.loads(plan.plan.to_json())["projected_device_memory"] == plan.projected_device_memory
    assert f"device   {human(plan.projected_device_memory)} at most (input" in str(plan)
    assert "device " not in str(plan).partition("memory")[0]


def test_a_device_with_little_memory_gets_fewer_blocks_at_a_time_or_none(
    staged: list[int], volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_a_time, limit = [], planned(volume, tmp_path / "out", workers=2).projected_device_memory
    monkeypatch.setattr("oocpatch.configuration.make_plan.device_memory", lambda *_: limit)

    def plan_with_less_and_less() -> None:
        nonlocal limit
        while True:
            plan = planned(volume, tmp_path / "out", workers=2)
            assert plan.projected_device_memory <= limit
            at_a_time.append(plan.concurrency)
            limit = plan.projected_device_memory - 1

    with pytest.raises(oocpatch.PlanTooLarge, match=r"needs .*libraries 512.0 MiB.* of the device are to be used"):
        plan_with_less_and_less()
    assert (at_a_time[0], at_a_time[-1]) == (2, 1)


@pytest.mark.parametrize("block_shape", [(16, 16, 22), (29, 28, 22), (16, 28, 22)])
def test_memory_for_slabs_is_that_of_their_largest_with_the_size_of_each_value(
    block_shape: tuple[int, ...], volume: Path, tmp_path: Path
) -> None:
    plan = planned(volume, tmp_path / "out", block_shape=block_shape).plan
    for number, (frame, head, landing) in enumerate(zip(plan.frames, plan.heads, plan.landing_bytes, strict=True)):
        largest = max(
            sum(p.box.size * (head.out_voxel_bytes if p.name is None else head.sum_voxel_bytes) for p in pieces)
            for block in frame
            for _, pieces in slabs(frame, block, number)
        )
        assert largest <= landing <= 1.2 * largest + 8 * 11


@pytest.mark.parametrize("overlap_mode", ["hann", "max"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_on_a_device_fails_its_block_with_its_slab(
    overlap_mode: str, bad: float, staged: list[int], tmp_path: Path
) -> None:
    data = np.random.default_rng(0).random((32, 16), dtype=np.float32)
    data[20, 3] = bad
    settings: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "output_chunks": 8, "block_shape": 16}
    settings |= {"overlap_mode": overlap_mode, "progress": False}
    with pytest.raises(oocpatch.BlockFailed) as failed:
        oocpatch.predict(data, nn.Identity(), tmp_path / "out", **settings)
    assert list(failed.value.failures) == [1]
    assert "must be finite, got NaN or infinity in the voxels from (16, 0) to (24, 16)" in str(failed.value)
    huge = np.full((32, 16), 3e38, np.float32)  # whose sum is not finite, as each of them is
    result = oocpatch.predict(huge, nn.Identity(), tmp_path / "huge", **{**settings, "overlap_mode": "crop"})
    np.testing.assert_array_equal(result, huge)


def test_integers_and_volumes_in_memory_go_through_buffers_too(staged: list[int], tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 60_000, (50, 61)).astype(np.uint16)
    settings: dict[str, Any] = {"patch_size": 16, "patch_overlap": 6, "overlap_mode": "crop", "progress": False}
    result = oocpatch.predict(data, nn.Identity(), tmp_path / "out", **settings)
    np.testing.assert_array_equal(result, data)
    assert staged


def test_without_a_device_of_its_own_nothing_is_copied() -> None:
    direct = Transfer("cpu", staged=False)
    ring = torch.zeros(3, 4)
    with direct.upload(ring[:, 1:], direct.queued()) as target:
        assert target.__array_interface__["data"][0] == ring[:, 1:].data_ptr()
    arrays, _ = HostStaging(direct, 0).download([ring])
    assert arrays[0].__array_interface__["data"][0] == ring.data_ptr()


def test_a_slab_is_staged_in_the_memory_of_the_one_before_and_keeps_its_dtypes(staged: list[int]) -> None:
    staging = HostStaging(Transfer("cpu", staged=True), 1000)
    for offset in (0, 50):
        parts = [
            torch.arange(7, dtype=torch.uint8) + offset,
            torch.arange(6, dtype=torch.float64).view(2, 3) + offset,
            torch.tensor([True, False]),
        ]
        arrays, copy_done = staging.download(parts)
        copy_done()
        assert [a.dtype for a in arrays] == ["uint8", "float64", "bool"]
        for array, part in zip(arrays, parts, strict=True):
            np.testing.assert_array_equal(array, part.numpy())
    assert staged == [1024]


# Streams that do nothing until somebody waits: the latest moment at which a GPU may do what it was told.


class LateStream:
    """What was launched and is not done yet: functions, in their order."""

    def __init__(self, device: Any = None) -> None:
        self.waiting: list[Any] = []

    def launch(self, work: Any) -> None:
        self.waiting.append(work)

    def wait_event(self, event: LateEvent) -> None:
        self.launch(event.synchronize)

    def record_event(self, event: LateEvent | None = None) -> LateEvent:
        event = event or LateEvent()
        event.before = self, len(self.waiting)
        done = []
        self.launch(lambda: done.append(True))
        event.reached = lambda: bool(done)
        return event

    def step(self) -> None:
        self.waiting.pop(0)()


class LateEvent:
    """A place in a stream."""

    def __init__(self, *, blocking: bool = False) -> None:
        self.before: Any = None
        self.reached: Any = None

    def synchronize(self) -> None:
        while not self.reached():
            self.before[0].step()


class Late:
    """Stands for `torch.cuda`: each stream runs only as far as somebody waits for it."""

    Stream, Event = LateStream, LateEvent

    def __init__(self) -> None:
        self.compute = LateStream()
        self.current = self.compute

    def current_stream(self, device: Any = None) -> LateStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: LateStream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before


class OnDevice(torch.Tensor):
    """A tensor that is copied to and from when its stream comes to it, and not before."""

    late: Late

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        if func is torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return plain[0].data.as_subclass(cls)
        if func is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            cls.late.current.launch(lambda: plain[0].copy_(plain[1]))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    simulated = Late()
    OnDevice.late = simulated
    monkeypatch.setattr(device_transfer.torch, "cuda", simulated)
    return simulated


def on_late_streams() -> Transfer:
    transfer = Transfer("cpu", staged=True)
    transfer._up, transfer._down = LateStream(), LateStream()  # type: ignore[assignment]
    return transfer


def test_an_upload_waits_for_kernels_that_use_the_planes_and_is_done_when_its_thread_is(late: Late) -> None:
    transfer, ring, used = on_late_streams(), torch.full((4,), 1.0).as_subclass(OnDevice), []
    plain = ring.as_subclass(torch.Tensor)
    late.compute.launch(lambda: used.append(plain.clone()))  # a kernel that needs the old planes
    after = transfer.queued()
    late.compute.launch(lambda: pytest.fail("what was launched after the request is not waited for"))
    with transfer.upload(ring, after) as target:
        target[...] = 2
    assert used[0].tolist() == [1] * 4
    assert plain.tolist() == [2] * 4


def test_two_uploads_of_a_thread_use_its_buffer_one_after_the_other(late: Late) -> None:
    transfer = on_late_streams()
    rings = [torch.zeros(3).as_subclass(OnDevice) for _ in range(2)]
    for number, ring in enumerate(rings):
        with transfer.upload(ring, transfer.queued()) as target:
            target[...] = number + 1
    assert [r.as_subclass(torch.Tensor).tolist() for r in rings] == [[1] * 3, [2] * 3]


def test_a_download_waits_for_the_kernels_that_make_the_values_and_a_writer_for_the_download(late: Late) -> None:
    transfer, values = on_late_streams(), torch.zeros(4).as_subclass(OnDevice)
    plain = values.as_subclass(torch.Tensor)
    late.compute.launch(lambda: plain.fill_(5))  # the kernel that makes them
    arrays, copy_done = HostStaging(transfer, 0).download([values])
    late.compute.launch(lambda: pytest.fail("what is launched later is not waited for"))
    assert arrays[0].tolist() == [0] * 4, "nothing was waited for so far"
    copy_done()
    assert arrays[0].tolist() == [5] * 4


def test_a_thread_waits_for_the_batch_before_the_last_but_one(late: Late) -> None:
    done: list[int] = []
    transfer = on_late_streams()
    for batch in range(4):
        late.compute.launch(functools.partial(done.append, batch))
        transfer.limit_run_ahead()
        assert done == list(range(batch - 1)), "no more is waited for, since the device would have nothing to do then"


@pytest.mark.parametrize("name", ["wait_event", "record_event", "synchronize"])
def test_the_streams_of_the_tests_are_called_as_those_of_torch_are(name: str) -> None:
    for late, real in ((LateStream, torch.cuda.Stream), (LateEvent, torch.cuda.Event)):
        if hasattr(late, name):
            names = list(inspect.signature(getattr(late, name)).parameters)
            assert list(inspect.signature(getattr(real, name)).parameters)[: len(names)] == names


def test_calls_after_one_that_failed_are_waited_for() -> None:
    """They write to memory and files that are given up next."""
    begun, written = threading.Event(), threading.Event()

    def fail() -> None:
        begun.wait()
        raise OSError("no space left")

    def write() -> None:
        begun.set()
        time.sleep(0.05)
        written.set()

    with ThreadPoolExecutor(2) as pool:
        group = FutureGroup(pool)
        group.submit(fail)
        group.submit(write)
        with pytest.raises(OSError, match="no space left"):
            group.wait()
        group.cancel_and_wait()
        assert written.is_set()
