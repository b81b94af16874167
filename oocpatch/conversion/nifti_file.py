"""NIfTI files: the header by nibabel, voxels streamed with `x` fastest and channels slowest, `.nii.gz` in parallel.

NIfTI-1, or NIfTI-2 where an axis is longer than 32767. The gzip stream has one member, so that every reader reads it;
its blocks are compressed on their own, and do not depend on the number of threads.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oocpatch.conversion.file_order import THREADS, FileOrder, ahead, in_order, write_at
from oocpatch.conversion.geometry import SECONDS, affine_of, factor_of, spatial_axes, time_spacing
from oocpatch.volumes.formats.nifti import CHANNELS
from oocpatch.volumes.ome_metadata import METERS
from oocpatch.volumes.volume import Volume

BLOCK = 1 << 18
"""Bytes that are compressed at a time."""

COMPRESSION = 4

LONGEST = 32767
"""Longest axis of NIfTI-1."""

SPACE_UNITS = {"meter": "meter", "millimeter": "mm", "micrometer": "micron"}
TIME_UNITS = {"second": "sec", "millisecond": "msec", "microsecond": "usec"}


class NiftiWriter:
    """Writes a volume to a NIfTI file.

    Args:
        volume: the volume.
        labels: whether its values are labels.
        mark: text for the header's description.
        limit: bytes of memory.
        is_packed: whether to write `.nii.gz`.
    """

    def __init__(self, volume: Volume, *, labels: bool, mark: str, limit: int, is_packed: bool) -> None:
        axes = spatial_axes(volume)
        time = [volume.axes.names[a] for a in volume.axes.looped]
        channel = [] if volume.channel_axis is None else [volume.channel_axis]
        fast_first = [*axes.values(), *time, *channel]
        self._dtype = stored_dtype(volume.dtype)
        self._is_packed = is_packed
        coding = (2 * ahead(THREADS) + 4 + 2 * THREADS) * BLOCK  # two are as large as the state of a packer
        self.order = FileOrder.plan(volume, fast_first[::-1], 2, limit, coding=coding)
        header = self._header(volume, len(axes), labels=labels)
        if channel and not time:
            header["intent_name"] = CHANNELS.encode()
        header["descrip"] = mark.encode()
        self._start = header.binaryblock + b"\0\0\0\0"  # no extensions

    def write(self, path: Path, advance: Callable[[int], None]) -> None:
        """Write the file."""
        with path.open("wb") as file:
            if not self._is_packed:
                file.write(self._start)
                file.flush()
                row = self._dtype.itemsize * self.order.plane[1]
                for piece in self.order.strips():
                    for number, values in enumerate(piece.values, piece.plane):
                        at = len(self._start) + (number * self.order.plane[0] + piece.row) * row
                        for rows in _runs(values[np.newaxis], BLOCK):
                            write_at(file.fileno(), self._cast(rows), at)
                            at += rows.size * self._dtype.itemsize
                    advance(piece.values.size)
                return
            crc = size = 0

            def blocks() -> Iterator[bytes]:
                nonlocal crc, size
                for block in self._blocks(path.parent, advance):
                    crc, size = zlib.crc32(block, crc), size + len(block)
                    yield block

            file.write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")  # no name, no time, any system
            for packed in in_order(_deflated, blocks(), self.order.threads):
                file.write(packed)
            file.write(b"\x03\0" + struct.pack("<II", crc, size % (1 << 32)))  # an empty last block

    def _blocks(self, folder: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
        """Yield the bytes of the file in blocks of one size."""
        block = bytearray(self._start)
        for piece in self.order.pieces(folder):
            for rows in _runs(piece.values, BLOCK):
                view = memoryview(self._cast(rows)).cast("B")
                while view:
                    taken = min(len(view), BLOCK - len(block))
                    block += view[:taken]
                    view = view[taken:]
                    if len(block) == BLOCK:
                        yield bytes(block)
                        block.clear()
            advance(piece.values.size)
        if block:
            yield bytes(block)

    def _cast(self, values: Any) -> Any:
        return np.ascontiguousarray(values, self._dtype)

    def _header(self, volume: Volume, space: int, *, labels: bool) -> Any:
        """Return the header of a volume with so many spatial axes."""
        import nibabel  # noqa: PLC0415 - an extra

        sizes = self.order.volume.shape[::-1]
        shape, others = sizes[:space], sizes[space:]
        if others:
            shape = (*shape, *(1,) * (3 - space), *others)
        kind: Any = nibabel.Nifti1Header if max(shape) <= LONGEST else nibabel.Nifti2Header
        header = kind(endianness="<")
        header.set_data_dtype(self._dtype)
        header.set_data_shape(shape)
        affine, unit = affine_of(volume)
        stored = unit if unit in SPACE_UNITS else _nearest_unit(unit)
        affine[:3] *= factor_of(unit, stored)
        header.set_sform(affine, code="scanner")
        header.set_qform(affine, code="unknown")  # the voxel sizes, too
        if np.allclose(header.get_qform(), affine, rtol=1e-5, atol=1e-6 * np.abs(affine[:3, :3]).max()):
            header.set_qform(affine, code="scanner")
        frames = time_spacing(volume)
        second = None
        if frames is not None:
            second = frames.unit if frames.unit in TIME_UNITS or frames.unit not in SECONDS else "second"
            header["pixdim"][4] = abs(frames.step or 1.0) * factor_of(frames.unit, second)
            header["toffset"] = frames.start * factor_of(frames.unit, second)
        header.set_xyzt_units(SPACE_UNITS.get(stored or ""), TIME_UNITS.get(second or ""))
        if labels:
            header.set_intent("label")
        header.set_slope_inter(1, 0)
        header.set_data_offset(len(header.binaryblock) + 4)
        return header


def description_of(path: Path) -> str:
    """Return the description in the header of a NIfTI."""
    import nibabel  # noqa: PLC0415 - an extra

    image: Any = nibabel.load(path)
    return bytes(image.header["descrip"].item()).decode()


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in a NIfTI: the same, or one with all its values.

    >>> stored_dtype(np.dtype(bool)).name, stored_dtype(np.dtype("float16")).name, stored_dtype(np.dtype("int64")).name
    ('uint8', 'float32', 'int64')
    """
    return np.dtype({"bool": "uint8", "float16": "float32"}.get(dtype.name, dtype)).newbyteorder("<")


def _nearest_unit(unit: str | None) -> str | None:
    """Return the unit of a NIfTI for another unit of length.

    >>> _nearest_unit("nanometer"), _nearest_unit("centimeter"), _nearest_unit("degree")
    ('micrometer', 'millimeter', None)
    """
    if unit not in METERS:
        return None
    return min(SPACE_UNITS, key=lambda known: (abs(METERS[known] - METERS[unit]), METERS[known]))


def _runs(values: Any, size: int) -> Iterator[Any]:
    """Cut planes into runs of about so many bytes, in their order."""
    plane = values.nbytes // len(values)
    if plane <= size:
        step = max(1, size // plane)
        yield from (values[start : start + step] for start in range(0, len(values), step))
        return
    step = max(1, size * values.shape[1] // plane)
    for rows in values:
        yield from (rows[start : start + step] for start in range(0, len(rows), step))


def _deflated(block: bytes) -> bytes:
    """Return a block of a deflate stream that ends at a byte, and is not the last."""
    packer = zlib.compressobj(COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(block) + packer.flush(zlib.Z_SYNC_FLUSH)
