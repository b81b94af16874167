"""What neuroglancer shows of a result: a layer per output over the input, each read from the Zarr on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from oocpatch.outputs.ome_zarr import axis_transform
from oocpatch.outputs.record import array_path
from oocpatch.storage.paths import LocalPath
from oocpatch.visualization import colormaps as colours
from oocpatch.visualization.display_source import DisplaySource, open_display_source, record_of
from oocpatch.visualization.picture import fractions, input_of, is_rgb, kind_of, noted_volume
from oocpatch.visualization.slices import plane
from oocpatch.volumes.formats.spec import parse_address
from oocpatch.volumes.ome_metadata import METERS, ome_attributes
from oocpatch.volumes.volume import Volume

DTYPES = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "float32"})
"""Those that the viewer reads."""

PIXELS = 256
PANEL, SCREEN = 330, 700
"""Pixels of one of four panels, and of one alone, about: what is shown first fills it."""

RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
CHANNELS = 6
"""Channels that are mixed; with more of them each is looked at by itself."""

SHADER = """#uicontrol invlerp normalized
#uicontrol vec3 colour color
void main() { emitRGB(colour * normalized()); }"""


@dataclass(frozen=True)
class Layer:
    """One thing to show.

    Attributes:
        name: of the layer.
        folder: directory that has to be served.
        inside: path of the image or array in it.
        sight: it, opened.
        kind: `"labels"`, `"scores"`, `"image"` or `"rgb"`.
        ome: whether there is an OME-Zarr that says where its voxels lie.
        windows: values that are black and white, per channel.
    """

    name: str
    folder: Path
    inside: str
    sight: DisplaySource
    kind: str
    ome: bool
    windows: tuple[tuple[float, float], ...] = field(default=())


def layers_of(
    output: Any, *, volume: Any = None, head: str | None = None, kind: str = "auto", axes: str | None = None
) -> tuple[list[Layer], list[str]]:
    """The layers of a result or a volume, the input first; and what cannot be shown, and why.

    Raises:
        ValueError: when nothing can.
    """
    record = record_of(output)
    if record is None:
        candidates = [
            (Path(os.fspath(output)).name, output, open_display_source(output, PIXELS, head=head, axes=axes), kind)
        ]
    else:
        heads = list(record.details["heads"]) if head is None else [head]
        candidates = [(name, output, open_display_source(output, PIXELS, head=name), kind) for name in heads]
    sight = candidates[0][2]
    if (below := input_of(sight, volume, PIXELS)) is not None:
        candidates.insert(0, ("input", noted_volume(sight) if volume is None else volume, below, "auto"))
    layers, refused = [], []
    for name, address, seen, asked in candidates:
        try:
            layers.append(_layer(name, address, seen, asked))
        except ValueError as error:
            refused.append(str(error))
    if not layers:
        raise ValueError("; ".join(refused))
    return layers, refused


def _layer(name: str, address: Any, sight: DisplaySource, kind: str) -> Layer:
    """One layer.

    Raises:
        ValueError: when the viewer cannot read it.
    """
    if str(sight.volume.dtype) not in DTYPES:
        raise ValueError(f"{name}: the viewer reads {', '.join(sorted(DTYPES))}, got {sight.volume.dtype}")
    if sight.record is not None and sight.head is not None and Path(address).is_dir():
        folder, inside = Path(address), array_path(sight.record, sight.head)
        ome = bool(sight.record.details.get("pyramids")) and sight.record.complete  # else coarser levels are missing
        inside = inside.rpartition("scale0/")[0].strip("/") if ome else inside
    else:
        folder, inside, ome = _place(name, address, sight.volume)
    last = len(sight.volume.shape)
    values = plane(sight.volume, (last - 2, last - 1), (PIXELS, PIXELS), [0.5] * last) if last > 1 else np.zeros((1, 1))
    chosen = kind_of(sight, [values]) if kind == "auto" else kind
    if chosen == "labels" and sight.volume.dtype.kind == "f":
        chosen = "image"
    each = [(0.0, 255.0)] * 3 if is_rgb(sight) else [colours.window_of([v]) for v in values]
    windows = [(0.0, 1.0)] * len(values) if chosen == "scores" and fractions([values]) else each
    return Layer(name, folder.absolute(), inside, sight, chosen, ome, tuple(windows))


def _place(name: str, address: Any, volume: Volume) -> tuple[Path, str, bool]:
    """Directory and path in it of a volume that is no output of a run, and whether it is an OME-Zarr."""
    if (
        not isinstance(address, (str, os.PathLike))
        or parse_address(str(address)) is not None
        or not Path(address).is_dir()
    ):
        raise ValueError(
            f"{name}: only Zarr in local directories is served, got {address}; `oocpatch convert` makes one"
        )
    folder = Path(address)
    try:
        attributes = dict(zarr.open_group(LocalStore(folder), mode="r").attrs)
    except (OSError, ValueError):
        return folder, "", False  # an array
    if "multiscales" in ome_attributes(attributes):
        return folder, "", True
    location = volume.source.location
    if not isinstance(location, LocalPath):
        raise ValueError(f"{name}: only Zarr in local directories is served, got {address}")
    return folder, location.relative_to(folder.resolve()).as_posix(), False


def state_of(layers: list[Layer], sources: list[str]) -> dict[str, Any]:
    """The state of the viewer, as it stands in its address.

    Args:
        layers: what to show.
        sources: the address of each.
    """
    first = layers[-1].sight.volume
    shown = first.names[-first.spatial_ndim :][-3:]
    extents, voxel = _extents(first, shown)
    dimensions = {name: list(_step(first, name)[:2]) for name in reversed(first.names)}
    return {
        "dimensions": dimensions,
        "displayDimensions": list(reversed(shown)),
        "crossSectionScale": max(extents) / voxel / (PANEL if len(shown) > 2 else SCREEN),
        "projectionScale": 1.5 * max(extents) / voxel,
        "layout": "4panel" if len(shown) > 2 else "xy",
        "showSlices": True,
        "layers": [
            state
            for number, (layer, source) in enumerate(zip(layers, sources, strict=True))
            for state in _layer_states(layer, source, over=number > 0)
        ],
    }


def _extents(volume: Volume, names: tuple[str, ...]) -> tuple[list[float], float]:
    """Lengths along axes, and the smallest voxel."""
    steps = [_step(volume, name)[0] for name in names]
    lengths = [volume.shape[volume.names.index(name)] for name in names]
    return [n * s for n, s in zip(lengths, steps, strict=True)], min(steps)


def _step(volume: Volume, name: str) -> tuple[float, str, float]:
    """Size of a voxel along an axis, in meters, seconds or nothing; the unit; where the first one is, in voxels."""
    try:
        axis, step, start = axis_transform(volume, name)
    except ValueError:  # coordinates that decrease
        return 1.0, "", 0.0
    if axis.unit in METERS:
        return step * 10.0 ** METERS[axis.unit], "m", start / step
    return step, "", start / step


def _layer_states(layer: Layer, source: str, *, over: bool) -> Iterator[dict[str, Any]]:
    """A layer, or one per channel: the viewer mixes layers, and channels only where they share their chunks."""
    volume = layer.sight.volume
    common: dict[str, Any] = {"name": layer.name, "source": source}
    if not layer.ome:
        common["source"] = {"url": source, "transform": _transform(volume)}
    if layer.kind == "labels":
        yield {"type": "segmentation", **common, "selectedAlpha": 0.5, "notSelectedAlpha": 0.2}
        return
    common = {"type": "image", **common, "opacity": 0.6 if over else 1}
    if not 1 < volume.channels <= CHANNELS:  # of more of them one is shown, and a slider
        if volume.channels == 1:
            common["shaderControls"] = {"normalized": {"range": list(layer.windows[0])}}
        yield common
        return
    tones = RGB if layer.kind == "rgb" else [colours.label_colour(c + 1) for c in range(volume.channels)]
    for c, (window, tone) in enumerate(zip(layer.windows, tones, strict=False)):
        yield {
            **common,
            "name": f"{layer.name} {c}",
            "localDimensions": {f"{volume.channel_axis}'": [1, ""]},
            "localPosition": [c],
            "blend": "additive" if c else "default",
            "shader": SHADER,
            "shaderControls": {
                "normalized": {"range": list(window)},
                "colour": "#" + "".join(f"{v:02x}" for v in tone),
            },
        }


def _transform(volume: Volume) -> dict[str, Any]:
    """Names, units and places of an array's axes."""
    given: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    matrix = []
    names = volume.axes.names
    for a, name in enumerate(names):
        channel = a == volume.axes.channel
        step, unit, start = (1.0, "", 0.0) if channel else _step(volume, name)
        given[name] = shown[f"{name}'" if channel else name] = [step, unit]
        corner = 0.0 if channel else (start if math.isfinite(start) else 0.0) - 0.5  # places are those of centres
        matrix.append([*(float(b == a) for b in range(len(names))), corner])
    return {"outputDimensions": shown, "inputDimensions": given, "matrix": matrix}
