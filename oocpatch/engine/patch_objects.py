"""The objects of patches, from a model that returns labels, numbered anew in every patch; and how a block stores them.

```text
 objects                 per patch: its place in the grid, its objects, which of them extend, and where its labels lie
 objects-<spill>-<n>     labels of patches, compressed one by one, one after the other
```

`spill` has a digit per axis: 1 where the patches reach beyond the block's core, into neighbours that will read them. So
each neighbour reads only files with patches that reach into its core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.normalize import Counts
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints, unravel
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.memory import OBJECT_FILE_BYTES
from oocpatch.storage.packed_arrays import compress, decompress, pack_arrays, unpack_arrays
from oocpatch.workspace.partials import PartialReader, PartialWriter

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.unsignedinteger[Any]]
Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

TABLE = 4
"""Labels per voxel up to which a table finds the ones that occur faster than sorting does."""


@dataclass(frozen=True, slots=True)
class PatchObjects:
    """The objects of one patch.

    Attributes:
        labels: the objects 1 to `count` of the voxels that lie in the volume, 0 the background.
        extends: per object, whether it takes voxels that other patches own: it is seen whole, and its patch owns at
            least one of its voxels.
    """

    labels: Labels
    extends: Flags

    @property
    def count(self) -> int:
        """Number of objects; some may lie beyond the border of the volume."""
        return len(self.extends)


def patch_objects(labels: Array, box: Box, owned: Box, shape: Ints, looped: int = 0) -> PatchObjects:
    """Return the objects of a patch.

    Args:
        labels: labels of its voxels, `(*patch)`, numbered in any way, 0 the background.
        box: place of the patch, which may reach beyond the volume.
        owned: the voxels that the patch owns.
        shape: shape of the volume.
        looped: number of looped axes, along which a patch has one voxel.

    Raises:
        TypeError, ValueError: when these are no labels of objects.

    >>> objects = patch_objects(np.array([7, 7, 0, 3, 0, 9]), Box((0,), (6,)), Box((0,), (4,)), (10,))
    >>> objects.labels.tolist(), objects.extends.tolist()
    ([2, 2, 0, 1, 0, 3], [True, True, False])
    """
    compacted, count = compact(labels)
    extends = seen_whole(compacted, count, box, shape, looped)
    extends &= _present(compacted[owned.slices(box.start)], count)[1:]
    inside = (box & Box.of_shape(shape)).slices(box.start)
    return PatchObjects(np.ascontiguousarray(compacted[inside]), extends)


def compact(labels: Array) -> tuple[Labels, int]:
    """Number labels from 1 without gaps, in their order, in the smallest dtype; 0 stays 0.

    Returns:
        The labels, and the largest one.

    Raises:
        TypeError: when they are not integers.
        ValueError: when one is negative.

    >>> compact(np.array([0, 900, 0, 5]))
    (array([0, 2, 0, 1], dtype=uint8), 2)
    """
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels of objects must be integers, got {labels.dtype}")
    least, most = int(labels.min(initial=0)), int(labels.max(initial=0))
    if least < 0:
        raise ValueError(f"labels of objects must be 0 or more, 0 the background, got {least}")
    if most <= TABLE * labels.size:
        present = _present(labels, most)
        numbers = np.cumsum(present)
        return numbers.astype(np.min_scalar_type(numbers[-1]))[labels], int(numbers[-1])
    values, places = np.unique(labels, return_inverse=True)
    first = int(values[0] != 0)  # the number of the lowest label, if it is not the background
    count = len(values) - 1 + first
    return (places + first).astype(np.min_scalar_type(count)).reshape(labels.shape), count


def _present(labels: Array, most: int) -> Flags:
    """Return whether each label from 0 to `most` occurs; False for the background."""
    present = np.zeros(most + 1, np.bool_)
    present[labels.reshape(-1)] = True
    present[0] = False
    return present


def seen_whole(labels: Labels, count: int, box: Box, shape: Ints, looped: int = 0) -> Flags:
    """Return whether each object of a patch touches no face of it, except at or beyond the border of the volume.

    >>> seen_whole(np.array([1, 0, 2]), 2, Box((0,), (3,)), (10,)).tolist()
    [True, False]
    """
    cut = np.zeros(count + 1, np.bool_)
    for axis in range(looped, labels.ndim):
        for at, is_border in ((0, box.start[axis] <= 0), (-1, box.stop[axis] >= shape[axis])):
            if not is_border:
                cut[labels.take(at, axis).reshape(-1)] = True
    return ~cut[1:]


INDEX = "objects"
"""Name of the file that says what the others have."""


def file_name(spill: int, ndim: int, number: int) -> str:
    """Return the name of a file of labels.

    >>> file_name(0b01, 2, 3)
    'objects-01-3'
    """
    return f"{INDEX}-{spill:0{ndim}b}-{number}"


def spill_of(flags: Ints) -> int:
    """Return the spill with these flags, one per axis.

    >>> spill_of((0, 1, 1))
    3
    """
    return int("".join(map(str, flags)), 2)


@dataclass
class _OpenFile:
    """A file of labels that is being filled."""

    number: int = 0
    size: int = 0
    parts: list[bytes] = field(default_factory=list)


class PatchObjectsWriter:
    """Stores the objects of the patches of one block, in the frame of one head.

    Args:
        partials: the attempt at the block.
        blocks: the blocks in the head's frame.
        index: the block.
        number: position of the head in the plan.
        looped: number of looped axes.

    Attributes:
        counts: voxels without a patch: none yet, as nothing is written to the output.
    """

    def __init__(self, partials: PartialWriter, blocks: BlockGrid, index: int, *, number: int, looped: int) -> None:
        self._partials = partials
        self._grid = blocks.grid
        self._core = blocks[index].core
        self._number, self._looped = number, looped
        self._files: dict[int, _OpenFile] = {}
        self._patches: list[tuple[int, ...]] = []
        self._extends: list[Flags] = []
        self.counts = Counts()

    def advance(self, to: int) -> None:
        """Do nothing: no voxel is final before the objects of all blocks are known."""

    def add(self, index: Ints, labels: torch.Tensor) -> None:
        """Add the patch with the given index on each axis; its labels are `(1, *patch)`.

        Raises:
            ValueError: when one is negative.
        """
        box, volume = self._grid.box(index), Box.of_shape(self._grid.shape)
        values = labels[0].numpy(force=True)
        objects = patch_objects(values, box, self._grid.crop_box(index), volume.stop, self._looped)
        stop = (box & volume).stop
        spill = spill_of(tuple(int(a > b) for a, b in zip(stop, self._core.stop, strict=True)))
        file = self._files.setdefault(spill, _OpenFile())
        data = compress(objects.labels) if objects.count else b""
        place = np.ravel_multi_index(index, self._grid.counts)
        self._patches.append((int(place), objects.count, spill, file.number, file.size, len(data)))
        self._extends.append(objects.extends)
        file.parts.append(data)
        file.size += len(data)
        if file.size >= OBJECT_FILE_BYTES:
            self._write(spill, file)

    def close(self) -> None:
        """Write what is not yet written."""
        for spill, file in self._files.items():
            if file.size:
                self._write(spill, file)
        if self._patches:
            columns = np.array(self._patches, np.int64)
            extends = np.packbits(np.concatenate(self._extends))
            self._partials.write_file(self._number, INDEX, pack_arrays({"patches": columns, "extends": extends}))

    def _write(self, spill: int, file: _OpenFile) -> None:
        name = file_name(spill, len(self._grid.axes), file.number)
        self._partials.write_file(self._number, name, b"".join(file.parts))
        file.number, file.size, file.parts = file.number + 1, 0, []


class StoredObjects:
    """The objects of a block's patches, as they are stored.

    Args:
        reader: the partials of the block.
        blocks: the blocks in the head's frame.
        number: position of the head in the plan.
        looped: number of looped axes.

    Attributes:
        patches: the place of each patch in the grid, in C order.
        counts: the number of its objects.
        spills: its spill.
        sections: its place on the looped axes, in C order within the core.
        firsts: number of the object before its first one, among all of the block in the same section.
        totals: number of objects of each section.
    """

    def __init__(self, reader: PartialReader, blocks: BlockGrid, number: int, looped: int) -> None:
        self._reader, self._grid, self._number = reader, blocks.grid, number
        content = reader.read_file(number, INDEX)
        columns = np.zeros((0, 6), np.int64)
        self._extends = np.zeros(0, np.uint8)
        if content is not None:
            arrays = unpack_arrays(content)
            columns, self._extends = arrays["patches"], arrays["extends"]
        self.patches, self.counts, self.spills = columns[:, 0], columns[:, 1], columns[:, 2]
        self._places = columns[:, 2:]
        self._bits = np.cumsum(self.counts) - self.counts
        core = blocks[reader.block].core
        loops = Box(core.start[:looped], core.stop[:looped])
        self.sections = np.zeros(len(columns), np.int64)
        places = np.unravel_index(self.patches, self._grid.counts)[:looped]
        for place, start, length in zip(places, loops.start, loops.shape, strict=True):
            self.sections = self.sections * length + place - start
        self.totals = np.bincount(self.sections, self.counts, loops.size).astype(np.int64)
        order = np.argsort(self.sections, kind="stable")
        self.firsts = np.empty_like(self.sections)
        self.firsts[order] = np.cumsum(self.counts[order]) - self.counts[order]
        self.firsts -= (np.cumsum(self.totals) - self.totals)[self.sections]

    def __len__(self) -> int:
        return len(self.patches)

    def file(self, row: int) -> str:
        """Return the name of the file with the labels of a patch, by its row in the index."""
        spill, number = self._places[row, :2].tolist()
        return file_name(spill, len(self._grid.axes), number)

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            CorruptPartial: when it is damaged.
        """
        content = self._reader.read_file(self._number, name)
        if content is None:
            raise self._reader.missing(name)
        return content

    def objects(self, row: int, content: bytes) -> PatchObjects:
        """Return the objects of a patch, by its row in the index, from the content of its file."""
        _, _, start, length = self._places[row].tolist()
        count, bit = int(self.counts[row]), int(self._bits[row])
        first = bit // 8
        bits = np.unpackbits(self._extends[first : (bit + count + 7) // 8])[bit - 8 * first :][:count]
        shape = seen_box(self._grid, int(self.patches[row])).shape
        dtype = np.min_scalar_type(count)
        if not count:
            return PatchObjects(np.zeros(shape, dtype), bits.astype(np.bool_))
        return PatchObjects(decompress(content[start : start + length], dtype, shape), bits.astype(np.bool_))


def seen_box(grid: PatchGrid, patch: int) -> Box:
    """Return the voxels of the volume that a patch sees, by its place in C order."""
    return grid.box(unravel(patch, grid.counts)) & Box.of_shape(grid.shape)
