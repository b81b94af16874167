"""The CRC of each write unit of the output, taken while it is written.

It is that of the stored file, so that every flipped bit shows, and looking needs no codec. A unit that holds nothing
but the fill value has no file, and the CRC 0. What a stage of a block wrote is told in one text, for its record in the
ledger: the CRCs of all units in the boxes that the stage is answerable for, head by head, in C order.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
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


class ChecksumStore(Wrapper):
    """A store that notes the CRC of whatever is written to it, as it goes by."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._crcs: dict[str, int] = {}

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file, and note its CRC."""
        self._crcs[key] = checksum(value.as_numpy_array()) or 1
        await super().set(key, value)

    def pop(self, key: str) -> int:
        """The CRC of what was written last under a key; 0: nothing was."""
        return self._crcs.pop(key, ABSENT)


class WriteChecksums:
    """What one task wrote to the output; safe to be told by several threads.

    Args:
        plan: the plan.
        stage: `predict` or `normalize`.
        block: the block.
    """

    def __init__(self, plan: Plan, stage: str, block: int) -> None:
        self._plan = plan
        self._boxes = unit_boxes(plan, stage, block)
        self._parts: list[tuple[int, Box, Crcs]] = []

    def add(self, head: int, box: Box, crcs: Crcs) -> None:
        """Note a write of whole units: their CRCs, `(C, *units of the box)`."""
        self._parts.append((head, box, crcs))

    def pack(self) -> str:
        """The CRCs of all units that the stage is answerable for; what was not written is not stored."""
        found = []
        for head, box in self._boxes:
            unit = self._plan.heads[head].unit
            whole = units_of(box, unit)
            crcs = np.zeros((self._plan.heads[head].out_channels, *whole.shape), np.uint32)
            for number, part, values in self._parts:
                if number == head and not (part & box).empty:
                    crcs[(slice(None), *units_of(part, unit).slices(whole.start))] = values
            found.append(crcs.astype("<u4").tobytes())
        return base64.b64encode(b"".join(found)).decode()


def unit_boxes(plan: Plan, stage: str, block: int) -> list[tuple[int, Box]]:
    """The boxes of the output that a stage of a block writes, each with the number of its head."""
    found = []
    for number, frame in enumerate(plan.frames):
        one = frame[block]
        found += [(number, box) for box in ((one.direct,) if stage == "predict" else one.open_boxes) if not box.empty]
    return found


def unpack(plan: Plan, stage: str, block: int, packed: str) -> Iterator[tuple[int, Ints, int]]:
    """What `WriteChecksums` told: head, position in the grid of units with the channel first, and CRC of each unit.

    Raises:
        ValueError: when it is not of this stage of this block.
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
    """A box in units instead of voxels.

    >>> units_of(Box((8, 0), (20, 3)), (4, 4))
    Box(start=(2, 0), stop=(5, 1))
    """
    return Box(
        tuple(a // u for a, u in zip(box.start, unit, strict=True)),
        tuple(-(-b // u) for b, u in zip(box.stop, unit, strict=True)),
    )
