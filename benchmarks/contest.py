"""How one contender is measured, in whatever environment it runs: a small run first, and a look at what it wrote.

Needs numpy, psutil, torch and a zarr of any version.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from benchmarks.measure import measured

KNOWN = ("identity", "two")
"""Models whose result follows from the source alone."""
SMALL = 16
"""Edge of a patch and of a chunk in the run before the one that is measured."""

LEVEL = 1
"""Level of Zstandard at which every contender writes: that of oocpatch, and the fastest one that Zarr's files have."""


@dataclass(frozen=True)
class Job:
    """What every contender is asked to do."""

    source: str
    """A cube `(z, y, x)`, or an image `(y, x, channel)`."""
    target: str
    patch: int
    overlap: int
    chunk: int
    """Edge of a chunk of the output; the source has the same."""
    model: str = "identity"
    """A name that `benchmarks.models.network` knows."""

    @property
    def image(self) -> bool:
        """Whether the source has two spatial axes, and channels behind them."""
        return self.model == "two"

    @property
    def corners(self) -> list[tuple[int, ...]]:
        """Where patches start: one every stride, and a last one that ends at the border."""
        shape = zarr.open_array(self.source, mode="r").shape[: 2 if self.image else 3]
        return corners(shape, self.patch, self.overlap)


def corners(shape: tuple[int, ...], patch: int, overlap: int) -> list[tuple[int, ...]]:
    """Where patches start: one every stride, and a last one that ends at the border."""
    return list(itertools.product(*([*range(0, n - patch, patch - overlap), n - patch] for n in shape)))


Run = Callable[[Job], dict[str, Any] | None]
"""Does the job; may return figures of its own."""


def contend(run: Run, *, compare: bool = True, **job: Any) -> dict[str, Any]:
    """Measure a contender, after a small job, so that what is loaded once and for all is not counted.

    Args:
        run: does the job.
        compare: look at the result as well.
        **job: the fields of a `Job`.

    Returns:
        What was used, as JSON, and `error` and `mean_error` where the result is known.
    """
    task = Job(**job)
    _small_run(run, task)
    remove(task.target)
    with measured() as usage:
        more = run(task) or {}
    record = {**asdict(usage), **more}
    if compare and task.model in KNOWN:
        record["error"], record["mean_error"] = _errors(task)
    remove(task.target)
    return record


def until_first_patch(make: Callable[[Any], Run], **job: Any) -> dict[str, Any]:
    """Seconds until the model gets its first patch, in a process that has done nothing yet but import.

    Args:
        make: the contender with a given model; it gets one that ends the process.
        **job: the fields of a `Job`.
    """
    from benchmarks.models import Clock  # noqa: PLC0415  # torch, which a copy does not need

    task = Job(**job)
    remove(task.target)
    make(Clock(imports=time.time() - psutil.Process().create_time()))(task)
    raise RuntimeError("the model was never asked")


def remove(target: str) -> None:
    """Remove what an earlier run wrote, and what it left beside that if it was stopped."""
    for path in Path(target).parent.glob(f"{Path(target).name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    # On the disk as well: the next run must not pay for it.
    os.sync()


def _small_run(run: Run, task: Job) -> None:
    overlap = SMALL * task.overlap // task.patch
    source = zarr.open_array(task.source, mode="r")
    with tempfile.TemporaryDirectory() as folder:
        spatial = 2 if task.image else 3
        shape = (3 * SMALL,) * spatial + source.shape[spatial:]
        options = {} if zarr.__version__.startswith("2") else {"zarr_format": source.metadata.zarr_format}
        made = zarr.create(
            shape,
            chunks=(SMALL,) * spatial + source.shape[spatial:],
            dtype=source.dtype,
            store=f"{folder}/in",
            **options,
        )
        made[...] = np.ones(shape, source.dtype)
        run(replace(task, source=f"{folder}/in", target=f"{folder}/out", patch=SMALL, overlap=overlap, chunk=SMALL))


def _errors(task: Job) -> tuple[float, float]:
    """Largest and mean absolute difference between the output and what it should be."""
    source = zarr.open_array(task.source, mode="r")
    inside = Path(task.target) / "prediction"  # the name of oocpatch's only head
    output = zarr.open_array(str(inside if inside.exists() else task.target), mode="r")

    def differ(box: tuple[slice, ...]) -> tuple[float, float, int]:
        expected = np.asarray(source[box])
        if output.shape == source.shape:
            found = np.asarray(output[box])
        elif task.image and output.shape[-1] == 2:
            expected, found = expected[..., :2], np.asarray(output[(*box[:2], slice(None))])
        elif task.image:
            expected = np.moveaxis(expected[..., :2], -1, 0)
            found = np.asarray(output[(..., *box[:2])]).reshape(expected.shape)
        else:
            found = np.asarray(output[(..., *box)]).reshape(expected.shape)
        difference = np.abs(found.astype(np.float32) - expected)
        return float(difference.max()), float(difference.mean(dtype=np.float64)), expected.size

    with ThreadPoolExecutor(2) as pool:
        largest, means, sizes = np.array(list(pool.map(differ, chunks_of(source)))).T
    # NumPy's max, because Python's would pass over a NaN.
    return float(largest.max()), float(np.average(means, weights=sizes))


def chunks_of(volume: Any) -> Iterator[tuple[slice, ...]]:
    """The boxes of a Zarr array's chunks."""
    ranges = [range(0, n, c) for n, c in zip(volume.shape, volume.chunks, strict=True)]
    for corner in itertools.product(*ranges):
        yield tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, volume.chunks, volume.shape, strict=True))
