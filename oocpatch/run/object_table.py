"""Tables of objects: one call that measures the blocks of a volume of labels and merges what they have by label."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from oocpatch.objects.columns import TableSchema
from oocpatch.objects.table_files import read_frame
from oocpatch.progress import OnProgress
from oocpatch.run.predict import run
from oocpatch.run.table_config import FRAME, table_config
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import LocalPath


@torch.inference_mode(mode=False)
def objects(
    labels: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    intensity: Any = None,
    properties: Sequence[str] = ("area", "bbox", "centroid"),
    spacing: float | Sequence[float] | Mapping[str, float] | None = None,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    classes: Mapping[int, Any] | None = None,
    block_shape: int | Sequence[int] | Mapping[str, int] | None = None,
    max_memory: int | float | str = "auto",
    workers: int | None = None,
    processes: bool = False,
    client: Any = None,
    part: tuple[int, int] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    update: bool = False,
    check_input: bool = True,
    progress: str | bool | OnProgress = "auto",
) -> Any:
    """Measure the objects of a volume of labels: a table with one row per object, whatever the size of the volume.

    The volume is read once, block by block. Areas, boxes and centroids are exact, and the table is the same for every
    schedule. An interrupted call leaves nothing at `output`, and the same call continues it.

    Args:
        labels: as a volume for `predict`; integers, where voxels of one value are one object, and 0 is none. Indices
            of time and channel have objects of their own, each with its index in a column of the axis' name.
        output: the file to write: `.parquet`, `.csv`, `.geojson` (polygons, of two spatial axes), `.h5ad` (AnnData);
            None: the table is returned.
        intensity: volume of the extent of the labels, of which each channel is measured.
        properties: columns to compute: `area`, `bbox`, `centroid`, `equivalent_diameter`, `axis_major_length`,
            `axis_minor_length`, `orientation`, `principal_axes`; of an intensity all of `mean`, `min`, `max` and `std`,
            or those that are named.
        spacing: size of a voxel, for all axes, per axis or by their names; default: from the coordinates of the labels.
        axes: names of the axes of the labels, e.g. `"zyx"`.
        level: level of a pyramid; 0 is the largest.
        classes: for `.geojson`, names of classes by value, `{1: "Tumor"}`, or pairs of name and colour, `{1: ("Tumor",
            "#c80000")}`. The class of an object is its label; with an intensity, which is then a map of classes, the
            value that all its voxels have there. None: the names that a model package gave.
        block_shape: spatial shape of a block, in voxels; default: chosen by memory and workers.
        max_memory: limit in bytes of what the call adds to a process; `"auto"`: a quarter of the machine's.
        workers: threads, or with `client` processes; default: one per core, or all.
        processes: compute in `workers` processes of this machine instead of threads.
        client: a `dask.distributed.Client` to compute on.
        part: `(i, n)`: measure only the i-th of n parts; the last one to end writes the table.
        workspace: directory of what is measured until the table is complete; default: beside the output.
        resume: continue an interrupted call; False: refuse.
        overwrite: replace a table that oocpatch wrote.
        update: where the input changed since, measure again.
        check_input: compare the input of a complete table with what it was made of.
        progress: as for `predict`.

    Returns:
        The path of the table, or the table as a `pandas.DataFrame`, with the units of its columns in `attrs`. With
        `part`, None while other parts are not done.

    Raises:
        ValueError, TypeError: for bad arguments, before any voxel is read.
        InvalidVolume: when a label is negative.
        OutputExists: if there is something else at `output`.
        OutputBusy: if another call is writing it.
        RunMismatch: if a table with other arguments, or of other input, was written or begun there.
        PlanTooLarge: if not even one block, or the table that is returned, fits the memory limit.
        BlockFailed: if blocks failed; the same call measures them again.

    >>> import numpy as np
    >>> objects(np.array([[7, 7, 0], [0, 7, 3]])).to_dict("list")
    {'label': [3, 7], 'area': [1, 3], 'bbox_y_start': [1, 0], 'bbox_y_stop': [2, 2], 'bbox_x_start': [2, 0],
    'bbox_x_stop': [3, 2], 'centroid_y': [1.0, 0.333...], 'centroid_x': [2.0, 0.666...]}
    """
    config = table_config(
        labels,
        output,
        intensity=intensity,
        properties=properties,
        spacing=spacing,
        axes=axes,
        level=level,
        classes=classes,
        block_shape=block_shape,
        max_memory=max_memory,
        workers=workers,
        processes=processes,
        client=client,
        part=part,
        workspace=workspace,
        resume=resume,
        overwrite=overwrite,
        update=update,
        check_input=check_input,
        progress=progress,
    )
    if output is not None:
        return run(config)
    above = config.output.parent if workspace is None else config.workspace
    above.make_folder()
    with tempfile.TemporaryDirectory(prefix="oocpatch-", dir=str(above)) as folder:
        path = LocalPath(folder) / FRAME
        run(replace(config, output=path, workspace=beside(path, "")))
        return read_frame(path, TableSchema.of(config.table or {}))
