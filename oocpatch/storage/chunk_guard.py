"""Chunks that would inflate: what a stored chunk says of its size is looked at before it is decoded.

A file of 32 KB may decode to a gigabyte. Decoders believe it, and say afterwards that it was too much. Each chunk of a
selection is looked at; in a shard, each inner chunk of it.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore

from oocpatch.planning.box import Ints, unit_positions
from oocpatch.storage.decoded import Part, Told, nothing, told_by

FACTOR, SLACK = 8, 1 << 20
"""Filters may widen what a codec gives: so many times the chunk, and so many bytes, are no cause for alarm."""

ABSENT = 2**64 - 1
"""In the index of a shard, twice: nothing is stored of this chunk."""


@dataclass(frozen=True)
class ChunkGuard:
    """Refuses chunks of an array that would decode to far more than they should.

    Args:
        array: a Zarr array in a local directory.
        folder: its directory.
        told: reads from a stored chunk how many bytes it decodes to, or a number above the limit that it is given.
        index: of its shards, if there are any.
    """

    array: zarr.Array[Any]
    folder: Path
    told: Told
    index: ShardIndex | None

    @classmethod
    def of(cls, array: zarr.Array[Any] | None) -> ChunkGuard | None:
        """The guard of an array; None where it does not lie in a local directory.

        Raises:
            ValueError: when its chunks are coded in a way that cannot be looked through.
        """
        if array is None or not isinstance(array.store, LocalStore):
            return None
        folder = Path(array.store.root, array.path)
        try:
            told = told_by([*array.filters, *array.compressors])
            return cls(array, folder, told, None if array.shards is None else ShardIndex.of(array))
        except ValueError as error:
            raise ValueError(f"{folder} cannot be read: {error}") from error

    def check(self, selection: tuple[slice, ...]) -> None:
        """Look at the chunks of a selection.

        Raises:
            ValueError: when one is not what the metadata promises, before any of it is decoded.
        """
        bounds = [part.indices(n)[:2] for part, n in zip(selection, self.array.shape, strict=True)]
        whole = math.prod(self.array.shards or self.array.chunks) * np.dtype(self.array.dtype).itemsize
        for position in unit_positions(self.array.shards or self.array.chunks, tuple(slice(*span) for span in bounds)):
            key = self.array.metadata.encode_chunk_key(position)
            path = self.folder / key
            try:
                status = path.stat()
                self.check_size(key, status, whole)
                if self.told is nothing and self.index is None:
                    continue
                with path.open("rb", buffering=0) as file:
                    if self.index is not None:
                        self._check_shard(self.index, file.fileno(), key, position, bounds)
                    else:
                        self._refuse(key, self.told(Part(file.fileno(), 0, status.st_size), limit(whole)), whole)
            except FileNotFoundError:  # a chunk of nothing but the fill value
                continue

    def check_size(self, key: str, status: os.stat_result, whole: int) -> None:
        """Look at a chunk's file before it is read.

        Raises:
            ValueError: when it is none, or larger than a chunk of so many bytes.
        """
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"chunk {key} of {self.folder} must be a file, and is none")
        self._refuse(key, status.st_size, whole)

    def check_bytes(self, key: str, data: memoryview, whole: int) -> None:
        """Look at a chunk that was read, before it is decoded; not for shards.

        Raises:
            ValueError: when it would decode to more than so many bytes.
        """
        if self.told is not nothing:
            self._refuse(key, self.told(io.BytesIO(data), limit(whole)), whole)

    def _check_shard(
        self, index: ShardIndex, file: int, key: str, position: Ints, bounds: Sequence[tuple[int, int]]
    ) -> None:
        """Each inner chunk, and all of them together: a little too much of each is too much."""
        chunk = math.prod(self.array.chunks) * np.dtype(self.array.dtype).itemsize
        total = 0
        try:
            entries = list(index.entries(file, position, bounds))
        except ValueError as error:
            raise ValueError(f"shard {key} of {self.folder} cannot be read: {error}") from error
        for count, (start, size) in enumerate(entries, 1):
            self._refuse(key, size, chunk)
            found = self.told(Part(file, start, size), limit(chunk))
            total += found
            self._refuse(key, found, chunk)
            self._refuse(key, total, count * chunk)

    def _refuse(self, key: str, found: int, expected: int) -> None:
        if found > limit(expected):
            raise ValueError(
                f"chunk {key} of {self.folder} must decode to {expected} bytes, as its metadata says, "
                f"but would decode to {found} or more; it is damaged or hostile"
            )


def limit(expected: int) -> int:
    """Bytes that are no cause for alarm where so many are expected."""
    return FACTOR * expected + SLACK


@dataclass(frozen=True)
class ShardIndex:
    """Where the inner chunks of a shard lie.

    Args:
        shard, chunk: their shapes in voxels.
        order: how its numbers are stored, for numpy.
        checked: bytes of the checksum after it.
        first: whether it is at the shard's start instead of its end.
    """

    shard: Ints
    chunk: Ints
    order: str
    checked: int
    first: bool

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> ShardIndex:
        """The index of an array's shards.

        Raises:
            ValueError: when shards are coded in a way that cannot be looked through.
        """
        assert isinstance(array.metadata, ArrayV3Metadata)
        codecs = array.metadata.codecs
        sharding = next(codec for codec in codecs if isinstance(codec, ShardingCodec))
        if any(isinstance(codec, BytesBytesCodec) for codec in codecs):
            raise ValueError("shards must not be compressed as a whole; store the volume anew")
        if any(isinstance(codec, ShardingCodec) for codec in sharding.codecs):
            raise ValueError("shards must not lie within shards; store the volume anew")
        stored, *more = sharding.index_codecs
        if not isinstance(stored, BytesCodec) or any(not isinstance(codec, Crc32cCodec) for codec in more):
            raise ValueError("the index of a shard must be bytes with a crc32c; store the volume anew")
        order = ">u8" if stored.endian is not None and stored.endian.value == "big" else "<u8"
        assert array.shards is not None
        return cls(array.shards, array.chunks, order, 4 * len(more), sharding.index_location.value == "start")

    def entries(self, file: int, position: Ints, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """First byte and length of each inner chunk that lies in the bounds, of the shard at a position.

        Raises:
            ValueError: when it would lie beyond the shard's end.
        """
        counts = tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        size, stored = 16 * math.prod(counts), os.fstat(file).st_size
        start = 0 if self.first else stored - size - self.checked
        raw = os.pread(file, size, start) if start >= 0 else b""
        if len(raw) < size:
            return  # cut off: the decoder will say so
        index = np.frombuffer(raw, self.order).reshape(*counts, 2)
        spans = zip(position, self.shard, self.chunk, bounds, strict=True)
        ranges = [range(max(a - p * s, 0) // c, -(-min(b - p * s, s) // c)) for p, s, c, (a, b) in spans]
        for place in itertools.product(*ranges):
            first, length = (int(number) for number in index[place])
            if (first, length) != (ABSENT, ABSENT):
                if first + length > stored:  # a decoder may allocate what it is told, and end the process
                    raise ValueError(
                        f"its index must lead to bytes of its {stored}, but leads to {length} from {first} on; "
                        "it is damaged or hostile"
                    )
                yield first, length
