"""A prediction as a lazy array: computed where it is looked at, and not written."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import xarray

from oocpatch.configuration.make_plan import make_plan
from oocpatch.configuration.options import ExecutionOptions
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import PlanTooLarge
from oocpatch.execution.lazy_chunks import ChunkSource, head_arrays
from oocpatch.execution.task_context import RunInputs, open_predict_tasks
from oocpatch.outputs.coordinates import head_attributes, scaled_coords
from oocpatch.outputs.ome_zarr import is_ome_zarr
from oocpatch.outputs.output import Result, channel_position, is_tree
from oocpatch.planning.box import Ints
from oocpatch.planning.heads import common_unit, distinct_channel_axes
from oocpatch.planning.plan import Plan, human
from oocpatch.run.driver import with_statistics

REFUSED = {f.name for f in fields(ExecutionOptions)} - {"progress"} | {"output", "export", "max_disk"}
"""Arguments of `predict` that say where a result is written, and where tasks run."""


@torch.inference_mode(mode=False)
def lazy(
    volume: Any, model: Any, *, patch_size: int | Sequence[int] | Mapping[str, int] | str | None = None, **options: Any
) -> Result:
    """Return the result of `predict` as an array over Dask, which computes what is asked for and writes nothing.

    Any part of it has the values that `predict` writes with the same arguments. There is one task per chunk of the
    result, which computes the patches that reach it; a patch between two chunks is computed for both. So `predict` is
    cheaper for the whole volume, and this is for parts of it, or to look at it. Chunks are those of `predict`'s output
    unless `output_chunks` says otherwise: larger ones compute fewer patches twice.

    Reads metadata only, unless a preprocess or a padding needs statistics of the whole volume, which is then read once.
    Chunks are computed by the scheduler that Dask has at that time: threads, or a `distributed.Client`, to whose
    workers the model travels by its spec or pickled. Each process loads it once. With a `batch_size` other than 1,
    batches have other patches than those of `predict`, and may round differently.

    Args:
        volume: as for `predict`.
        model: as for `predict`.
        patch_size: as for `predict`.
        options: the arguments of `predict` that its values depend on, with the same defaults: `patch_overlap`,
            `overlap_mode` (not `"instances"`), `padding_mode`, `axes`, `mask`, `box`, `weights`, `preprocess`,
            `augment`, `postprocess`, `device`, `output_dtype`, `output_chunks` and so on. `max_memory` bounds what
            computing adds to a process, without the chunks that Dask keeps.

    Returns:
        A `DataArray` `([C',] *axes)`; of a model that gives a dict, a `Dataset`, or where scales differ a `DataTree`.

    Raises:
        ValueError, TypeError: for bad arguments.
        PlanTooLarge: when one chunk needs more memory than `max_memory`.

    >>> import numpy as np, torch
    >>> result = lazy(np.ones((4096, 4096), np.float32), torch.nn.Identity(), patch_size=64, patch_overlap=32)
    >>> result.dims, float(result[:2, 1000].mean())
    (('y', 'x'), 1.0)
    """
    if unknown := sorted(REFUSED & options.keys()):
        raise TypeError(
            f"lazy takes no {', '.join(unknown)}: it writes nothing, and Dask decides where chunks are computed; call "
            "predict to write the result"
        )
    nowhere = Path(tempfile.gettempdir()) / "oocpatch-lazy.zarr"  # a place for the checks of `predict`; never written
    config = RunConfig.of(volume, model, nowhere, patch_size=patch_size, **options)
    if config.finds_objects:
        raise ValueError(
            "overlap_mode must not be 'instances' for a lazy result: the ids of objects depend on the whole volume; "
            "call predict"
        )
    if config.labels_result:
        raise ValueError("postprocess must not be 'label' for lazy: ids depend on the whole volume; use predict")
    if config.target is not None:
        raise ValueError(
            "output_grid must be 'model' for a lazy result with spacing or orientation: on the grid of the volume, "
            "stored scores are resampled; pass output_grid='model', or call predict"
        )
    plan = make_plan(config)
    if plan.vectors:
        raise ValueError(
            f"the model's outputs must be voxels for a lazy result, got a vector per patch: "
            f"{', '.join(v.name for v in plan.vectors)}; call predict"
        )
    plan = with_statistics(plan, config)
    cell = common_unit([replace(head, unit=head.chunks) for head in plan.heads], len(plan.axes))
    volumes = (config.volume, config.data.mask)
    inputs = RunInputs(config.model, *volumes, config.models, open_predict_tasks, config.context)
    source = ChunkSource(plan, inputs, cell, _at_a_time(plan, cell, config.limits.max_memory))
    heads, arrays = plan.heads, {}
    if is_ome_zarr(plan) and not is_tree(heads):  # whose arrays are opened by themselves
        axes = distinct_channel_axes(heads, plan.in_channels)
        heads = tuple(replace(head, channel_axis=axis) for head, axis in zip(heads, axes, strict=True))
    for head, data in zip(heads, head_arrays(source), strict=True):
        dims = list(plan.axes)
        if head.channel_axis is not None:
            dims.insert(channel_position(plan), head.channel_axis)
        coords = scaled_coords(config.volume, plan, head)
        attributes = head_attributes(config.volume, plan, head)
        arrays[head.name] = xarray.DataArray(data, coords, dims, name=head.name, attrs=attributes)
    if is_tree(heads):
        return xarray.DataTree.from_dict({name: array.to_dataset() for name, array in arrays.items()})
    return next(iter(arrays.values())) if len(arrays) == 1 else xarray.Dataset(arrays)


def _at_a_time(plan: Plan, cell: Ints, max_memory: int) -> int:
    """Return how many chunks a process computes at a time.

    Raises:
        PlanTooLarge: when there is no memory for one.
    """
    # both places together: what the model's device has of its own is not compared with the chunks yet
    shared = plan.projected_memory - plan.concurrency * plan.task_memory
    shared += plan.projected_device_memory - plan.concurrency * plan.task_device_memory
    lengths = zip(cell, plan.shape, plan.input_grid.patch_size, strict=True)
    voxels = math.prod(min(c, n) + 2 * (patch - 1) for c, n, patch in lengths)
    read = voxels * plan.in_channels * torch.empty(0, dtype=getattr(torch, plan.in_dtype)).element_size()
    values = 0
    for head in plan.heads:
        size = math.prod(c * times // per for c, (times, per) in zip(cell, head.scale, strict=True))
        values += size * (2 * head.sum_voxel_bytes + head.out_voxel_bytes)  # the sums of two blocks
    if (count := (max_memory - shared) // (read + values)) < 1:
        raise PlanTooLarge(
            f"one chunk of {cell[-plan.spatial :]} voxels needs {human(shared + read + values, up=True)} (model and "
            f"batch {human(shared)}, input {human(read)}, sums and values {human(values)}) but max_memory is "
            f"{human(max_memory)}; lower output_chunks or patch_size, or raise max_memory"
        )
    return count
