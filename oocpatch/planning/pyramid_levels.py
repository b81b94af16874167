"""Pyramids: which axes each level halves, how far down, and what making one takes.

A level has `ceil(n / 2)` voxels where the one above has `n`, so that no voxel at the border is lost:

```text
 level 0   | 0 | 1 | 2 | 3 | 4 |
 level 1   |   0   |   1   |   2   :      the last one stands for the one voxel that is there
```
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from oocpatch.planning.box import Ints, ceil_to, worthwhile

LARGEST = 256
"""The coarsest level has no more voxels than a chunk, and than this on each axis would make."""

REGION, PIECE = 1 << 18, 1 << 17
"""Voxels that one write, and one read, should have at least: smaller units are taken several at a time."""


def halvings(
    shape: Ints, chunks: Ints, sizes: Sequence[float], spatial: int, levels: int | None = None
) -> tuple[Ints, ...]:
    """How each level comes from the one above it: 2 for an axis that is halved, else 1.

    Axes whose voxels are twice as long as the shortest, or longer, wait until the others have caught up. Only the last
    `spatial` axes are halved, and no axis that is one voxel long.

    Args:
        shape: of the finest level.
        chunks: of the finest level.
        sizes: of its voxels, per axis, in one unit.
        spatial: number of axes in space, the last ones.
        levels: so many levels in all; None: until a level has no more voxels than a chunk.

    >>> halvings((100, 1000, 1000), (64, 64, 64), (2.0, 0.5, 0.5), 3)
    ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    """
    space = range(len(shape) - spatial, len(shape))
    enough = math.prod(min(chunks[a], LARGEST) for a in space)
    n, size = list(shape), list(sizes)
    found: list[Ints] = []
    while (math.prod(n[a] for a in space) > enough) if levels is None else (len(found) + 1 < levels):
        longer = [a for a in space if n[a] > 1]
        least = min((size[a] for a in longer), default=0.0)
        step = tuple(2 if a in longer and size[a] < 2 * least * (1 - 1e-9) else 1 for a in range(len(shape)))
        found.append(step)
        n = list(level_shape(tuple(n), step))
        size = [s * f for s, f in zip(size, step, strict=True)]
    return tuple(found)


def level_shape(shape: Ints, step: Ints) -> Ints:
    """The shape of a level, given that of the one above.

    >>> level_shape((5, 4, 1), (2, 2, 1))
    (3, 2, 1)
    """
    return tuple(-(-n // f) for n, f in zip(shape, step, strict=True))


def level_chunks(shape: Ints, chunks: Ints, unit: Ints) -> tuple[Ints, Ints]:
    """Chunks and write unit of a level, given those of the finest one: the same, but not longer than it needs.

    >>> level_chunks((100, 30), (32, 32), (64, 64)), level_chunks((20, 30), (32, 32), (64, 64))
    (((32, 30), (64, 30)), ((20, 30), (20, 30)))
    """
    short = tuple(min(c, n) for c, n in zip(chunks, shape, strict=True))
    units = (n if c >= n else min(u, ceil_to(n, c)) for u, c, n in zip(unit, chunks, shape, strict=True))
    return short, tuple(units)


def regions(shape: Ints, unit: Ints, *, sharded: bool) -> Ints:
    """The shape of what one task writes, whole write units: a shard, or chunks that are worth their overhead."""
    return unit if sharded else worthwhile(unit, shape, REGION)


def pieces(region: Ints, above: Ints, step: Ints) -> Ints:
    """The shape of what is computed at a time, whose voxels come from whole chunks of the level above, if that can be.

    >>> pieces((64, 64), (512, 512), (2, 2)), pieces((512, 512), (33, 64), (2, 2))
    ((64, 64), (264, 512))
    """
    least = (c if c % f else c // f for c, f in zip(above, step, strict=True))
    return worthwhile(tuple(min(n, r) for n, r in zip(least, region, strict=True)), region, PIECE)


def task_memory(shape: Ints, chunks: Ints, unit: Ints, step: Ints, itemsize: int) -> int:
    """Bytes that one task adds at most: what it writes, coded too; what it reads, decoded too; and sums in float64."""
    region = math.prod(regions(shape, unit, sharded=unit != chunks))
    piece = pieces(regions(shape, unit, sharded=unit != chunks), chunks, step)
    read = math.prod(n * f for n, f in zip(piece, step, strict=True))
    decoded = math.prod(chunks) + read
    return itemsize * (3 * region + 2 * read + decoded) + math.prod(piece) * (16 + 2 * itemsize)
