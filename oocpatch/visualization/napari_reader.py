"""Read volumes and results into layers of napari, which is not imported: layers are tuples of data, settings and kind.

napari finds `get_reader` by the manifest `oocpatch/napari.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array
import numpy as np
import numpy.typing as npt

from oocpatch.outputs.ome_zarr import axis_transform
from oocpatch.planning.box import selected
from oocpatch.visualization import colormaps
from oocpatch.visualization.anatomy import anatomical_planes
from oocpatch.visualization.display_source import folder_of
from oocpatch.visualization.layers import Layer, layers_of
from oocpatch.volumes.affine import spacing_of
from oocpatch.volumes.formats.spec import parse_address
from oocpatch.volumes.volume import Volume, default_chunks

LayerData = tuple[Any, dict[str, Any], str]
HEAT = "inferno"
MILLIMETER = "millimeter"


def get_reader(path: str | list[str]) -> Callable[[str], list[LayerData]] | None:
    """Return the reader of a path; None for one that holds no volume that can be read."""
    if not isinstance(path, str) or (parse_address(path) is None and folder_of(path) is None):
        return None
    return read


def read(path: str) -> list[LayerData]:
    """Return the layers of a result over its input, or of a volume, with names, places, windows and colours."""
    return [_layer_data(layer, number) for number, layer in enumerate(layers_of(path))]


def _layer_data(layer: Layer, number: int) -> LayerData:
    volume = layer.volume
    order, flips, steps, starts, units = _orientation(volume)
    levels = [_array(level)[(slice(None), *flips)] for level in layer.levels]
    levels = [level.transpose(0, *(1 + a for a in order)) for level in levels]
    settings: dict[str, Any] = {
        "name": layer.name,
        "scale": [steps[a] for a in order],
        "translate": [starts[a] for a in order],
        "units": [units[a] or "pixel" for a in order],
        "axis_labels": [volume.names[a] for a in order],
        "multiscale": len(levels) > 1,
    }
    if layer.kind == "rgb":
        settings["rgb"], levels = True, [level.transpose(*range(1, level.ndim), 0) for level in levels]
    elif volume.channels == 1:
        levels = [level[0] for level in levels]
    data = levels if len(levels) > 1 else levels[0]
    if layer.kind == "labels":
        if volume.channels > 1:  # an axis of its own, with a slider
            settings |= {name: [first, *settings[name]] for name, first in (("scale", 1), ("translate", 0))}
            settings |= {"units": ["pixel", *settings["units"]], "axis_labels": ["c", *settings["axis_labels"]]}
        if volume.dtype == np.uint8:  # classes, in the colours of pictures; ids of objects have napari's own
            colours = np.c_[colormaps.label_colours(np.arange(1, 256)), np.ones(255)]
            settings["colormap"] = {None: [0, 0, 0, 0], **{n: c.tolist() for n, c in enumerate(colours, 1)}}
        return data, {**settings, "opacity": 0.5}, "labels"
    if layer.kind == "rgb":
        return data, settings, "image"
    several = volume.channels > 1
    if several:
        settings |= {"channel_axis": 0, "name": [f"{layer.name} {name}" for name in layer.channel_names]}
    windows = [list(window) for window in layer.windows]
    tones = layer.colours if several else [HEAT if layer.kind == "scores" else "gray"]
    settings |= {"contrast_limits": windows if several else windows[0], "colormap": tones if several else tones[0]}
    if several or number:
        settings["blending"] = "additive"
    return data, settings, "image"


def _orientation(
    volume: Volume,
) -> tuple[list[int], list[slice], list[float], list[float], list[str | None]]:
    """Return the order of looped and spatial axes, their directions, steps, starts and units.

    Axes of an affine are ordered from head to feet, front to back, and right to left, so that napari shows what
    radiologists look at; steps and starts are in these directions, in millimeters.
    """
    space = volume.spatial_ndim
    order, looped = list(range(len(volume.shape))), len(volume.shape) - space
    steps, starts, units = [], [], []
    for name in volume.names:
        try:
            axis, step, start = axis_transform(volume, name)
        except ValueError:  # coordinates that are all the same
            step = 0.0
        step, start, unit = (step, start, axis.unit) if step > 0 else (1.0, 0.0, None)
        steps.append(step)
        starts.append(start)
        units.append(unit)
    flips = [slice(None)] * len(order)
    if planes := anatomical_planes(volume):
        axial, coronal = planes[:2]
        backwards = dict(zip((*axial.axes, *coronal.axes), (*axial.flips, *coronal.flips), strict=True))
        order[looped:] = [coronal.axes[0], *axial.axes]
        corner = [n - 1 if backwards[a] else 0 for a, n in enumerate(volume.shape) if a >= looped]
        right, front, head = (volume.affine @ [*corner, 1])[:3]
        for a, start in zip(order[looped:], (-head, -front, -right), strict=True):
            steps[a], starts[a], units[a] = spacing_of(volume.affine)[a - looped], float(start), MILLIMETER
            flips[a] = slice(None, None, -1 if backwards[a] else None)
    return order, flips, steps, starts, units


class _Reader:
    """A volume as an array `(C, *axes)` that dask reads in parts."""

    def __init__(self, volume: Volume) -> None:
        self._volume, self.dtype = volume, volume.dtype
        self.shape = (volume.channels, *volume.shape)
        self.ndim = len(self.shape)

    def __getitem__(self, selection: tuple[slice, ...]) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._volume.read(selected(selection[1:], self._volume.shape))[selection[0]]
        return values


def _array(volume: Volume) -> Any:
    chunks = (volume.channels, *default_chunks(volume, volume.dtype.itemsize))
    return dask.array.from_array(_Reader(volume), chunks, name=False, asarray=False)  # type: ignore[no-untyped-call]
