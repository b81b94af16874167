"""Tasks of `benchmarks.object_tables`, each in a process of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import oocpatch
from benchmarks.contest import chunks_of
from benchmarks.copies import copy_by_chunks
from benchmarks.measure import answer, measured

PROPERTIES = {
    "shape": ("area", "bbox", "centroid"),
    "axes": ("area", "bbox", "centroid", "principal_axes"),
    "intensity": ("area", "bbox", "centroid"),
}


def make_cells(folder: str, size: int, chunk: int, cell: int) -> dict[str, Any]:
    """Write labels of balls that nearly touch, and a noisy image of them."""
    counts = -(-size // cell)
    labels = zarr.create_array(Path(folder, "labels.zarr"), shape=(size,) * 3, chunks=(chunk,) * 3, dtype="uint32")
    image = zarr.create_array(Path(folder, "image.zarr"), shape=(size,) * 3, chunks=(chunk,) * 3, dtype="uint16")
    random = np.random.default_rng(0)
    for start in range(0, size, chunk):
        z, y, x = np.ogrid[start : min(start + chunk, size), :size, :size]
        values = ((z // cell) * counts**2 + (y // cell) * counts + x // cell + 1).astype(np.uint32)
        distance = sum((axis % cell - (cell - 1) / 2) ** 2 for axis in (z, y, x))
        values[distance > (cell / 2) ** 2] = 0
        labels[start : start + chunk] = values
        image[start : start + chunk] = random.integers(1000, 1064, values.shape, np.uint16) + 500 * (values > 0)
    return {}


def copy(folder: str, workers: int) -> dict[str, Any]:
    """Copy the labels, a chunk at a time on each of some threads."""
    path = Path(folder, "copy.zarr")
    with measured() as usage:
        copy_by_chunks(Path(folder, "labels.zarr"), path, workers)
    shutil.rmtree(path)
    return vars(usage)


def make_table(folder: str, workers: int, kind: str) -> dict[str, Any]:
    """Make a table of the labels."""
    intensity = Path(folder, "image.zarr") if kind == "intensity" else None
    output = Path(folder, f"{kind}.parquet")
    _warm_up(folder)
    with measured() as usage:
        oocpatch.objects(
            Path(folder, "labels.zarr"),
            output,
            intensity=intensity,
            properties=PROPERTIES[kind],
            workers=workers,
            overwrite=True,
            progress=False,
        )
    return vars(usage)


def _warm_up(folder: str) -> None:
    """Import what a table needs, which takes seconds and is the process', not the table's."""
    labels = np.ones((8, 8, 8), np.uint8)
    oocpatch.objects(labels, Path(folder, "warm.parquet"), intensity=labels, overwrite=True, progress=False)


def make_sparse(folder: str, size: int, count: int, chunk: int = 128) -> dict[str, Any]:
    """Write objects of one voxel at random places, numbered in C order of chunks; some places are drawn twice."""
    labels = zarr.create_array(Path(folder, "sparse.zarr"), shape=(size,) * 3, chunks=(chunk,) * 3, dtype="uint32")
    random, number = np.random.default_rng(0), 0
    chunks = list(chunks_of(labels))
    share = -(-count // len(chunks)) + 64
    for box in chunks:
        values = np.zeros(tuple(s.stop - s.start for s in box), np.uint32)
        places = np.unique(random.integers(0, values.size // 2, min(share, count - number))) * 2
        values.reshape(-1)[places] = np.arange(number + 1, number + len(places) + 1)
        number += len(places)
        labels[box] = values
    return {}


def make_sparse_table(folder: str, max_memory: str, workers: int) -> dict[str, Any]:
    """Make a table of these, within a limit."""
    _warm_up(folder)
    output = Path(folder, "sparse.parquet")
    with measured() as usage:
        oocpatch.objects(
            Path(folder, "sparse.zarr"), output, max_memory=max_memory, workers=workers, overwrite=True, progress=False
        )
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    return {**vars(usage), "objects": pq.read_metadata(output).num_rows}


if __name__ == "__main__":
    answer(make_cells, copy, make_table, make_sparse, make_sparse_table)
