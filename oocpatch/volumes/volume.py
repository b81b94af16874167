"""Volumes: large arrays on disk or in memory as lazy arrays `(C, *axes)`, read box by box.

The axes of a volume are one channel axis (of length 1 if the source has none), the looped axes and the spatial axes in
their order. Boxes are in the frame of the unpadded volume; reading outside it pads.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.arguments import one_of, per_axis
from oocpatch.planning.box import Box, Ints, selected, unravel, worthwhile
from oocpatch.planning.choices import FOLDED_PADDING
from oocpatch.planning.memory import READ_BYTES
from oocpatch.storage.chunk_guard import ChunkGuard
from oocpatch.storage.chunk_reader import PlainArray
from oocpatch.storage.paths import StoragePath
from oocpatch.storage.unit_tags import TagReader, Tags, UnitStamps, WholeFiles
from oocpatch.storage.zarrs_codec import ZarrsArray
from oocpatch.volumes.affine import Affine, affine_of
from oocpatch.volumes.axes import Axes, resolve_axes
from oocpatch.volumes.sources import Source, open_source

NO_TAGS: Tags = np.empty(0, np.uint64)


class Volume:
    """A lazy volume: only metadata are read until a box is.

    Args:
        source: path or URL of a Zarr array or group or OME-Zarr, `zarr.Array`, `xarray.DataArray`, dask or numpy array,
            `torch.Tensor`, or path of a TIFF, slide, NIfTI, HDF5, CZI, ND2, LIF, IMS, N5 or precomputed file, or of a
            directory of DICOM.
        axes: one name per axis of the source, e.g. `"zyx"`, `"yxc"`, `"tczyx"`; default: dimension names, OME axes,
            else by the number of axes. `c` is the channel, `t` is looped over, all others are spatial.
        level: level of an OME-Zarr's pyramid by its number (0: the finest) or its path in the group.

    Raises:
        ValueError: if the source cannot be read as one array, or the axes do not fit.

    >>> volume = Volume(np.arange(24).reshape(4, 6))
    >>> volume
    Volume(y: 4, x: 6; 1 channel(s), int64)
    >>> volume.channels, volume.shape
    (1, (4, 6))
    >>> volume.read(Box((2, 4), (4, 8)), "edge").tolist()
    [[[16, 17, 17, 17], [22, 23, 23, 23]]]
    """

    def __init__(self, source: Any, axes: str | Sequence[str] | Axes | None = None, level: int | str = 0) -> None:
        self.source: Source = source if isinstance(source, Source) else open_source(source, level)
        if not isinstance(axes, Axes):
            self.source = _renamed(self.source, axes)
            axes = resolve_axes(axes, self.source.names, len(self.source.shape), self.source.roles)
        data = self.source
        self.axes: Axes = axes
        self.chunk_reader: PlainArray | ZarrsArray | None = None  # see `for_run`
        self._tag_reader: TagReader | None = None
        self._guard = ChunkGuard.of(data.array)
        self.dtype: np.dtype[Any] = np.dtype(data.dtype).newbyteorder("=")
        place = f" for {data.location}" if data.location is not None else ""
        if self.dtype.kind not in "buif" or self.dtype.itemsize > 8:
            raise ValueError(
                f"the volume must hold booleans, integers or floats of at most 64 bits, got dtype {data.dtype}{place}"
            )
        if any(n < 1 for n in data.shape):
            raise ValueError(f"the volume must have at least one voxel on every axis, got shape {data.shape}{place}")
        if any(n < 1 for n in data.chunks):
            raise ValueError(f"the volume's chunks must have at least one voxel, got {data.chunks}{place}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {n}" for name, n in zip(self.names, self.shape, strict=True))
        place = f", {self.source.location}" if self.source.location is not None else ""
        return f"Volume({sizes}; {self.channels} channel(s), {self.dtype}{place})"

    @property
    def channels(self) -> int:
        """Number of channels; 1 if the source has no channel axis."""
        return 1 if self.axes.channel is None else self.source.shape[self.axes.channel]

    @property
    def channel_axis(self) -> str | None:
        """Name of the source's channel axis, if it has one."""
        return None if self.axes.channel is None else self.axes.names[self.axes.channel]

    @property
    def channel_position(self) -> int:
        """Number of looped axes before the channel axis of outputs: as in the source; all if that has no channels."""
        channel = self.axes.channel
        return sum(channel is None or a < channel for a in self.axes.looped)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of looped and spatial axes."""
        return tuple(self.axes.names[i] for i in self.axes.order)

    @property
    def shape(self) -> Ints:
        """Extent of looped and spatial axes, in voxels."""
        return tuple(self.source.shape[i] for i in self.axes.order)

    @property
    def affine(self) -> Affine:
        """Matrix from indices of voxels along the spatial axes to the world, see `volumes.affine`."""
        return affine_of(self.source, self.axes)

    @property
    def spatial_ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.axes.spatial)

    @property
    def chunks(self) -> Ints:
        """Chunks along looped and spatial axes, in voxels; ones if the source is in memory."""
        return tuple(self.source.chunks[i] for i in self.axes.order)

    @property
    def shards(self) -> Ints | None:
        """Shards along looped and spatial axes, in voxels; None if the source has none."""
        shards = None if self.source.array is None else self.source.array.shards
        return None if shards is None else tuple(shards[i] for i in self.axes.order)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk, or of what it is computed from; 0 if the source is in memory."""
        size = math.prod(self.source.chunks) * self.dtype.itemsize if self.source.chunked else 0
        return max(size, self.source.read_bytes)

    @property
    def fingerprint(self) -> str:
        """Digest of the volume's content, by the tags of its files or objects; of one in memory, by its values."""
        return self.source.fingerprint

    @property
    def signature(self) -> str:
        """Shape, dtype and packing as a text: volumes of one signature and the same axes differ in content alone."""
        packing = f" {dict(self.source.packing)}" if self.source.packing else ""
        return f"{self.dtype} {'x'.join(map(str, self.source.shape))}{packing}"

    def for_run(self, threads: int = 0) -> Volume:
        """Return the same volume for one run: with the tags of its units, and its file opened anew.

        With `threads`, boxes are read without zarr-python if possible: plain chunks by the calling thread, others by so
        many threads of zarrs. A process with threads of zarrs must not fork.
        """
        volume = copy.copy(self)
        volume.source = source = self.source.reopened(threads)
        volume._tag_reader = None if source.units is None else source.units.reader()  # noqa: SLF001 - its own
        if threads and source.array is not None and not source.packing:
            volume.chunk_reader = PlainArray.of(source.array) or ZarrsArray.open(source.array, threads)
        return volume

    def split_reads(self, box: Box, out: npt.NDArray[Any] | None) -> Iterator[tuple[Box, list[Box]]]:
        """Cut a box at chunk borders into reads large enough to be worth their overhead; they cover it exactly once.

        Each comes with its parts that are stamped, see `volumes.content`: the same ones however a volume is read.
        Without an array `out` to read into, each read has its own buffer, and is one chunk or at most `READ_BYTES`.
        """
        step = self.chunks if self.source.chunked else chunks_in_memory(self.source, self.axes.order)
        voxels = READ_BYTES // (2 * self.channels * self.dtype.itemsize)
        parts = box.split(worthwhile(step, box.shape, voxels))
        if isinstance(self.chunk_reader, ZarrsArray) and out is not None and self._target(out) is not None:
            yield box, list(parts)
            return
        yield from ((part, [part]) for part in parts)

    def unit_stamps(self, box: Box, padding_mode: str) -> UnitStamps | None:
        """Return stamps, still empty, of the stored units that reading a box meets; None where they are not seen.

        They are seen by a chunk reader that reads their bytes.
        """
        array, units = self.source.array, self.source.units
        if array is None or units is None or not isinstance(self.chunk_reader, PlainArray):
            return None
        return UnitStamps(array, self._units(box, padding_mode))

    def tags(self, box: Box, padding_mode: str = "edge") -> Tags:
        """Return the tags of the stored units that reading a box meets; none where the source has no units.

        They are there in a volume that is open for a run.
        """
        units = self.source.units
        if self._tag_reader is None or units is None:
            return NO_TAGS
        return self._tag_reader(self._unit_box(box, padding_mode))

    def unit_indices(self, box: Box, padding_mode: str = "edge") -> npt.NDArray[np.int64]:
        """Return the numbers of the stored units that `tags` has, in its order."""
        if self.source.units is None:
            return np.empty(0, np.int64)
        box = self._units(box, padding_mode)
        grid = np.meshgrid(*(range(a, b) for a, b in zip(box.start, box.stop, strict=True)), indexing="ij")
        return np.ravel_multi_index(grid, self.unit_counts).reshape(-1)

    def box_of_unit(self, number: int) -> Box:
        """Return the box of the stored unit of a number."""
        unit = self.source.shape if self.source.units is None else self.source.units.unit
        start = [p * n for p, n in zip(unravel(number, self.unit_counts), unit, strict=True)]
        return Box(tuple(start[a] for a in self.axes.order), tuple(start[a] + unit[a] for a in self.axes.order))

    @property
    def unit_counts(self) -> Ints:
        """Number of stored units along each axis of the source."""
        units = self.source.units
        return () if units is None else tuple(-(-n // u) for n, u in zip(self.source.shape, units.unit, strict=True))

    def _units(self, box: Box, padding_mode: str) -> Box:
        """Return the positions of the stored units that reading a box meets."""
        whole, units = self._unit_box(box, padding_mode), self.source.units
        unit = whole.shape if units is None else units.unit
        start = tuple(a // n for a, n in zip(whole.start, unit, strict=True))
        return Box(start, tuple(-(-b // n) for b, n in zip(whole.stop, unit, strict=True)))

    def _unit_box(self, box: Box, padding_mode: str) -> Box:
        """Return the box of the source that reading a box meets, with all channels."""
        start, stop = [0] * len(self.source.shape), list(self.source.shape)
        for position, a, b, n in zip(self.axes.order, box.start, box.stop, self.shape, strict=True):
            index = (a, b - 1) if a >= 0 and b <= n else _source_index(np.arange(a, b), n, padding_mode)
            start[position], stop[position] = int(min(index)), int(max(index)) + 1
        return Box(tuple(start), tuple(stop))

    def read(self, box: Box, padding_mode: str = "edge", fill: float = 0.0) -> npt.NDArray[Any]:
        """Read a box as a new array `(C, *box.shape)` of the volume's dtype."""
        out = np.empty((self.channels, *box.shape), self.dtype)
        self.read_into(out, box, padding_mode, fill)
        return out

    def read_into(
        self,
        out: npt.NDArray[Any],
        box: Box,
        padding_mode: str = "edge",
        fill: float = 0.0,
        stamps: UnitStamps | None = None,
    ) -> None:
        """Read a box into `out`, `(C, *box.shape)`; voxels outside the volume are padded as by `numpy.pad`.

        Chunks that are read are added to `stamps`, of `unit_stamps`.

        Raises:
            ValueError: for an unknown padding mode.
        """
        if box in Box.of_shape(self.shape):
            selection, target = self._selection(box), self._target(out)
            if self._guard is not None and not isinstance(self.chunk_reader, PlainArray):  # which checks sizes itself
                self._guard.check(selection)
            if target is not None and isinstance(self.chunk_reader, PlainArray):
                self.chunk_reader.read_into(target, selection, stamps)
            elif target is not None and self.chunk_reader is not None:
                self.chunk_reader.read_into(target, selection)
            else:
                out[...] = self.source.load(selection).transpose(self._positions)
            return
        one_of("padding_mode", padding_mode, ("constant", *FOLDED_PADDING))
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
            if not any(outside):
                self.read_into(target, inner, stamps=stamps)
                continue
            data = np.empty((self.channels, *inner.shape), self.dtype)
            self.read_into(data, inner, stamps=stamps)
            for axis, (index, is_outside) in enumerate(zip(indices, outside, strict=True)):
                if is_outside:
                    data = np.take(data, index - inner.start[axis], axis=axis + 1)
            target[...] = data

    def _selection(self, box: Box) -> tuple[slice, ...]:
        """Return a box as a selection of the source, with all channels."""
        selection: list[slice] = [slice(None)] * len(self.source.shape)
        for position, part in zip(self.axes.order, box.slices(), strict=True):
            selection[position] = part
        return tuple(selection)

    @property
    def _positions(self) -> Ints:
        """Positions in the source of the axes of `(C, *axes)`, without C if the source has no channel axis."""
        return (() if self.axes.channel is None else (self.axes.channel,)) + self.axes.order

    def _target(self, out: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """Return `out`, `(C, *shape)`, in the axis order of the source; None if the chunk reader cannot fill it."""
        if self.chunk_reader is None:
            return None
        target = (out[0] if self.axes.channel is None else out).transpose(np.argsort(self._positions))
        return target if isinstance(self.chunk_reader, PlainArray) or target.flags.c_contiguous else None


def read_selection(
    axes: Axes,
    shape: Ints,
    channels: int,
    selection: tuple[slice, ...],
    read: Callable[[Box], npt.NDArray[Any]],
) -> npt.NDArray[Any]:
    """Read a selection of an array that is computed box by box.

    Args:
        axes: the axes of the array.
        shape: its extent along looped and spatial axes, in the order of boxes.
        channels: number of channels.
        selection: one slice per axis of the array.
        read: computes a box, `(C, *box.shape)`.
    """
    box = selected(tuple(selection[a] for a in axes.order), shape)
    values = read(box)
    if axes.channel is None:
        return np.transpose(values[0], np.argsort(axes.order))
    whole = slice(*selection[axes.channel].indices(channels))
    return np.transpose(values[whole], np.argsort((axes.channel, *axes.order)))


def _renamed(source: Source, axes: str | Sequence[str] | None) -> Source:
    """Return a source whose file has other names of axes than the user gave with the names that were given.

    Axes that had other names lose their coordinates, which would be those of another axis, and an affine whose columns
    are those of other axes is dropped.
    """
    names = None if axes is None else tuple(str(n) for n in axes)
    is_file = source.array is None and source.names is not None and isinstance(source.units, WholeFiles)
    if names is None or not is_file or len(names) != len(source.shape) or names == source.names:
        return source
    same = {name for name, own in zip(names, source.names or (), strict=True) if name == own}
    attrs = {k: v for k, v in source.attrs.items() if k != "affine" or same >= set("xyz") & set(names)}
    coords = {k: v for k, v in source.coords.items() if k in same}
    return replace(source, names=names, coords=coords, attrs=attrs, roles=None)


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a span into the parts before, in and after the volume."""
    for a, b in ((start, min(stop, 0)), (max(start, 0), min(stop, length)), (max(start, length), stop)):
        if a < b:
            yield a, b


def _source_index(index: npt.NDArray[np.int64], length: int, mode: str) -> npt.NDArray[np.int64]:
    """Fold the indices of one axis that lie beyond its ends into the volume."""
    if mode == "reflect" and length > 1:
        folded = index % (2 * (length - 1))
        return np.minimum(folded, 2 * (length - 1) - folded)
    if mode == "symmetric":
        folded = index % (2 * length)
        return np.minimum(folded, 2 * length - 1 - folded)
    if mode == "wrap":
        return index % length
    return np.clip(index, 0, length - 1)


COPIED = 1 << 18
"""Bytes of a chunk of a volume in memory, as it is stamped and as it is stored for workers."""


def chunks_in_memory(source: Source, axes: Sequence[int] | None = None) -> Ints:
    """Return chunks for a source in memory, which has none; along some axes, or all of them."""
    side = max(1, int((COPIED / source.dtype.itemsize) ** (1 / len(source.shape))))
    return tuple(min(side, source.shape[a]) for a in (range(len(source.shape)) if axes is None else axes))


DEFAULT_CHUNKS = {1: 1 << 18, 2: 512, 3: 64, 4: 32}
CHUNK_BYTES = (1 << 12, 1 << 26)
"""Bytes between which the chunks of an input are used for the output."""


def default_chunks(volume: Volume, out_itemsize: int, *, small: bool = False) -> Ints:
    """Return chunks for an output: those of the volume if their size is reasonable, else 64^3, 512^2 and the like.

    With `small`, small chunks are: they lie in shards.
    """
    chunks = tuple(min(c, n) for c, n in zip(volume.chunks, volume.shape, strict=True))
    size = out_itemsize * int(np.prod(chunks, dtype=object))
    if volume.source.chunked and size <= CHUNK_BYTES[1] and (small or size >= CHUNK_BYTES[0] or chunks == volume.shape):
        return chunks
    looped = len(volume.shape) - volume.spatial_ndim
    side = DEFAULT_CHUNKS.get(volume.spatial_ndim, 16)
    return tuple(1 if a < looped else min(side, n) for a, n in enumerate(volume.shape))


def spatial_sizes(name: str, value: Any, volume: Volume, *, least: int = 0) -> Ints:
    """Return one size per spatial axis, in voxels, from an `int` for all axes, a sequence, or a dict by axis name.

    Raises:
        TypeError: if `value` is not an `int`, nor a sequence or dict of them.
        ValueError: for a wrong number of sizes, names other than those of the axes, or a size below `least`.
    """
    return per_axis(name, value, volume.names[-volume.spatial_ndim :], least=least)


def refuse_overlap(name: str, path: StoragePath, volume: Volume) -> None:
    """Refuse to write to the input volume, to a parent of it, or inside it.

    Raises:
        ValueError: in that case.
    """
    location, target = volume.source.location, path.resolve()
    if location is not None and (location == target or target in location.parents or location in target.parents):
        raise ValueError(
            f"{name} must not be the input volume, contain it, or be inside it, got {path} for the volume at {location}"
        )


def spatial_box(name: str, value: Any, volume: Volume) -> Box:
    """Return a box from one span per spatial axis; it covers all indices of looped axes.

    Raises:
        ValueError: if the box is not within the volume.
    """
    looped = len(volume.shape) - volume.spatial_ndim
    names, shape = volume.names[looped:], volume.shape[looped:]
    spans = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(spans) != len(shape):
        raise ValueError(
            f"{name} must be a pair (start, stop) or a slice per spatial axis ({', '.join(names)}), got {value!r}"
        )
    checked = []
    for span, n in zip(spans, shape, strict=True):
        try:
            start, stop = (span.start, span.stop) if isinstance(span, slice) and span.step in {None, 1} else span
            start, stop = operator.index(0 if start is None else start), operator.index(n if stop is None else stop)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a pair (start, stop) or a slice per spatial axis, got {span!r}") from None
        if not 0 <= start < stop <= n:
            raise ValueError(f"{name} must be within the volume and not empty, got {start}:{stop} for {n} voxels")
        checked.append((start, stop))
    whole = [(0, n) for n in volume.shape[:looped]]
    return Box(*zip(*whole, *checked, strict=True))
