"""Chunks that would inflate: what a stored chunk says of its size is read before it is decoded.

A file of 32 KB may decode to a gigabyte. Decoders believe it, and say afterwards that it was too much.
"""

from __future__ import annotations

import math
import stat
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocpatch.storage.units import unit_positions

FACTOR, SLACK = 8, 1 << 20
"""Filters may widen what a codec gives: so many times the chunk, and so many bytes, are no cause for alarm."""

ZSTD_BLOCK = 1 << 17
"""What a block of a zstd frame may hold at most (RFC 8878, 3.1.1.2.4)."""


@dataclass(frozen=True)
class ChunkGuard:
    """Refuses chunks of an array that say they are far larger than they should be.

    Args:
        array: a Zarr array in a local directory.
        folder: its directory.
        told: reads from a stored chunk how many bytes it decodes to, or a number above the limit that it is given.
    """

    array: zarr.Array[Any]
    folder: Path
    told: Callable[[IO[bytes], int], int]

    @classmethod
    def of(cls, array: zarr.Array[Any] | None) -> ChunkGuard | None:
        """The guard of an array; None where it does not lie in a local directory."""
        if array is None or not isinstance(array.store, LocalStore):
            return None
        codecs = [_name(codec) for codec in array.compressors]
        told = _TOLD.get(codecs[-1], _nothing) if codecs and array.shards is None else _nothing
        return cls(array, Path(array.store.root, array.path), told)

    def check(self, selection: tuple[slice, ...]) -> None:
        """Look at the chunks of a selection.

        Raises:
            ValueError: when one is not what the metadata promises, before any of it is decoded.
        """
        expected = math.prod(self.array.shards or self.array.chunks) * np.dtype(self.array.dtype).itemsize
        limit = FACTOR * expected + SLACK
        bounds = tuple(slice(*part.indices(n)[:2]) for part, n in zip(selection, self.array.shape, strict=True))
        for position in unit_positions(self.array, bounds):
            key = self.array.metadata.encode_chunk_key(position)
            path = self.folder / key
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"chunk {key} of {self.folder} must be a file, and is none")
                found = status.st_size
                if found <= limit and self.told is not _nothing:
                    with path.open("rb", buffering=0) as file:
                        found = self.told(file, limit)
            except FileNotFoundError:  # a chunk of nothing but the fill value
                continue
            if found > limit:
                raise ValueError(
                    f"chunk {key} of {self.folder} must decode to {expected} bytes, as its metadata says, "
                    f"but would decode to {found} or more; it is damaged or hostile"
                )


def _name(codec: Any) -> str:
    """`zstd`, `blosc`, ... of a codec of Zarr v3 or of numcodecs."""
    found = getattr(codec, "codec_id", None) or type(codec).__name__.removesuffix("Codec").lower()
    return str(found).rpartition(".")[2]


def _nothing(_: IO[bytes], __: int) -> int:
    """A codec that does not inflate, or does not tell."""
    return 0


def _blosc(file: IO[bytes], _: int) -> int:
    return int.from_bytes(file.read(8)[4:], "little")


def _lz4(file: IO[bytes], _: int) -> int:
    return int.from_bytes(file.read(4), "little")


def _zstd(file: IO[bytes], limit: int) -> int:
    """The size of a zstd frame from its header, else a bound from its blocks (RFC 8878, 3.1.1)."""
    head = file.read(18)
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return 0  # not zstd: the decoder will say so
    flags = head[4]
    single = flags >> 5 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    if width:
        return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)
    total, last = 0, 0
    while not last and total <= limit:
        file.seek(at)
        block = int.from_bytes(file.read(3), "little")
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        total += size if kind < 2 else ZSTD_BLOCK
        at += 3 + (1 if kind == 1 else size)
        if not block:
            break
    return total


def _deflate(bits: int) -> Callable[[IO[bytes], int], int]:
    """Deflate tells no size that could be believed, so it is inflated a piece at a time, until it is too much."""

    def told(file: IO[bytes], limit: int) -> int:
        total, decoder = 0, zlib.decompressobj(bits)
        rest = file.read(1 << 16)
        try:
            while rest and total <= limit:
                total += len(decoder.decompress(rest, 1 << 20))
                if decoder.eof:  # gzip may hold several members
                    rest, decoder = decoder.unused_data, zlib.decompressobj(bits)
                else:
                    rest = decoder.unconsumed_tail
                rest = rest or file.read(1 << 16)
        except zlib.error:  # the decoder will say so
            return total
        return total

    return told


_TOLD: dict[str, Callable[[IO[bytes], int], int]] = {
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
    "gzip": _deflate(31),
    "zlib": _deflate(15),
}
