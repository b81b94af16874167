"""Converting: any volume that can be read, streamed into a chunked Zarr v3 within a memory limit.

```text
 volume --boxes of whole write units--> buffers, one per thread --> OUT.partial --rename--> OUT
```

What is not finished has another name, so that it never looks complete. The same call after an interruption starts anew.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray
import zarr
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch import door
from oocpatch.errors import OutputExists, PlanTooLarge
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.plan import human
from oocpatch.storage.coordinates import plain_attributes, write_coords
from oocpatch.storage.lock import locked
from oocpatch.storage.volume import REQUEST, Volume, default_chunks
from oocpatch.telling import telling

NAME = "volume"
"""Of the array in the group that is written."""

MARK = "oocpatch_convert"
"""Attribute of the group: what it was made of."""

FEW = 4
"""So many channels, such as those of a picture, share a chunk."""

COPIES = 3
"""Copies of a chunk that coding it takes at most, the encoded one included."""

THREADS = 4


@dataclass(frozen=True, slots=True)
class Stream:
    """How a volume is cut into boxes.

    Attributes:
        box: what a thread reads and writes at a time, in voxels; whole write units.
        threads: how many do so.
        memory: bytes that they take together.
    """

    box: Ints
    threads: int
    memory: int


def convert(
    volume: Any,
    output: str | os.PathLike[str],
    *,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    chunks: int | Sequence[int] | None = None,
    shards: int | Sequence[int] | None = None,
    max_memory: int | float | str = "auto",
    progress: str | bool = "auto",
) -> xarray.DataArray:
    """Stream a volume of any format into a Zarr v3 group, within a memory limit.

    Axes, coordinates and attributes are kept; the order of axes is that of `predict`'s outputs: the channel first, then
    looped axes, then the spatial ones in their order. An interrupted call leaves nothing at `output`.

    Args:
        volume: whatever `predict` takes.
        output: directory to write; must not exist.
        axes: names of the volume's axes, e.g. `"zyx"`.
        level: of the pyramid of a slide, a TIFF or an OME-Zarr; 0 is the largest.
        chunks: spatial chunks, in voxels; default: those of the volume, if reasonable.
        shards: spatial shards, in voxels; multiples of the chunks.
        max_memory: bytes that the conversion may add to this process; `"auto"`: a quarter of the machine's.
        progress: as for `predict`.

    Returns:
        The new volume, lazy, `([C,] *axes)`.

    Raises:
        ValueError, TypeError: for bad arguments.
        OutputExists: when there is something at `output`.
        OutputBusy: when another call is at work on it.
        PlanTooLarge: when not even one write unit fits the memory limit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = convert(np.arange(24).reshape(4, 6), f"{folder}/out.zarr", chunks=2)
    ...     print(made.dims, made.values.tolist()[1])
    ('y', 'x') [6, 7, 8, 9, 10, 11]
    """
    target = door.local_path("output", output)
    data = Volume(volume, axes, level)
    door.apart("output", target, data)
    door.writable("output", target)
    if target.exists():
        raise OutputExists(f"output must be a new path, but {target} exists; choose another, or delete it first")
    looped = len(data.shape) - data.spatial_ndim
    chunk = default_chunks(data, data.dtype.itemsize)
    if chunks is not None:
        chunk = door.clipped((*(1,) * looped, *door.sizes("chunks", chunks, data, least=1)), data.shape)
    shard = None if shards is None else (*(1,) * looped, *door.sizes("shards", shards, data, least=1))
    unit = door.write_unit(chunk, shard, data.shape)
    stream = plan_stream(data, unit, door.memory_limit(max_memory))
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.partial.lock"), str(target)):
        if partial.exists():
            _remove_left(partial)
        array = _create(partial, data, chunk, unit, str(volume) if isinstance(volume, (str, os.PathLike)) else None)
        voxel = data.channels * data.dtype.itemsize
        with telling(progress, "convert", "voxels", math.prod(data.shape), bytes_each=voxel) as tell:
            _stream(data, array, stream, unit, tell)
        with warnings.catch_warnings():
            # Zarr v3 has no specification of consolidated metadata yet; xarray warns when there is none.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            zarr.consolidate_metadata(LocalStore(partial))
        partial.rename(target)
    made: xarray.DataArray = xarray.open_zarr(target)[NAME]
    return made


def plan_stream(volume: Volume, unit: Ints, limit: int) -> Stream:
    """Boxes of whole write units that fit the limit, and of which few share a chunk of the volume.

    Raises:
        PlanTooLarge: when not even one write unit fits.

    >>> planes = Volume(zarr.zeros((100, 128, 128), chunks=(1, 128, 128), dtype="uint8", store={}))
    >>> plan_stream(planes, (32, 32, 32), 40_000_000).box
    (32, 128, 128)
    """

    def needed(box: Ints) -> int:
        voxel = volume.channels * volume.dtype.itemsize
        read = max(COPIES * volume.chunk_bytes, 2 * REQUEST if volume.source.chunked else REQUEST)
        return math.prod(box) * voxel + read + COPIES * math.prod(unit) * voxel

    if needed(unit) > limit:
        raise PlanTooLarge(
            f"one write unit of {unit} voxels needs {human(needed(unit))} (chunks of the volume included, "
            f"{volume.chunks} voxels each) but max_memory is {human(limit)}; raise max_memory or lower chunks"
        )
    units = math.prod(-(-n // u) for n, u in zip(volume.shape, unit, strict=True))
    threads = max(1, min(THREADS, os.cpu_count() or 1, units, limit // needed(unit)))
    box = unit
    while grown := [b for b in _grown(box, unit, volume.shape) if threads * needed(b) <= limit]:
        best = min(grown, key=lambda b: _decoded(volume, b))
        if _decoded(volume, best) >= _decoded(volume, box):
            break
        box = best
    return Stream(box, threads, threads * needed(box))


def _grown(box: Ints, unit: Ints, shape: Ints) -> Iterator[Ints]:
    """The box, longer on one axis."""
    for axis, (b, u, n) in enumerate(zip(box, unit, shape, strict=True)):
        if b < n:
            longer = min(2 * b, -(-n // u) * u)
            yield (*box[:axis], longer, *box[axis + 1 :])


def _decoded(volume: Volume, box: Ints) -> float:
    """How often a voxel is decoded, when the volume is read in such boxes; chunks at borders are shared."""
    times = 1.0
    for b, c, n in zip(box, volume.chunks, volume.shape, strict=True):
        starts = range(0, n, b) if n // b < 64 else range(0, 64 * b, b)
        read = sum(min(n, -(-min(s + b, n) // c) * c) - s // c * c for s in starts)
        times *= read / sum(min(s + b, n) - s for s in starts)
    return times


def _create(path: Path, volume: Volume, chunk: Ints, unit: Ints, address: str | None) -> zarr.Array[Any]:
    attributes = {MARK: {"source": address, "identity": volume.identity}}
    store = LocalStore(path)
    zarr.create_group(store, attributes=attributes, overwrite=False)
    channel = () if volume.channel_axis is None else (volume.channel_axis,)
    channels = () if volume.channel_axis is None else (volume.channels,)
    together = tuple(n if n <= FEW else 1 for n in channels)
    names = {*channel, *volume.names} - {NAME}
    sizes = dict(zip((*channel, *volume.names), (*channels, *volume.shape), strict=True))
    coords = {
        name: variable
        for name, variable in volume.source.coords.items()
        if name != NAME
        and set(map(str, variable.dims)) <= names
        and all(sizes[str(d)] == n for d, n in variable.sizes.items())
    }  # fmt: skip
    for variable in coords.values():
        variable.encoding = {}
    write_coords(path, coords, attributes)
    return zarr.create_array(
        store,
        name=NAME,
        shape=(*channels, *volume.shape),
        chunks=(*together, *chunk),
        shards=(*together, *unit) if unit != chunk else None,
        dtype=volume.dtype,
        dimension_names=(*channel, *volume.names),
        attributes=plain_attributes(volume),
    )


def _stream(volume: Volume, array: zarr.Array[Any], stream: Stream, unit: Ints, tell: Callable[[int], None]) -> None:
    """Read and write all boxes, each by one thread: nobody writes another's write unit."""
    boxes, turn, stop = Box.of_shape(volume.shape).split(stream.box), threading.Lock(), threading.Event()
    voxels = math.prod(min(b, n) for b, n in zip(stream.box, volume.shape, strict=True)) * volume.channels

    def work() -> None:
        # One mapping per thread, used again: a heap would keep what it gave before.
        room = np.frombuffer(mmap.mmap(-1, voxels * volume.dtype.itemsize), volume.dtype)
        while not stop.is_set():
            with turn:
                box = next(boxes, None)
            if box is None:
                return
            data = room[: volume.channels * math.prod(box.shape)].reshape(volume.channels, *box.shape)
            for request in volume.requests(box, data):
                volume.read_into(data[(slice(None), *request.slices(box.start))], request)
            for part in box.split(unit):
                _write(array, part, data[(slice(None), *part.slices(box.start))], volume.channel_axis is not None)
            tell(math.prod(box.shape))

    with ThreadPoolExecutor(stream.threads, thread_name_prefix="oocpatch-convert") as pool:
        try:
            for done in [pool.submit(work) for _ in range(stream.threads)]:
                done.result()
        finally:
            stop.set()


def _write(array: zarr.Array[Any], part: Box, values: Any, has_channels: bool) -> None:
    if not has_channels:
        array[part.slices()] = values[0]
        return
    step = (array.shards or array.chunks)[0]
    for first in range(0, len(values), step):
        array[(slice(first, first + step), *part.slices())] = values[first : first + step]


def _remove_left(partial: Path) -> None:
    """Delete what an interrupted conversion left.

    Raises:
        OutputExists: when something else has that name.
    """
    ours = partial.is_dir() and (not any(partial.iterdir()) or MARK in _attributes_of(partial))
    if not ours:
        raise OutputExists(f"unfinished output goes to {partial}, which holds something else; move it away")
    shutil.rmtree(partial)


def _attributes_of(path: Path) -> dict[str, Any]:
    try:
        return dict(zarr.open_group(LocalStore(path), mode="r", use_consolidated=False).attrs)
    except (OSError, ValueError, KeyError):
        return {}
