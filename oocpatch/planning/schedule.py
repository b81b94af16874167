"""The order of blocks, their division among parts, and the use that they make of many workers.

The order keeps workers busy and has no say in the bytes. Blocks come in C order, in which the seams that enter a block
are there as soon as the block itself is, and few partials wait at a time. Only the last ones come by size, the largest
first: whoever takes a large block as the last one lets the others wait.

```text
 C order, the last layer of blocks by size     worker 1  [ 0 ][ 3 ][   6   ][ 9 ]
                                               worker 2  [  1   ][ 4 ][  7   ][8]
                                               worker 3  [ 2 ][   5   ][ 10 ][11]  <- idle at the end: a small block
```
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int32]

TASK = 0.02
"""Weight of a block besides that of its patches, as a share of one: blocks without patches are shared out, too."""

EXAMINED = 20_000
"""Blocks at the end of a run whose schedule is followed one by one; those before keep every worker busy."""


def in_order(counts: Counts, blocks: Sequence[int], last: int) -> Iterator[int]:
    """Yield blocks in their order of execution: those given, in C order, and the `last` of them by size.

    >>> list(in_order(np.array([8, 4, 4, 2, 8]), range(5), 3))
    [0, 1, 4, 2, 3]
    """
    first = max(0, len(blocks) - last)
    yield from blocks[:first]
    yield from sorted(blocks[first:], key=lambda block: -int(counts[block]))


def division(counts: Counts, count: int) -> list[range]:
    """Return the blocks of each of so many parts: consecutive ones, with about as many patches as those of the others.

    The blocks of all parts cover every block exactly once. No division into consecutive blocks has a smaller largest
    part.

    >>> division(np.array([0, 0, 0, 4, 4, 4]), 3)
    [range(0, 4), range(4, 5), range(5, 6)]
    """
    totals = np.concatenate([[0.0], np.cumsum(counts + TASK)])
    low, high = totals[-1] / count, totals[-1] / count + counts.max(initial=0) + TASK
    while high - low > TASK / 2:  # a bisection for the weight of the largest part
        middle = (low + high) / 2
        low, high = (low, middle) if _earliest_edges(totals, count, middle)[0] <= 0 else (middle, high)
    earliest, edges = _earliest_edges(totals, count, high), [0]
    for part in range(1, count + 1):
        nearest = _nearest(totals, totals[-1] * part / count)
        latest = int(np.searchsorted(totals, totals[edges[-1]] + high, "right")) - 1
        edges.append(max(earliest[part], min(nearest, latest)))
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _nearest(totals: npt.NDArray[np.float64], weight: float) -> int:
    """Return the position of the total, of ascending ones, that is nearest to a weight."""
    after = min(int(np.searchsorted(totals, weight)), len(totals) - 1)
    return after - (after > 0 and weight - totals[after - 1] < totals[after] - weight)


def _earliest_edges(totals: npt.NDArray[np.float64], count: int, most: float) -> list[int]:
    """Return the earliest edges between so many parts, each of at most so much weight, that end with the last block."""
    edges = [len(totals) - 1]
    for _ in range(count):
        edges.append(int(np.searchsorted(totals, totals[edges[-1]] - most)))
    return edges[::-1]


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The use that a run makes of so many workers, or parts, if all of them are equally fast.

    Attributes:
        workers: their number.
        blocks: number of blocks with patches to compute.
        idle: share of the workers' time until the end of the run in which they have nothing to do.
        bytes_each: traffic of each with volume, workspace and output.
    """

    workers: int
    blocks: int
    idle: float
    bytes_each: float

    def to_json(self) -> dict[str, float]:
        """Return the numbers by name."""
        each = round(self.blocks / self.workers, 2)
        return {
            "workers": self.workers,
            "blocks_per_worker": each,
            "idle_share": round(self.idle, 4),
            "bytes_per_worker": round(self.bytes_each),
        }


def occupancy(counts: Counts, last: int, workers: int, traffic: float) -> Occupancy:
    """Follow a run over blocks with so many patches each, in their order of execution.

    >>> occupancy(np.array([8, 8, 8, 4]), 2, 2, 100.0)
    Occupancy(workers=2, blocks=4, idle=0.124..., bytes_each=50.0)
    """
    weights, first = counts + TASK, max(0, len(counts) - EXAMINED)
    free = [float(weights[:first].sum()) / workers] * workers
    for block in in_order(counts, range(first, len(counts)), last):
        heapq.heapreplace(free, free[0] + float(weights[block]))
    return _occupancy(counts, free, traffic)


def occupancy_of_parts(counts: Counts, parts: int, traffic: float) -> Occupancy:
    """Compare the parts of a run over blocks with so many patches each.

    >>> occupancy_of_parts(np.array([8, 8, 8]), 2, 100.0).idle
    0.25
    """
    weights = counts + TASK
    ends = [float(weights[part.start : part.stop].sum()) for part in division(counts, parts)]
    return _occupancy(counts, ends, traffic)


def _occupancy(counts: Counts, ends: list[float], traffic: float) -> Occupancy:
    workers = len(ends)
    busy = float((counts + TASK).sum()) / (workers * max(ends))
    return Occupancy(workers, int(np.count_nonzero(counts)), 1.0 - busy, traffic / workers)
