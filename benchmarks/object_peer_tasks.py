"""What other libraries do with the volumes of `benchmarks.instances` and `benchmarks.objects`, without oocpatch.

They run in an environment of their own. Where objects are joined, each gets the same patches from the same model: a
tile of theirs is a stride of ours, with half an overlap on each side.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import dask.array
import numpy as np
import zarr

from benchmarks.cells import compare, renumbered
from benchmarks.measure import answer, measured


def patchworks(
    path: str, output: str, *, patch: int, overlap: int, perturbed: bool, workers: int, stitch: str
) -> dict[str, Any]:
    """Join by patchworks: by touching (`"touch"`), or where two tiles agree on their overlap (`"iou"`)."""
    from patchworks import tile_process  # noqa: PLC0415

    volume = dask.array.from_zarr(path)
    with measured() as usage:
        tile_process(
            volume,
            lambda tile: renumbered(tile, perturbed=perturbed),
            tile_shape=(patch - overlap,) * volume.ndim,
            overlap=overlap // 2,
            write_to=output,
            stitch=stitch,
            max_workers=workers,
            progress=False,
        )
    return {**compare(zarr.open_array(path, mode="r"), zarr.open_array(output, path="labels", mode="r")), **vars(usage)}


def cellpose(path: str, output: str, *, patch: int, overlap: int, perturbed: bool, workers: int) -> dict[str, Any]:
    """Join by the functions of `cellpose.contrib.distributed_segmentation`, in its order, without its networks."""
    del workers  # a loop over blocks
    for name in ("version", "io", "models"):  # they import torch; the functions use none of them
        module: Any = ModuleType(f"cellpose.{name}")
        module.version = module.version_str = ""
        sys.modules[module.__name__] = module
    from cellpose.contrib import distributed_segmentation as peer  # noqa: PLC0415

    volume = zarr.open_array(path, mode="r")
    size, halo = (patch - overlap,) * volume.ndim, overlap // 2
    parts = zarr.create_array(f"{output}-parts", shape=volume.shape, chunks=size, dtype="uint32", overwrite=True)
    with measured() as usage:
        indices, crops = peer.get_block_crops(volume.shape, size, halo, None)
        faces, used = [], []
        for index, crop in zip(indices, crops, strict=True):
            labels, place = peer.remove_overlaps(
                renumbered(volume[crop], perturbed=perturbed).astype(np.uint32), crop, halo, size
            )
            labels, numbers = peer.global_segment_ids(labels, index, peer.get_nblocks(volume.shape, size))
            parts[tuple(place)] = labels
            faces.append(peer.block_faces(labels))
            used.append(numbers)
        new = peer.determine_merge_relabeling(indices, faces, np.concatenate(used))
        dask.array.from_zarr(f"{output}-parts").map_blocks(lambda block: new[block], dtype=np.uint32).to_zarr(
            output, overwrite=True
        )
    return {**compare(volume, zarr.open_array(output, mode="r")), **vars(usage)}


def dask_image(folder: str, kind: str, workers: int, threshold: float | None) -> dict[str, Any]:
    """Label connected components with dask-image, on as many threads."""
    from dask_image.ndmeasure import label  # noqa: PLC0415

    path = Path(folder, "dask.zarr")
    with measured() as usage, dask.config.set(scheduler="threads", num_workers=workers):
        volume = dask.array.from_zarr(str(Path(folder, f"{kind}.zarr"))).rechunk(256)
        labels, _ = label(volume if threshold is None else volume > threshold)
        labels.rechunk(64).to_zarr(str(path), compute=True)
    shutil.rmtree(path)
    return vars(usage)


if __name__ == "__main__":
    answer(patchworks, cellpose, dask_image)
