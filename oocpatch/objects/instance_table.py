"""The table of a block for the merge: the objects of its patches, per place on the looped axes.

```text
 places     the first voxel of each object in the core, in C order of the volume, ascending
 numbers    its number in the neighbourhood
 sources    the block that has its patch, as a spill
 nodes      its number among the objects of that block
 pairs      objects that are one: source and node of either
 total      number of objects of the block's own patches, in its core or not
```
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from oocpatch.objects.block_table import Section, global_places
from oocpatch.objects.instances import Numbers
from oocpatch.objects.merge import Merge, MergeGrid, WriteIds
from oocpatch.objects.neighbourhood import Neighbourhood
from oocpatch.objects.union import Union
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.labelling import Labelling
from oocpatch.storage.packed_arrays import pack_arrays, unpack_arrays

NOWHERE = np.iinfo(np.int64).max
"""Place of an object without a voxel."""

NO_RULE = Labelling(threshold=None, connectivity=1, per_class=False, min_size=0)
"""Rule of the merge: objects are neither found by values nor dropped."""


@dataclass(frozen=True, slots=True)
class InstanceSection:
    """The objects of one block at one place of the looped axes; see the module."""

    places: Numbers
    numbers: npt.NDArray[np.uint32]
    sources: npt.NDArray[np.uint8]
    nodes: Numbers
    pairs: Numbers
    total: int

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in (self.places, self.numbers, self.sources, self.nodes, self.pairs))


def make_table(
    neighbourhood: Neighbourhood, looped: int, match: float, on_slab: Callable[[], None] = lambda: None
) -> list[InstanceSection]:
    """Assemble the core of a block, compare its patches, and describe its objects.

    Args:
        neighbourhood: the patches.
        looped: number of looped axes.
        match: least intersection over union of objects that are one.
        on_slab: called before each slab.
    """
    shape = neighbourhood.shape
    places = np.full(neighbourhood.count + 1, NOWHERE)
    pairs: list[list[Numbers]] = [[] for _ in neighbourhood.totals]
    for slab in neighbourhood.slabs():
        on_slab()
        objects, _ = neighbourhood.assemble(slab)
        spatial = Box(slab.start[looped:], slab.stop[looped:])
        for at in itertools.product(*map(range, slab.shape[:looped])):
            _lower(places, objects[at], spatial, shape[looped:])
        for i, j, ones, others in neighbourhood.matches(slab, match):
            columns = [
                part
                for k, labels in ((i, ones), (j, others))
                for part in (np.full(len(labels), neighbourhood.sources[k]), neighbourhood.nodes[k] + labels - 1)
            ]
            pairs[neighbourhood.sections[i]].append(np.stack(columns, axis=1))
    numbers = np.flatnonzero(places < NOWHERE)
    patches = np.searchsorted(neighbourhood.firsts, numbers - 1, side="right") - 1
    sections = neighbourhood.sections[patches]
    tables = []
    for section, total in enumerate(neighbourhood.totals.tolist()):
        chosen = np.flatnonzero(sections == section)
        chosen = chosen[np.argsort(places[numbers[chosen]])]
        of, number = patches[chosen], numbers[chosen]
        tables.append(
            InstanceSection(
                places=places[number],
                numbers=number.astype(np.uint32),
                sources=neighbourhood.sources[of].astype(np.uint8),
                nodes=neighbourhood.nodes[of] + number - neighbourhood.firsts[of] - 1,
                pairs=np.concatenate([*pairs[section], np.zeros((0, 4), np.int64)]),
                total=total,
            )
        )
    return tables


def _lower(places: Numbers, objects: npt.NDArray[np.uint32], box: Box, shape: Ints) -> None:
    """Lower the first places of the objects in a box, spatial axes only."""
    flat = objects.reshape(-1)
    starts = np.flatnonzero(np.concatenate([flat[:1] != 0, flat[1:] != flat[:-1]]))  # of runs
    starts = starts[flat[starts] != 0]
    numbers, first = np.unique(flat[starts], return_index=True)
    places[numbers] = np.minimum(places[numbers], global_places(starts[first], box, shape))


def encode_sections(sections: list[InstanceSection]) -> bytes:
    """Return the sections of a block as the content of a file."""
    names = ("places", "numbers", "sources", "nodes", "pairs")
    arrays = {f"{i}/{name}": getattr(section, name) for i, section in enumerate(sections) for name in names}
    return pack_arrays({"totals": np.array([section.total for section in sections], np.int64), **arrays})


def decode_sections(content: bytes) -> list[InstanceSection]:
    """Return the sections in the content of a file."""
    arrays = unpack_arrays(content)
    return [
        InstanceSection(
            places=arrays[f"{i}/places"],
            numbers=arrays[f"{i}/numbers"],
            sources=arrays[f"{i}/sources"],
            nodes=arrays[f"{i}/nodes"],
            pairs=arrays[f"{i}/pairs"],
            total=total,
        )
        for i, total in enumerate(arrays["totals"].tolist())
    ]


def merge_table(grid: MergeGrid, read: Callable[[int], InstanceSection], write: WriteIds, max_memory: int) -> int:
    """Give ids to the objects of all blocks at one place of the looped axes, and return the number of objects.

    Raises:
        PlanTooLarge: when there are more objects than `max_memory` holds.
    """
    return _InstanceMerge(grid, read, max_memory).give_ids(write)


class _InstanceMerge(Merge):
    """A merge whose nodes are the objects of all patches, in whichever blocks they have voxels."""

    nodes_are, fewer = "objects of patches", "larger patches or less overlap"

    def __init__(self, grid: MergeGrid, read: Callable[[int], InstanceSection], max_memory: int) -> None:
        self._read_instances = read
        super().__init__(grid, NO_RULE, self._section, max_memory)

    def _section(self, block: int) -> Section:
        section = self._read_instances(block)
        every = np.arange(len(section.places))
        none = np.empty(0, np.int64)
        return Section(section.places, sizes=none, border=every, classes=none, faces={}, crc=0)

    def _counts(self, block: int) -> tuple[int, int]:
        section = self._read_instances(block)
        return len(section.places), section.total

    def _nodes_of(self, block: int, section: Section, first: int, last: int) -> Numbers:  # noqa: ARG002
        instances = self._read_instances(block)
        return self._numbered(block, instances.sources[first:last], instances.nodes[first:last])

    def _numbered(self, block: int, sources: npt.NDArray[np.integer], nodes: Numbers) -> Numbers:
        """Return nodes among those of all blocks, from the sources and their own numbers of them."""
        ndim = len(self.grid.counts)
        starts = np.zeros(1 << ndim, np.int64)
        for source in np.unique(sources).tolist():
            offset = tuple(-int(digit) for digit in f"{source:0{ndim}b}"[-ndim:])
            other = self.grid.upper(block, offset)
            if other is None:
                raise RuntimeError(f"block {block} has no neighbour at {offset}")
            starts[source] = self.starts[other]
        return np.asarray(starts[sources] + nodes, np.int64)

    def _sets(self, nodes: int) -> tuple[Numbers, Numbers]:
        union = Union(nodes, batch=self.batch)
        places = np.full(nodes, NOWHERE)
        for block in self.grid:
            section = self._read_instances(block)
            own = self._numbered(block, section.sources, section.nodes)
            places[own] = np.minimum(places[own], section.places)
            ones, others = (self._numbered(block, section.pairs[:, k], section.pairs[:, k + 1]) for k in (0, 2))
            union.add(ones, others)
        roots = union.roots()
        del union
        for start in range(0, nodes, self.batch):
            part = slice(start, start + self.batch)
            np.minimum.at(places, roots[part], places[part].copy())
        return roots, places
