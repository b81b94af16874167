"""What `benchmarks.flush` measures, in a process of its own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import oocpatch
from benchmarks.contest import remove
from benchmarks.measure import answer, measured
from oocpatch import executors
from oocpatch.storage import files, output


def predict_timing_the_disk(source: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """A run, and the seconds in it that wait for the disk: for the ledger and other small files, and for the output."""
    with tempfile.TemporaryDirectory() as folder:  # libraries are loaded
        oocpatch.predict(np.zeros((8, 8, 8), np.float32), torch.nn.Identity(), f"{folder}/first.zarr", patch_size=8)
    remove(target)
    synced, flushed = _Timed(os.fsync), _Timed(files.flush)
    os.fsync = synced  # type: ignore[assignment]
    for user in (output, executors):
        user.flush = flushed  # type: ignore[attr-defined]
    with measured() as usage:
        oocpatch.predict(source, torch.nn.Identity(), target, **options, progress=False)
    written = [path.stat().st_size for path in Path(target).rglob("*") if path.is_file()]
    waits = {"fsync": synced.seconds, "fsyncs": len(synced.seconds), "flush": flushed.seconds}
    return {**vars(usage), **waits, "files": len(written), "bytes": sum(written)}


class _Timed:
    """A function that notes how long each of its calls takes, in seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds.append(time.perf_counter() - start)


if __name__ == "__main__":
    answer(predict_timing_the_disk)
