"""Layers of a viewer: a result over its input, or any volume, with levels, kind, windows and a table of objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from oocpatch.visualization import colormaps
from oocpatch.visualization.display_source import DisplaySource, display_levels, record_of
from oocpatch.visualization.object_table import read_table, segment_properties
from oocpatch.visualization.picture import channel_colours, channel_names, fractions, input_address, is_rgb, kind_of
from oocpatch.visualization.slices import plane
from oocpatch.volumes.volume import Volume

PIXELS = 256  # of the plane that windows are computed from

RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


@dataclass(frozen=True)
class Layer:
    """A volume or a head of an output to show.

    Attributes:
        sources: all levels, the finest first.
        kind: `"labels"`, `"scores"`, `"image"` or `"rgb"`.
        windows: values shown as black and white, per channel.
        properties: the table of its objects, as `segment_properties` returns it; None: there is none.
    """

    name: str
    sources: tuple[DisplaySource, ...]
    kind: str
    windows: tuple[tuple[float, float], ...] = ()
    properties: Mapping[str, Any] | None = None

    @property
    def levels(self) -> list[Volume]:
        """The volumes of all levels."""
        return [source.volume for source in self.sources]

    @property
    def volume(self) -> Volume:
        """The finest level."""
        return self.sources[0].volume

    @property
    def channel_names(self) -> list[str]:
        """Return the names of the channels, else their numbers."""
        return channel_names(self.volume)

    @property
    def colours(self) -> list[str]:
        """Return the colours of the channels, as `#RRGGBB`: those of the metadata, else by their number."""
        tones = RGB if self.kind == "rgb" else channel_colours(self.volume)
        return ["#{:02X}{:02X}{:02X}".format(*tone) for tone in tones]

    def factors(self, level: int) -> tuple[float, ...]:
        """Return voxels of the finest level per voxel of a level, along looped and spatial axes."""
        first, other = self.sources[0], self.sources[level]
        ratios = [b / a for a, b in zip(first.spacing, other.spacing, strict=True)]
        return tuple(map(_factor, first.volume.shape, other.volume.shape, ratios))


def _factor(finest: int, coarse: int, ratio: float) -> float:
    """Return voxels of the finest level per voxel of a coarser one: the ratio of their sizes, if it fits the numbers.

    The last voxel of the coarser level may be a part, or left out.

    >>> _factor(14, 2, 8.0), _factor(1001, 250, 1.0), _factor(1000, 300, 1.0)
    (8.0, 4, 3.3333333333333335)
    """
    candidates = (f for f in (round(ratio, 6), round(finest / coarse)) if f > 0 and abs(finest / f - coarse) < 1)
    return next(candidates, finest / coarse)


def layers_of(
    output: Any,
    *,
    volume: Any = None,
    head: str | None = None,
    kind: str = "auto",
    axes: str | None = None,
    table: Any = None,
) -> list[Layer]:
    """Return the layers of a result or a volume, the input first.

    The first layer of labels that is not the input has the rows of the table as properties of its segments.

    Raises:
        ValueError: when something cannot be read, or there are no labels for a table.
    """
    properties = None if table is None else segment_properties(read_table(table))
    record = record_of(output)
    heads = [head] if record is None or head is not None else list(record.details["heads"]) or [None]
    stacks = [list(display_levels(output, head=name, axes=axes if record is None else None)) for name in heads]
    name = Path(os.fspath(output)).name if isinstance(output, str | os.PathLike) else "volume"
    layers = [_layer(levels[0].head or name, levels, kind) for levels in stacks]
    if table is not None:
        labels = [n for n, layer in enumerate(layers) if layer.kind == "labels"]
        if not labels:
            raise ValueError(f"a table needs labels, but {os.fspath(output)} is shown as {layers[-1].kind}")
        layers[labels[0]] = replace(layers[labels[0]], properties=properties)
    if (address := input_address(stacks[0][0], volume)) is not None:
        levels = list(display_levels(address[0], axes=address[1]))
        layers.insert(0, _layer("input", levels, "auto"))
    return layers


def _layer(name: str, levels: list[DisplaySource], kind: str) -> Layer:
    source = levels[0]
    smallest = next((s for s in levels[::-1] if max(s.volume.shape[-s.volume.spatial_ndim :]) >= PIXELS), source)
    volume = smallest.volume
    last = len(volume.shape) - 1
    values = plane(volume, (last - 1, last), (PIXELS, PIXELS), [0.5] * (last + 1)) if last else np.zeros((1, 1))
    chosen = kind_of(source, [values]) if kind == "auto" else kind
    if chosen == "labels" and volume.dtype.kind == "f":
        chosen = "image"
    windows = [(0.0, 255.0)] * 3 if is_rgb(source) else [colormaps.window_of([v]) for v in values]
    if chosen == "scores" and fractions([values]):
        windows = [(0.0, 1.0)] * len(values)
    return Layer(name, tuple(levels), chosen, tuple(windows))
