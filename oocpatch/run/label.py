"""One call of `label`: connected components of a volume of any size, as a run like that of `predict`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from oocpatch.configuration.label_plan import label_config
from oocpatch.objects.components import require_libraries
from oocpatch.outputs.output import Result
from oocpatch.progress import OnProgress
from oocpatch.run.predict import run


@torch.inference_mode(mode=False)
def label(
    volume: Any,
    output: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    connectivity: int = 1,
    per_class: bool = False,
    min_size: int = 0,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    max_memory: int | float | str = "auto",
    block_shape: int | Sequence[int] | Mapping[str, int] | None = None,
    workers: int | None = None,
    processes: bool = False,
    client: Any = None,
    part: Sequence[int] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    update: bool = False,
    check_input: bool = True,
    output_chunks: int | Sequence[int] | Mapping[str, int] | None = None,
    output_shards: int | Sequence[int] | Mapping[str, int] | None = None,
    output_dtype: Any = None,
    output_format: str = "auto",
    progress: str | bool | OnProgress = "auto",
) -> Result:
    """Label the connected components of a volume that does not fit in memory.

    The objects are those that `scipy.ndimage.label` finds in the whole volume. Their ids are 1 to n, in the order of
    their first voxels in C order, so they depend on nothing else: not on blocks, workers or kills. The same call again
    continues where a killed one stopped. Each index of time and of the channel is labelled by itself.

    Args:
        volume: a volume of booleans, labels or scores, as for `predict`.
        output: path of the Zarr group to write, or its URL in an object store.

        threshold: foreground is what is larger; NaN is background. None: every voxel that is not zero; volumes of
            floats need a threshold.
        connectivity: 1: voxels touch by faces; 2: by edges, too; up to the number of spatial axes.
        per_class: whether an object has voxels of one label only, as of a map of classes.
        min_size: voxels of the smallest object that counts. Smaller ones become background, before ids are given.

        axes: names of the volume's axes, e.g. `"zyx"`, `"tczyx"`.
        level: level of an OME-Zarr's pyramid to read.

        max_memory: bytes that the run may add to this process, e.g. `"2GiB"`; `"auto"`: a quarter of the machine's.
        block_shape: spatial shape of a unit of work; default: planned.
        workers: blocks to work on at a time; with a client, worker processes to use at most.
        processes: compute in `workers` processes of this machine instead of threads.
        client: a `dask.distributed.Client`, whose worker processes run the tasks, each within `max_memory`.
        part: `(i, n)`: label only the i-th of n parts of the run, counted from 1; the part that ends last merges the
            objects of all and writes the labels.
        workspace: path or URL of unfinished work; default: beside the output.
        resume: continue an incomplete output; else it is refused.
        overwrite: start afresh; replaces only what oocpatch wrote.
        update: where chunks of the volume have changed since they were read, label again. Any id may depend on any
            chunk, so all labels are written anew.
        check_input: compare the volume with what a complete output was computed from.

        output_chunks: chunks of the output, spatial; default: those of the volume, if reasonable.
        output_shards: shards of the output, spatial; multiples of its chunks.
        output_dtype: dtype of integers that holds the number of objects; default: the smaller of uint32 and uint64 that
            does.
        output_format: `"zarr"`; `"ome-zarr"` with a pyramid; `"auto"`: an OME-Zarr where the volume is one.
        progress: as for `predict`; voxels are counted twice, as they are read twice.

    Returns:
        The labels, lazy. Their attribute `objects` is the number of objects; with several indices of time or channel, a
        list of the number at each, in C order of time and channel.

    Raises:
        ValueError, TypeError: for bad arguments, and for labels below zero.
        ImportError: when scipy is missing; the extra `objects` has it.
        PlanTooLarge, RunMismatch, OutputExists, OutputBusy, BlockFailed, ClusterLost: as `predict`.

    >>> import tempfile, numpy as np
    >>> scores = np.array([[0.9, 0.1, 0.8], [0.7, 0.2, 0.9], [0.1, 0.1, 0.1], [0.6, 0.1, 0.0]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     labels = label(scores, f"{folder}/labels.zarr", threshold=0.5)
    ...     print(labels.values.tolist(), labels.attrs["objects"])
    [[1, 0, 2], [1, 0, 2], [0, 0, 0], [3, 0, 0]] 3
    """
    require_libraries()
    rules = {"threshold": threshold, "connectivity": connectivity, "per_class": per_class, "min_size": min_size}
    options = {
        "axes": axes,
        "level": level,
        "max_memory": max_memory,
        "block_shape": block_shape,
        "workers": workers,
        "processes": processes,
        "client": client,
        "part": part,
        "workspace": workspace,
        "resume": resume,
        "overwrite": overwrite,
        "update": update,
        "check_input": check_input,
        "output_chunks": output_chunks,
        "output_shards": output_shards,
        "output_dtype": output_dtype,
        "output_format": output_format,
        "progress": progress,
    }
    result: Result = run(label_config(volume, output, **rules, **options))
    return result
