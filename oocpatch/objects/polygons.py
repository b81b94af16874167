"""Polygons of objects in the plane: their corners, found block by block, and the rings through them.

```text
 pixels   weights of corners     rings
  1 1     +1 . -1                exterior: (0,0) (2,0) (2,1) (1,1) (1,2) (0,2)
  1 0      . -1 +1
          -1 +1  .
```

Each pixel adds +1, -1, -1, +1 to its four corners, as the mixed difference of the object's indicator does. Weights of
blocks add up, and what is left over is exactly where the outline turns, whatever the blocks were: neither neighbours
nor a seam need to be read. Along a row the corners pair up as the ends of horizontal edges, along a column as those of
vertical ones. Where pixels of an object touch diagonally two corners fall together (weight 2 or -2): rings turn there
so that they touch and never cross, as valid polygons must.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TRACED = 1024
"""Objects whose polygons are traced at a time."""

Ring = list[tuple[int, int]]
"""Corners (x, y) of a closed ring; the first is not repeated."""


def corner_dtype(indices: int) -> np.dtype[np.void]:
    """Return the dtype of corners: of an object, at a place, with their weight."""
    return np.dtype([("label", "<u8"), ("index", "<i4", (indices,)), ("y", "<i4"), ("x", "<i4"), ("weight", "i1")])


def find_corners(labels: Array, start: Sequence[int], index: Sequence[int], dtype: np.dtype[np.void]) -> Array:
    """Return the corners of all objects in a box of two axes, as if there was nothing outside of it.

    >>> corners = find_corners(np.array([[7, 7], [7, 0]]), (0, 0), (), corner_dtype(0))
    >>> [(int(c["y"]), int(c["x"]), int(c["weight"])) for c in corners]
    [(0, 0, 1), (0, 2, -1), (1, 1, -1), (1, 2, 1), (2, 0, -1), (2, 1, 1)]
    """
    padded = np.zeros((labels.shape[0] + 2, labels.shape[1] + 2), labels.dtype)
    padded[1:-1, 1:-1] = labels
    views = (padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:])
    a, b, c, d = views
    is_corner = ~(((a == b) & (c == d)) | ((a == c) & (b == d)))
    y, x = np.nonzero(is_corner)
    around = [view[y, x] for view in views]
    parts = []
    for k, label in enumerate(around):
        weight = np.zeros(len(y), np.int8)
        is_first = label != 0
        for m, other in enumerate(around):
            same = other == label
            weight += (same * (1, -1, -1, 1)[m]).astype(np.int8)
            if m < k:
                is_first &= ~same
        keep = np.flatnonzero(is_first & (weight != 0))
        corners = np.zeros(len(keep), dtype)
        corners["label"], corners["index"], corners["weight"] = label[keep], index, weight[keep]
        corners["y"], corners["x"] = y[keep] + start[0], x[keep] + start[1]
        parts.append(corners)
    return merge_corners(parts)


def merge_corners(parts: Sequence[Array]) -> Array:
    """Return the corners of all parts, by object and in C order, with their weights added up."""
    corners = np.concatenate(parts)
    if not len(corners):
        return corners
    order = np.lexsort((corners["x"], corners["y"], *corners["index"].T[::-1], corners["label"]))
    corners = corners[order]
    differs = np.ones(len(corners), np.bool_)
    differs[1:] = (corners["index"][1:] != corners["index"][:-1]).any(axis=1)
    for name in ("label", "y", "x"):
        differs[1:] |= corners[name][1:] != corners[name][:-1]
    starts = np.flatnonzero(differs)
    merged = corners[starts]
    merged["weight"] = np.add.reduceat(corners["weight"], starts)
    kept: Array = merged[merged["weight"] != 0]
    return kept


def trace(corners: Array) -> Iterator[list[list[Ring]]]:
    """Yield for each object its polygons: an exterior ring, counter-clockwise for x to the right and y up, then holes.

    Args:
        corners: those of whole objects, as `merge_corners` returns them.

    >>> corners = find_corners(np.array([[7, 0], [0, 7]]), (0, 0), (), corner_dtype(0))
    >>> for polygon in next(trace(corners)):
    ...     print(polygon)
    [[(0, 0), (1, 0), (1, 1), (0, 1)]]
    [[(1, 1), (2, 1), (2, 2), (1, 2)]]
    """
    if not len(corners):
        return
    repeated = np.repeat(corners, np.abs(corners["weight"]))
    following = _following(repeated)
    bounds = [*object_starts(repeated).tolist(), len(repeated)]
    points = list(zip(repeated["x"].tolist(), repeated["y"].tolist(), strict=True))
    for first, stop in pairwise(bounds):
        yield _polygons(_rings(points, following, first, stop))


def object_starts(corners: Array) -> npt.NDArray[np.int64]:
    """Return the first corner of each object."""
    if not len(corners):
        return np.empty(0, np.int64)
    differs = corners["label"][1:] != corners["label"][:-1]
    differs |= (corners["index"][1:] != corners["index"][:-1]).any(axis=1)
    return np.flatnonzero(np.append(True, differs))


def _following(corners: Array) -> list[int]:
    """Return for each corner the next one of its ring, with the object to the right as it is seen with y down.

    Corners of weight 2 or -2 come twice: once for each of the two turns there.
    """
    count = len(corners)
    number, sign = np.arange(count), np.sign(corners["weight"])
    leaves_along_row = (number % 2 == 0) == np.repeat(sign[::2] > 0, 2)
    # The two turns of a double corner go around the two pixels of the object, be they on one diagonal or the other.
    turn = number * sign
    order = np.lexsort((turn, corners["y"], corners["x"], *corners["index"].T[::-1], corners["label"]))
    along_column = np.empty(count, np.int64)
    along_column[order] = order[number ^ 1]
    following: list[int] = np.where(leaves_along_row, number ^ 1, along_column).tolist()
    return following


def _rings(points: list[tuple[int, int]], following: list[int], first: int, stop: int) -> Iterator[Ring]:
    """Yield the rings through the corners of one object; none passes a point twice."""
    is_new = bytearray(b"\1") * (stop - first)
    for start in range(first, stop):
        ring, corner = [], start
        while is_new[corner - first]:
            is_new[corner - first] = 0
            ring.append(points[corner])
            corner = following[corner]
        if ring:
            yield from _split(ring) if len(set(ring)) < len(ring) else (ring,)


def _split(ring: Ring) -> Iterator[Ring]:
    """Cut a ring where it touches itself."""
    open_ring: Ring = []
    place: dict[tuple[int, int], int] = {}
    for point in ring:
        if point in place:
            start = place[point]
            yield open_ring[start:]
            for closed in open_ring[start:]:
                del place[closed]
            del open_ring[start:]
        place[point] = len(open_ring)
        open_ring.append(point)
    yield open_ring


def _polygons(rings: Iterator[Ring]) -> list[list[Ring]]:
    """Return polygons: each exterior ring with the holes that lie in it."""
    exteriors, holes = [], []
    for ring in rings:
        area = sum(x * v - u * y for (x, y), (u, v) in pairwise([*ring, ring[0]]))
        if area > 0:
            exteriors.append((area, ring))
        else:
            holes.append(ring)
    polygons = [[ring] for _, ring in exteriors]
    if len(polygons) == 1:
        polygons[0] += holes
    elif holes:
        boxes = np.array([(*np.min(ring, axis=0), *np.max(ring, axis=0)) for _, ring in exteriors])
        for hole in holes:
            x, y = _pixel_beside(hole)
            near = (boxes[:, 0] < x) & (boxes[:, 1] < y) & (boxes[:, 2] > x) & (boxes[:, 3] > y)
            around = [i for i in np.flatnonzero(near) if _contains(exteriors[i][1], x, y)]
            polygons[min(around, key=lambda i: exteriors[i][0])].append(hole)
    return polygons


def _pixel_beside(ring: Ring) -> tuple[float, float]:
    """Return the centre of a pixel of the object beside a ring: on the right of one of its horizontal edges."""
    (x, y), (u, v) = ring[:2] if ring[0][1] == ring[1][1] else ring[1:3]
    return (x + 0.5, y + 0.5) if u > x else (x - 0.5, v - 0.5)


def _contains(ring: Ring, x: float, y: float) -> bool:
    """Return whether a point is inside a ring."""
    crossings = sum(a == u and a > x and min(b, v) < y < max(b, v) for (a, b), (u, v) in pairwise([*ring, ring[0]]))
    return crossings % 2 == 1
