"""Tags and stamps of stored units: numbers by which a file or an object shows, unread, that it has not changed.

A unit is a chunk or a shard of a Zarr, or all files of an array of another format. Its tag is made of a file's size,
modification time, change time and inode, or of an object's ETag, and of what says how it is decoded: metadata of a
Zarr, the part of a file. Units with equal tags are unchanged; where tags differ, the content decides: a copy has other
times and the same content.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from oocpatch.planning.box import Box, Ints, unit_positions
from oocpatch.storage.checksums import checksum, file_checksum, text_checksum
from oocpatch.storage.object_store import BUCKETS, scheme_of
from oocpatch.storage.paths import LocalPath, ObjectPath, path_of

Tags = npt.NDArray[np.uint64]
TagReader = Callable[[Box], Tags]
"""Returns the tags of the units that a box of the array meets, in C order."""

ABSENT, UNKNOWN = 0, 1
"""Tags of a file that is not there, and of one that changed while it was read, which equals no other."""

SECOND = 10**9
TICK = SECOND // 50
"""Kernels count the times of files in steps of up to 10 ms, in nanoseconds."""
PATIENCE = 50
"""Times that a file that keeps changing is looked at."""

FACTORS = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
"""Odd numbers that spread sizes and times over 64 bits."""


class StoredUnits(Protocol):
    """The stored units of an array.

    Attributes:
        unit: voxels of a unit along each axis of the array.
    """

    @property
    def unit(self) -> Ints: ...

    def reader(self) -> TagReader:
        """Return a function that reads tags as they are now; for one run."""
        ...


def units_of(array: zarr.Array[Any]) -> StoredUnits | None:
    """Return the stored units of a Zarr array; None where its store has no times and tags.

    >>> units_of(zarr.ones((4,), store={})) is None
    True
    """
    if isinstance(array.store, LocalStore):
        return ChunkFiles(array)
    path = path_of(array.store)
    return ChunkObjects(array, path) if isinstance(path, ObjectPath) and scheme_of(path.url) in BUCKETS else None


@dataclass(frozen=True)
class ChunkFiles:
    """The chunks or shards of a Zarr array in a local directory."""

    array: zarr.Array[Any]

    @property
    def unit(self) -> Ints:
        return self.array.shards or self.array.chunks

    def reader(self) -> TagReader:
        folder, key = f"{path_of(self.array.store)}/{self.array.path}/", self.array.metadata.encode_chunk_key
        unit, decoding = self.unit, _decoding(self.array)
        return lambda box: _array(
            _with(decoding, file_tag(folder + key(p))) for p in unit_positions(unit, box.slices())
        )


@dataclass(frozen=True)
class WholeFiles:
    """The files of an array, all of which are one unit; `part` says which array in them it is."""

    files: tuple[str, ...]
    part: str
    unit: Ints

    def reader(self) -> TagReader:
        tags = [file_tag(file) for file in self.files]  # once, before anything is read
        whole = _array([UNKNOWN if UNKNOWN in tags else _mixed([_text_tag(self.part), *tags])])
        return lambda _: whole


@dataclass(frozen=True)
class ChunkObjects:
    """The chunks or shards of a Zarr array in an object store, which lists many ETags per request."""

    array: zarr.Array[Any]
    path: ObjectPath

    @property
    def unit(self) -> Ints:
        return self.array.shards or self.array.chunks

    def reader(self) -> TagReader:
        key, unit, decoding = self.array.metadata.encode_chunk_key, self.unit, _decoding(self.array)
        lock = threading.Lock()
        listed: list[tuple[Tags, Tags]] = []

        def read(box: Box) -> Tags:
            with lock:
                if not listed:
                    listed.append(_listed(self.path / self.array.path if self.array.path else self.path))
            names, tags = listed[0]
            wanted = _array(_text_tag(key(p)) for p in unit_positions(unit, box.slices()))
            places = np.searchsorted(names[:-1], wanted)
            return _array(_with(decoding, int(tag)) for tag in np.where(names[places] == wanted, tags[places], ABSENT))

        return read


class UnitStamps:
    """Stamps of stored units of a Zarr in a local directory: of each, its tag and the CRC-32C of its bytes.

    What says how chunks are decoded goes into each CRC, too: the same bytes may stand for other values.

    Attributes:
        box: the positions of the units.
        tags: their tags; 0 where a unit was not read.
        crcs: their CRCs.
    """

    def __init__(self, array: zarr.Array[Any], box: Box) -> None:
        self.box = box
        self.tags = np.zeros(box.shape, np.uint64)
        self.crcs = np.zeros(box.shape, np.uint32)
        self._decoding, self._seed = _decoding(array), _seed(array)

    def add(self, position: Ints, status: os.stat_result | None, data: bytes | memoryview) -> None:
        """Add a unit that was read, with the status that its file had before.

        One that was read twice and changed in between counts as changed, whatever it becomes.
        """
        index = tuple(p - a for p, a in zip(position, self.box.start, strict=True))
        tag = _with(self._decoding, ABSENT if status is None else status_tag(status))
        if tag == self.tags[index] != UNKNOWN:
            return
        crc = checksum(np.frombuffer(data, np.uint8), self._seed) if data else self._seed
        if not self.tags[index]:
            self.crcs[index], self.tags[index] = crc, tag
        elif crc != self.crcs[index]:
            self.crcs[index], self.tags[index] = self.crcs[index] ^ 1, UNKNOWN


class UnitRecords(NamedTuple):
    """Stamps of some stored units.

    Attributes:
        positions: their positions, one per row.
        tags, crcs: as in `UnitStamps`.
    """

    positions: npt.NDArray[np.int64]
    tags: Tags
    crcs: npt.NDArray[np.uint32]

    def select(self, which: slice | npt.NDArray[np.bool_]) -> UnitRecords:
        """Return some of the stamps."""
        return UnitRecords(self.positions[which], self.tags[which], self.crcs[which])

    def changed(self, array: zarr.Array[Any]) -> list[Ints]:
        """Return the positions of the units that have changed; reads the files whose tags differ."""
        folder, key = f"{path_of(array.store)}/{array.path}", array.metadata.encode_chunk_key
        decoding, seed, changed = _decoding(array), _seed(array), []
        for row, tag, crc in zip(self.positions.tolist(), self.tags.tolist(), self.crcs.tolist(), strict=True):
            path = f"{folder}/{key(tuple(row))}"
            now = _with(decoding, file_tag(path))
            if (now != tag or now == UNKNOWN) and _file_crc(path, seed) != crc:
                changed.append(tuple(row))
        return changed


def _file_crc(path: str, seed: int) -> int:
    try:
        return file_checksum(LocalPath(path), seed)
    except (FileNotFoundError, NotADirectoryError):
        return seed


def _listed(path: ObjectPath) -> tuple[Tags, Tags]:
    """List names and ETags of all objects below a path, each as a number, sorted by the names: 16 bytes for each."""
    pairs = np.fromiter(
        ((_text_tag(name), _text_tag(tag)) for name, tag in path.list_tags()),
        np.dtype([("name", np.uint64), ("tag", np.uint64)]),
    )
    pairs = np.append(pairs, np.array((0, ABSENT), pairs.dtype))
    pairs.sort(order="name")
    return pairs["name"], pairs["tag"]


def file_tag(path: str) -> int:
    """Return the tag of a file; `ABSENT` where there is none.

    >>> file_tag("/no/such/file"), file_tag("/dev/null") == file_tag("/dev/null")
    (0, True)
    """
    try:
        return status_tag(settled(lambda: os.stat(path)))  # noqa: PTH116 - a million times
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT


def settled(stat: Callable[[], os.stat_result]) -> os.stat_result:
    """Return the status of a file, when it is so old that any later change has another time.

    The clocks of file systems go in steps: a file may change twice at one time.
    """
    status = stat()
    for _ in range(PATIENCE):
        step = TICK if status.st_ctime_ns % SECOND else 2 * SECOND  # some file systems count in seconds
        age = time.time_ns() - status.st_ctime_ns
        if not 0 <= age < step:
            break
        time.sleep((step - age) / SECOND)
        status = stat()
    return status


def status_tag(status: os.stat_result) -> int:
    """Return the tag of a file of this status."""
    return _mixed((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


def _mixed(numbers: Iterable[int]) -> int:
    """Return a number of 64 bits that depends on the order of numbers; neither `ABSENT` nor `UNKNOWN`."""
    mixed = 0
    for place, number in enumerate(numbers):
        mixed = (mixed * FACTORS[0] + (number + place + 1) * FACTORS[1]) % (1 << 64)
        mixed ^= mixed >> 29
    return max(mixed * FACTORS[2] % (1 << 64), UNKNOWN + 1)


def common_tag(tags: Tags) -> Tags:
    """Return the tag of several units as one; unknown where one of them is, none where there are none."""
    if not tags.size:
        return tags
    return _array([UNKNOWN if UNKNOWN in tags else _mixed(tags.tolist())])


def _decoding(array: zarr.Array[Any]) -> int:
    """Return a tag of the metadata of an array: with others, its chunks have other values."""
    return _text_tag(json.dumps(array.metadata.to_dict(), sort_keys=True, default=str))


def _seed(array: zarr.Array[Any]) -> int:
    """Return the CRC of what says how the chunks of an array in a directory are decoded.

    It is read as it is stored: what zarr-python makes of it may differ from version to version.
    """
    name = "zarr.json" if array.metadata.zarr_format == 3 else ".zarray"
    metadata = json.loads((LocalPath(str(path_of(array.store))) / array.path / name).read_text())
    metadata.pop("attributes", None)
    return text_checksum(json.dumps(metadata, sort_keys=True, default=str))


def _with(decoding: int, tag: int) -> int:
    return tag if tag == UNKNOWN else _mixed((decoding, tag))


def _text_tag(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _array(tags: Iterable[int]) -> Tags:
    return np.fromiter(tags, np.uint64)
