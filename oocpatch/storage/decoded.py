"""How many bytes a stored chunk decodes to, read from its header or found by decoding it a piece at a time.

Each function takes an open file at the chunk's first byte and a limit. Its answer is the size, a bound on it, or any
number above the limit.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

ZSTD_BLOCK = 1 << 17
"""What a block of a zstd frame may hold at most (RFC 8878, 3.1.1.2.4)."""

PIECE, STEP = 1 << 16, 1 << 20
"""Bytes that are read, and that are decoded, at a time."""


class Bytes(Protocol):
    """What is read of an open file."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""
        ...

    def seek(self, place: int, /) -> int:
        """Go to a place, from the chunk's first byte."""
        ...


Told = Callable[[Bytes, int], int]


class Part:
    """A part of a file, read as if it were one.

    Args:
        file: an open file's number.
        start, size: the part, in bytes.
    """

    def __init__(self, file: int, start: int, size: int) -> None:
        self._file, self._start, self._size, self._place = file, start, size, 0

    def read(self, size: int, /) -> bytes:
        """The next bytes, none beyond the part."""
        found = os.pread(self._file, max(0, min(size, self._size - self._place)), self._start + self._place)
        self._place += len(found)
        return found

    def seek(self, place: int, /) -> int:
        """Go to a place in the part."""
        self._place = min(place, self._size)
        return self._place


def told_by(codecs: Sequence[Any]) -> Told:
    """What tells the size of chunks that went through these codecs, in that order.

    Raises:
        ValueError: when they are compressed twice: the inner size is not known before the outer one is decoded.
    """
    names = [_name(codec) for codec in codecs]
    inflating = [name for name in names if name in _TOLD or name == "lzma"]
    if not inflating:
        return nothing
    if len(inflating) > 1:
        raise ValueError(f"chunks must be compressed at most once, got {', '.join(inflating)}; store the volume anew")
    codec = codecs[names.index(inflating[0])]
    told = _lzma(codec) if inflating[0] == "lzma" else _TOLD[inflating[0]]
    before = 4 * sum(name in CHECKSUMS_BEFORE for name in names[names.index(inflating[0]) + 1 :])
    return told if not before else lambda file, limit: told(_After(file, before), limit)


CHECKSUMS_BEFORE = frozenset({"crc32", "adler32"})
"""Of numcodecs: they put their four bytes first. All others put theirs last, where they do not matter here."""


class _After:
    """A file without its first bytes."""

    def __init__(self, file: Bytes, skipped: int) -> None:
        self._file, self._skipped = file, skipped
        file.seek(skipped)

    def read(self, size: int, /) -> bytes:
        return self._file.read(size)

    def seek(self, place: int, /) -> int:
        return self._file.seek(place + self._skipped) - self._skipped


def _name(codec: Any) -> str:
    """`zstd`, `blosc`, ... of a codec of Zarr v3, of numcodecs or of imagecodecs."""
    found = str(getattr(codec, "codec_id", None) or type(codec).__name__.removesuffix("Codec").lower())
    if found.startswith(OTHERS) and not getattr(codec, "header", True):
        return found  # no size before it
    return found.rpartition(".")[2].removeprefix(OTHERS)


OTHERS = "imagecodecs_"
"""What imagecodecs puts before the names of its codecs. Those of pictures, pcodec and zfp tell no size."""


def nothing(_: Bytes, __: int) -> int:
    """A codec that does not inflate, or does not tell."""
    return 0


def _blosc(file: Bytes, _: int) -> int:
    return int.from_bytes(file.read(8)[4:], "little")


def _lz4(file: Bytes, _: int) -> int:
    return int.from_bytes(file.read(4), "little")


def declared(codec: Any, data: memoryview) -> int | None:
    """The size that a chunk's header promises and its decoder keeps to; None where it does not say.

    Args:
        codec: zstd or blosc, of numcodecs.
        data: the chunk.
    """
    file = io.BytesIO(data[:18])
    return _blosc(file, 0) if _name(codec) == "blosc" else _zstd_header(file.read(18))[0]


def _zstd_header(head: bytes) -> tuple[int | None, int]:
    """The size that a zstd frame's header promises, if it does, and where its first block begins."""
    if len(head) < 6 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None, 0  # not zstd: the decoder will say so
    flags = head[4]
    single = flags >> 5 & 1
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    size = int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)
    return (size if width else None), at + width


def _zstd(file: Bytes, limit: int) -> int:
    """The size of a zstd frame from its header, else a bound from its blocks (RFC 8878, 3.1.1)."""
    size, at = _zstd_header(file.read(18))
    if size is not None or not at:
        return size or 0
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


def _inflated(start: Callable[[], Any]) -> Told:
    """For what tells no size that could be believed: decoded a piece at a time, until it is too much."""

    def told(file: Bytes, limit: int) -> int:
        total, decoder = 0, start()
        while total <= limit:
            rest = b""
            if decoder.eof:  # several members, or streams, may follow each other
                rest, decoder = decoder.unused_data, start()
            if decoder.needs_input:
                rest = rest or file.read(PIECE)
                if not rest:
                    break
            try:
                total += len(decoder.decompress(rest, STEP))
            except (zlib.error, lzma.LZMAError, OSError, EOFError):  # the codec will say so
                break
        return total

    return told


class _Zlib:
    """zlib's decoder with the interface of those of bz2 and lzma."""

    def __init__(self, bits: int) -> None:
        self._decoder = zlib.decompressobj(bits)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, most)


def _lzma(codec: Any) -> Told:
    """With the settings of the codec, which a stream without a header needs."""
    settings: Mapping[str, Any] = getattr(codec, "codec_config", None) or vars(codec)
    how, filters = settings.get("format", lzma.FORMAT_XZ), settings.get("filters")
    return _inflated(lambda: lzma.LZMADecompressor(how, filters=filters))


_TOLD: dict[str, Told] = {
    "blosc": _blosc,
    "blosc2": _blosc,
    "lz4": _lz4,
    "lzf": _lz4,
    "zstd": _zstd,
    "gzip": _inflated(lambda: _Zlib(31)),
    "zlib": _inflated(lambda: _Zlib(15)),
    "zlibng": _inflated(lambda: _Zlib(15)),
    "deflate": _inflated(lambda: _Zlib(15)),
    "bz2": _inflated(bz2.BZ2Decompressor),
}
