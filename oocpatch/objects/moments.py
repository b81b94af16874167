"""Additive moments of objects: rows of parts of objects, made block by block and merged by label.

```text
 labels --runs of equal labels along the last axis--> a row per object of a piece --merge by label--> a row per object
```

A row counts the voxels of a part of an object and has its box, the sums and products of its coordinates and what is
known of its intensities. Sums of coordinates, and of intensities of at most 16 bits, are integers, so that they are the
same in whatever order, and for whatever blocks, parts are merged. Other intensities are described by their mean and
their squared deviations from it (T. F. Chan, G. H. Golub, R. J. LeVeque, 1979), which are merged in the order of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.void]
"""Rows of a `RowLayout`, ascending by label and indices."""

SEGMENT = 1 << 18
"""Voxels that are cut into runs at a time."""

BYTES_PER_VOXEL = 192
"""Bytes that a voxel of these takes at most."""

RUNS_PER_SEGMENT = 4
"""A quarter of the voxels is the most runs that are measured at a time, for where every voxel has another label."""

OVERFLOW = 2.0**62
"""Bound of a sum from which on it is not computed in 64 bits."""


@dataclass(frozen=True)
class RowLayout:
    """The fields of a row.

    Attributes:
        ndim: number of spatial axes.
        indices: number of other axes, each of which has a column of its own.
        products: whether there are products of coordinates, for principal axes.
        channels: number of channels of the intensity; 0: there is none.
        intensity: dtype of the intensity.
        wide: whether an axis has more voxels than 32 bits can count.
    """

    ndim: int
    indices: int = 0
    products: bool = False
    channels: int = 0
    intensity: str = "u1"
    wide: bool = False

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of axes that products of coordinates are stored for."""
        return list(itertools.combinations_with_replacement(range(self.ndim), 2))

    @property
    def exact(self) -> bool:
        """True where sums of squares of intensities in a block fit in 64 bits, so that they are integers."""
        dtype = np.dtype(self.intensity)
        return dtype.kind in "biu" and dtype.itemsize <= 2

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """Dtype of a row."""
        place = "<i8" if self.wide else "<i4"
        fields: list[Any] = [("label", "<u8"), ("index", place, (self.indices,)), ("count", "<i8")]
        fields += [("start", place, (self.ndim,)), ("stop", place, (self.ndim,)), ("sums", "<i8", (self.ndim,))]
        fields += [("products", "<i8", (len(self.pairs),))] if self.products else []
        if self.channels:
            dtype, each = np.dtype(self.intensity).newbyteorder("<").str, (self.channels,)
            moments = [("total", "<i8", each), ("squares", "<i8", each)]
            fields += moments if self.exact else [("mean", "<f8", each), ("deviations", "<f8", each)]
            fields += [("min", dtype, each), ("max", dtype, each)]
        return np.dtype(fields)


def measure(
    labels: Array,
    intensity: Array | None,
    layout: RowLayout,
    *,
    start: Sequence[int],
    index: Sequence[int] = (),
    segment_size: int = SEGMENT,
) -> Iterator[Rows]:
    """Measure the objects of a box: rows of each piece of it, which need merging.

    Args:
        labels: integers, 0 or more, of the shape of the box; contiguous.
        intensity: values `(C, *box)`, or None.
        layout: the fields of rows.
        start: start of the box on the spatial axes.
        index: position on the other axes.
        segment_size: voxels that are cut into runs at a time.

    >>> layout = RowLayout(2)
    >>> labels = np.array([[7, 7, 0], [0, 7, 3]])
    >>> rows = merge(list(measure(labels, None, layout, start=(10, 20))), layout)
    >>> rows["label"].tolist(), rows["count"].tolist(), rows["start"].tolist(), rows["stop"].tolist()
    ([3, 7], [1, 3], [[11, 22], [10, 20]], [[12, 23], [12, 22]])
    """
    flat = labels.reshape(-1)
    values = None if intensity is None else intensity.reshape(len(intensity), -1)
    runs = segment_size // RUNS_PER_SEGMENT
    width, changes = labels.shape[-1], np.empty(min(segment_size, flat.size), np.bool_)
    for first in range(0, flat.size, segment_size):
        segment = flat[first : first + segment_size]
        if not segment.max():
            continue
        is_start = changes[: segment.size]
        is_start[0] = True
        np.not_equal(segment[1:], segment[:-1], out=is_start[1:])
        is_start[-first % width :: width] = True
        edges = np.append(np.flatnonzero(is_start), segment.size)
        for run in range(0, len(edges) - 1, runs):
            part = edges[run : run + runs + 1]
            rows = _measure_runs(flat, values, first + part, labels.shape, layout)
            if len(rows):
                rows["index"] = index
                rows["start"] += np.asarray(start, rows["start"].dtype)
                rows["stop"] += np.asarray(start, rows["stop"].dtype)
                yield rows


def _measure_runs(labels: Array, values: Array | None, edges: Array, shape: tuple[int, ...], layout: RowLayout) -> Rows:
    """Return the rows of runs of voxels between `edges`, with boxes in the frame of the array; arrays are flat."""
    of_run = labels.take(edges[:-1])
    foreground = np.flatnonzero(of_run)
    if not foreground.size:
        return np.empty(0, layout.dtype)
    order, starts = _grouped(of_run.take(foreground))
    runs = foreground.take(order)  # by label, and in C order within each
    lengths = (edges[1:] - edges[:-1]).take(runs)
    places = _positions(edges.take(runs), shape)
    rows = np.zeros(len(starts), layout.dtype)
    rows["label"] = of_run.take(runs.take(starts))
    rows["count"] = count = np.add.reduceat(lengths, starts)
    sums = [lengths * place for place in places]
    steps = lengths * (lengths - 1) // 2  # 0 + 1 + ... along each run
    sums[-1] += steps
    totals = [np.add.reduceat(value, starts) for value in sums]
    last = len(shape) - 1
    for axis, place in enumerate(places):
        rows["start"][:, axis] = start = np.minimum.reduceat(place, starts)
        rows["stop"][:, axis] = np.maximum.reduceat(place + (lengths if axis == last else 1), starts)
        rows["sums"][:, axis] = totals[axis] - count * start
    for number, (a, b) in enumerate(layout.pairs if layout.products else ()):
        x = places[b]
        of_run = sums[b] if a < last else lengths * x + 2 * steps
        product = (places[a] if a < last else x) * of_run
        product += steps * (2 * lengths - 1) // 3 if a == last else 0
        low, other = (rows["start"][:, axis].astype(np.int64) for axis in (a, b))
        moved = np.add.reduceat(product, starts) - low * totals[b] - other * totals[a] + count * low * other
        rows["products"][:, number] = moved
    if values is not None:
        shifted = edges - edges[0]
        of_runs = _Runs(shifted, runs, shifted.take(runs), shifted.take(runs + 1), starts)
        for channel in range(layout.channels):
            part = values[channel, edges[0] : edges[-1]]
            for name, ufunc in (("min", np.minimum), ("max", np.maximum)):
                rows[name][:, channel] = ufunc.reduceat(_extremes(ufunc, part, of_runs.low, of_runs.high), starts)
            (_measure_integers if layout.exact else _measure_floats)(rows, channel, part, of_runs)
    return rows


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs in a part of an array.

    Attributes:
        edges: bounds of all runs, those of the background among them.
        numbers: the runs of objects, object by object.
        low, high: their bounds.
        starts: the first of these of each object.
    """

    edges: Array
    numbers: Array
    low: Array
    high: Array
    starts: Array


def _measure_integers(rows: Rows, channel: int, values: Array, runs: _Runs) -> None:
    """Add sums of intensities, and of their squares, to rows."""
    wide = values.astype(np.int64)
    rows["total"][:, channel] = np.add.reduceat(_run_sums(wide, runs.low, runs.high), runs.starts)
    np.multiply(wide, wide, out=wide)
    rows["squares"][:, channel] = np.add.reduceat(_run_sums(wide, runs.low, runs.high), runs.starts)


def _measure_floats(rows: Rows, channel: int, values: Array, runs: _Runs) -> None:
    """Add means of intensities, and squared deviations from them, to rows."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinities are the user's, and give NaN
        floats, all_lengths = values.astype(np.float64), np.diff(runs.edges)
        means = np.add.reduceat(floats, runs.edges[:-1]) / all_lengths
        floats -= np.repeat(means, all_lengths)
        np.multiply(floats, floats, out=floats)
        squares, mean = np.add.reduceat(floats, runs.edges[:-1]).take(runs.numbers), means.take(runs.numbers)
        # About the mean of a run, since rounding then adds nothing to objects of one value.
        object_of = np.repeat(np.arange(len(rows)), np.diff(np.append(runs.starts, len(mean))))
        lengths, pivot = runs.high - runs.low, mean.take(runs.starts)
        shifted = np.add.reduceat(lengths * (mean - pivot.take(object_of)), runs.starts)
        rows["mean"][:, channel] = of_object = pivot + shifted / rows["count"]
        squares += lengths * (mean - of_object.take(object_of)) ** 2
        rows["deviations"][:, channel] = np.add.reduceat(squares, runs.starts)


def _grouped(labels: Array) -> tuple[Array, Array]:
    """Return the order that sorts labels and keeps that of equal ones, and the first position of each label in it."""
    low = int(labels.min())
    span = int(labels.max()) - low
    shifted = labels - labels.dtype.type(low)
    if span >= 1 << 16:  # 16 bits are sorted in a tenth of the time
        if span < 1 << 20:
            number = np.zeros(span + 1, np.bool_)
            number[shifted] = True
            shifted = (np.cumsum(number) - 1).take(shifted)
        else:
            shifted = np.unique(shifted, return_inverse=True)[1]
    order = np.argsort(shifted.astype(np.uint16), kind="stable")
    ordered = shifted.take(order)
    return order, np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _positions(offsets: Array, shape: tuple[int, ...]) -> list[Array]:
    """Return the coordinates of voxels by their offsets in C order."""
    small = int(offsets.max(initial=0)) < 2**31  # divided in a fifth of the time
    rest: npt.NDArray[np.int32] | npt.NDArray[np.int64] = offsets.astype(np.int32) if small else offsets
    places = []
    for size in shape[:0:-1]:
        whole = rest // np.array(size, rest.dtype)
        places.append((rest - whole * np.array(size, rest.dtype)).astype(np.int64))
        rest = whole
    return [rest.astype(np.int64), *places[::-1]]


def _run_sums(values: Array, low: Array, high: Array) -> Array:
    """Return the sums of integers over ranges `[low, high)`."""
    total = np.append(0, np.cumsum(values))
    sums: Array = total.take(high) - total.take(low)
    return sums


def _extremes(ufunc: np.ufunc, values: Array, low: Array, high: Array) -> Array:
    """Return the minimum, or the maximum, over ranges `[low, high)`: of two windows of 2^k values that cover each.

    Reducing one short range at a time costs many times that.
    """
    result = np.empty(len(low), values.dtype)
    power = np.frexp((high - low).astype(np.float64))[1] - 1
    window = values
    for k in range(int(power.max()) + 1):
        if k:
            window = ufunc(window[: -(1 << k - 1)], window[1 << k - 1 :])
        chosen = np.flatnonzero(power == k)
        result[chosen] = ufunc(window.take(low.take(chosen)), window.take(high.take(chosen) - (1 << k)))
    return result


def merge(parts: Sequence[Rows], layout: RowLayout) -> Rows:
    """Merge rows by label and indices; they may be in any order, but floats are added in that order."""
    return merge_sorted(*sort_rows(parts, layout), layout)


def sort_rows(parts: Sequence[Rows], layout: RowLayout) -> tuple[Rows, Array]:
    """Return rows sorted by label and indices, and the first row of each object; equal ones keep their order."""
    rows = np.concatenate(parts) if parts else np.empty(0, layout.dtype)
    label, indices = rows["label"], rows["index"].T
    if len(indices):
        rows = rows[np.lexsort((*indices[::-1], label))]
    elif not bool((label[1:] >= label[:-1]).all()):
        rows = rows[np.argsort(label, kind="stable")]
    if not len(rows):
        return rows, np.empty(0, np.int64)
    differs = (rows["label"][1:] != rows["label"][:-1]) | (rows["index"][1:] != rows["index"][:-1]).any(axis=1)
    return rows, np.flatnonzero(np.append(True, differs))


def merge_sorted(rows: Rows, starts: Array, layout: RowLayout) -> Rows:
    """Merge sorted rows of the same object into one.

    Products and squares of objects that are too large for them wrap around: see `covariances` and `variances`.
    """
    if len(starts) == len(rows):
        return rows
    merged = rows[starts]
    merged["count"] = np.add.reduceat(rows["count"], starts)
    merged["start"] = np.minimum.reduceat(rows["start"], starts)
    merged["stop"] = np.maximum.reduceat(rows["stop"], starts)
    group = _group_of(rows, starts)
    shift = (rows["start"] - merged["start"][group]).astype(np.int64)
    sums = rows["sums"] + rows["count"][:, None] * shift
    merged["sums"] = np.add.reduceat(sums, starts)
    for number, (a, b) in enumerate(layout.pairs if layout.products else ()):
        moved = rows["products"][:, number] + shift[:, a] * rows["sums"][:, b] + shift[:, b] * sums[:, a]
        merged["products"][:, number] = np.add.reduceat(moved, starts)
    if layout.channels:
        merged["min"] = np.minimum.reduceat(rows["min"], starts)
        merged["max"] = np.maximum.reduceat(rows["max"], starts)
        if layout.exact:
            merged["total"] = np.add.reduceat(rows["total"], starts)
            merged["squares"] = np.add.reduceat(rows["squares"], starts)
        else:
            _merge_means(merged, rows, starts, group)
    return merged


def _group_of(rows: Rows, starts: Array) -> Array:
    return np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rows))))


def _merge_means(merged: Rows, rows: Rows, starts: Array, group: Array) -> None:
    """Merge means and squared deviations of groups of rows."""
    with np.errstate(invalid="ignore", over="ignore"):
        count, mean, pivot = rows["count"][:, None], rows["mean"], rows["mean"][starts]
        shifted = np.add.reduceat(count * (mean - pivot[group]), starts)
        merged["mean"] = pivot + shifted / merged["count"][:, None]
        deviations = rows["deviations"] + count * (mean - merged["mean"][group]) ** 2
        merged["deviations"] = np.add.reduceat(deviations, starts)


def covariances(merged: Rows, rows: Rows, starts: Array, layout: RowLayout) -> Array:
    """Return the covariances of the coordinates of the voxels of objects, `(N, pairs)`, in voxels squared.

    Args:
        merged: a row per object.
        rows: the sorted rows that they were merged of, for objects whose products do not fit in 64 bits.
        starts: the first of these of each object.
        layout: the fields of rows.
    """
    count = merged["count"].astype(np.float64)
    mean = merged["sums"] / count[:, None]
    result = np.empty((len(merged), len(layout.pairs)))
    for number, (a, b) in enumerate(layout.pairs):
        result[:, number] = merged["products"][:, number] / count - mean[:, a] * mean[:, b]
    extent = (merged["stop"] - merged["start"]).max(axis=1, initial=0).astype(np.float64)
    for large in np.flatnonzero(count * extent**2 >= OVERFLOW).tolist():
        parts = _parts_of(rows, starts, large)
        n, shift = int(merged["count"][large]), (parts["start"] - merged["start"][large]).astype(object)
        own = parts["sums"].astype(object)
        sums = own + parts["count"].astype(object)[:, None] * shift
        for number, (a, b) in enumerate(layout.pairs):
            product = (parts["products"][:, number] + shift[:, a] * own[:, b] + shift[:, b] * sums[:, a]).sum()
            result[large, number] = (n * product - sums[:, a].sum() * sums[:, b].sum()) / n**2
    return result


def variances(merged: Rows, rows: Rows, starts: Array, layout: RowLayout) -> tuple[Array, Array]:
    """Return the means and variances of the intensities of objects, `(N, C)` each; arguments as of `covariances`."""
    count = merged["count"][:, None]
    if not layout.exact:
        return merged["mean"], merged["deviations"] / count
    mean = merged["total"] / count
    # About a whole number near the mean, nothing cancels; 64 bits may wrap around on the way, but not in the end.
    pivot = np.rint(mean).astype(np.int64)
    squares = merged["squares"] - 2 * pivot * merged["total"] + count * pivot * pivot
    variance = squares / count - (mean - pivot) ** 2
    bound = count[:, 0] * np.float64(np.iinfo(np.uint16).max) ** 2
    for large in np.flatnonzero(bound >= OVERFLOW).tolist():
        parts, n = _parts_of(rows, starts, large), int(count[large, 0])
        for channel in range(layout.channels):
            total, square = (int(parts[name][:, channel].astype(object).sum()) for name in ("total", "squares"))
            variance[large, channel] = (n * square - total**2) / n**2
    return mean, np.maximum(variance, 0)


def _parts_of(rows: Rows, starts: Array, number: int) -> Rows:
    """Return the rows that an object was merged of."""
    return rows[starts[number] : starts[number + 1] if number + 1 < len(starts) else len(rows)]
