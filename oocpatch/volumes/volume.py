"""Volumes: big arrays on disk or in memory, seen lazily as `(C, *axes)` and read box by box.

Whatever the source, a volume has looped axes first, then the spatial axes in their order, and one channel axis before
them (of length 1 when the source has none). Boxes are in the frame of the unpadded volume; reading outside it pads.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.arguments import one_of, per_axis
from oocpatch.planning.box import Box, Ints, worthwhile
from oocpatch.planning.memory import READ_BYTES
from oocpatch.storage.chunk_guard import ChunkGuard
from oocpatch.storage.chunk_reader import PlainArray
from oocpatch.storage.paths import Address
from oocpatch.storage.zarrs_codec import ZarrsArray
from oocpatch.volumes.axes import Axes, resolve_axes
from oocpatch.volumes.sources import Source, open_source

PADDING_MODES = ("constant", "edge", "reflect", "symmetric", "wrap")


class Volume:
    """A lazy volume: reads nothing but metadata until a box is asked for.

    Args:
        source: path or URL of a Zarr array or group or OME-Zarr, `zarr.Array`, `xarray.DataArray`, dask or numpy array,
            or path of a TIFF, slide, NIfTI, HDF5, N5 or precomputed file.
        axes: one name per axis of the source, e.g. `"zyx"`, `"yxc"`, `"tczyx"`; default: dimension names, OME axes,
            else by the number of axes. `c` is the channel, `t` is looped over, all others are spatial.
        level: which level of an OME-Zarr's pyramid, by its number (0: the finest) or its path in the group.

    Raises:
        ValueError: when the source cannot be read as one array, or the axes do not fit.

    >>> volume = Volume(np.arange(24).reshape(4, 6))
    >>> volume
    Volume(y: 4, x: 6; 1 channel(s), int64)
    >>> volume.channels, volume.shape
    (1, (4, 6))
    >>> volume.read(Box((2, 4), (4, 8)), "edge").tolist()
    [[[16, 17, 17, 17], [22, 23, 23, 23]]]
    """

    def __init__(self, source: Any, axes: str | Sequence[str] | None = None, level: int | str = 0) -> None:
        self.source: Source = source if isinstance(source, Source) else open_source(source, level)
        data = self.source
        self.axes: Axes = resolve_axes(axes, data.names, len(data.shape), data.roles)
        self.chunk_reader: PlainArray | ZarrsArray | None = None  # see `with_chunk_reader`
        self._guard = ChunkGuard.of(data.array)
        self.dtype: np.dtype[Any] = np.dtype(data.dtype).newbyteorder("=")
        told = f" for {data.location}" if data.location is not None else ""
        if self.dtype.kind not in "buif":
            raise ValueError(f"the volume must hold booleans, integers or floats, got dtype {data.dtype}{told}")
        if any(n < 1 for n in data.shape):
            raise ValueError(f"the volume must have at least one voxel on every axis, got shape {data.shape}{told}")
        if any(n < 1 for n in data.chunks):
            raise ValueError(f"the volume's chunks must have at least one voxel, got {data.chunks}{told}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {n}" for name, n in zip(self.names, self.shape, strict=True))
        where = f", {self.source.location}" if self.source.location is not None else ""
        return f"Volume({sizes}; {self.channels} channel(s), {self.dtype}{where})"

    @property
    def channels(self) -> int:
        """Number of channels; 1 when the source has no channel axis."""
        return 1 if self.axes.channel is None else self.source.shape[self.axes.channel]

    @property
    def channel_axis(self) -> str | None:
        """Name of the source's channel axis, if it has one."""
        return None if self.axes.channel is None else self.axes.names[self.axes.channel]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of looped and spatial axes."""
        return tuple(self.axes.names[i] for i in self.axes.order)

    @property
    def shape(self) -> Ints:
        """Extent of looped and spatial axes, in voxels."""
        return tuple(self.source.shape[i] for i in self.axes.order)

    @property
    def spatial_ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.axes.spatial)

    @property
    def chunks(self) -> Ints:
        """Chunks along looped and spatial axes, in voxels; ones where the source is in memory."""
        return tuple(self.source.chunks[i] for i in self.axes.order)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk; 0 where the source is in memory."""
        return math.prod(self.source.chunks) * self.dtype.itemsize if self.source.chunked else 0

    @property
    def fingerprint(self) -> str:
        """Digest of what says that two volumes are the same, without reading voxels on disk."""
        return self.source.fingerprint

    def with_chunk_reader(self, threads: int) -> Volume:
        """The same volume, whose boxes are read without zarr-python where that can be.

        Plain chunks are read by the calling thread, others by so many threads of zarrs, which is not for processes that
        fork later.
        """
        found = copy.copy(self)
        if (array := self.source.array) is not None:
            found.chunk_reader = PlainArray.of(array) or ZarrsArray.open(array, threads)
        return found

    def split_reads(self, box: Box, out: npt.NDArray[Any] | None) -> Iterator[Box]:
        """Cut a box at chunk borders into reads into `out`, worth their overhead, that cover it exactly once.

        Without `out`, for reads into buffers of their own, each is of one chunk or at most `READ_BYTES` bytes.
        """
        if isinstance(self.chunk_reader, ZarrsArray) and out is not None and self._readable_target(out) is not None:
            yield box
            return
        step = self.chunks
        if not self.source.chunked and out is not None:
            step = (max(1, -(-box.shape[0] // 4)), *box.shape[1:])
        voxel = self.channels * self.dtype.itemsize
        yield from box.split(worthwhile(step, box.shape, READ_BYTES // (2 * voxel)))

    def read(self, box: Box, padding_mode: str = "edge", fill: float = 0.0) -> npt.NDArray[Any]:
        """Read a box as a new array `(C, *box.shape)` of the volume's dtype."""
        out = np.empty((self.channels, *box.shape), self.dtype)
        self.read_into(out, box, padding_mode, fill)
        return out

    def read_into(self, out: npt.NDArray[Any], box: Box, padding_mode: str = "edge", fill: float = 0.0) -> None:
        """Read a box into `out`, `(C, *box.shape)`; voxels outside the volume are padded as `numpy.pad` would.

        Raises:
            ValueError: for an unknown padding mode.
        """
        if box in Box.of_shape(self.shape):
            target = self._readable_target(out)
            if target is not None and self.chunk_reader is not None:
                if not isinstance(self.chunk_reader, PlainArray):  # which looks for itself
                    self._check(box)
                self.chunk_reader.read_into(target, self._selection(box))
            else:
                out[...] = self._load(box)
            return
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        spans = [list(_spans(a, b, n)) for a, b, n in zip(box.start, box.stop, self.shape, strict=True)]
        for parts in itertools.product(*spans):
            target = out[(slice(None), *(slice(a - o, b - o) for (a, b), o in zip(parts, box.start, strict=True)))]
            outside = [a < 0 or b > n for (a, b), n in zip(parts, self.shape, strict=True)]
            if padding_mode == "constant" and any(outside):
                target[...] = fill
                continue
            indices = [
                _source_index(np.arange(a, b), n, padding_mode) for (a, b), n in zip(parts, self.shape, strict=True)
            ]
            inner = Box(tuple(int(i.min()) for i in indices), tuple(int(i.max()) + 1 for i in indices))
            data = self._load(inner)
            for axis, (index, is_outside) in enumerate(zip(indices, outside, strict=True)):
                if is_outside:
                    data = np.take(data, index - inner.start[axis], axis=axis + 1)
            target[...] = data

    def _selection(self, box: Box) -> tuple[slice, ...]:
        """A box as a selection of the source, all channels."""
        selection: list[slice] = [slice(None)] * len(self.source.shape)
        for position, part in zip(self.axes.order, box.slices(), strict=True):
            selection[position] = part
        return tuple(selection)

    @property
    def _positions(self) -> Ints:
        """Where the axes of `(C, *axes)` lie in the source; without C where it has no channel axis."""
        return (() if self.axes.channel is None else (self.axes.channel,)) + self.axes.order

    def _load(self, box: Box) -> npt.NDArray[Any]:
        """Read a box inside the volume as `(C, *box.shape)`."""
        if isinstance(self.chunk_reader, PlainArray):
            out = np.empty((self.channels, *box.shape), self.dtype)
            self.read_into(out, box)
            return out
        self._check(box)
        data = self.source.load(self._selection(box)).transpose(self._positions)
        return data[None] if self.axes.channel is None else data

    def _check(self, box: Box) -> None:
        """Refuse chunks that would inflate, before they are read."""
        if self._guard is not None:
            self._guard.check(self._selection(box))

    def _readable_target(self, out: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """`out`, `(C, *shape)`, with its axes as the source has them; None where it cannot be read into."""
        if self.chunk_reader is None:
            return None
        target = (out[0] if self.axes.channel is None else out).transpose(np.argsort(self._positions))
        return target if isinstance(self.chunk_reader, PlainArray) or target.flags.c_contiguous else None


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a span into what lies before, in and after the volume."""
    for a, b in ((start, min(stop, 0)), (max(start, 0), min(stop, length)), (max(start, length), stop)):
        if a < b:
            yield a, b


def _source_index(index: npt.NDArray[np.int64], length: int, mode: str) -> npt.NDArray[np.int64]:
    """Where the voxels of one axis come from: indices beyond the border folded into the volume."""
    if mode == "reflect" and length > 1:
        folded = index % (2 * (length - 1))
        return np.minimum(folded, 2 * (length - 1) - folded)
    if mode == "symmetric":
        folded = index % (2 * length)
        return np.minimum(folded, 2 * length - 1 - folded)
    if mode == "wrap":
        return index % length
    return np.clip(index, 0, length - 1)


DEFAULT_CHUNKS = {1: 1 << 18, 2: 512, 3: 64, 4: 32}
CHUNK_BYTES = (1 << 12, 1 << 26)
"""Chunks of an input that are smaller or larger than this are not taken over for the output."""


def default_chunks(volume: Volume, out_itemsize: int) -> Ints:
    """Chunks for an output: the volume's when they are reasonable, else 64^3, 512^2 and the like."""
    chunks = tuple(min(c, n) for c, n in zip(volume.chunks, volume.shape, strict=True))
    size = out_itemsize * int(np.prod(chunks, dtype=object))
    if volume.source.chunked and (
        CHUNK_BYTES[0] <= size <= CHUNK_BYTES[1] or (chunks == volume.shape and size <= CHUNK_BYTES[1])
    ):
        return chunks
    looped = len(volume.shape) - volume.spatial_ndim
    side = DEFAULT_CHUNKS.get(volume.spatial_ndim, 16)
    return tuple(1 if a < looped else min(side, n) for a, n in enumerate(volume.shape))


def spatial_sizes(name: str, value: Any, volume: Volume, *, least: int = 0) -> Ints:
    """One size per spatial axis, in voxels; an `int` counts for all of them, a dict gives them by the axes' names.

    Raises:
        TypeError: when it is neither an `int` nor a sequence or dict of them.
        ValueError: for a wrong number of sizes, other names than the axes', or a size that is too small.
    """
    return per_axis(name, value, volume.names[-volume.spatial_ndim :], least=least)


def checked_padding_mode(value: str | None) -> str | None:
    """A checked `padding_mode`."""
    return one_of("padding_mode", value, PADDING_MODES)


def refuse_overlap(name: str, path: Address, volume: Volume) -> None:
    """Refuse a place to write that is, holds or lies in the volume.

    Raises:
        ValueError: in that case.
    """
    location, target = volume.source.location, path.resolve() if isinstance(path, Path) else path
    if location is None:
        return
    if location == target or target in location.parents or location in target.parents:
        raise ValueError(f"{name} must not be, hold or lie in the volume, got {path} for the volume at {location}")


def spatial_box(name: str, value: Any, volume: Volume) -> Box:
    """A checked box, one span per spatial axis, over all indices of looped axes.

    Raises:
        ValueError: when it is no box within the volume.
    """
    looped = len(volume.shape) - volume.spatial_ndim
    names, shape = volume.names[looped:], volume.shape[looped:]
    spans = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(spans) != len(shape):
        raise ValueError(
            f"{name} must be a pair (start, stop) or a slice per spatial axis ({', '.join(names)}), got {value!r}"
        )
    found = []
    for span, n in zip(spans, shape, strict=True):
        try:
            start, stop = (span.start, span.stop) if isinstance(span, slice) and span.step in {None, 1} else span
            start, stop = operator.index(0 if start is None else start), operator.index(n if stop is None else stop)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a pair (start, stop) or a slice per spatial axis, got {span!r}") from None
        if not 0 <= start < stop <= n:
            raise ValueError(f"{name} must lie within the volume and hold a voxel, got {start}:{stop} for {n} voxels")
        found.append((start, stop))
    whole = [(0, n) for n in volume.shape[:looped]]
    return Box(*zip(*whole, *found, strict=True))
