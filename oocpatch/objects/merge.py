"""The merge: from the tables of all blocks to the ids of all objects, in bounded memory.

```text
 tables --faces of neighbours--> pairs --union--> sets of border objects --first voxel, size--> places, dropped
    |                                                                                             |
    +-- places of objects, one row of blocks after the other, in order --> ids 1, 2, 3 ... <------+
                                                                            |
                                                          ids of each block's objects, in pieces
```

Blocks of one row, all with the same place along the first axis, hold places that no other row has, and places ascend
from row to row. So ids are given row by row; a row with more objects than fit in memory is cut into ranges of places.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocpatch.errors import PlanTooLarge
from oocpatch.objects.block_table import Section, neighbour_offsets, pairs
from oocpatch.objects.components import Places
from oocpatch.objects.union import Union
from oocpatch.planning.box import Ints, unravel
from oocpatch.planning.labelling import MERGE_BATCH_BYTES, MERGE_NODE_BYTES, Labelling
from oocpatch.planning.plan import human

DROPPED = np.iinfo(np.int64).min
"""Place of a set of objects that is too small to count. Places that have an id are its negative."""

SMALLEST_BATCH = 1 << 12

ReadSection = Callable[[int], Section]
"""Return the section of a block, by its number in C order of the blocks of one index."""
WriteIds = Callable[[int, int, npt.NDArray[np.uint64]], None]
"""Store a piece of a block's ids, by the block's number and that of the piece: the next of its objects, in order."""


@dataclass(frozen=True, slots=True)
class MergeGrid:
    """The blocks of one index of time and channel.

    Attributes:
        counts: number of blocks per axis.
        row_places: the first place of each row of blocks along the first axis, and the number of all places.
    """

    counts: Ints
    row_places: Ints

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def upper(self, block: int, offset: Ints) -> int | None:
        """Return the neighbour of a block at an offset; None where there is none."""
        other = 0
        for position, step, count in zip(unravel(block, self.counts), offset, self.counts, strict=True):
            if not 0 <= position + step < count:
                return None
            other = other * count + position + step
        return other

    def row(self, number: int) -> range:
        """Return the blocks of a row."""
        size = len(self) // self.counts[0]
        return range(number * size, (number + 1) * size)


def merge(grid: MergeGrid, rule: Labelling, read: ReadSection, write: WriteIds, max_memory: int) -> int:
    """Give ids to the objects of all blocks of one index, and return the number of objects.

    Raises:
        PlanTooLarge: when there are more objects at borders between blocks than `max_memory` holds.
    """
    return Merge(grid, rule, read, max_memory).give_ids(write)


class Merge:
    """One merge.

    Attributes:
        starts: number of the first border object of each block, and of all.
        roots: per border object, the one that stands for its set.
        places: per such object, the first place of its set, then the negative of its id; `DROPPED`: it is too small.
    """

    nodes_are, fewer = "objects at the borders of blocks", "a larger block_shape"

    def __init__(self, grid: MergeGrid, rule: Labelling, read: ReadSection, max_memory: int) -> None:
        self.grid, self.rule, self.read = grid, rule, read
        counts = np.array([self._counts(block) for block in grid], np.int64)
        self.counts = counts[:, 0]
        self.starts = np.concatenate([[0], np.cumsum(counts[:, 1])])
        nodes = int(self.starts[-1])
        needed = nodes * MERGE_NODE_BYTES + SMALLEST_BATCH * MERGE_BATCH_BYTES
        if needed > max_memory:
            raise PlanTooLarge(
                f"merging {nodes:,} {self.nodes_are} needs {human(needed, up=True)} but max_memory is "
                f"{human(max_memory)}; raise max_memory, or start afresh with {self.fewer}"
            )
        self.batch = max(SMALLEST_BATCH, (max_memory - nodes * MERGE_NODE_BYTES) // MERGE_BATCH_BYTES)
        self.roots, self.places = self._sets(nodes)

    def _counts(self, block: int) -> tuple[int, int]:
        """Return the numbers of objects of a block, and of its nodes: its objects at borders."""
        section = self.read(block)
        return section.count, len(section.border)

    def nodes(self, block: int) -> slice:
        """Return the numbers of the border objects of a block."""
        return slice(int(self.starts[block]), int(self.starts[block + 1]))

    def _sets(self, nodes: int) -> tuple[Places, Places]:
        """Join the border objects that touch."""
        union = Union(nodes, batch=self.batch)
        places, sizes = np.zeros(nodes, np.int64), np.zeros(nodes if self.rule.min_size > 1 else 0, np.int64)
        offsets = list(neighbour_offsets(len(self.grid.counts), self.rule.connectivity))
        for block in self.grid:
            own = self.nodes(block)
            if own.start == own.stop:
                continue
            section = self.read(block)
            places[own] = section.places[section.border]
            if len(sizes):
                sizes[own] = section.sizes[section.border]
            for offset in offsets:
                other = self.grid.upper(block, offset)
                if other is not None and self.starts[other] < self.starts[other + 1]:
                    ones, others = pairs(section, self.read(other), offset, self.rule)
                    union.add(ones + own.start, others + self.starts[other])
        roots = union.roots()
        del union
        for start in range(0, nodes, self.batch):
            part = slice(start, start + self.batch)
            np.minimum.at(places, roots[part], places[part].copy())
            if len(sizes):
                np.add.at(sizes, roots[part], np.where(roots[part] == np.arange(nodes)[part], 0, sizes[part]))
        if len(sizes):
            places[sizes < self.rule.min_size] = (
                DROPPED  # sizes of sets are at their roots, the only ones that are read
            )
        return roots, places

    def give_ids(self, write: WriteIds) -> int:
        """Give ids in the order of places, and return how many."""
        count = 0
        pieces: Counter[int] = Counter()
        for row in range(self.grid.counts[0]):
            blocks = [block for block in self.grid.row(row) if self.counts[block]]
            for low, high in self._ranges(blocks, *self.grid.row_places[row : row + 2]):
                parts = [self._part(block, low, high) for block in blocks]
                ids = self._number(parts, count)
                for part in parts:
                    if part.stop > part.start:
                        write(part.block, pieces[part.block], self._ids_of(part, ids))
                        pieces[part.block] += 1
                count += len(ids)
        return count

    def _ranges(self, blocks: list[int], low: int, high: int) -> Iterator[tuple[int, int]]:
        """Cut the places of a row into ranges of no more objects than fit in memory, in order."""
        waiting = [(low, high)]
        while waiting:
            low, high = waiting.pop()
            if self.counts[blocks].sum() > self.batch and high - low > 1:
                spans = (np.searchsorted(self.read(block).places, (low, high)) for block in blocks)
                if sum(int(stop - start) for start, stop in spans) > self.batch:
                    middle = (low + high) // 2
                    waiting += [(middle, high), (low, middle)]
                    continue
            yield low, high

    def _part(self, block: int, low: int, high: int) -> _Part:
        """Return the objects of a block whose first voxels are in a range, and which of them have ids of their own."""
        section = self.read(block)
        start, stop = map(int, np.searchsorted(section.places, (low, high)))
        first, last = map(int, np.searchsorted(section.border, (start, stop)))
        has_id = np.ones(stop - start, np.bool_)
        if self.rule.min_size > 1:
            has_id = section.sizes[start:stop] >= self.rule.min_size
        border, nodes = section.border[first:last], self._nodes_of(block, section, first, last)
        has_id[border - start] = self.places[self.roots[nodes]] == section.places[border]
        return _Part(block, start, stop, border - start, nodes, has_id, section.places[start:stop][has_id])

    def _nodes_of(self, block: int, section: Section, first: int, last: int) -> Places:  # noqa: ARG002 - see subclasses
        """Return the numbers of some border objects of a block."""
        return np.arange(first, last) + int(self.starts[block])

    def _number(self, parts: list[_Part], before: int) -> Places:
        """Return the ids of the objects of parts that have one of their own, part by part; sets remember theirs."""
        places = np.concatenate([*(part.places for part in parts), np.empty(0, np.int64)])
        ids = np.empty(len(places), np.int64)
        ids[np.argsort(places, kind="stable")] = np.arange(before + 1, before + len(places) + 1)
        at = 0
        for part in parts:
            part.at, part.places = at, places[:0]
            own = part.has_id[part.border]
            positions = np.cumsum(part.has_id)[part.border[own]] - 1
            self.places[self.roots[part.nodes[own]]] = -ids[at + positions]
            at += int(part.has_id.sum())
        return ids

    def _ids_of(self, part: _Part, ids: Places) -> npt.NDArray[np.uint64]:
        """Return the ids of all objects of a part, 0 of those that do not count."""
        result = np.zeros(part.stop - part.start, np.int64)
        result[part.has_id] = ids[part.at : part.at + int(part.has_id.sum())]
        of_sets = self.places[self.roots[part.nodes]]
        result[part.border] = np.where(of_sets == DROPPED, 0, -of_sets)
        return result.astype(np.uint64)


@dataclass(slots=True)
class _Part:
    """Objects of a block, `start` to `stop`, and what numbering them needs.

    Attributes:
        border: those at borders, counted from `start`.
        nodes: their numbers among the border objects of all blocks.
        has_id: those that get an id: not too small, and with the first voxel of their set.
        places: the first voxels of these.
        at: where their ids begin.
    """

    block: int
    start: int
    stop: int
    border: Places
    nodes: Places
    has_id: npt.NDArray[np.bool_]
    places: Places
    at: int = 0
