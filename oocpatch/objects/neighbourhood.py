"""The patches that meet the core of a block, of the block itself and of those below it: assembled slab by slab.

```text
 patches of lower blocks   [======|==]  [=====|==]        those that reach into the core
                                  +-------------------+
 core                             | slab | slab | ... |   each voxel gets the number of an object, see `Assembly`
                                  +-------------------+
 patches of the block             [==========]  [=====|==]
```

Objects are numbered from 1 within the neighbourhood, patch by patch in the order of the grid. Two patches are compared
by the block whose core has the lowest corner of the box that both see: it is one of the blocks that read both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from oocpatch.engine.patch_objects import PatchObjects, StoredObjects, spill_of
from oocpatch.objects.cache import Cache
from oocpatch.objects.instances import Assembly, Flags, Numbers, matches
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints, unravel
from oocpatch.planning.memory import OBJECT_CACHE_BYTES
from oocpatch.workspace.partials import PartialReader


class Neighbourhood:
    """The patches with objects that meet a block's core, in the frame of one head.

    Args:
        blocks: the blocks in the head's frame.
        index: the block.
        number: position of the head in the plan.
        looped: number of looped axes.
        read: opens the partials of a block.

    Attributes:
        core: the block's core.
        shape: shape of the volume.
        sources: for each patch, in the order of the grid, the block that has it, as a spill: 1 on axes where that block
            is the lower neighbour.
        sections: its place on the looped axes, in C order within the core.
        counts: number of its objects.
        firsts: number of the object before its first one, in the neighbourhood.
        nodes: the same among the objects of its block in the section.
        totals: number of objects of the block itself, per section.
    """

    def __init__(
        self, blocks: BlockGrid, index: int, *, number: int, looped: int, read: Callable[[int], PartialReader]
    ) -> None:
        block = blocks[index]
        self._blocks, self._grid = blocks, blocks.grid
        self.core, self.shape = block.core, self._grid.shape
        own = StoredObjects(read(index), blocks, number, looped)
        self.totals = own.totals
        self._stored = {0: own}
        for offset, source in blocks.sources(block):
            self._stored[spill_of(offset)] = StoredObjects(read(source.index), blocks, number, looped)
        chosen = [(s, np.flatnonzero((stored.spills & s) == s)) for s, stored in self._stored.items()]
        patches = np.concatenate([self._stored[s].patches[rows] for s, rows in chosen])
        order = np.argsort(patches)

        def of_all(column: Callable[[StoredObjects], Numbers]) -> Numbers:
            return np.concatenate([column(self._stored[s])[rows] for s, rows in chosen])[order]

        self.patches = patches[order]
        self.sources = np.repeat([s for s, _ in chosen], [len(rows) for _, rows in chosen])[order]
        self._rows = np.concatenate([rows for _, rows in chosen])[order]
        self.counts, self.nodes = of_all(lambda s: s.counts), of_all(lambda s: s.firsts)
        self.sections = of_all(lambda s: s.sections)
        self.firsts = np.cumsum(self.counts) - self.counts
        self._starts, self._stops = self._corners()
        self._position = {patch: i for i, patch in enumerate(self.patches.tolist())}
        self._decoded: Cache[PatchObjects] = Cache(OBJECT_CACHE_BYTES)
        self._files: Cache[bytes] = Cache(OBJECT_CACHE_BYTES)

    @property
    def count(self) -> int:
        """Number of objects of all patches."""
        return int(self.counts.sum())

    def _corners(self) -> tuple[Numbers, Numbers]:
        """Return start and stop of the voxels of the volume that each patch sees."""
        starts, stops = [], []
        for axis, at in zip(self._grid.axes, np.unravel_index(self.patches, self._grid.counts), strict=True):
            start = np.array([axis.start(i) for i in at.tolist()], dtype=np.int64)
            starts.append(np.maximum(start, 0))
            stops.append(np.minimum(start + axis.patch, axis.length))
        return np.stack(starts, axis=1), np.stack(stops, axis=1)

    def slabs(self) -> Iterator[Box]:
        """Cut the core along the swept axis: whole write units."""
        return self._blocks.steps(self.core)

    def assemble(self, slab: Box) -> tuple[npt.NDArray[np.uint32], Flags | None]:
        """Return the object of each voxel of a slab, 0 for the background, and where no patch has the voxel, if any."""
        assembly, owned, boxes = Assembly(slab), 0, []
        for i in self._meeting(slab):
            owner = self._grid.crop_box(unravel(int(self.patches[i]), self._grid.counts))
            boxes.append(owner & slab)
            owned += boxes[-1].size
            if self.counts[i]:
                assembly.paint(self._objects(i), self._seen(i), owner, int(self.firsts[i]))
        objects = assembly.objects()
        if owned == slab.size:
            return objects, None
        uncovered = objects == 0
        for box in boxes:
            uncovered[box.slices(slab.start)] = False
        return objects, uncovered

    def matches(self, slab: Box, threshold: float) -> Iterator[tuple[int, int, Numbers, Numbers]]:
        """Yield pairs of patches with a common corner in a slab, as positions, and their objects that are one."""
        for i in self._meeting(slab):
            if not self.counts[i]:
                continue
            for j in self._partners(i):
                corner = np.maximum(self._starts[i], self._starts[j])
                if self.counts[j] and (corner >= slab.start).all() and (corner < slab.stop).all():
                    common = self._seen(i) & self._seen(j)
                    one, other = (self._objects(k).labels[common.slices(self._seen(k).start)] for k in (i, j))
                    ones, others = matches(one, other, threshold)
                    if len(ones):
                        yield i, j, ones, others

    def _partners(self, position: int) -> Iterator[int]:
        """Yield the later patches that share voxels with one, as positions."""
        ranges = [
            axis.meeting(*span)
            for axis, *span in zip(self._grid.axes, self._starts[position], self._stops[position], strict=True)
        ]
        for index in itertools.product(*ranges):
            other = self._position.get(_ravel(index, self._grid.counts), -1)
            if other > position:
                yield other

    def _meeting(self, box: Box) -> list[int]:
        meets = (self._starts < box.stop).all(axis=1) & (self._stops > box.start).all(axis=1)
        return np.flatnonzero(meets).tolist()

    def _seen(self, position: int) -> Box:
        return Box(tuple(self._starts[position].tolist()), tuple(self._stops[position].tolist()))

    def _objects(self, position: int) -> PatchObjects:
        source, row = int(self.sources[position]), int(self._rows[position])
        stored = self._stored[source]

        def decoded() -> tuple[PatchObjects, int]:
            name = stored.file(row)
            content = self._files.get((source, name), lambda: _sized(stored.read(name)))
            objects = stored.objects(row, content)
            return objects, objects.labels.nbytes

        return self._decoded.get(position, decoded)


def _sized(content: bytes) -> tuple[bytes, int]:
    return content, len(content)


def _ravel(index: Ints, counts: Ints) -> int:
    place = 0
    for i, n in zip(index, counts, strict=True):
        place = place * n + i
    return place
