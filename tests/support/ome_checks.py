"""Checks of OME-Zarr that yaozarrs does not make: arrays, coordinates and listings against the metadata about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaozarrs
import zarr

MAX_CHUNK = 256 << 20  # bytes when decoded: a viewer loads all of it to show one voxel
CLOSE = 1e-4  # share of a voxel by which positions may differ: scales are rounded when they are written
Nodes = Mapping[str, Any]


@dataclass(frozen=True)
class Image:
    """An image group: its OME metadata, and per level the array, its path in the group, scale and translation."""

    path: str
    ome: Mapping[str, Any]
    axes: tuple[str, ...]
    levels: tuple[str, ...]
    arrays: tuple[zarr.Array[Any], ...]
    scales: np.ndarray[Any, Any]
    starts: np.ndarray[Any, Any]

    @property
    def shapes(self) -> np.ndarray[Any, Any]:
        return np.array([array.shape for array in self.arrays])


def ome_of(node: Any) -> Mapping[str, Any]:
    """Return the OME metadata of a group, of version 0.4 or 0.5."""
    attributes = dict(node.attrs)
    return attributes.get("ome", attributes)


def read_nodes(path: Path) -> dict[str, Any]:
    """Return all groups and arrays of a container by their paths, without its consolidated metadata."""
    container = zarr.open_group(path, mode="r", use_consolidated=False)
    return {"": container, **dict(container.members(max_depth=None))}


def read_images(nodes: Nodes) -> dict[str, Image]:
    """Return the images among groups, by their paths."""
    images = {}
    for path, node in nodes.items():
        if isinstance(node, zarr.Group) and "multiscales" in (ome := ome_of(node)):
            multiscale = ome["multiscales"][0]
            levels = tuple(dataset["path"] for dataset in multiscale["datasets"])
            pairs = [dataset["coordinateTransformations"] for dataset in multiscale["datasets"]]
            images[path] = Image(
                path=path,
                ome=ome,
                axes=tuple(axis["name"] for axis in multiscale["axes"]),
                levels=levels,
                arrays=tuple(nodes[f"{path}/{level}".strip("/")] for level in levels),
                scales=np.array([scale["scale"] for scale, _ in pairs]),
                starts=np.array([translation["translation"] for _, translation in pairs]),
            )
    return images


def ome_image_paths(path: Path) -> list[str]:
    """Return the paths of the images in a container, labels among them."""
    return sorted(read_images(read_nodes(path)))


def ome_faults(path: Path) -> list[str]:
    """Return what is wrong with the images of a container; empty where yaozarrs accepts them and nothing is wrong.

    Raises:
        ValueError: when yaozarrs refuses an image or its labels.
    """
    nodes = read_nodes(path)
    images = read_images(nodes)
    faults = list(_consolidated(path))
    for image in images.values():
        yaozarrs.validate_zarr_store(str(path / image.path))
        checks = (_levels(image), _coordinates(image, nodes), _channels(image), _labels(image, images, nodes))
        faults += [f"{image.path or '.'}: {fault}" for check in checks for fault in check]
    return faults


def _levels(image: Image) -> Iterator[str]:
    """Check shapes and positions of levels against their scales, and sizes of chunks."""
    finest, voxel = image.arrays[0], image.scales[0]
    for name, array, scale, start in zip(image.levels, image.arrays, image.scales, image.starts, strict=True):
        ratio = scale / voxel
        if (abs(np.array(array.shape) - finest.shape / ratio) >= 1).any():
            yield f"{name} of shape {array.shape} does not fit its scale, {ratio} times that of {finest.shape}"
        if (abs((start - image.starts[0]) / voxel - (ratio - 1) / 2) > CLOSE * ratio).any():
            yield f"{name} lies at {start}, not at the centre of the voxels that it averages"
        if array.dtype != finest.dtype:
            yield f"{name} has dtype {array.dtype}, not {finest.dtype}"
        if math.prod(array.chunks) * array.dtype.itemsize > MAX_CHUNK:
            yield f"{name} has chunks of more than {MAX_CHUNK} bytes"


def _coordinates(image: Image, nodes: Nodes) -> Iterator[str]:
    """Check 1-D coordinates beside each level against its scale and translation."""
    for name, array, scales, starts in zip(image.levels, image.arrays, image.scales, image.starts, strict=True):
        for axis, n, scale, start in zip(image.axes, array.shape, scales, starts, strict=True):
            place = f"{name.rpartition('/')[0]}/{axis}"
            coordinate = nodes.get(f"{image.path}/{place}".strip("/"))
            if coordinate is None or coordinate.dtype.kind not in "iuf":  # names of channels
                continue
            values = np.asarray(coordinate[...], np.float64)
            if values.shape != (n,) or abs(values - (start + scale * np.arange(n))).max() > CLOSE * scale:
                yield f"{place} is not {n} values from {start:g} by {scale:g}"


def _channels(image: Image) -> Iterator[str]:
    """Check the number of described channels, and the order of each window's values."""
    kinds = [axis["type"] for axis in image.ome["multiscales"][0]["axes"]]
    count = image.shapes[0][kinds.index("channel")] if "channel" in kinds else 1
    channels = image.ome.get("omero", {}).get("channels")
    if channels is not None and len(channels) != count:
        yield f"omero describes {len(channels)} of {count} channels"
    for channel in channels or ():
        low, start, end, high = (channel["window"][name] for name in ("min", "start", "end", "max"))
        if not low <= start < end <= high:
            yield f"omero has the window {low}, {start}, {end}, {high}"


def _labels(image: Image, images: Mapping[str, Image], nodes: Nodes) -> Iterator[str]:
    """Check that all labels of an image are listed, and lie where it lies, at as many levels."""
    folder = f"{image.path}/labels".strip("/")
    labels = {path.removeprefix(f"{folder}/"): label for path, label in images.items() if path.startswith(f"{folder}/")}
    if labels and sorted(ome_of(nodes[folder])["labels"]) != sorted(labels):
        yield f"labels lists {ome_of(nodes[folder])['labels']}, but there are {sorted(labels)}"
    for name, label in labels.items():
        shared = [image.axes.index(axis) for axis in label.axes]
        for kind in ("shapes", "scales", "starts"):
            own, others = getattr(image, kind)[:, shared], getattr(label, kind)
            if own.shape != others.shape or not np.allclose(own, others, rtol=CLOSE):
                yield f"labels/{name} has the {kind} {others.tolist()}, not {own.tolist()}"


def _consolidated(path: Path) -> Iterator[str]:
    """Check that consolidated metadata, where a group has them, repeat those of every node below it."""
    for file in (*path.rglob("zarr.json"), *path.rglob(".zmetadata")):
        content = json.loads(file.read_text())
        repeated = content.get("metadata") or (content.get("consolidated_metadata") or {}).get("metadata")
        names = ("zarr.json",) if file.name == "zarr.json" else (".zgroup", ".zarray", ".zattrs")
        below = {f.relative_to(file.parent): f for name in names for f in file.parent.rglob(name) if f != file}
        stored = {str(k if names[1:] else k.parent): json.loads(f.read_text()) for k, f in below.items()}
        if repeated is not None and _plain(repeated) != _plain(stored):
            yield f"consolidated metadata of {file.parent} are not those of its nodes"


def _plain(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in node.items() if k != "consolidated_metadata"} for name, node in nodes.items()}
