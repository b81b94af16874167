"""A small cluster of real processes for a test to kill, and a run for it to work on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import numpy as np

import oocpatch
from tests.support.children import Children, file_digests
from tests.support.cluster_child import MODEL
from tests.support.crash_child import make_volume

PATIENCE = 60.0
SHAPE, PATCH, OVERLAP, BLOCK = (32, 32), 8, 4, 8
"""49 patches in 16 blocks, of which 15 receive seams."""
MIDDLE = float(np.ravel_multi_index((8, 16), SHAPE) + 1)
"""First voxel of a patch in a block with neighbours on all axes."""
MIDDLE_BLOCK = 6


class Fork:
    """Processes forked on demand: a scheduler, workers, clients."""

    def __init__(self, children: Children, folder: Path) -> None:
        self._children = children
        self.folder = folder
        self._alive: set[int] = set()
        self._count = 0

    def start(self, role: str, *arguments: Any, place: tuple[str, int] | None = None) -> int:
        """Process id of a child; a place is its working directory, and a process that holds its host or 0."""
        pid = self._children.fork("role", self.folder / f"{role}.log", role, arguments, place)
        self._alive.add(pid)
        return pid

    def scheduler(self, *host: str, place: tuple[str, int] | None = None) -> tuple[int, str]:
        """Process id and address."""
        self._count += 1
        report = self.folder / f"scheduler{self._count}"
        pid = self.start("scheduler", str(report), *host, place=place)
        until(report.exists)
        return pid, report.read_text()

    def poll(self, pid: int) -> int | None:
        """Exit code of a process; None while it runs."""
        code = self._children.poll(pid)
        self._alive -= set() if code is None else {pid}
        return code

    def kill(self, pid: int) -> None:
        """End a process, and see it gone."""
        os.kill(pid, signal.SIGKILL)
        os.kill(pid, signal.SIGCONT)
        until(lambda: self.poll(pid) is not None)

    def kill_all(self) -> None:
        for pid in list(self._alive):
            self.kill(pid)


class SmallCluster:
    """A scheduler and its workers, a run, and what the model of the run did."""

    def __init__(self, fork: Fork, folder: Path) -> None:
        self.fork = fork
        self.folder = folder
        make_volume(folder / "volume.zarr", SHAPE, (8, 8))
        self.control = folder / "control"
        self.behave()
        self.scheduler, self.address = fork.scheduler()
        self.workers: list[int] = []

    def behave(self, **settings: Any) -> None:
        """Tell the model what to do: `delay` in seconds, `fatal` and `failing` patches by first voxels, `room`."""
        aside = self.control.with_suffix(".new")
        aside.write_text(json.dumps(settings))
        aside.rename(self.control)

    def add(self, count: int = 1, threads: int = 1) -> None:
        self.workers += [self.fork.start("worker", self.address, threads) for _ in range(count)]

    def client(self) -> distributed.Client:
        client = distributed.Client(self.address, set_as_default=False)
        until(lambda: len(client.nthreads()) == len(self.workers))
        return client

    def arguments(self, name: str = "out", **options: Any) -> dict[str, Any]:
        return {
            "volume": str(self.folder / "volume.zarr"),
            "model_id": "scripted",  # it reads how to behave from a file
            "model": MODEL,
            "model_args": {"control": str(self.control)},
            "output": str(self.folder / name),
            "patch_size": PATCH,
            "patch_overlap": OVERLAP,
            "block_shape": BLOCK,
            "output_chunks": 4,
            **options,
        }

    def predict(self, name: str = "out", **options: Any) -> Any:
        return oocpatch.predict(**{"progress": False, **self.arguments(name, **options)})

    def digests(self, name: str = "out") -> dict[str, str]:
        return file_digests(self.folder / name / "prediction")

    def expected(self, **options: Any) -> dict[str, str]:
        """Bytes of the run in this process."""
        self.predict("embedded", **options)
        self.log_file.unlink()
        return self.digests("embedded")

    @property
    def log_file(self) -> Path:
        return Path(f"{self.control}.log")

    def calls(self) -> list[tuple[int, float]]:
        """Process id and first voxel of each patch that was computed, without the probe."""
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        found = [json.loads(line) for line in lines]
        return [(pid, first) for pid, *firsts in found for first in firsts if first]

    def left_behind(self) -> list[str]:
        """What lies beside the output, or in it without a name."""
        beside = [path.name for path in self.folder.glob("out.*")]
        return beside + [str(path) for path in (self.folder / "out").rglob("*.partial")]


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for something that is about to happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s"
        time.sleep(0.01)
