"""An output as OME-Zarr: its images, their levels, coordinates and metadata.

```text
<output>/                  the image of the only head, or of the only head that is not labels
    scale0/image, y, x     the finest level and 1-D coordinates of its voxels' centres
    scale1/image, y, x     ...
    labels/<head>/scale0/  heads that are labels of this image
<output>/<head>/scale0/    otherwise each head is an image, and the output is a series of images
```

The finest level is the head's array, which the engine writes; the other levels are computed from it afterwards. All
metadata are written before, so that only voxels are missing after a crash.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray
import zarr
from zarr.abc.store import Store

from oocpatch.outputs.coordinates import at_centres, json_attributes, scaled_coords, write_coords
from oocpatch.planning.arguments import one_of
from oocpatch.planning.box import Ints
from oocpatch.planning.choices import OUTPUT_FORMATS
from oocpatch.planning.heads import Head
from oocpatch.planning.plan import Plan
from oocpatch.planning.pyramid_levels import halvings, level_chunks, level_shape
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.ome_metadata import METERS, Multiscale, OmeAxis, OmeLevel, coordinate, long_unit
from oocpatch.volumes.volume import Volume

ARRAY = "image"
"""Name of the array of each level."""

ZARR_FORMATS: dict[str, Literal[2, 3]] = {"0.4": 2, "0.5": 3}

RESERVED = frozenset({"OME"})
"""Names that a series of images uses itself."""


def ome_version(plan: Plan) -> str | None:
    """Return the OME-Zarr version of a plan's output; None if it is not an OME-Zarr."""
    return {"ome-zarr": "0.5", "ome-zarr-0.4": "0.4"}.get(plan.parameters.get("output_format", "zarr"))


def image_groups(heads: tuple[Head, ...]) -> dict[str, str]:
    """Return the group of each head's image in the output; an empty path is the output itself.

    Raises:
        ValueError: if a head has a reserved name.
    """
    images = [head.name for head in heads if not head.labels]
    if len(heads) == 1:
        return {heads[0].name: ""}
    if len(images) == 1:
        return {h.name: f"labels/{h.name}" if h.labels else "" for h in heads}
    if taken := sorted(RESERVED & {h.name for h in heads}):
        raise ValueError(
            f"the outputs of the model must not be named {', '.join(taken)} in an OME-Zarr; rename them, or write "
            "output_format='zarr'"
        )
    return {h.name: h.name for h in heads}


@dataclass(frozen=True, slots=True)
class Image:
    """The image of a head. Sizes are per axis of its arrays: looped axes, the channel if there is one, spatial axes.

    Attributes:
        head: the head.
        group: path of the image in the output.
        pyramid: axes, and paths, scales and translations of the levels.
        shapes: shapes of the levels.
        steps: factors between each level and the next coarser one; see `halvings`.
        chunks, unit: chunks and write unit of the finest level.
    """

    head: Head
    group: str
    pyramid: Multiscale
    shapes: tuple[Ints, ...]
    steps: tuple[Ints, ...]
    chunks: Ints
    unit: Ints

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the levels' arrays in the output."""
        return tuple(f"{self.group}/{level.path}".strip("/") for level in self.pyramid.levels)

    @property
    def method(self) -> str:
        """Reduction of several voxels of a level to one of the next: `mode` or `mean`."""
        return "mode" if self.head.labels else "mean"


def images_of(plan: Plan, volume: Volume, levels: int | None = None) -> tuple[Image, ...]:
    """Return the images of a plan's output; `levels` is that of the existing image whose labels the output is."""
    groups = image_groups(plan.heads)
    first = next((h for h in plan.heads if not groups[h.name]), None)
    own = levels if first is not None and first.labels else None
    images = {} if first is None else {first.name: _image(plan, volume, first, "", own)}
    levels = len(images[first.name].shapes) if first is not None else None
    for head in plan.heads:
        if head is not first:
            # Labels must have as many levels as their image.
            count = levels if groups[head.name].startswith("labels/") else None
            images[head.name] = _image(plan, volume, head, groups[head.name], count)
    return tuple(images[head.name] for head in plan.heads)


def _image(plan: Plan, volume: Volume, head: Head, group: str, levels: int | None = None) -> Image:
    """Return the image of a head, with a number of levels if one is given."""
    looped = len(plan.axes) - plan.spatial
    axes, scales, starts = [], [], []
    for name, ratio in zip(plan.axes, head.scale, strict=True):
        axis, scale, start = axis_transform(volume, name)
        axes.append(axis)
        scales.append(scale * ratio[1] / ratio[0])
        starts.append(start + (ratio[1] / ratio[0] - 1) / 2 * scale)
    shape = [-(-n * times // per) for n, (times, per) in zip(plan.shape, head.scale, strict=True)]
    chunks, unit = list(head.chunks), list(head.unit)
    if head.channel_axis is not None:  # NGFF wants time before channels
        axes.insert(looped, OmeAxis(head.channel_axis, "channel"))
        scales.insert(looped, 1.0)
        starts.insert(looped, 0.0)
        shape.insert(looped, head.out_channels)
        chunks.insert(looped, 1)
        unit.insert(looped, 1)
    steps = halvings(tuple(shape), tuple(chunks), _comparable(axes, scales), plan.spatial, levels)
    shapes, pyramid_levels = [tuple(shape)], [OmeLevel(f"scale0/{ARRAY}", tuple(scales), tuple(starts))]
    for number, step in enumerate(steps, 1):
        above = pyramid_levels[-1]
        shapes.append(level_shape(shapes[-1], step))
        larger = tuple(s * f for s, f in zip(above.scale, step, strict=True))
        axis_values = zip(above.translation, above.scale, step, strict=True)
        centre = tuple(t + s * (f - 1) / 2 for t, s, f in axis_values)  # of the voxels that become the first one
        pyramid_levels.append(OmeLevel(f"scale{number}/{ARRAY}", larger, centre))
    pyramid = Multiscale(tuple(axes), tuple(pyramid_levels), group.rpartition("/")[2] or head.name)
    return Image(head, group, pyramid, tuple(shapes), steps, tuple(chunks), tuple(unit))


def axis_transform(volume: Volume, name: str) -> tuple[OmeAxis, float, float]:
    """Return an axis of the volume, the distance of its voxels' centres, and the coordinate of the first one.

    They come from the metadata of an OME-Zarr, else from the axis' coordinate, if that is numeric. The distance of an
    unevenly spaced coordinate is its mean.

    Raises:
        ValueError: if the coordinate decreases.
    """
    kind = "time" if name in volume.names[: -volume.spatial_ndim] else "space"
    if (image := volume.source.image) is not None:
        for axis, scale, start in zip(image.axes, image.levels[0].scale, image.levels[0].translation, strict=True):
            if axis.name == name:
                return OmeAxis(name, kind, long_unit(axis.unit)), scale, start
    variable = volume.source.coords.get(name)
    if variable is None:
        return OmeAxis(name, kind), 1.0, 0.0
    unit = long_unit(variable.attrs.get("units", variable.attrs.get("unit")))
    values = np.asarray(variable.values)
    if values.dtype.kind not in "iuf" or values.shape != (volume.shape[volume.names.index(name)],):
        return OmeAxis(name, kind, unit), 1.0, 0.0
    if len(values) == 1:
        return OmeAxis(name, kind, unit), 1.0, float(values[0])
    mean = (float(values[-1]) - float(values[0])) / (len(values) - 1)
    # Twelve digits: the step of 0.1, 0.2, 0.3 ... is 0.1 and not 0.09999999999999999.
    step = float(f"{mean:.12g}")
    if not step > 0:
        raise ValueError(
            f"coordinates must increase along each axis in an OME-Zarr, got {values[0]} to {values[-1]} along {name}; "
            "sort the volume by it, or write output_format='zarr'"
        )
    return OmeAxis(name, kind, unit), step, float(values[0])


def _comparable(axes: list[OmeAxis], scales: list[float]) -> list[float]:
    """Return the voxel sizes in a common unit; all equal if their units cannot be compared."""
    space = {axis.unit for axis in axes if axis.kind == "space"}
    if len(space) == 1:
        return scales
    if not space <= METERS.keys():
        return [1.0] * len(scales)
    return [s * 10.0 ** METERS.get(axis.unit or "", 0) for axis, s in zip(axes, scales, strict=True)]


def create_images(path: StoragePath, plan: Plan, volume: Volume, images: tuple[Image, ...], version: str) -> None:
    """Create groups, arrays of all levels, coordinates and metadata in the existing group of an output."""
    store, zarr_format = path.store(), ZARR_FORMATS[version]
    settings = {"fill_value": plan.parameters["output_fill"], "zarr_format": zarr_format}
    for image in images:
        if image.group:
            attributes = image_attributes(image, version)
            zarr.create_group(store, path=image.group, zarr_format=zarr_format, attributes=attributes)
        coords = _level_coords(image, scaled_coords(volume, plan, image.head))
        for level, shape, of_level in zip(image.paths, image.shapes, coords, strict=True):
            parent = level.removesuffix(f"/{ARRAY}")
            zarr.create_group(store, path=parent, zarr_format=zarr_format)
            write_coords(path / parent, of_level, {}, zarr_format)
            _create_level(store, level, shape, image, {**settings, "attributes": json_attributes(volume)})
    labels = [image.head.name for image in images if image.group.startswith("labels/")]
    if labels:
        zarr.open_group(store, path="labels", zarr_format=zarr_format, mode="r+").attrs.update(
            versioned_attributes({"labels": labels}, version)
        )
    if all(image.group for image in images):
        series = versioned_attributes({"series": [image.group for image in images]}, version)
        zarr.create_group(store, path="OME", zarr_format=zarr_format, attributes=series)


def root_attributes(images: tuple[Image, ...], version: str | None, *, in_parent: bool = False) -> dict[str, Any]:
    """Return the OME metadata of the output's group; with `in_parent`, it is labels of an existing image."""
    if version is None:
        return {}
    first = next((image for image in images if not image.group), None)
    if first is None:
        return versioned_attributes({"bioformats2raw.layout": 3}, version)
    return image_attributes(first, version, in_parent=in_parent)


def _create_level(store: Store, path: str, shape: Ints, image: Image, settings: dict[str, Any]) -> None:
    """Create the array of a level."""
    names = [axis.name for axis in image.pyramid.axes]
    chunks, unit = level_chunks(shape, image.chunks, image.unit)
    if settings["zarr_format"] == 3:
        settings = {**settings, "dimension_names": names, "shards": unit if image.unit != image.chunks else None}
    else:
        attributes = {**settings["attributes"], "_ARRAY_DIMENSIONS": names}
        keys = {"name": "v2", "separator": "/"}
        # All readers take None for zero; with 0, xarray would interpret zeros as missing.
        fill = settings["fill_value"] or None
        settings = {**settings, "attributes": attributes, "chunk_key_encoding": keys, "fill_value": fill}
    zarr.create_array(store, name=path, shape=shape, chunks=chunks, dtype=image.head.out_dtype, **settings)


def _level_coords(image: Image, finest: Mapping[str, xarray.Variable]) -> list[dict[str, xarray.Variable]]:
    """Return the coordinates of each level: those of the finest, along halved axes at the new centres."""
    axes, levels = image.pyramid.axes, image.pyramid.levels
    coords_of_finest = dict(finest)
    for a, axis in enumerate(axes):
        if axis.kind != "channel" and axis.name not in coords_of_finest:
            step, start = levels[0].scale[a], levels[0].translation[a]
            coords_of_finest[axis.name] = coordinate(axis.name, image.shapes[0][a], step, start, axis.unit)
    every = [coords_of_finest]
    for level, shape, factors in zip(levels[1:], image.shapes[1:], image.steps, strict=True):
        halved = {axis.name: a for a, axis in enumerate(axes) if factors[a] > 1}
        coords = {}
        for name, variable in every[-1].items():
            if not halved.keys() & set(map(str, variable.dims)):
                coords[name] = variable
            elif variable.ndim == 1 and variable.dtype.kind in "iuf":
                a = halved[str(variable.dims[0])]
                even = coordinate(str(variable.dims[0]), shape[a], level.scale[a], level.translation[a])
                values = at_centres(np.asarray(variable.values, np.float64), (1, 2))
                close = np.allclose(values, even.values, rtol=0, atol=1e-6 * level.scale[a])
                coords[name] = xarray.Variable(variable.dims, even.values if close else values, variable.attrs)
        every.append(coords)
    return every


def image_attributes(image: Image, version: str, *, in_parent: bool = False) -> dict[str, Any]:
    """Return the OME metadata of an image as attributes of its group.

    Raises:
        ValueError: if yaozarrs is installed and rejects them.
    """
    axes = [
        {"name": axis.name, "type": axis.kind, **({"unit": axis.unit} if axis.unit else {})}
        for axis in image.pyramid.axes
    ]
    datasets = [
        {
            "path": level.path,
            "coordinateTransformations": [
                {"type": "scale", "scale": list(level.scale)},
                {"type": "translation", "translation": list(level.translation)},
            ],
        }
        for level in image.pyramid.levels
    ]
    multiscale: dict[str, Any] = {
        "name": image.pyramid.name,
        "axes": axes,
        "datasets": datasets,
        "type": image.method,
        "metadata": {"method": "oocpatch", "description": f"each level is the {image.method} of the one above"},
    }
    metadata: dict[str, Any] = {"multiscales": [multiscale]}
    if image.head.labels and np.dtype(image.head.out_dtype).kind in "iu":
        label: dict[str, Any] = (
            {"source": {"image": "../../"}} if in_parent or image.group.startswith("labels/") else {}
        )
        metadata["image-label"] = label if version == "0.5" else {"version": version, **label}
    if version == "0.4":
        multiscale["version"] = version
    attributes = versioned_attributes(metadata, version)
    _validate(attributes, version)
    return attributes


def versioned_attributes(metadata: dict[str, Any], version: str) -> dict[str, Any]:
    """Return OME metadata as attributes of a group.

    >>> versioned_attributes({"labels": ["nuclei"]}, "0.5")
    {'ome': {'version': '0.5', 'labels': ['nuclei']}}
    """
    return {"ome": {"version": version, **metadata}} if version == "0.5" else metadata


def _validate(attributes: dict[str, Any], version: str) -> None:
    if importlib.util.find_spec("yaozarrs") is None:
        return
    from yaozarrs import v04, v05  # noqa: PLC0415 - optional, and slow to import

    if version == "0.5":
        v05.OMEAttributes.model_validate(attributes)
    else:
        v04.Image.model_validate(attributes)


def checked_output_format(value: str, volume: Volume) -> str:
    """Check an `output_format`, and return the format that `"auto"` stands for.

    Raises:
        ValueError: if there is no such format, or the volume does not fit it.
    """
    one_of("output_format", value, OUTPUT_FORMATS)
    if value == "auto":
        value = "zarr" if volume.source.image is None else "ome-zarr"
    if value != "zarr":
        looped = len(volume.shape) - volume.spatial_ndim
        if not 2 <= volume.spatial_ndim <= 3 or looped > 1:
            raise ValueError(
                "an OME-Zarr must have two or three axes in space and at most one for time, got "
                f"{', '.join(volume.axes.names)}; write output_format='zarr', or name the axes with `axes`"
            )
        for name in volume.names:
            axis_transform(volume, name)
    return value
