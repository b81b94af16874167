"""What other programs see of an OME-Zarr: run by the Python of an environment that holds them and not oocpatch.

`python reader_child.py FOLDER` prints JSON: for each reader the axes, the scales and the shapes of all levels, and
whether their voxels are those of the `.npy` files in `FOLDER/expected`, one per level.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr


def seen(values: list[Any], expected: list[np.ndarray], **facts: Any) -> dict[str, Any]:
    """What a reader tells, and whether its voxels are right."""
    arrays = [np.asarray(value) for value in values]
    same = [np.array_equal(a.reshape(e.shape), e) and a.dtype == e.dtype for a, e in zip(arrays, expected, strict=True)]
    return {"shapes": [list(a.shape) for a in arrays], "same": same, **facts}


def ome_zarr(path: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    # It also gives the image that labels belong to, and those that belong to an image.
    node = next(n for n in Reader(parse_url(str(path)))() if str(n).split(" ")[0].rstrip("/") == str(path))
    scales = [transforms[0]["scale"] for transforms in node.metadata["coordinateTransformations"]]
    axes = [[axis["name"], axis["type"], axis.get("unit")] for axis in node.metadata["axes"]]
    return seen(node.data, expected, axes=axes, scales=scales)


def ome_zarr_models(path: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    from ome_zarr_models import open_ome_zarr

    group = zarr.open_group(path, mode="r")
    model = open_ome_zarr(group)
    attributes = getattr(model.attributes, "ome", model.attributes)
    (multiscale,) = attributes.multiscales
    axes = [[axis.name, axis.type, axis.unit] for axis in multiscale.axes]
    scales = [list(dataset.coordinateTransformations[0].scale) for dataset in multiscale.datasets]
    return seen([group[d.path][...] for d in multiscale.datasets], expected, axes=axes, scales=scales)


def bioio(path: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    import bioio_ome_zarr
    from bioio import BioImage

    image = BioImage(str(path), reader=bioio_ome_zarr.Reader)
    values, scales = [], []
    for level in image.resolution_levels:
        image.set_resolution_level(level)
        values.append(image.data)
        scales.append([image.scale.T, image.scale.C, image.scale.Z, image.scale.Y, image.scale.X])
    return seen(values, expected, scales=scales, channels=image.channel_names)


def tensorstore(path: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    import tensorstore as ts

    driver = "zarr3" if (path / "zarr.json").exists() else "zarr"
    arrays = []
    for level in range(len(expected)):
        place = {"driver": "file", "path": str(path / f"scale{level}" / "image")}
        arrays.append(ts.open({"driver": driver, "kvstore": place}).result())
    labels = [list(array.domain.labels) for array in arrays]
    return seen([array.read().result() for array in arrays], expected, labels=labels)


def xarray_tree(path: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    import xarray

    tree = xarray.open_datatree(path, engine="zarr")
    nodes = [tree[f"scale{level}"]["image"] for level in range(len(expected))]
    return seen([node.values for node in nodes], expected, dims=[list(node.dims) for node in nodes])


def napari(path: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    from napari_ome_zarr import napari_get_reader

    reader = napari_get_reader(str(path))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the attributes
        layers = reader(str(path))
    # Of labels it gives the image that they belong to, too, and of an image its labels, with paths as names.
    beside = path.parent.name == "labels"
    (found,) = [n for n in layers if (n[2] == "labels" and n[1]["name"].endswith(path.name)) or not beside][:1]
    values, layer, kind = found
    return seen(
        [value.compute() for value in values],
        expected,
        kind=kind,
        channel_axis=layer.get("channel_axis"),
        labelled=list(layer["axis_labels"]),
        units=list(layer["units"]),
        spacing=list(layer["scale"]),
        names=layer.get("name"),
        contrast=layer.get("contrast_limits"),
        others=sorted(n[1]["name"] for n in layers if n[2] == "labels"),
    )


def main(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for image in sorted((folder / "expected").iterdir()):
        expected = [np.load(file) for file in sorted(image.iterdir())]
        path = Path((folder / f"{image.name}.txt").read_text())
        for reader in (ome_zarr, ome_zarr_models, bioio, tensorstore, xarray_tree, napari):
            if reader is ome_zarr_models and (path / "labels" / "zarr.json").exists():
                continue  # version 1.7 finds levels of listed labels of 0.5 by paths of one part only
            yield f"{image.name} {reader.__name__}", reader(path, expected)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.stdout.write(json.dumps(dict(main(Path(sys.argv[1])))))
