"""Conversion: any readable volume, streamed into an OME-Zarr with a pyramid within a memory limit.

```text
 volume --boxes of whole write units--> buffers, one per thread --> OUT.partial --rename--> OUT
```

An unfinished conversion has another name, so that it never looks complete. After an interruption the same call
continues: stored write units are not written again.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xarray

from oocpatch.conversion.export import are_labels
from oocpatch.conversion.target import Conversion, Layout, is_complete, remove_conversions
from oocpatch.errors import PlanTooLarge
from oocpatch.planning.arguments import clipped_chunks, memory_limit, positive, write_unit
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.memory import READ_BYTES
from oocpatch.planning.plan import human
from oocpatch.progress import show_progress
from oocpatch.storage.locks import locked
from oocpatch.storage.paths import check_is_zarr, local_path
from oocpatch.system import usable_cores
from oocpatch.volumes.volume import Volume, default_chunks, refuse_overlap, spatial_sizes

COPIES = 3
"""Copies of a chunk that coding it needs at most, including the encoded one."""

THREADS = 4


def convert(
    volume: Any,
    output: str | os.PathLike[str],
    *,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    chunks: int | Sequence[int] | None = None,
    shards: int | Sequence[int] | None = None,
    levels: int | None = None,
    labels: bool | None = None,
    max_memory: int | float | str = "auto",
    progress: str | bool = "auto",
    overwrite: bool = False,
) -> xarray.DataArray:
    """Stream a volume of any format into an OME-Zarr with a pyramid, within a memory limit.

    Axes, coordinates and attributes are kept. The order of axes is that of `predict`'s outputs: time, channel, then the
    spatial axes in their order. A volume that an OME-Zarr cannot describe, with more than three axes in space or uneven
    coordinates, becomes a plain Zarr group with one array, `volume`. An interrupted call leaves nothing at `output`,
    and the same call continues it. If the conversion is complete, the same call returns at once.

    Args:
        volume: as for `predict`.
        output: directory to write; it does not exist, or the same call wrote it.
        axes: names of the volume's axes, e.g. `"zyx"`.
        level: level of the pyramid of a slide, a TIFF or an OME-Zarr; 0 is the largest.
        chunks: spatial chunks, in voxels; default: those of the volume, if reasonable.
        shards: spatial shards, in voxels; multiples of the chunks.
        levels: number of levels of the pyramid, the finest included; default: until one fits a chunk. 1: no pyramid, a
            plain Zarr group.
        labels: whether values are labels, of which coarser levels keep the most frequent ones; of other values they
            have the mean. None: as for `export`.
        max_memory: limit in bytes of what the conversion adds to this process; `"auto"`: a quarter of the machine's.
        progress: as for `predict`.
        overwrite: replace another conversion, finished or not.

    Returns:
        The new volume, lazy.

    Raises:
        ValueError, TypeError: for bad arguments.
        OutputExists: if there is something else at `output`.
        OutputBusy: if another call is writing it.
        RunMismatch: if another volume, or other arguments, were converted to it; the message names the differences.
        PlanTooLarge: if not even one write unit of the volume or its pyramid fits the memory limit.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     array = convert(np.arange(24).reshape(4, 6), f"{folder}/out.zarr", chunks=2)
    ...     print(array.dims, array.values.tolist()[1])
    ('y', 'x') [6, 7, 8, 9, 10, 11]
    """
    target = local_path("output", output)
    check_is_zarr("output", target)
    data = Volume(volume, axes, level)
    refuse_overlap("output", target, data)
    target.check_writable("output")
    looped = len(data.shape) - data.spatial_ndim
    chunk = default_chunks(data, data.dtype.itemsize)
    if chunks is not None:
        chunk = clipped_chunks((*(1,) * looped, *spatial_sizes("chunks", chunks, data, least=1)), data.shape)
    shard = None if shards is None else (*(1,) * looped, *spatial_sizes("shards", shards, data, least=1))
    unit = write_unit(chunk, shard, data.shape)
    limit = memory_limit(max_memory)
    box, threads = plan_stream(data, unit, limit)
    if levels is not None:
        positive("levels", levels)
    is_labels = are_labels(volume, data) if labels is None else labels
    layout = Layout.of(data, chunk, unit, levels, labels=is_labels)
    if layout.image is not None and (needed := layout.image.task_memory) > limit:
        raise PlanTooLarge(
            f"one write unit of the pyramid needs {human(needed, up=True)} but max_memory is {human(limit)}; "
            "raise max_memory, lower shards or chunks, or write levels=1"
        )
    record = layout.record(level, str(volume) if isinstance(volume, str | os.PathLike) else None)
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.partial.lock"), str(target)):
        if overwrite:
            remove_conversions(partial, target)
        if not is_complete(target, record):
            conversion = Conversion.open(partial, layout, record)
            voxel, total, done = data.channels * data.dtype.itemsize, math.prod(data.shape), conversion.done
            with (
                contextlib.closing(conversion),
                show_progress(progress, "convert", "voxels", total, resumed=done, bytes_each=voxel) as advance,
            ):
                _stream(data, conversion, box, threads, advance)
            conversion.finish(target, max_memory=limit, threads=threads, progress=progress)
    return layout.open(target)


def plan_stream(volume: Volume, unit: Ints, limit: int) -> tuple[Ints, int]:
    """Choose the box of whole write units that each thread reads and writes at a time, and the number of threads.

    They fit the limit, and few boxes share a chunk of the volume.

    Raises:
        PlanTooLarge: if not even one write unit fits.

    >>> import zarr
    >>> planes = Volume(zarr.zeros((100, 128, 128), chunks=(1, 128, 128), dtype="uint8", store={}))
    >>> plan_stream(planes, (32, 32, 32), 40_000_000)[0]
    (32, 128, 128)
    """

    def needed(box: Ints) -> int:
        voxel = volume.channels * volume.dtype.itemsize
        read = max(COPIES * volume.chunk_bytes, 2 * READ_BYTES if volume.source.chunked else READ_BYTES)
        return math.prod(box) * voxel + read + COPIES * math.prod(unit) * voxel

    if needed(unit) > limit:
        raise PlanTooLarge(
            f"one write unit of {unit} voxels needs {human(needed(unit), up=True)} (chunks of the volume included, "
            f"{volume.chunks} voxels each) but max_memory is {human(limit)}; raise max_memory or lower chunks"
        )
    units = math.prod(-(-n // u) for n, u in zip(volume.shape, unit, strict=True))
    threads = max(1, min(THREADS, usable_cores(), units, limit // needed(unit)))
    box = unit
    while grown := [b for b in _grown(box, unit, volume.shape) if threads * needed(b) <= limit]:
        best = min(grown, key=lambda b: _decoded(volume, b))
        if _decoded(volume, best) >= _decoded(volume, box):
            break
        box = best
    return box, threads


def _grown(box: Ints, unit: Ints, shape: Ints) -> Iterator[Ints]:
    """Yield the box with one axis made longer, for each axis."""
    for axis, (b, u, n) in enumerate(zip(box, unit, shape, strict=True)):
        if b < n:
            longer = min(2 * b, -(-n // u) * u)
            yield (*box[:axis], longer, *box[axis + 1 :])


def _decoded(volume: Volume, box: Ints) -> float:
    """Return how often a voxel is decoded on average if the volume is read in such boxes, which share chunks."""
    times = 1.0
    for b, c, n in zip(box, volume.chunks, volume.shape, strict=True):
        starts = range(0, n, b) if n // b < 64 else range(0, 64 * b, b)
        read = sum(min(n, -(-min(s + b, n) // c) * c) - s // c * c for s in starts)
        times *= read / sum(min(s + b, n) - s for s in starts)
    return times


def _stream(volume: Volume, conversion: Conversion, size: Ints, threads: int, advance: Callable[[int], None]) -> None:
    """Read and write the missing units of all boxes, each unit by one thread."""
    boxes, lock, stop = Box.of_shape(volume.shape).split(size), threading.Lock(), threading.Event()
    voxels = math.prod(min(b, n) for b, n in zip(size, volume.shape, strict=True)) * volume.channels

    def work() -> None:
        # One mapping per thread, reused: the heap would not return the memory of freed buffers.
        buffer = np.frombuffer(mmap.mmap(-1, voxels * volume.dtype.itemsize), volume.dtype)
        while not stop.is_set():
            with lock:
                box = next(boxes, None)
            if box is None:
                return
            missing = conversion.missing(box)
            if not missing:
                continue
            starts, stops = zip(*((part.start, part.stop) for part in missing), strict=True)
            box = Box(tuple(map(min, zip(*starts, strict=True))), tuple(map(max, zip(*stops, strict=True))))
            data = buffer[: volume.channels * math.prod(box.shape)].reshape(volume.channels, *box.shape)
            for read, _ in volume.split_reads(box, data):
                volume.read_into(data[(slice(None), *read.slices(box.start))], read)
            for part in missing:
                conversion.write(part, data[(slice(None), *part.slices(box.start))])
            advance(sum(math.prod(part.shape) for part in missing))

    with ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-convert") as pool:
        try:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
        finally:
            stop.set()
