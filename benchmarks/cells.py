"""Touching convex cells: a volume of them, a model that knows them, and what became of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from scipy import ndimage
from scipy.spatial import cKDTree

Array = npt.NDArray[Any]


def make_cells(path: str, shape: list[int], cells: int, chunk: int) -> dict[str, Any]:
    """Store touching convex cells: each voxel has the number of the nearest of so many random points, from 1."""
    points = np.random.default_rng(0).random((cells, len(shape))) * shape
    tree = cKDTree(points)
    array = zarr.create_array(path, shape=tuple(shape), chunks=(chunk,) * len(shape), dtype="int32", overwrite=True)
    present = np.zeros(cells + 1, np.bool_)
    for start in range(0, shape[0], chunk):
        rows = [np.arange(start, min(start + chunk, shape[0])), *map(np.arange, shape[1:])]
        grid = np.stack(np.meshgrid(*rows, indexing="ij"), axis=-1).reshape(-1, len(shape))
        slab = tree.query(grid, workers=-1)[1].astype(np.int32).reshape([len(r) for r in rows]) + 1
        array[start : start + chunk] = slab
        present[slab.reshape(-1)] = True
    return {"cells": int(present.sum())}


def renumbered(patch: Array, *, perturbed: bool) -> Array:
    """Return the cells of a patch, numbered anew; `perturbed`: with each boundary a voxel wrong."""
    found = np.flatnonzero(np.bincount(patch.reshape(-1)))
    random = np.random.default_rng(int(patch.sum(dtype=np.int64)))
    numbers = np.zeros(found[-1] + 1, np.int32)
    numbers[found] = random.permutation(len(found)) + 1
    result: Array = numbers[patch]
    if perturbed:  # each cell grows by a voxel into those with a lower number, another one in every patch
        structure = ndimage.generate_binary_structure(patch.ndim, 1)
        result = ndimage.grey_dilation(result, footprint=structure, mode="nearest")
    return result


def compare(truth: Any, result: Any) -> dict[str, int]:
    """Count the cells that are the best cell of several objects (split), or of none (merged)."""
    pairs, voxels = np.zeros(0, np.int64), np.zeros(0, np.int64)
    width, step = 1 << 31, truth.chunks[0]
    for start in range(0, truth.shape[0], step):
        rows = slice(start, start + step)
        keys = truth[rows].astype(np.int64).reshape(-1) * width + result[rows].reshape(-1)
        new, counts = np.unique(keys, return_counts=True)
        merged, places = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        voxels = np.bincount(places, np.concatenate([voxels, counts])).astype(np.int64)
        pairs = merged
    cells, objects = np.divmod(pairs, width)
    order = np.lexsort((-voxels, objects))
    order = order[objects[order] > 0]
    best = cells[order[np.unique(objects[order], return_index=True)[1]]]
    number, times = np.unique(best, return_counts=True)
    every = np.unique(cells)
    return {"cells": len(every), "split": int((times > 1).sum()), "merged": len(every) - len(number)}
