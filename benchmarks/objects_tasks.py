"""Tasks of `benchmarks.objects`, each in a process of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from scipy import ndimage

import oocpatch
from benchmarks.copies import copy_by_chunks
from benchmarks.measure import answer, measured

OPTIONS: dict[str, dict[str, Any]] = {"scores": {"threshold": 0.8}, "mask": {}, "labels": {"per_class": True}}


def make(folder: str, kind: str, size: int, chunk: int) -> dict[str, Any]:
    """Write a volume of blobs: noisy scores, a mask of them, or labels of five classes."""
    random, tile = np.random.default_rng(0), min(size, 128)
    smooth = ndimage.gaussian_filter(random.standard_normal((tile,) * 3, np.float32), 4, mode="wrap")
    smooth /= smooth.std()
    dtype = {"scores": "float32", "mask": "uint8", "labels": "uint32"}[kind]
    volume = zarr.create_array(
        Path(folder, f"{kind}.zarr"), shape=(size,) * 3, chunks=(chunk,) * 3, dtype=dtype, overwrite=True
    )
    repeats = -(-size // tile)
    for start in range(0, size, tile):
        slab = np.tile(smooth, (1, repeats, repeats))[: size - start, :size, :size]
        if kind == "scores":
            values = slab + random.standard_normal(slab.shape, np.float32) * 1e-3
        else:
            values = slab > 0.8 if kind == "mask" else (slab > 0.8) * (1 + (slab > 1.2) + (slab > 1.6))
        volume[start : start + tile] = values.astype(dtype)
    return {}


def copy(folder: str, kind: str, workers: int) -> dict[str, Any]:
    """Copy the volume, a chunk at a time on each of some threads."""
    path = Path(folder, "copy.zarr")
    with measured() as usage:
        copy_by_chunks(Path(folder, f"{kind}.zarr"), path, workers)
    shutil.rmtree(path)
    return vars(usage)


def label(folder: str, kind: str, workers: int) -> dict[str, Any]:
    """Label the volume."""
    path = Path(folder, "out.zarr")
    _warm_up(folder)
    with measured() as usage:
        oocpatch.label(Path(folder, f"{kind}.zarr"), path, workers=workers, progress=False, **OPTIONS[kind])
    shutil.rmtree(path)
    return vars(usage)


def make_sparse(folder: str, size: int, count: int) -> dict[str, Any]:
    """Write so many single voxels, densely in few chunks of a float32 volume; no other chunk is stored."""
    chunk = 128
    volume = zarr.create_array(
        Path(folder, "sparse.zarr"), shape=(size,) * 3, chunks=(chunk,) * 3, dtype="float32", overwrite=True
    )
    per_chunk, across = (chunk // 2) ** 3, size // chunk
    values = np.zeros((chunk,) * 3, np.float32)
    values[::2, ::2, ::2] = 1
    for number in range(-(-count // per_chunk)):
        last = values if (left := count - number * per_chunk) >= per_chunk else _first(values, left)
        place = np.unravel_index(number * 37 % across**3, (across,) * 3)  # all over the volume
        volume[tuple(slice(int(p) * chunk, (int(p) + 1) * chunk) for p in place)] = last
    return {}


def _first(values: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    fewer = np.zeros(values.size, values.dtype)
    fewer[np.flatnonzero(values)[:count]] = 1
    return fewer.reshape(values.shape)


def label_sparse(folder: str, max_memory: str, workers: int) -> dict[str, Any]:
    """Label the sparse volume."""
    path = Path(folder, "out.zarr")
    _warm_up(folder)
    with measured() as usage:
        labels = oocpatch.label(
            Path(folder, "sparse.zarr"), path, threshold=0.5, max_memory=max_memory, workers=workers, progress=False
        )
    shutil.rmtree(path)
    return {**vars(usage), "objects": labels.attrs["objects"]}


def _warm_up(folder: str) -> None:
    """Label a few voxels, so that what is loaded once and for all is not counted."""
    oocpatch.label(np.eye(8, dtype=bool), Path(folder, "small.zarr"), block_shape=4, overwrite=True, progress=False)
    shutil.rmtree(Path(folder, "small.zarr"))


if __name__ == "__main__":
    answer(make, copy, label, make_sparse, label_sparse)
