"""Oracles of tables of objects: loops over labels in plain numpy, and polygons filled by the even-odd rule."""

from __future__ import annotations

import math

import numpy as np

from oocpatch.objects import moments
from oocpatch.objects.columns import TableSchema


def schema_of(labels, intensity=None, properties=("area", "bbox", "centroid")):
    """The columns of a table of voxels without coordinates; an intensity is `(C, *shape)`."""
    ndim = labels.ndim
    return TableSchema(
        axes=tuple("wzyx"[-ndim:]),
        scale=(1.0,) * ndim,
        offset=(0.0,) * ndim,
        units=("",) * ndim,
        is_physical=False,
        indices=(),
        properties=properties,
        channels=() if intensity is None else tuple(map(str, range(len(intensity)))),
        label_dtype=str(labels.dtype),
        intensity_dtype="u1" if intensity is None else intensity.dtype.str,
    )


def boxes_of(shape, block):
    """Slices of blocks that cover a shape."""
    for position in np.ndindex(*(-(-n // block) for n in shape)):
        yield tuple(slice(i * block, min(n, (i + 1) * block)) for i, n in zip(position, shape, strict=True))


def columns_of(schema, labels, intensity=None, block=None, segment_size=moments.SEGMENT):
    """The columns of a table, measured in blocks of one size and merged in one step."""
    layout, parts = schema.layout, []
    for box in boxes_of(labels.shape, block or max(labels.shape)):
        values = None if intensity is None else np.ascontiguousarray(intensity[(slice(None), *box)])
        start = [s.start for s in box]
        measured = moments.measure(
            np.ascontiguousarray(labels[box]), values, layout, start=start, segment_size=segment_size
        )
        parts.append(moments.merge(list(measured), layout))
    rows, starts = moments.sort_rows(parts, layout)
    return schema.columns(moments.merge_sorted(rows, starts, layout), rows, starts)


def expected_columns(labels, intensity=None):
    """Area, box, centroid and intensities of each label, one label at a time."""
    names = "wzyx"[-labels.ndim :]
    ids = [int(i) for i in np.unique(labels) if i]
    table = {"label": np.array(ids, np.uint64)}
    voxels = [np.argwhere(labels == i) for i in ids]
    table["area"] = np.array([len(v) for v in voxels])
    for axis, name in enumerate(names):
        table[f"bbox_{name}_start"] = np.array([v[:, axis].min() for v in voxels])
        table[f"bbox_{name}_stop"] = np.array([v[:, axis].max() + 1 for v in voxels])
        table[f"centroid_{name}"] = np.array([math.fsum(v[:, axis]) / len(v) for v in voxels])
    for number, channel in enumerate([] if intensity is None else intensity):
        values = [channel[labels == i] for i in ids]
        suffix = f"_{number}" if len(intensity) > 1 else ""
        table[f"mean{suffix}"] = np.array([v.astype(np.longdouble).mean() for v in values], np.float64)
        table[f"min{suffix}"] = np.array([v.min() for v in values])
        table[f"max{suffix}"] = np.array([v.max() for v in values])
        table[f"std{suffix}"] = np.array([v.astype(np.longdouble).std() for v in values], np.float64)
    return table


def filled(polygons, shape):
    """The pixels whose centres are inside an odd number of the rings of each polygon; no two polygons overlap."""
    total = np.zeros(shape, np.int64)
    for rings in polygons:
        crossings = np.zeros(shape, np.int64)
        for ring in rings:
            for (x, y), (u, v) in zip(ring, [*ring[1:], ring[0]], strict=True):
                if x == u:  # a vertical edge: it is crossed on the way from the left to all pixels on its right
                    crossings[min(y, v) : max(y, v), x:] += 1
        total += crossings % 2
    assert total.max() <= 1
    return total.astype(bool)


def signed_area(ring):
    """The area inside a ring, positive where it is counter-clockwise for x to the right and y up."""
    return sum(x * v - u * y for (x, y), (u, v) in zip(ring, [*ring[1:], ring[0]], strict=True)) / 2
