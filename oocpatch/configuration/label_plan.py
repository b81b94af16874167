"""The configuration of a call of `label`, and its plan. Reads metadata only; nothing is written.

A call of `label` is a run whose patches are single voxels: its blocks, arrays, records and checksums are those of
`predict`. Blocks are large, since objects that cross their borders are what the merge has to hold in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from oocpatch.configuration.output_heads import infer_heads
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import InvalidVolume, PlanTooLarge, TooManyObjects
from oocpatch.models.probe import Geometry, Probe
from oocpatch.outputs.pyramid import with_pyramids
from oocpatch.planning.arguments import positive, real_number, switch
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints, ceil_to
from oocpatch.planning.grid import chunk_span
from oocpatch.planning.heads import Head, common_unit
from oocpatch.planning.labelling import DTYPES, Labelling
from oocpatch.planning.memory import IoStrategy, chunk_bytes, io_threads
from oocpatch.planning.plan import Plan, human
from oocpatch.system import usable_cores

NAME = "labels"
"""Name of the output's array."""

_NOT_ASKED = ("model", "patch_size", "overlap_mode")
"""Arguments of `predict` that a call of `label` has no values for."""

BLOCK_VOXELS = 1 << 24
"""Voxels of a block that is not chosen by hand: a second of work."""

BLOCKS = 16
"""Number of blocks, so that several can be at work, down to blocks of `LEAST_VOXELS`."""

LEAST_VOXELS = 1 << 20
MOST_WORKERS = 8
NOMINAL = 2
"""Blocks at a time that shapes are chosen for, so that they do not depend on the machine."""


def label_config(
    volume: Any,
    output: Any,
    *,
    threshold: Any,
    connectivity: Any,
    per_class: Any,
    min_size: Any,
    **options: Any,
) -> RunConfig:
    """Check the arguments of `label`.

    Raises:
        TypeError, ValueError: for the first value that breaks a rule.
    """
    config = RunConfig.of(volume, "identity", output, patch_size=1, overlap_mode="crop", **options)
    rule = _checked(config, threshold, connectivity, per_class, min_size)
    dtype = config.outputs.output_dtype
    if dtype is not None and (isinstance(dtype, dict) or np.dtype(dtype).kind not in "iu"):
        raise ValueError(f"output_dtype must be a dtype of integers, which hold ids, got {dtype!r}")
    parameters = {
        "volume": config.parameters["volume"],
        "axes": config.parameters["axes"],
        "threshold": rule.threshold,
        "connectivity": rule.connectivity,
        "per_class": rule.per_class,
        "min_size": rule.min_size,
        **{
            name: config.parameters[name]
            for name in ("output_dtype", "output_chunks", "output_shards", "output_format")
        },
    }
    return replace(
        config,
        labelling=rule,
        parameters=parameters,
        settings={
            **{name: value for name, value in config.settings.items() if name not in _NOT_ASKED},
            **{name: value for name, value in asdict(rule).items() if value or name == "connectivity"},
        },
        outputs=replace(config.outputs, output_dtype=dtype or DTYPES[0]),
    )


def _checked(config: RunConfig, threshold: Any, connectivity: Any, per_class: Any, min_size: Any) -> Labelling:
    """Return the rule by which voxels become objects, checked against the volume."""
    volume = config.volume
    if threshold is not None:
        threshold = real_number("threshold", threshold)
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got NaN")
    if (connectivity := positive("connectivity", connectivity)) > volume.spatial_ndim:
        raise ValueError(
            f"connectivity must be from 1 to the number of spatial axes ({', '.join(volume.names[config.looped :])}), "
            f"got {connectivity}"
        )
    if min_size != 0 or isinstance(min_size, bool):
        min_size = positive("min_size", min_size)
    rule = Labelling(threshold, connectivity, switch("per_class", per_class), int(min_size))
    if threshold is None and volume.dtype.kind == "f":
        what = "labels of per_class=True must be integers" if rule.per_class else "threshold must be given"
        raise ValueError(f"{what} where the volume holds floats, got {volume.dtype}; pass threshold=0.5, or the like")
    array = volume.source
    if threshold is None and volume.dtype.kind == "i" and not array.chunked:  # in memory: no need to wait for a block
        least = int(np.min(array.load(tuple(slice(None) for _ in array.shape))))
        if least < 0:
            raise InvalidVolume(
                f"labels must be 0 or more, got {least}; pass threshold= to say what is foreground, such as threshold=0"
            )
    return rule


def make_label_plan(config: RunConfig, rule: Labelling) -> Plan:
    """Decide everything about a run of `label`.

    Raises:
        PlanTooLarge: when not even one block fits the memory limit.
    """
    volume, limit = config.volume, config.limits.max_memory
    voxels = math.prod(volume.shape[config.looped :])
    if voxels > np.iinfo(np.int64).max:
        raise PlanTooLarge(f"label numbers at most {np.iinfo(np.int64).max:,} voxels, got {voxels:,}")
    ones = (1,) * len(volume.shape)
    example = torch.zeros((1, volume.channels, *ones), dtype=torch.int32, device="cpu")
    geometry = Geometry(((1, 1),) * volume.spatial_ndim, (0,) * volume.spatial_ndim)
    probe = Probe({NAME: example}, {NAME: geometry}, copies_input=False, aliased=frozenset(), bytes=0)
    outputs = infer_heads(config, probe)
    (head,) = outputs.heads
    unit = common_unit(outputs.heads, len(outputs.grid.axes))
    threads = io_threads(limit, max(volume.chunk_bytes, math.prod(head.unit) * head.out_voxel_bytes))
    shared = chunk_bytes(threads, max(volume.chunk_bytes, math.prod(head.unit) * head.out_voxel_bytes))
    loops = unit[: config.looped]
    if config.limits.block_shape is not None:
        shapes: list[Ints] = [(*loops, *config.limits.block_shape)]
    else:
        shapes = list(_shapes(config, unit))
    grids = [BlockGrid.of(outputs.grid, shape, unit, 0, crop=True) for shape in shapes]
    needs = [_task_memory(config, head, grid) for grid in grids]
    fitting = [i for i in range(len(grids)) if shared + NOMINAL * needs[i] <= limit]
    fitting = fitting or [i for i in range(len(grids)) if shared + needs[i] <= limit]
    if not fitting:
        least = min(needs)
        raise PlanTooLarge(
            f"labelling one block needs {human(shared + least, up=True)} (chunks {human(shared)}, voxels and labels "
            f"{human(least)}) but max_memory is {human(limit)}; raise max_memory, or lower block_shape or output_chunks"
        )
    blocks, need = grids[fitting[-1]], needs[fitting[-1]]
    workers = config.execution.threads or min(usable_cores(), MOST_WORKERS)
    concurrency = max(1, min(workers, blocks.num_blocks, (limit - shared) // need))
    size = math.prod(volume.shape) * volume.channels
    plan = replace(
        voxel_plan(config, tuple(axis.size for axis in blocks.axes), concurrency, need),
        context=outputs.context,
        snap=outputs.snap,
        heads=outputs.heads,
        sweep=blocks.sweep,
        io_strategy=IoStrategy(aligned_reads=True, prefetch=False, threads=threads),
        torch_threads=torch.get_num_threads(),
        projected_memory=shared + concurrency * need,
        projected_disk=_disk(blocks, config.looped) * volume.channels,
        bytes_read=2 * size * volume.dtype.itemsize,
        bytes_written=size * np.dtype(head.out_dtype).itemsize,
        memory_parts=(("blocks", need), ("chunks", shared)),
        labelling=rule,
    )
    return with_pyramids(plan, limit)


def voxel_plan(config: RunConfig, core: Ints, concurrency: int, task_memory: int) -> Plan:
    """Return the plan of a run whose patches are voxels, which no model sees, without heads."""
    volume, axes = config.volume, len(config.volume.shape)
    return Plan(
        parameters=config.parameters,
        axes=volume.names,
        spatial=volume.spatial_ndim,
        shape=volume.shape,
        in_channels=volume.channels,
        in_dtype=str(volume.dtype),
        in_chunks=volume.chunks,
        patch_size=(1,) * axes,
        patch_overlap=(0,) * axes,
        padding_mode=None,
        fill=0,
        context=(0,) * axes,
        snap=(1,) * axes,
        heads=(),
        copies_input=False,
        may_skip=False,
        core=core,
        sweep=0,
        io_strategy=IoStrategy(aligned_reads=False, prefetch=False, threads=1),
        concurrency=concurrency,
        batch_size=1,
        torch_threads=1,
        projected_memory=concurrency * task_memory,
        projected_disk=0,
        bytes_read=math.prod(volume.shape) * volume.channels * volume.dtype.itemsize,
        bytes_written=0,
        task_memory=task_memory,
        merge_memory=config.limits.max_memory,
    )


def with_larger_ids(config: RunConfig, error: TooManyObjects) -> RunConfig:
    """Return the configuration of a call whose default dtype does not hold the number of objects, with a larger one.

    Raises:
        TooManyObjects: when the dtype was asked for.
    """
    larger = [dtype for dtype in DTYPES if np.iinfo(dtype).max >= error.count]
    if config.parameters["output_dtype"] is not None or not larger:
        raise error
    return replace(config, outputs=replace(config.outputs, output_dtype=larger[0]))


def _shapes(config: RunConfig, unit: Ints) -> Iterator[Ints]:
    """Yield shapes of blocks from one write unit on, each larger than the one before, up to a nominal size."""
    volume = config.volume
    total = math.prod(volume.shape[config.looped :])
    most = min(BLOCK_VOXELS, max(LEAST_VOXELS, total // BLOCKS))
    shape = unit
    yield shape
    while True:
        grown = []
        for axis in range(config.looped, len(unit)):
            whole, step = ceil_to(volume.shape[axis], unit[axis]), math.lcm(unit[axis], volume.chunks[axis])
            longer = 2 * shape[axis]
            longer = min(whole, ceil_to(longer, step) if step <= longer else longer)
            if longer > shape[axis]:
                grown.append((*shape[:axis], longer, *shape[axis + 1 :]))
        grown = [larger for larger in grown if math.prod(larger[config.looped :]) <= most]
        if not grown:
            return
        shape = min(grown, key=lambda larger: (_decoded(config, larger), max(larger[config.looped :])))
        yield shape


def _decoded(config: RunConfig, shape: Ints) -> float:
    """Return how often a voxel of the volume is decoded, where blocks share chunks."""
    times = 1.0
    for size, chunk, length in zip(shape, config.volume.chunks, config.volume.shape, strict=True):
        starts = range(0, min(length, 64 * size), size)
        read = sum(chunk_span(start, min(start + size, length), chunk, length) for start in starts)
        times *= read / min(length, 64 * size)
    return times


def _task_memory(config: RunConfig, head: Head, blocks: BlockGrid) -> int:
    """Return the bytes of one task at a time: of the stage that needs more, with as many objects as there can be."""
    volume, looped = config.volume, config.looped
    core = [max(axis.core(i)[1] - axis.core(i)[0] for i in {0, axis.count - 1}) for axis in blocks.axes]
    voxels, indices = math.prod(core[looped:]), math.prod(core[:looped]) * volume.channels
    values = voxels * indices * volume.dtype.itemsize
    labelled = voxels * (1 + 4 + 8 + (8 if volume.spatial_ndim > 3 else 0))  # foreground, labels, what finds them
    tables = voxels // 2 * 8 * indices  # first voxels of every other voxel
    ids = voxels // 2 * 16
    return values + labelled + max(tables * 3, tables + ids + voxels * indices * np.dtype(head.out_dtype).itemsize)


def _disk(blocks: BlockGrid, looped: int) -> int:
    """Return the bytes of the faces of all blocks; objects add 16 bytes each, and how many there are nobody knows."""
    total = 0
    for axis, cut in enumerate(blocks.axes):
        if axis >= looped:
            others = math.prod(a.grid.length for i, a in enumerate(blocks.axes) if i != axis)
            total += 2 * (cut.count - 1) * others * 4
    return total
