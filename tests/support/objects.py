"""Labels of a small array by the pieces that `oocpatch.label` is made of, in memory; and the oracle, by scipy alone."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from oocpatch.objects.block_table import Section, decode_table, encode_table, label_section
from oocpatch.objects.merge import MergeGrid, merge
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.labelling import Labelling

Array = npt.NDArray[Any]


def oracle(values: Array, rule: Labelling) -> tuple[Array, int]:
    """Label a whole array with scipy; number objects by their first voxels, without those that are too small."""
    marked = values if rule.threshold is None else values > rule.threshold
    structure = ndimage.generate_binary_structure(marked.ndim, rule.connectivity)
    whole, count = np.zeros(marked.shape, np.int64), 0
    for value in np.unique(marked[marked != 0]) if rule.per_class else [None]:
        labels, added = ndimage.label(marked != 0 if value is None else marked == value, structure)
        whole[labels > 0] = labels[labels > 0] + count
        count += added
    return renumbered(whole, rule.min_size)


def renumbered(labels: Array, min_size: int = 0) -> tuple[Array, int]:
    """Number labels by their first voxels in C order."""
    values, first, counts = np.unique(labels, return_index=True, return_counts=True)
    kept = (values != 0) & (counts >= min_size)
    order = values[kept][np.argsort(first[kept])]
    numbers = np.zeros(int(values.max()) + 1, np.int64)
    numbers[order] = np.arange(1, len(order) + 1)
    return numbers[labels], len(order)


def label_in_blocks(values: Array, rule: Labelling, block: Ints, max_memory: int = 1 << 26) -> tuple[Array, int]:
    """Label an array block by block, and merge."""
    counts = tuple(-(-n // b) for n, b in zip(values.shape, block, strict=True))
    tables: list[bytes] = []
    labels: list[tuple[Box, Array]] = []
    for position in itertools.product(*map(range, counts)):
        start = tuple(p * b for p, b in zip(position, block, strict=True))
        core = Box(start, tuple(min(a + b, n) for a, b, n in zip(start, block, values.shape, strict=True)))
        touching = {(axis, 0) for axis, p in enumerate(position) if p}
        touching |= {(axis, 1) for axis, p in enumerate(position) if p + 1 < counts[axis]}
        local, section = label_section(values[core.slices()], rule, core, values.shape, frozenset(touching))
        labels.append((core, local))
        tables.append(encode_table([section]))

    def read(number: int) -> Section:
        return decode_table(tables[number])[0]

    pieces: dict[int, list[Array]] = defaultdict(list)

    def write(number: int, piece: int, ids: Array) -> None:
        assert piece == len(pieces[number])
        pieces[number].append(ids)

    rows = tuple(min(r * block[0], values.shape[0]) * int(np.prod(values.shape[1:])) for r in range(counts[0] + 1))
    count = merge(MergeGrid(counts, rows), rule, read, write, max_memory)
    result = np.zeros(values.shape, np.int64)
    for number, (core, local) in enumerate(labels):
        ids = np.concatenate([np.zeros(1, np.uint64), *pieces[number]])
        result[core.slices()] = ids[local]
    return result, count


def shapes_of_objects(name: str, shape: Ints, seed: int, density: float) -> Array:
    """Return an array of objects: noise, noise in classes, one long spiral, combs whose teeth join late, or blobs."""
    random = np.random.default_rng(seed)
    if name == "noise":
        return random.random(shape) < density
    if name == "classes":
        return ((random.random(shape) < density) * random.integers(1, 4, shape)).astype(np.uint8)
    if name == "blobs":
        smooth = ndimage.gaussian_filter(random.standard_normal(shape), 1.5)
        return smooth > np.quantile(smooth, 1 - density)
    if name == "comb":  # walls on every other place of the last axis, joined at the end of the axis before
        array = np.zeros(shape, bool)
        array[..., ::2] = True
        array[tuple([slice(None)] * (len(shape) - 2) + [-1] * (len(shape) > 1))] = True
        return array
    return _spiral(shape)


def _spiral(shape: Ints) -> Array:
    """Return a spiral over the last two axes, in every other plane, which one voxel joins to the next."""
    plane = np.zeros(shape[-2:] if len(shape) > 1 else (1, *shape), bool)
    top, left, bottom, right = 0, 0, plane.shape[0] - 1, plane.shape[1] - 1
    while top <= bottom and left <= right:
        plane[top, max(0, left - 1) : right + 1] = True
        plane[top : bottom + 1, right] = True
        plane[bottom, left : right + 1] = True
        plane[min(top + 2, bottom) : bottom + 1, left] = True
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    array = np.zeros(shape, bool)
    if len(shape) == 1:
        return plane[0]
    array[..., :, :] = plane
    if len(shape) > 2:
        array[..., 1::2, :, :] = False
        array[..., 1::2, 0, 0] = True
    return array
