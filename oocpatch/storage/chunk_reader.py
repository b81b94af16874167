"""Read and encode plain chunks, which nearly all volumes have.

A chunk is plain when it is a file of its own in a local directory and holds numbers in C order, coded by nothing or by
one codec of numcodecs, which is what zarr-python codes with: so the bytes are the same. zarr-python passes each chunk
from thread to thread; here the thread that needs a chunk reads it, decodes it and puts it in its place, and nearly all
of that needs no interpreter.

```text
    file --read--> bytes --decode--> one chunk's memory --copy--> out, with any strides
    values, with any strides --copy--> one chunk's memory --encode--> bytes, whose CRC is known before they are written
```
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numcodecs  # type: ignore[import-untyped]  # it has no types of its own
import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec
from zarr.storage import LocalStore

from oocpatch.planning.box import Box, Ints, selected, unit_positions
from oocpatch.storage.chunk_guard import ChunkGuard, declared_size, setting
from oocpatch.storage.unit_tags import UnitStamps, settled
from oocpatch.system import open_to_read, read_at

Array = npt.NDArray[Any]
Selection = tuple[slice, ...]


class PlainArray:
    """A Zarr array of plain chunks, for any number of threads at a time.

    Args:
        array: the array.
        guard: what refuses chunks of it that would decode to far more than the metadata says.
        codec: of numcodecs; None: chunks are stored as they are.
        writes: encode chunks, too: decoding works with all settings of a codec, but the same bytes as from zarr-python
            need the same settings.
    """

    def __init__(self, array: zarr.Array[Any], guard: ChunkGuard, codec: Any, *, writes: bool) -> None:
        self._array = array
        self._folder = guard.folder
        self._codec = codec
        self.writes = writes
        self._guard = guard
        self._dtype = np.dtype(array.dtype)
        self._empty = np.asarray(0 if array.fill_value is None else array.fill_value, self._dtype)
        self._bytes = math.prod(array.chunks) * self._dtype.itemsize
        self._memory = threading.local()

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> PlainArray | None:
        """Return the array with its chunks read here; None where they are not plain.

        >>> PlainArray.of(zarr.ones((4,), store={})) is None  # not in a local directory
        True
        """
        dtype = np.dtype(array.dtype)
        if not isinstance(array.store, LocalStore) or array.shards is not None or not dtype.isnative:
            return None
        plain = _codec_of(array)
        if plain is None or dtype.kind not in "buif" or (guard := ChunkGuard.of(array)) is None:
            return None
        codec, writes = plain
        return cls(array, guard, codec, writes=writes and array.fill_value is not None)

    def read_into(self, out: Array, selection: Selection, stamps: UnitStamps | None = None) -> None:
        """Read a selection into an array of its shape, with any strides; raise `ValueError` for damaged chunks.

        The chunks that are read are added to `stamps`.
        """
        box, chunks = selected(selection, self._array.shape), self._array.chunks
        for position in unit_positions(chunks, box.slices()):
            start = tuple(p * n for p, n in zip(position, chunks, strict=True))
            common = Box(start, tuple(a + n for a, n in zip(start, chunks, strict=True))) & box
            chunk = self._chunk(position, stamps)
            out[common.slices(box.start)] = self._empty if chunk is None else chunk[common.slices(start)]

    def _chunk(self, position: Ints, stamps: UnitStamps | None) -> Array | None:
        """Return a chunk, valid until the same thread reads the next one; None where none is stored."""
        key = self._array.metadata.encode_chunk_key(position)
        try:
            # Not to wait for what is no file: the guard refuses it.
            file = open_to_read(self._folder / key)
        except FileNotFoundError:
            if stamps is not None:
                stamps.add(position, None, b"")
            return None
        try:
            status = os.fstat(file) if stamps is None else settled(lambda: os.fstat(file))
            self._guard.check_size(key, status, self._bytes)
            data = self._read(file, status.st_size)
        finally:
            os.close(file)
        if stamps is not None:
            stamps.add(position, status, data)
        self._guard.check_bytes(key, data, self._bytes)
        decoded = self._decoded(key, data)
        if decoded.nbytes != self._bytes:
            raise ValueError(f"chunk {key} of {self._folder} must decode to {self._bytes} bytes, got {decoded.nbytes}")
        return decoded.view(self._dtype).reshape(self._array.chunks)

    def _read(self, file: int, size: int) -> memoryview:
        """Read a file into memory of this thread."""
        data = self._memory_of("file", size)[:size].data
        at = 0
        while at < size and (count := read_at(file, data[at:], at)):
            at += count
        return data[:at]

    def _decoded(self, key: str, data: memoryview) -> npt.NDArray[np.uint8]:
        if self._codec is None:
            return np.frombuffer(data, np.uint8)
        # Decoders do not tell when there was less than fits.
        memory = self._memory_of("chunk", self._bytes) if declared_size(self._codec, data) == self._bytes else None
        try:
            return np.frombuffer(self._codec.decode(data, out=memory), np.uint8)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"chunk {key} of {self._folder} cannot be decoded: {error}") from error

    def _memory_of(self, use: str, size: int) -> npt.NDArray[np.uint8]:
        """Return memory of this thread, which it uses again and again."""
        memory: npt.NDArray[np.uint8] | None = getattr(self._memory, use, None)
        if memory is None or memory.size < size:
            memory = np.empty(size, np.uint8)
            setattr(self._memory, use, memory)
        return memory

    def encoded(self, selection: Selection, values: Array) -> Iterator[tuple[str, bytes | None]]:
        """Yield key and bytes of a selection's whole chunks in C order; no bytes for nothing but the fill value."""
        box = selected(selection, self._array.shape)
        positions = unit_positions(self._array.chunks, selection)
        for position, part in zip(positions, box.split(self._array.chunks), strict=True):
            yield self._array.metadata.encode_chunk_key(position), self._encoded(values[part.slices(box.start)])

    def _encoded(self, values: Array) -> bytes | None:
        if values.shape != self._array.chunks:  # at the border
            whole = np.full(self._array.chunks, self._empty, self._dtype)
            whole[tuple(slice(0, n) for n in values.shape)] = values
            values = whole
        first = values[(0,) * values.ndim]  # looked at before all are
        if (first == self._empty or np.isnan(first)) and NDBuffer.from_numpy_array(values).all_equal(self._empty[()]):
            return None
        if self._codec is None:
            return values.tobytes()
        chunk = self._memory_of("chunk", self._bytes).view(self._dtype).reshape(values.shape)
        chunk[...] = values
        return bytes(self._codec.encode(chunk))


def _codec_of(array: zarr.Array[Any]) -> tuple[Any, bool] | None:
    """Return the codec in numcodecs, and True if it encodes the same; None where chunks are not plain."""
    if array.filters or len(array.compressors) > 1:
        return None
    if array.metadata.zarr_format == 2:
        in_order = array.order == "C"
    else:
        endian = getattr(array.serializer, "endian", None)
        in_order = isinstance(array.serializer, BytesCodec) and setting(endian) in {"", sys.byteorder}
    if not in_order:
        return None
    if not array.compressors:
        return None, True
    codec: Any = array.compressors[0]
    if isinstance(codec, ZstdCodec):
        return numcodecs.Zstd(level=codec.level, checksum=codec.checksum), True
    if isinstance(codec, BloscCodec):
        return numcodecs.Blosc(), False
    return (codec, isinstance(codec, numcodecs.Zstd)) if isinstance(codec, numcodecs.Zstd | numcodecs.Blosc) else None
