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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
import zarr

from oocpatch.outputs.coordinates import at_centres, head_attributes, scaled_coords, write_coords
from oocpatch.outputs.write_units import COMPRESSOR
from oocpatch.planning.arguments import clipped_chunks, one_of, write_unit
from oocpatch.planning.box import Ints
from oocpatch.planning.choices import OUTPUT_FORMATS
from oocpatch.planning.grid import Scale
from oocpatch.planning.heads import Head
from oocpatch.planning.plan import Plan
from oocpatch.planning.pyramid_levels import halvings, level_shape, task_memory
from oocpatch.storage.paths import StoragePath
from oocpatch.volumes.ome_metadata import METERS, Multiscale, OmeAxis, OmeLevel, coordinate, long_unit
from oocpatch.volumes.volume import Volume

ARRAY = "image"
"""Name of the array of each level."""

RESERVED = frozenset({"OME"})
"""Names that a series of images uses itself."""


def is_ome_zarr(plan: Plan) -> bool:
    """Return whether the output of a plan is an OME-Zarr."""
    return plan.parameters.get("output_format") == "ome-zarr"


def image_groups(heads: tuple[Head, ...]) -> dict[str, str]:
    """Return the group of each head's image in the output; an empty path is the output itself.

    Labels belong to the only image if they have its scale, and one channel or as many as it has.

    Raises:
        ValueError: if a head has a reserved name.
    """
    images = [head for head in heads if not head.labels]
    if len(heads) <= 1:
        return {head.name: "" for head in heads}
    fits = (h.scale == images[0].scale and h.out_channels in {1, images[0].out_channels} for h in heads if images)
    if len(images) == 1 and all(fits):
        return {h.name: f"labels/{h.name}" if h.labels else "" for h in heads}
    if taken := sorted(RESERVED & {h.name for h in heads}):
        raise ValueError(
            f"the outputs of the model must not be named {', '.join(taken)} in an OME-Zarr; rename them, or write "
            "output_format='zarr'"
        )
    return {h.name: h.name for h in heads}


@dataclass(frozen=True, slots=True)
class Image:
    """An image. Sizes are per axis of its arrays: looped axes, the channel if there is one, spatial axes.

    Attributes:
        name: name of the image, that of its head.
        dtype: dtype of its voxels.
        labels: whether they are labels.
        group: path of the image in the output.
        pyramid: axes, and paths, scales and translations of the levels.
        shapes: shapes of the levels.
        steps: factors between each level and the next coarser one; see `halvings`.
        chunks, unit: chunks and write unit of the finest level.
    """

    name: str
    dtype: str
    labels: bool
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
        return "mode" if self.labels else "mean"

    @property
    def task_memory(self) -> int:
        """Bytes that a task of the finest coarser level needs; 0 if there is none."""
        if not self.steps:
            return 0
        return task_memory(self.shapes[1], self.chunks, self.unit, self.steps[0], np.dtype(self.dtype).itemsize)


def images_of(plan: Plan, volume: Volume, levels: int | None = None) -> tuple[Image, ...]:
    """Return the images of a plan's output; `levels` is that of the existing image whose labels the output is."""
    groups = image_groups(plan.heads)
    images: dict[str, Image] = {}
    for head in sorted(plan.heads, key=lambda h: groups[h.name] != ""):  # the image before its labels
        if (group := groups[head.name]).startswith("labels/"):
            count: int | None = len(images[""].shapes)  # labels must have as many levels as their image
        else:
            count = None if group or not head.labels else levels
        images[group] = _image(plan, volume, head, group, count)
    return tuple(images[groups[head.name]] for head in plan.heads)


def _image(plan: Plan, volume: Volume, head: Head, group: str, levels: int | None) -> Image:
    """Return the image of a head, with a number of levels if one is given."""
    return image_of(
        volume, head.name, head.out_dtype,
        shape=plan.frames[plan.heads.index(head)].grid.shape,
        chunks=head.chunks,
        unit=head.unit,
        scales=head.scale,
        channel=None if head.channel_axis is None else (head.channel_axis, head.out_channels, 1),
        labels=head.labels,
        group=group,
        levels=levels,
    )  # fmt: skip


def image_of(
    volume: Volume,
    name: str,
    dtype: str,
    *,
    shape: Ints,
    chunks: Ints,
    unit: Ints,
    scales: Sequence[Scale],
    channel: tuple[str, int, int] | None,
    labels: bool,
    group: str = "",
    levels: int | None = None,
) -> Image:
    """Return an image on the grid of a volume, or on a multiple or part of it.

    Shape, chunks, write unit and scales are per looped and spatial axis; `channel` is name, number and chunk of the
    channels. Without a number of levels, the coarsest is the first that has no more voxels than a chunk.
    """
    rows: list[tuple[OmeAxis, float, float, int, int, int]] = []
    negated: tuple[str, ...] = ()
    for axis_name, (times, per), n, chunk, size in zip(volume.names, scales, shape, chunks, unit, strict=True):
        axis, scale, start = axis_transform(volume, axis_name)
        if scale < 0:  # NGFF scales are positive: the axis is written with the opposite direction
            negated, scale, start = (*negated, axis_name), -scale, -start
        rows.append((axis, scale * per / times, start + (per / times - 1) / 2 * scale, n, chunk, size))
    if channel is not None:  # NGFF wants time before channels
        axis_name, n, chunk = channel
        rows.insert(len(shape) - volume.spatial_ndim, (OmeAxis(axis_name, "channel"), 1.0, 0.0, n, chunk, chunk))
    axes, steps_of_axes, starts, sizes, chunks, unit = zip(*rows, strict=True)
    steps = halvings(sizes, chunks, _comparable(axes, steps_of_axes), volume.spatial_ndim, levels)
    shapes, pyramid_levels = [sizes], [OmeLevel(f"scale0/{ARRAY}", steps_of_axes, starts)]
    for number, step in enumerate(steps, 1):
        above = pyramid_levels[-1]
        shapes.append(level_shape(shapes[-1], step))
        larger = tuple(s * f for s, f in zip(above.scale, step, strict=True))
        axis_values = zip(above.translation, above.scale, step, strict=True)
        centre = tuple(t + s * (f - 1) / 2 for t, s, f in axis_values)  # of the voxels that become the first one
        pyramid_levels.append(OmeLevel(f"scale{number}/{ARRAY}", larger, centre))
    pyramid = Multiscale(axes, tuple(pyramid_levels), group.rpartition("/")[2] or name, negated)
    return Image(name, dtype, labels, group, pyramid, tuple(shapes), steps, chunks, unit)


def axis_transform(volume: Volume, name: str) -> tuple[OmeAxis, float, float]:
    """Return an axis of the volume, the distance of its voxels' centres, and the coordinate of the first one.

    They come from the metadata of an OME-Zarr, else from the axis' coordinate, if that is numeric. The distance of an
    unevenly spaced coordinate is its mean; that of a coordinate that decreases is negative.

    Raises:
        ValueError: if the coordinate neither increases nor decreases.
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
    if step == 0 or not math.isfinite(step):
        raise ValueError(
            f"coordinates must increase or decrease along each axis in an OME-Zarr, got {values[0]} to {values[-1]} "
            f"along {name}; write output_format='zarr'"
        )
    return OmeAxis(name, kind, unit), step, float(values[0])


def _comparable(axes: Sequence[OmeAxis], scales: Sequence[float]) -> Sequence[float]:
    """Return the voxel sizes in a common unit; all equal if their units cannot be compared."""
    space = {axis.unit for axis in axes if axis.kind == "space"}
    if len(space) == 1:
        return scales
    if not space <= METERS.keys():
        return [1.0] * len(scales)
    return [s * 10.0 ** METERS.get(axis.unit or "", 0) for axis, s in zip(axes, scales, strict=True)]


def create_images(path: StoragePath, plan: Plan, volume: Volume, images: tuple[Image, ...]) -> None:
    """Create groups, arrays of all levels, coordinates and metadata in the existing group of an output."""
    store = path.store()
    for head, image in zip(plan.heads, images, strict=True):
        if image.group:
            zarr.create_group(store, path=image.group, zarr_format=3, attributes=image_attributes(image))
        coords, attributes = scaled_coords(volume, plan, head), head_attributes(volume, plan, head)
        create_levels(path, image, coords, attributes, plan.output_fill)
    labels = [image.name for image in images if image.group.startswith("labels/")]
    if labels:
        zarr.open_group(store, path="labels", mode="r+").attrs.update(ome_attribute({"labels": labels}))
    if all(image.group for image in images):
        series = [image.group for image in images]
        zarr.create_group(store, path="OME", zarr_format=3, attributes=ome_attribute({"series": series}))


def create_levels(
    path: StoragePath, image: Image, coords: Mapping[str, xarray.Variable], attributes: Mapping[str, Any], fill: float
) -> None:
    """Create the arrays of all levels of an image, and their coordinates, given those of the finest."""
    store = path.store()
    for level, shape, of_level in zip(image.paths, image.shapes, _level_coords(image, coords), strict=True):
        parent = level.removesuffix(f"/{ARRAY}")
        zarr.create_group(store, path=parent, zarr_format=3)
        write_coords(path / parent, of_level, {})
        chunks, unit = clipped_chunks(image.chunks, shape), write_unit(image.chunks, image.unit, shape)
        zarr.create_array(
            store,
            name=level,
            shape=shape,
            chunks=chunks,
            shards=unit if image.unit != image.chunks else None,
            dtype=image.dtype,
            compressors=COMPRESSOR,
            zarr_format=3,
            fill_value=fill,
            dimension_names=[axis.name for axis in image.pyramid.axes],
            attributes=dict(attributes),
        )


def root_attributes(images: tuple[Image, ...], *, in_parent: bool = False) -> dict[str, Any]:
    """Return the OME metadata of the output's group; with `in_parent`, it is labels of an existing image."""
    if not images:
        return {}
    first = next((image for image in images if not image.group), None)
    return (
        ome_attribute({"bioformats2raw.layout": 3}) if first is None else image_attributes(first, in_parent=in_parent)
    )


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


def image_attributes(image: Image, *, in_parent: bool = False) -> dict[str, Any]:
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
    if image.pyramid.negated:
        multiscale["metadata"]["negated_axes"] = list(image.pyramid.negated)
    metadata: dict[str, Any] = {"multiscales": [multiscale]}
    if image.labels and np.dtype(image.dtype).kind in "iu":
        has_source = in_parent or image.group.startswith("labels/")
        metadata["image-label"] = {"source": {"image": "../../"}} if has_source else {}
    attributes = ome_attribute(metadata)
    if importlib.util.find_spec("yaozarrs") is not None:
        from yaozarrs import v05  # noqa: PLC0415 - optional, and slow to import

        v05.OMEAttributes.model_validate(attributes)
    return attributes


def ome_attribute(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return OME metadata as the attribute of a group.

    >>> ome_attribute({"labels": ["nuclei"]})
    {'ome': {'version': '0.5', 'labels': ['nuclei']}}
    """
    return {"ome": {"version": "0.5", **metadata}}


def checked_output_format(value: str, volume: Volume) -> str:
    """Check an `output_format`, and return the format that `"auto"` stands for.

    Raises:
        ValueError: if there is no such format, or the volume does not fit it.
    """
    one_of("output_format", value, OUTPUT_FORMATS)
    if value == "auto" and volume.source.image is None and volume.source.display is not None:
        try:  # a part of an image in xarray may be no image any more
            return checked_output_format("ome-zarr", volume)
        except ValueError:
            return "zarr"
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
