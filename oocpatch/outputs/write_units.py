"""CRCs of the write units of the output, computed while they are written.

The CRC of a unit is that of its stored file, so it detects every flipped bit, and verifying needs no codec. A unit that
contains only the fill value has no file, and the CRC 0. The CRCs of a stage of a block are packed into one text for its
record in the ledger: those of all units in the boxes that the stage writes, head by head, in C order.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from zarr.codecs import ZstdCodec
from zarr.storage import WrapperStore

from oocpatch.planning.box import Box, Ints
from oocpatch.planning.plan import Plan
from oocpatch.storage.checksums import ABSENT, checksum

if TYPE_CHECKING:
    from zarr.abc.buffer import Buffer
    from zarr.abc.store import Store

    Wrapper = WrapperStore[Store]
else:
    Wrapper = WrapperStore

Crcs = npt.NDArray[np.uint32]

COMPRESSOR = ZstdCodec(level=1)
"""Codec of the arrays that are written. Level 3, Zarr's default, takes up to ten times as long where values have noise,
for files that are at most 7% smaller: those of labels and masks are as large, some of noisy images are larger."""


class ChecksumStore(Wrapper):
    """A store that computes the CRC of each file written to it."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._crcs: dict[str, int] = {}

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file and remember its CRC."""
        self._crcs[key] = checksum(value.as_numpy_array()) or 1
        await super().set(key, value)

    def pop(self, key: str) -> int:
        """Remove and return the CRC of the file written last under a key; 0 if none was."""
        return self._crcs.pop(key, ABSENT)


class WriteChecksums:
    """CRCs of the write units that the task of a stage of a block writes; several threads may add to them."""

    def __init__(self, plan: Plan, stage: str, block: int) -> None:
        self._plan, self._stage, self._block = plan, stage, block
        self._boxes = unit_boxes(plan, stage, block)
        self._writes: list[tuple[int, Box, Crcs]] = []

    def add(self, head: int, box: Box, crcs: Crcs) -> None:
        """Add the CRCs of a write of whole units: `(C, *units of the box)`."""
        self._writes.append((head, box, crcs))

    def empty_units(self) -> Iterator[tuple[int, Ints]]:
        """Yield head and position, channel first, of each unit of the stage that has no file."""
        for head, position, crc in unpack(self._plan, self._stage, self._block, self.pack()):
            if crc == ABSENT:
                yield head, position

    def pack(self) -> str:
        """Return the CRCs of all units that the stage writes as a text; units that were not written have the CRC 0."""
        packed = []
        for head, box in self._boxes:
            unit = self._plan.heads[head].unit
            whole = units_of(box, unit)
            crcs = np.zeros((self._plan.heads[head].out_channels, *whole.shape), np.uint32)
            for number, written, values in self._writes:
                if number == head and not (written & box).empty:
                    crcs[(slice(None), *units_of(written, unit).slices(whole.start))] = values
            packed.append(crcs.astype("<u4").tobytes())
        return base64.b64encode(b"".join(packed)).decode()


def unit_boxes(plan: Plan, stage: str, block: int) -> list[tuple[int, Box]]:
    """Return the boxes of the output that a stage of a block writes, each with the number of its head."""
    if plan.labelling is not None:  # labels are final after the merge
        return [(0, plan.frames[0][block].core)] if stage == "normalize" else []
    boxes: list[tuple[int, Box]] = []
    for number, (head, frame) in enumerate(zip(plan.heads, plan.frames, strict=True)):
        of_head = frame[block]
        if head.has_objects:
            boxes += [(number, of_head.core)] if stage == "normalize" else []
        else:
            boxes += [(number, box) for box in ((of_head.direct,) if stage == "predict" else of_head.open_boxes)]
    return [(number, box) for number, box in boxes if not box.empty]


def unpack(plan: Plan, stage: str, block: int, packed: str) -> Iterator[tuple[int, Ints, int]]:
    """Yield the head, the position in the grid of units (channel first) and the CRC of each unit that was packed.

    Raises:
        ValueError: if the text is not of this stage of this block.
    """
    try:
        crcs = np.frombuffer(base64.b64decode(packed, validate=True), "<u4")
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the CRCs of block {block} cannot be read") from error
    grids = [
        (head, units_of(box, plan.heads[head].unit), plan.heads[head].out_channels)
        for head, box in unit_boxes(plan, stage, block)
    ]
    if sum(grid.size * channels for _, grid, channels in grids) != len(crcs):
        raise ValueError(f"the CRCs of block {block} are not those of its units")
    values = iter(crcs.tolist())
    for head, grid, channels in grids:
        spans = [range(a, b) for a, b in zip(grid.start, grid.stop, strict=True)]
        for position in itertools.product(range(channels), *spans):
            yield head, position, next(values)


def units_of(box: Box, unit: Sequence[int]) -> Box:
    """Convert a box from voxels to units.

    >>> units_of(Box((8, 0), (20, 3)), (4, 4))
    Box(start=(2, 0), stop=(5, 1))
    """
    return Box(
        tuple(a // u for a, u in zip(box.start, unit, strict=True)),
        tuple(-(-b // u) for b, u in zip(box.stop, unit, strict=True)),
    )
