"""Levels of a pyramid: the axes that each one halves, their number, chunks and tasks, and the memory of a task.

A level has `ceil(n / 2)` voxels where the one above has `n`, so that no voxel at the border is lost:

```text
 level 0   | 0 | 1 | 2 | 3 | 4 |
 level 1   |   0   |   1   |   2   :      the last voxel stands for the one above it alone
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from oocpatch.planning.box import Ints, worthwhile

LARGEST = 256
"""A level that has no more voxels than a chunk is the coarsest; sides of chunks count up to this many voxels."""

REGION, PIECE = 1 << 18, 1 << 17
"""Least voxels of a write, and of a piece that is computed at a time: smaller units are taken several at a time."""


def halvings(
    shape: Ints, chunks: Ints, sizes: Sequence[float], spatial: int, levels: int | None = None
) -> tuple[Ints, ...]:
    """Return the steps from each level to the next, per axis: 2 for an axis that is halved, else 1.

    Axes whose voxels are twice as long as the shortest, or longer, wait until the others have caught up. Only the last
    `spatial` axes are halved, and no axis that is one voxel long. Shape, chunks and `sizes`, the lengths of a voxel in
    one unit, are those of the finest level; `levels` counts it, too. Without `levels`, the last one is the first that
    has no more voxels than a chunk.

    >>> halvings((100, 1000, 1000), (64, 64, 64), (2.0, 0.5, 0.5), 3)
    ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    """
    space = range(len(shape) - spatial, len(shape))
    enough = math.prod(min(chunks[a], LARGEST) for a in space)
    n, size = list(shape), list(sizes)
    steps: list[Ints] = []
    while (math.prod(n[a] for a in space) > enough) if levels is None else (len(steps) + 1 < levels):
        longer = [a for a in space if n[a] > 1]
        least = min((size[a] for a in longer), default=0.0)
        step = tuple(2 if a in longer and size[a] < 2 * least * (1 - 1e-9) else 1 for a in range(len(shape)))
        steps.append(step)
        n = list(level_shape(tuple(n), step))
        size = [s * f for s, f in zip(size, step, strict=True)]
    return tuple(steps)


def level_shape(shape: Ints, step: Ints) -> Ints:
    """Return the shape of a level, given the shape of the level above and the step between them."""
    return tuple(-(-n // f) for n, f in zip(shape, step, strict=True))


def regions(shape: Ints, unit: Ints, *, sharded: bool) -> Ints:
    """Return the shape that one task writes, in whole write units: a shard, or as many chunks as repay a task.

    >>> regions((4096, 4096), (64, 64), sharded=False)
    (64, 4096)
    """
    return unit if sharded else worthwhile(unit, shape, REGION)


def pieces(region: Ints, above: Ints, step: Ints) -> Ints:
    """Return the shape that is computed at a time, read from whole chunks of the level above where possible.

    >>> pieces((64, 64), (512, 512), (2, 2)), pieces((512, 512), (33, 64), (2, 2))
    ((64, 64), (264, 512))
    """
    least = (c if c % f else c // f for c, f in zip(above, step, strict=True))
    return worthwhile(tuple(min(n, r) for n, r in zip(least, region, strict=True)), region, PIECE)


def task_memory(shape: Ints, chunks: Ints, unit: Ints, step: Ints, itemsize: int) -> int:
    """Return the bytes that one task needs at most, for a level of the given shape and write unit.

    These are its output and the encoded copy, its input and the decoded `chunks` of the level above, and sums in
    float64.
    """
    region = regions(shape, unit, sharded=unit != chunks)
    piece = pieces(region, chunks, step)
    read = math.prod(n * f for n, f in zip(piece, step, strict=True))
    decoded = math.prod(chunks) + read
    return itemsize * (3 * math.prod(region) + 2 * read + decoded) + math.prod(piece) * (16 + 2 * itemsize)
