"""Refuse stored chunks that would inflate, before they are decoded.

A file of 32 KB may decode to a gigabyte, which decoders allocate before they fail. zstd, blosc and lz4 declare the
decoded size in a header, which is read. gzip, zlib, bz2 and LZMA do not, and are decoded piece by piece up to a limit.
In a shard each inner chunk is checked.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import LocalStore

from oocpatch.planning.box import Ints, unit_positions
from oocpatch.system import read_at

FACTOR, SLACK = 8, 1 << 20  # filters may widen what a codec decodes: so many times the chunk, and bytes, are accepted
ABSENT = 2**64 - 1  # both numbers of an inner chunk that is not stored, in the index of a shard
ZSTD_BLOCK = 1 << 17  # bytes that a block of a zstd frame decodes to at most (RFC 8878, 3.1.1.2.4)
STEP = 1 << 20  # bytes that are decoded at a time

Read = Callable[[int, int], bytes]
"""Returns bytes of a stored chunk: from a first one on, at most so many."""
DecodedSize = Callable[[Read, int], int]
"""Returns how many bytes a chunk decodes to, a bound on it, or any number above a limit."""


@dataclass(frozen=True)
class ChunkGuard:
    """Refuses chunks of an array in a local directory that would decode to far more than they should."""

    array: zarr.Array[Any]
    folder: Path
    decoded_size: DecodedSize | None
    """Size of a stored chunk once decoded; None where no codec inflates."""
    sharding: ShardingCodec | None

    @classmethod
    def of(cls, array: zarr.Array[Any] | None) -> ChunkGuard | None:
        """Return the guard of an array in a local directory, else None; refuse codecs that hide the sizes of chunks."""
        if array is None or not isinstance(array.store, LocalStore):
            return None
        folder = Path(array.store.root, array.path)
        try:
            return cls(array, folder, decoded_size_of([*array.filters, *array.compressors]), _sharding_of(array))
        except ValueError as error:
            raise ValueError(f"{folder} cannot be read: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkGuard.of, (self.array,)  # functions made here cannot be pickled

    def check(self, selection: tuple[slice, ...]) -> None:
        """Raise `ValueError` if a chunk of a selection would decode to far more than the metadata says."""
        unit = self.array.shards or self.array.chunks
        bounds = [part.indices(n)[:2] for part, n in zip(selection, self.array.shape, strict=True)]
        for position in unit_positions(unit, tuple(slice(*span) for span in bounds)):
            key = self.array.metadata.encode_chunk_key(position)
            with contextlib.suppress(FileNotFoundError):  # the chunk has nothing but the fill value
                status = (self.folder / key).stat()
                self.check_size(key, status, math.prod(unit) * np.dtype(self.array.dtype).itemsize)
                if self.decoded_size is not None or self.sharding is not None:
                    with (self.folder / key).open("rb", buffering=0) as file:
                        self._check_file(file.fileno(), key, status.st_size, position, bounds)

    def check_size(self, key: str, status: os.stat_result, expected: int) -> None:
        """Refuse what is not a file, or far larger than the expected bytes."""
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"chunk {key} of {self.folder} must be a file, and is none")
        self._refuse(key, status.st_size, expected)

    def check_bytes(self, key: str, data: memoryview, expected: int) -> None:
        """Refuse a chunk, not a shard, that was read and would decode to far more than the expected bytes."""
        if self.decoded_size is not None:
            size = self.decoded_size(lambda start, count: bytes(data[start : start + count]), limit(expected))
            self._refuse(key, size, expected)

    def _check_file(self, file: int, key: str, size: int, position: Ints, bounds: Sequence[tuple[int, int]]) -> None:
        """Check each chunk in a file, and all of them together: many that are a little too large are refused."""
        expected, total = math.prod(self.array.chunks) * np.dtype(self.array.dtype).itemsize, 0
        try:
            chunks = [(0, size)] if self.sharding is None else list(self._inner_chunks(file, size, position, bounds))
        except ValueError as error:
            raise ValueError(f"shard {key} of {self.folder} cannot be read: {error}") from error
        for count, (first, length) in enumerate(chunks, 1):
            self._refuse(key, length, expected)
            if self.decoded_size is not None:
                decoded = self.decoded_size(functools.partial(_read_part, file, first, length), limit(expected))
                total += decoded
                self._refuse(key, decoded, expected)
                self._refuse(key, total, count * expected)

    def _inner_chunks(
        self, file: int, size: int, position: Ints, bounds: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, int]]:
        """Yield first byte and length of each stored inner chunk within bounds; refuse one beyond the shard's end."""
        sharding, shard, chunk = self.sharding, self.array.shards, self.array.chunks
        if sharding is None or shard is None:
            return
        counts = tuple(s // c for s, c in zip(shard, chunk, strict=True))
        nbytes, checksum = 16 * math.prod(counts), 4 * (len(sharding.index_codecs) - 1)
        start = 0 if setting(sharding.index_location) == "start" else size - nbytes - checksum
        raw = _read(file, nbytes, start) if start >= 0 else b""
        if len(raw) < nbytes:
            return  # cut off: the decoder reports it
        endian = getattr(sharding.index_codecs[0], "endian", None)
        order = ">u8" if setting(endian) == "big" else "<u8"
        index = np.frombuffer(raw, order).reshape(*counts, 2)
        spans = zip(position, shard, chunk, bounds, strict=True)
        ranges = [range(max(a - p * s, 0) // c, -(-min(b - p * s, s) // c)) for p, s, c, (a, b) in spans]
        for inner in itertools.product(*ranges):
            first, length = (int(number) for number in index[inner])
            if (first, length) == (ABSENT, ABSENT):
                continue
            if first + length > size:  # a decoder may allocate that length, and end the process
                raise ValueError(
                    f"its index must lead to bytes of its {size}, but leads to {length} from {first} on; "
                    "it is damaged or hostile"
                )
            yield first, length

    def _refuse(self, key: str, size: int, expected: int) -> None:
        if size > limit(expected):
            raise ValueError(
                f"chunk {key} of {self.folder} must decode to {expected} bytes, as its metadata says, "
                f"but would decode to {size} or more; it is damaged or hostile"
            )


def setting(value: Any) -> str:
    """Return a setting of a codec as text, empty for none: an enumeration's member before zarr-python 3.4.

    >>> setting("little"), setting(None)
    ('little', '')
    """
    return "" if value is None else str(getattr(value, "value", value))


def limit(expected: int) -> int:
    """Return the largest accepted size where so many bytes are expected."""
    return FACTOR * expected + SLACK


def _read_part(file: int, first: int, length: int, start: int, count: int) -> bytes:
    return _read(file, max(0, min(count, length - start)), first + start)


def _read(file: int, count: int, offset: int) -> bytes:
    data = bytearray(count)
    return bytes(data[: read_at(file, memoryview(data), offset)])


def _sharding_of(array: zarr.Array[Any]) -> ShardingCodec | None:
    """Return the codec of an array's shards; refuse one that hides the sizes of inner chunks."""
    if array.shards is None:
        return None
    codecs: Sequence[Any] = getattr(array.metadata, "codecs", ())
    sharding: ShardingCodec = next(codec for codec in codecs if isinstance(codec, ShardingCodec))
    if any(isinstance(codec, BytesBytesCodec) for codec in codecs):
        raise ValueError("shards must not be compressed as a whole; store the volume anew")
    if any(isinstance(codec, ShardingCodec) for codec in sharding.codecs):
        raise ValueError("shards must not lie within shards; store the volume anew")
    stored, *more = sharding.index_codecs
    if not isinstance(stored, BytesCodec) or any(not isinstance(codec, Crc32cCodec) for codec in more):
        raise ValueError("the index of a shard must be bytes with a crc32c; store the volume anew")
    return sharding


def decoded_size_of(codecs: Sequence[Any]) -> DecodedSize | None:
    """Return the function for chunks that went through these codecs, in that order; None where none inflates.

    Raises:
        ValueError: when they are compressed twice: the inner size is unknown before the outer one is decoded.
    """
    names = [_name(codec) for codec in codecs]
    inflating = [at for at, name in enumerate(names) if name in DECODED_SIZES]
    if not inflating:
        return None
    if len(inflating) > 1:
        both = ", ".join(names[at] for at in inflating)
        raise ValueError(f"chunks must be compressed at most once, got {both}; store the volume anew")
    decoded_size = DECODED_SIZES[names[inflating[0]]](codecs[inflating[0]])
    # These checksums of numcodecs precede the data; all others follow it.
    skipped = 4 * sum(name in {"crc32", "adler32"} for name in names[inflating[0] + 1 :])
    return lambda read, limit: decoded_size(lambda start, count: read(start + skipped, count), limit)


def declared_size(codec: Any, data: memoryview) -> int | None:
    """Return the size that the header of a chunk of zstd or blosc declares, and decoders keep to; None if absent."""
    return int.from_bytes(data[4:8], "little") if _name(codec) == "blosc" else _zstd_header(bytes(data[:18]))[0]


def _name(codec: Any) -> str:
    """Return `zstd`, `blosc`, ... for a codec of Zarr v3, numcodecs or imagecodecs."""
    name = str(getattr(codec, "codec_id", None) or type(codec).__name__.removesuffix("Codec").lower())
    if name.startswith("imagecodecs_") and not getattr(codec, "header", True):
        return name  # without the header that declares the size
    return name.rpartition(".")[2].removeprefix("imagecodecs_")


def _zstd_header(head: bytes) -> tuple[int | None, int]:
    """Return the size that a zstd frame declares, if it does, and the position of its first block (RFC 8878, 3.1.1)."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None, 0  # not zstd: the decoder reports it
    single = head[4] >> 5 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[head[4] & 3]
    width = (single, 2, 4, 8)[head[4] >> 6]
    size = int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)
    return (size if width else None), at + width


def _zstd(read: Read, limit: int) -> int:
    size, at = _zstd_header(read(0, 18))
    if size is not None or not at:
        return size or 0
    total, last = 0, 0  # without a declared size, a bound from the headers of its blocks
    while not last and total <= limit and (header := int.from_bytes(read(at, 3), "little")):
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        total += size if kind < 2 else ZSTD_BLOCK
        at += 3 + (1 if kind == 1 else size)
    return total


def _inflated(open_file: Callable[[io.BytesIO], Any], skipped: int = 0, header: bytes = b"") -> DecodedSize:
    """Return a function that decodes piece by piece, until it is above the limit; with another header if need be."""

    def decoded_size(read: Read, limit: int) -> int:
        total = 0
        with contextlib.suppress(zlib.error, lzma.LZMAError, OSError, EOFError):  # the decoder reports damage
            file = open_file(io.BytesIO(header + read(skipped, limit)))
            while total <= limit and (piece := file.read1(STEP)):
                total += len(piece)
        return total

    return decoded_size


def _lzma(codec: Any) -> DecodedSize:
    settings = getattr(codec, "codec_config", None) or vars(codec)  # a stream without a header needs them
    form, filters = settings.get("format", lzma.FORMAT_XZ), settings.get("filters")
    return _inflated(lambda file: lzma.LZMAFile(file, format=form, filters=filters))


def _gzip(file: io.BytesIO) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=file)


GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # a zlib stream has two bytes in its place
DECODED_SIZES: dict[str, Callable[[Any], DecodedSize]] = {
    **dict.fromkeys(("blosc", "blosc2"), lambda _: lambda read, _: int.from_bytes(read(4, 4), "little")),
    **dict.fromkeys(("lz4", "lzf"), lambda _: lambda read, _: int.from_bytes(read(0, 4), "little")),
    **dict.fromkeys(("zlib", "zlibng", "deflate"), lambda _: _inflated(_gzip, 2, GZIP_HEADER)),
    "zstd": lambda _: _zstd,
    "gzip": lambda _: _inflated(_gzip),
    "bz2": lambda _: _inflated(bz2.BZ2File),
    "lzma": _lzma,
}
"""Functions of the codecs that inflate, by their names."""
