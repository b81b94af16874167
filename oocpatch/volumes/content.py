"""Content of the input: stamps of what a block has read, in its record in the ledger.

```text
 stored unit    a chunk of a Zarr in a local directory, read by ourselves: tag of its file, CRC of its bytes
 part           any other box of about a megabyte, as it was read: tags of the units that it meets, CRC of its values
```

Tags are read before the bytes. Later calls compare the tags; where they differ, they read the unit or the part again,
and the CRC decides. So a change after the tags were read is always seen.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from zarr.storage import LocalStore

from oocpatch.errors import CorruptData
from oocpatch.planning.box import Box
from oocpatch.storage.checksums import checksum
from oocpatch.storage.unit_tags import UNKNOWN, Tags, UnitRecords, UnitStamps
from oocpatch.volumes.volume import Volume

VOLUME, MASK, LABELS, INTENSITY = "volume", "mask", "labels", "intensity"
CONTEXT = "context_level"
"""Names of the inputs: those of the parameters."""


class PartStamp(NamedTuple):
    """The stamp of a part of an input.

    Attributes:
        name: the input.
        box: the part in the input's frame.
        crc: CRC-32C of its values, in C order.
        tags: tags of the stored units that it meets.
    """

    name: str
    box: Box
    crc: int
    tags: Tags


class InputStamps:
    """Collects the stamps of what one block reads, from any thread.

    Attributes:
        units: stamps of the volume's stored units; None where its parts are stamped.
    """

    def __init__(self, units: UnitStamps | None = None) -> None:
        self.units = units
        self._parts: list[PartStamp] = []

    def add(self, name: str, box: Box, values: npt.NDArray[Any], tags: Tags) -> None:
        """Add a part with its values `(C, *box.shape)`; its tags were read before them."""
        self._parts.append(PartStamp(name, box, checksum(values), tags))

    def pack(self) -> str:
        """Return the stamps as a text, in an order that does not depend on threads.

        >>> stamps = InputStamps()
        >>> stamps.add("volume", Box((0,), (4,)), np.zeros((1, 4)), np.array([7], np.uint64))
        >>> [(part.name, part.box, part.tags.tolist()) for part in unpack_stamps(stamps.pack())[0]]
        [('volume', Box(start=(0,), stop=(4,)), [7])]
        """
        header: list[Any] = [[]]
        data = []
        if self.units is not None:
            seen = self.units.tags != 0
            header[0] = [*self.units.box.start, *self.units.box.stop]
            data = [np.packbits(seen), self.units.tags[seen], self.units.crcs[seen]]
        parts = sorted(self._parts, key=lambda part: (part.name, part.box.start, part.box.stop))
        for name, group in itertools.groupby(parts, key=lambda part: part.name):
            members = list(group)
            header.append([name, len(members), len(members[0].box.start)])
            data += [
                np.array([(*p.box.start, *p.box.stop) for p in members], "<i8"),
                np.array([(p.crc, p.tags.size) for p in members], "<u4"),
            ]
        data += [part.tags for part in parts]
        text = b"".join([json.dumps(header).encode(), b"\n", *(values.tobytes() for values in data)])
        return base64.b64encode(zlib.compress(text, 1)).decode()


def unpack_stamps(packed: str) -> tuple[list[PartStamp], UnitRecords | None]:
    """Return the stamps of parts and of the volume's stored units in a text; none of an empty one.

    Raises:
        CorruptData: if the text is none that `pack` returned.
    """
    if not packed:
        return [], None
    try:
        header, _, data = zlib.decompress(base64.b64decode(packed)).partition(b"\n")
        spans, *groups = json.loads(header)
        at, units, parts = 0, None, []

        def take(dtype: str, count: int) -> npt.NDArray[Any]:
            nonlocal at
            values = np.frombuffer(data, dtype, count, at)
            at += values.nbytes
            return values

        if spans:
            box = Box(tuple(spans[: len(spans) // 2]), tuple(spans[len(spans) // 2 :]))
            seen = np.unpackbits(take("u1", -(-box.size // 8)), count=box.size).reshape(box.shape)
            positions = np.argwhere(seen) + np.array(box.start)
            units = UnitRecords(positions, take("<u8", len(positions)), take("<u4", len(positions)))
        for name, count, ndim in groups:
            boxes, stamps = take("<i8", 2 * ndim * count).reshape(count, 2, ndim), take("<u4", 2 * count).reshape(-1, 2)
            for (start, stop), (crc, size) in zip(boxes.tolist(), stamps.tolist(), strict=True):
                parts.append((name, Box(tuple(start), tuple(stop)), crc, size))
        stamped = [PartStamp(name, box, crc, take("<u8", size)) for name, box, crc, size in parts]
    except (ValueError, TypeError, zlib.error, binascii.Error) as error:
        raise CorruptData(f"the stamps of the input cannot be read ({type(error).__name__})") from error
    return stamped, units


def changed_units(units: UnitRecords, volume: Volume) -> list[int] | None:
    """Return the numbers of stored units of a volume that have changed.

    None: they cannot be compared, since the volume is stored in other chunks, or its values are decoded by attributes.
    """
    array, counts = volume.source.array, volume.unit_counts
    if (
        array is None
        or volume.source.packing
        or not isinstance(array.store, LocalStore)
        or len(counts) != units.positions.shape[1]
    ):
        return None
    if bool((units.positions >= np.array(counts)).any()):
        return None
    return [int(np.ravel_multi_index(position, counts)) for position in units.changed(array)]


def changed_units_of_part(part: PartStamp, volume: Volume, padding_mode: str, fill: float) -> list[int] | None:
    """Return the numbers of the stored units in a part that have changed; None if its values are still the same.

    The volume is open for a run; the list is empty where it has no stored units.
    """
    tags = volume.tags(part.box, padding_mode)
    differ = tags != part.tags if tags.size == part.tags.size else np.ones(tags.size, np.bool_)
    differ |= tags == UNKNOWN
    if tags.size and not differ.any():
        return None
    if checksum(volume.read(part.box, padding_mode, fill)) == part.crc:
        return None
    return [int(unit) for unit in volume.unit_indices(part.box, padding_mode)[differ]]
