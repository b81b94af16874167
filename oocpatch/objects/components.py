"""Connected components of one array in memory, numbered by their first voxels.

`connected-components-3d` labels up to three axes where it is installed; else, and for more axes, scipy does.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import InvalidVolume
from oocpatch.planning.labelling import Labelling
from oocpatch.system import import_extra

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

PIECE, ROW = 1 << 18, 256
"""Voxels that are examined at a time, so that temporary arrays stay small; voxels whose largest label is looked up."""

NEIGHBOURS = {2: (4, 8), 3: (6, 18, 26)}
"""Names that connected-components-3d gives to the connectivities of two and three axes."""


@functools.cache
def require_libraries() -> None:
    """Check that what labelling needs is installed.

    Raises:
        ImportError: naming the extra.
    """
    import_extra("scipy.ndimage", "objects", "labelling", ImportError)


@functools.cache
def _cc3d() -> ModuleType | None:
    try:
        return importlib.import_module("cc3d")
    except ImportError:
        return None


def foreground(values: Array, rule: Labelling) -> Array:
    """Return the voxels that belong to objects: true or false, or with `per_class` the class, 0 for the background.

    Raises:
        InvalidVolume: for labels below zero.
    """
    if rule.threshold is not None:
        with np.errstate(over="ignore"):  # a threshold beyond the dtype is larger than all values
            return np.asarray(values > rule.threshold)
    if values.dtype.kind == "i" and values.size and (least := values.min()) < 0:
        raise InvalidVolume(
            f"labels must be 0 or more, got {least}; pass threshold= to say what is foreground, such as threshold=0"
        )
    return values if rule.per_class else values != 0


def components(marked: Array, connectivity: int) -> tuple[Labels, Places]:
    """Label connected components of equal values that are not zero, 1 to n by their first voxels in C order.

    Returns:
        The labels, and for each component the place of its first voxel in C order, ascending.

    >>> labels, places = components(np.array([[0, 1, 0], [1, 0, 1]], bool), 1)
    >>> labels.tolist(), places.tolist()
    ([[0, 1, 0], [2, 0, 3]], [1, 3, 5])
    """
    marked = np.ascontiguousarray(marked)
    if not marked.any():  # most blocks of a sparse volume
        return np.zeros(marked.shape, np.uint32), np.empty(0, np.int64)  # untouched: no memory
    library = _cc3d()
    if library is not None and marked.ndim <= 3:
        labels = _by_cc3d(library, marked, connectivity)
    else:
        labels = _by_scipy(marked, connectivity)
    return _in_order(labels)


def _by_cc3d(library: ModuleType, marked: Array, connectivity: int) -> Labels:
    # Never as a binary image: that shortcut of version 4.1 loses objects of two axes with edges of odd length.
    array = marked.view(np.uint8) if marked.dtype == np.bool_ else marked
    array = array[None] if array.ndim == 1 else array
    names = NEIGHBOURS[array.ndim]
    labels = library.connected_components(array, connectivity=names[connectivity - 1], out_dtype=np.uint32)
    return np.ascontiguousarray(labels, np.uint32).reshape(marked.shape)


def _by_scipy(marked: Array, connectivity: int) -> Labels:
    from scipy import ndimage  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra without types

    structure = ndimage.generate_binary_structure(marked.ndim, connectivity)
    labels = np.zeros(marked.shape, np.uint32)
    if marked.dtype == np.bool_:
        ndimage.label(marked, structure, output=labels)
        return labels
    count, of_class = 0, np.empty_like(labels)
    for value in np.unique(marked):
        if value:
            members = marked == value
            added = ndimage.label(members, structure, output=of_class)
            np.add(of_class, count, out=labels, where=members)
            count += added
    return labels


def _in_order(labels: Labels) -> tuple[Labels, Places]:
    """Return labels numbered by first voxels, and their places; the labels are 1 to n in any order."""
    flat = labels.reshape(-1)
    whole = flat.size // ROW * ROW
    rows = flat[:whole].reshape(-1, ROW)
    tail = np.zeros((1, ROW), np.uint32)
    tail[0, : flat.size - whole] = flat[whole:]
    highest = np.maximum.accumulate(np.concatenate([[0], rows.max(axis=1), tail.max(axis=1)]).astype(np.uint32))
    count = int(highest[-1])
    new = np.flatnonzero(highest[1:] > highest[:-1])  # rows with labels that no row before has; most have none
    places = [np.empty(0, np.int64)]
    step = max(1, PIECE // ROW)
    for start in range(0, len(new), step):
        numbers = new[start : start + step]
        some = rows[numbers] if numbers[-1] < len(rows) else np.concatenate([rows[numbers[:-1]], tail])
        so_far = np.maximum.accumulate(np.concatenate([highest[numbers][:, None], some], axis=1), axis=1)
        row, column = np.nonzero(so_far[:, 1:] > so_far[:, :-1])
        places.append(numbers[row] * ROW + column)
    first = np.concatenate(places)
    if len(first) == count:  # each one is larger by one than those before
        return labels, first
    return _renumbered(flat, count, labels.shape)


def _renumbered(flat: Labels, count: int, shape: tuple[int, ...]) -> tuple[Labels, Places]:
    first = np.zeros(count + 1, np.int64)
    for start in reversed(range(0, flat.size, PIECE)):
        piece = flat[start : start + PIECE]
        first[piece[::-1]] = np.arange(start + len(piece) - 1, start - 1, -1)  # of equal indices the last one counts
    order = np.argsort(first[1:])
    numbers = np.zeros(count + 1, np.uint32)
    numbers[1:][order] = np.arange(1, count + 1, dtype=np.uint32)
    return numbers[flat].reshape(shape), first[1:][order]


def replace_labels(labels: Labels, ids: Array, out: Array) -> None:
    """Write the id of each label to `out`, of the labels' shape and the ids' dtype; both arrays are contiguous.

    >>> out = np.zeros(3, np.uint64)
    >>> replace_labels(np.array([2, 0, 1], np.uint32), np.array([0, 7, 5], np.uint64), out)
    >>> out.tolist()
    [5, 0, 7]
    """
    flat, target = labels.reshape(-1), out.reshape(-1)
    for start in range(0, flat.size, PIECE):  # numpy converts indices, of a piece within the cache
        part = flat[start : start + PIECE]
        if part.any():
            np.take(ids, part, out=target[start : start + PIECE], mode="clip")  # else numpy copies the result


def sizes(labels: Labels, count: int) -> Places:
    """Return the number of voxels of each component.

    >>> sizes(np.array([0, 2, 1, 2], np.uint32), 2).tolist()
    [1, 2]
    """
    flat, total = labels.reshape(-1), np.zeros(count + 1, np.int64)
    step = max(PIECE, count)
    for start in range(0, flat.size, step):
        total += np.bincount(flat[start : start + step], minlength=count + 1)
    return total[1:]


def scratch_bytes(ndim: int) -> int:
    """Return the bytes per voxel that labelling adds to an array besides its foreground, in the worst case."""
    return 4 + 8 + (0 if ndim <= 3 else 8)  # labels; equivalent labels and their numbers


def most_components(voxels: int) -> int:
    """Return the largest number of components of so many voxels: every other one, as on a chessboard."""
    return math.ceil(voxels / 2)
