"""The table of a block for the merge: its objects, per index of time and channel.

```text
 places    the first voxel of each object, in C order of the volume, ascending; object k has the label k + 1
 sizes     voxels of each object, where small ones are dropped
 border    the objects at faces that other blocks touch, ascending
 classes   the class of each of these, where classes are labelled apart
 faces     per axis and side with a neighbour: 0, or 1 + the object's place in `border`
```

The table of a block is one file. Its CRC-32C is in the ledger, so damage is detected before it is used.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # it has no types of its own

from oocpatch.errors import CorruptPartial
from oocpatch.objects.components import Labels, Places, components, foreground, sizes
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.labelling import Labelling
from oocpatch.storage.checksums import bytes_checksum, checksum
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.ledger import PartialsRef

Array = npt.NDArray[Any]
Face = tuple[int, int]
"""An axis, and its side: 0 the lower, 1 the upper."""

TABLE = "table"
"""Name of the file."""

_CODEC = Zstd(level=1)


@dataclass(frozen=True, slots=True)
class Section:
    """The objects of one block at one index of time and channel.

    Attributes:
        crc: CRC-32C of the labels, which the block must have when it is labelled again.
    """

    places: Places
    sizes: Places
    border: Places
    classes: Array
    faces: Mapping[Face, Labels]
    crc: int

    @property
    def count(self) -> int:
        """Number of objects."""
        return len(self.places)


def label_section(
    values: Array, rule: Labelling, core: Box, shape: Ints, touching: frozenset[Face]
) -> tuple[Labels, Section]:
    """Label a block at one index, and describe its objects.

    Args:
        values: the voxels of the block's core, spatial axes only.
        rule: what objects are.
        core: place of the core in the volume, spatial axes only.
        shape: shape of the volume, spatial axes only.
        touching: the faces that other blocks touch.
    """
    marked = foreground(values, rule)
    labels, first = components(marked, rule.connectivity)
    count = len(first)
    faces = {face: _face(labels, {face[0]: face[1]}) for face in sorted(touching)} if count else {}
    at_border = np.zeros(count + 1, np.bool_)
    for values_of_face in faces.values():
        at_border[values_of_face.reshape(-1)] = True
    at_border[0] = False
    border = np.flatnonzero(at_border[1:])
    numbers = np.zeros(count + 1, np.uint32)
    numbers[border + 1] = np.arange(1, len(border) + 1, dtype=np.uint32)
    section = Section(
        places=global_places(first, core, shape),
        sizes=sizes(labels, count) if rule.min_size > 1 else np.empty(0, np.int64),
        border=border,
        classes=marked.reshape(-1)[first[border]] if rule.per_class else np.empty(0, np.uint8),
        faces={face: numbers[values_of_face] for face, values_of_face in faces.items()},
        crc=checksum(labels) if count else 0,
    )
    return labels, section


def global_places(first: Places, core: Box, shape: Ints) -> Places:
    """Convert places in a core, in C order, to places in the volume.

    >>> global_places(np.array([0, 3]), Box((1, 2), (3, 4)), (5, 10)).tolist()
    [12, 23]
    """
    places, rest = np.zeros(len(first), np.int64), np.asarray(first, np.int64)
    factor = 1
    for start, length, whole in reversed(list(zip(core.start, core.shape, shape, strict=True))):
        rest, position = np.divmod(rest, length)
        places += (position + start) * factor
        factor *= whole
    return places


def _face(labels: Labels, sides: Mapping[int, int]) -> Labels:
    """Return the voxels at the given side of each axis that is named; the other axes stay, or one if there are none."""
    return np.atleast_1d(labels[tuple(-sides[a] if a in sides else slice(None) for a in range(labels.ndim))])


def shared_face(section: Section, offset: Ints, *, lower: bool) -> Labels | None:
    """Return the voxels of a block that touch its neighbour at an offset, over the axes on which it is 0.

    Args:
        section: the block's objects.
        offset: place of the upper block relative to the lower one, -1 to 1 per axis.
        lower: whether the block is the lower one.
    """
    sides = {axis: int((step > 0) == lower) for axis, step in enumerate(offset) if step}
    axis, *others = sides
    face = section.faces.get((axis, sides[axis]))
    if face is None:
        return None
    return _face(face, {a - 1: sides[a] for a in others})  # axes before the first one stay, those after move up


def neighbour_offsets(ndim: int, connectivity: int) -> Iterator[Ints]:
    """Yield the offsets of the upper neighbours that a block's voxels may touch.

    >>> list(neighbour_offsets(2, 1)), len(list(neighbour_offsets(3, 3)))
    ([(0, 1), (1, 0)], 13)
    """
    for offset in itertools.product((-1, 0, 1), repeat=ndim):
        steps = [step for step in offset if step]
        if 0 < len(steps) <= connectivity and steps[0] > 0:
            yield offset


def pairs(lower: Section, upper: Section, offset: Ints, rule: Labelling) -> tuple[Places, Places]:
    """Return the pairs of objects of two neighbouring blocks that touch, as places in their `border`, each once."""
    first, second = shared_face(lower, offset, lower=True), shared_face(upper, offset, lower=False)
    if first is None or second is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    width, keys = len(upper.border) + 1, []
    free = rule.connectivity - sum(step != 0 for step in offset)
    for shift in itertools.product((0, 1, -1), repeat=first.ndim):
        if sum(step != 0 for step in shift) <= free:
            a = first[tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, first.shape, strict=True))]
            b = second[tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, second.shape, strict=True))]
            both = (a != 0) & (b != 0)
            key = a[both].astype(np.int64) * width + b[both]
            if len(key):
                keys.append(key[np.concatenate([[True], key[1:] != key[:-1]])])  # runs of one pair are long
    if not keys:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ones, others = np.divmod(np.unique(np.concatenate(keys)), width)
    ones, others = ones - 1, others - 1
    if rule.per_class:
        equal = lower.classes[ones] == upper.classes[others]
        ones, others = ones[equal], others[equal]
    return ones, others


def encode_table(sections: list[Section]) -> bytes:
    """Return the sections of a block, in C order of their indices, as the content of a file."""
    header: list[Any] = []
    data: list[bytes] = []
    for section in sections:
        arrays = [section.places, section.sizes, section.border, section.classes, *section.faces.values()]
        encoded = [_encoded(array) for array in arrays]
        described = [[len(e), str(a.dtype), list(a.shape)] for e, a in zip(encoded, arrays, strict=True)]
        header.append({"crc": section.crc, "faces": list(section.faces), "arrays": described})
        data += encoded
    return b"".join([json.dumps(header).encode(), b"\n", *data])


def _encoded(array: Array) -> bytes:
    return bytes(_CODEC.encode(np.ascontiguousarray(array).reshape(-1).view(np.uint8))) if array.size else b""


def decode_table(content: bytes) -> list[Section]:
    """Return the sections in the content of a file."""
    end = content.index(b"\n")
    at, sections = end + 1, []
    for described in json.loads(content[:end]):
        arrays = []
        for length, dtype, shape in described["arrays"]:
            part = _CODEC.decode(content[at : at + length]) if length else b""
            arrays.append(np.frombuffer(part, dtype).reshape(shape))
            at += length
        faces = {(axis, side): face for (axis, side), face in zip(described["faces"], arrays[4:], strict=True)}
        places, object_sizes, border, classes = arrays[:4]
        sections.append(Section(places, object_sizes, border, classes, faces, described["crc"]))
    return sections


def write_table(folder: StoragePath, sections: list[Section]) -> PartialsRef:
    """Write the table of one attempt at a block, and return the reference for the ledger.

    Idempotent: writes only below an address of its own.
    """
    attempt = f"{secrets.randbelow(10**15):015d}"
    content = encode_table(sections)
    (folder / attempt).make_folder()
    (folder / attempt / TABLE).write_plain(content)
    return PartialsRef(bytes_checksum(content) or 1, attempt)


def read_table(folder: StoragePath, block: int, ref: PartialsRef) -> list[Section]:
    """Read the table that the ledger records of a block.

    Raises:
        CorruptPartial: when it is missing, or not the one that was written.
        OSError: when an object store does not answer.
    """
    try:
        content = (folder / ref.attempt / TABLE).read_bytes()
    except OSError as error:
        if folder.is_outage(error):
            raise
        raise CorruptPartial(block, f"its table cannot be read ({type(error).__name__})") from error
    if (bytes_checksum(content) or 1) != ref.digest:
        raise CorruptPartial(block, "its table is not the one in the ledger")
    return decode_table(content)
