"""What is watched inside one run; each task in a process of its own: `python -m benchmarks.tasks NAME JSON`."""

from __future__ import annotations

import collections
import cProfile
import os
import pstats
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

import oocpatch
from benchmarks.contest import remove
from benchmarks.measure import answer, measured
from oocpatch.outputs.integrity import LEDGER
from oocpatch.storage import storage_path
from oocpatch.storage.unit_tags import UnitStamps
from oocpatch.volumes.content import InputStamps
from oocpatch.volumes.volume import Volume

WAITING = {("threading.py", "wait"), ("thread.py", "_worker"), ("selectors.py", "select"), ("queue.py", "get")}
"""Where Python threads wait, by file and function."""


def predict_under_profile(source: str, target: str, options: dict[str, Any], top: int) -> dict[str, Any]:
    """The main thread's functions by the time spent in and below them."""
    _warm_up(options)
    remove(target)
    profiler = cProfile.Profile()
    with measured() as usage:
        profiler.enable()
        oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
        profiler.disable()
    statistics: Any = pstats.Stats(profiler)
    rows = [
        {"function": f"{_short(file)}:{line} {name}", "calls": calls, "own": own, "with_callees": cumulative}
        for (file, line, name), (calls, _, own, cumulative, _) in statistics.stats.items()
    ]
    return {**vars(usage), "functions": sorted(rows, key=lambda row: -row["with_callees"])[:top]}


def predict_under_sampler(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """What each thread was doing, 200 times a second, unless it waited: samples per thread and innermost function."""
    _warm_up(options)
    remove(target)
    stop = threading.Event()
    threads: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def sample() -> None:
        while not stop.wait(0.005):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():  # noqa: SLF001  # the only door to other threads' frames
                code = frame.f_code
                if ident != threading.get_ident() and (Path(code.co_filename).name, code.co_name) not in WAITING:
                    place = f"{code.co_name} ({_short(code.co_filename)}:{frame.f_lineno})"
                    threads[names.get(ident, str(ident))][place] += 1

    sampler = threading.Thread(target=sample, name="sampler", daemon=True)
    sampler.start()
    oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
    stop.set()
    sampler.join()
    busiest = sorted(threads.items(), key=lambda item: -item[1].total())
    return {"threads": {name: dict(places) for name, places in busiest}}


def predict_under_py_spy(
    source: str, target: str, options: dict[str, Any], stacks: str, *, native: bool
) -> dict[str, Any]:
    """The same, seen from outside by py-spy, which also sees C and C++; its stacks go to a file."""
    _warm_up(options)
    remove(target)
    command = ["py-spy", "record", "--pid", str(os.getpid()), "--format", "raw", "--threads", "--rate", "200"]
    # Without --nonblocking it stops the process for every sample and measures itself; native frames need the stop.
    command += ["--output", stacks, "--native" if native else "--nonblocking"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as spy:
        time.sleep(1.0)  # to attach; this thread is idle meanwhile, and idle threads are not recorded
        oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
        spy.send_signal(signal.SIGINT)
        spy.wait()
    return {"attached": Path(stacks).exists()}


def predict_timing_the_disk(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """A run, and the seconds in it that wait for the disk: for the ledger and other small files, and for the output."""
    _warm_up(options)
    remove(target)
    synced, flushed = _Timed(os.fsync), _Timed(storage_path.flush_file_system)
    os.fsync = synced  # type: ignore[assignment]
    storage_path.flush_file_system = flushed  # type: ignore[assignment]
    with measured() as usage:
        oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
    written = [path.stat().st_size for path in Path(target).rglob("*") if path.is_file()]
    waits = {"fsync": synced.seconds, "fsyncs": len(synced.seconds), "flush": flushed.seconds}
    return {**vars(usage), **waits, "files": len(written), "bytes": sum(written)}


def predict_timing_stamps(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """A run, and the processor time in it of stamps of the input."""
    _warm_up(options)
    remove(target)
    seconds = []
    for kind, name in ((UnitStamps, "add"), (InputStamps, "add"), (InputStamps, "pack"), (Volume, "tags")):
        timed = _Timed(getattr(kind, name), time.thread_time)
        seconds.append(timed.seconds)
        setattr(kind, name, lambda *arguments, _timed=timed: _timed(*arguments))
    with measured() as usage:
        oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
    return {**vars(usage), "stamps": sum(map(sum, seconds)), "ledger": _ledger_bytes(target)}


def compare_tiny_chunks(folder: str, edge: int) -> dict[str, Any]:
    """Call a complete run over very many chunks of 8^3 voxels again: all of their files are compared."""
    source, target = Path(folder, "tiny.zarr"), Path(folder, "out.zarr")
    array = zarr.create_array(source, shape=(edge * 8,) * 3, chunks=(8, 8, 8), dtype="uint8", compressors=None)
    values = np.random.default_rng(0).integers(1, 255, (edge, 512), np.uint8)
    for row in np.ndindex(edge, edge):
        directory = source / "c" / str(row[0]) / str(row[1])
        directory.mkdir(parents=True)
        for column, chunk in enumerate(values):
            (directory / str(column)).write_bytes(chunk)
    options: dict[str, Any] = {"axes": "zyx", "patch_size": 64, "overlap_mode": "crop", "output_chunks": 64}
    oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
    with measured() as usage:
        oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
    return {**vars(usage), "chunks": edge**3, "ledger": _ledger_bytes(target), "shape": array.shape}


def _ledger_bytes(target: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(target).rglob(LEDGER))


class _Timed:
    """A function that notes how long each of its calls takes, in seconds."""

    def __init__(self, function: Callable[..., Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self.function = function
        self.clock = clock
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        start = self.clock()
        try:
            return self.function(*arguments)
        finally:
            self.seconds.append(self.clock() - start)


def _warm_up(options: dict[str, Any]) -> None:
    """A run on a few voxels, so that what is loaded once and for all is not counted."""
    small = {**options, "patch_size": 8, "patch_overlap": 4, "max_memory": "64MiB"}
    with tempfile.TemporaryDirectory() as folder:
        zarr.create_array(Path(folder) / "in", data=np.ones((20, 20, 20), np.float32), chunks=(8, 8, 8))
        oocpatch.predict(Path(folder) / "in", torch.nn.Identity(), Path(folder) / "out", **small, progress=False)


def _short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])


if __name__ == "__main__":
    answer(
        predict_under_profile,
        predict_under_sampler,
        predict_under_py_spy,
        predict_timing_the_disk,
        predict_timing_stamps,
        compare_tiny_chunks,
    )
