"""Draw a volume or a result: middle slices, laid over the input, and a projection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.arguments import one_of, positive
from oocpatch.planning.plan import human
from oocpatch.storage.paths import local_path
from oocpatch.visualization import colormaps
from oocpatch.visualization.anatomy import anatomical_planes
from oocpatch.visualization.canvas import Figure, Panel
from oocpatch.visualization.display_source import DisplaySource, folder_of, local_name, open_display_source
from oocpatch.visualization.slices import SlicePlane, plane, projection
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]
Legend = tuple[tuple[colormaps.Colour, str], ...]
KINDS = ("auto", "labels", "scores", "image", "rgb")
BRIGHT = 0.5
"""An input that is lighter on average, such as a slide, has scores in dark colormaps over it."""
SHOWN = 24
"""Labels that a legend names; of more, which are objects, it names none."""
INSIDE = 0.45
"""Opacity of a label over its input, within its outline."""


def view(
    output: Any,
    picture: str | os.PathLike[str] | None = None,
    *,
    volume: Any = None,
    head: str | None = None,
    kind: str = "auto",
    axes: str | None = None,
    pixels: int = 480,
) -> Path:
    """Draw a volume or a result as a PNG: of three axes the middle slices and a projection, of two the plane.

    Slices of a volume with an affine, as NIfTI and DICOM have one, are axial, coronal and sagittal, with the patient's
    right on the left.

    A result is laid over its input, whose path the run notes. Voxels are read chunk by chunk, from the smallest level
    that fills the picture.

    Args:
        output: output of `predict` or `convert`, or any volume that `predict` takes.
        picture: PNG to write; default: beside the output.
        volume: the input to lay the result over; default: the volume that the run noted, if it exists. False: none.
        head: which of several outputs; default: the first.
        kind: `"labels"` (a colour each), `"scores"`, `"image"`, `"rgb"`; `"auto"`: by dtype and values.
        axes: names of the axes, as for `predict`.
        pixels: longest side of a panel.

    Returns:
        The path of the PNG.

    Raises:
        ValueError: for bad arguments, or without Pillow.
    """
    if picture is None and not isinstance(output, (str, os.PathLike)):
        raise ValueError("picture must be a path for a volume that is not a file itself")
    place = Path(f"{local_name(output)}.png") if picture is None else local_path("picture", picture)
    if place.suffix.lower() != ".png":
        raise ValueError(f"picture must end in .png, got {os.fspath(place)!r}")
    figure = figure_of(output, volume=volume, head=head, kind=kind, axes=axes, pixels=pixels)
    data = figure.png()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return place


def figure_of(
    output: Any,
    *,
    volume: Any = None,
    head: str | None = None,
    kind: str = "auto",
    axes: str | None = None,
    pixels: int = 480,
) -> Figure:
    """Return the panels of a picture before they are drawn; arguments as for `view`."""
    one_of("kind", kind, KINDS)
    positive("pixels", pixels)
    source = open_display_source(output, pixels, head=head, axes=axes)
    below, bright = input_of(source, volume, pixels), False
    slice_planes = _slice_planes(source)
    sizes = _sizes(source, pixels)
    values, notes = _values(source, slice_planes, sizes)
    chosen = kind_of(source, values) if kind == "auto" else kind
    windows = [(0.0, 1.0)] if chosen == "scores" and fractions(values) else _windows(chosen, values)
    captions = [_caption(source, slice_plane, note) for slice_plane, note in zip(slice_planes, notes, strict=True)]
    rows = []
    if below is not None:
        grounds, _ = _values(below, slice_planes, sizes)
        ground_kind = "rgb" if is_rgb(below) else "image"
        light, tones = _windows(ground_kind, grounds), channel_colours(below.volume)
        pictures = [_picture(v, ground_kind, light, tones) for v in grounds]
        rows.append(_row(pictures, "input, ", captions, slice_planes))
    colours = channel_colours(source.volume)
    if below is not None and chosen in ("labels", "scores"):
        bright = float(np.mean([p.mean() for p in pictures])) > BRIGHT
        over = [_over(p, v, chosen, windows, colours, bright=bright) for p, v in zip(pictures, values, strict=True)]
        rows.append(_row(over, f"{chosen} over it, ", captions, slice_planes))
    else:  # one image over another shows neither
        shown = [_picture(v, chosen, windows, colours) for v in values]
        rows.append(_row(shown, "" if below is None else "result, ", captions, slice_planes))
    name = Path(os.fspath(output)).name if isinstance(output, (str, os.PathLike)) else "volume"
    return Figure(tuple(rows), name, _subtitle(source), _legend(source, chosen, values, windows, bright=bright))


def _row(pictures: list[Array], start: str, captions: list[str], planes: list[SlicePlane]) -> tuple[Panel, ...]:
    every = zip(pictures, captions, planes, strict=True)
    return tuple(Panel(picture, f"{start}{caption}", plane.ends) for picture, caption, plane in every)


def noted_volume(source: DisplaySource) -> str | None:
    """Return the path of the volume that a run noted, if the volume still exists."""
    noted = None if source.record is None else source.record.details.get("settings", {}).get("volume")
    if isinstance(noted, list | dict):  # several are the channels of the input
        noted = next(iter(noted.values() if isinstance(noted, dict) else noted))
    exists = isinstance(noted, str) and (Path(noted.partition("::")[0]).exists() or folder_of(noted) is not None)
    return noted if exists else None


def input_address(source: DisplaySource, volume: Any) -> tuple[Any, Any] | None:
    """Return the volume to lay a result over, and its axes if a run noted them; None: there is none."""
    if volume is not None:
        return None if volume is False else (volume, None)
    noted = noted_volume(source)
    if noted is None or source.record is None:
        return None
    settings = source.record.details["settings"]
    is_one = isinstance(settings["volume"], str)  # else the axes are those of the channels, too
    return noted, source.record.parameters.get("axes") if is_one else settings.get("axes")


def input_of(source: DisplaySource, volume: Any, pixels: int) -> DisplaySource | None:
    """Return the volume to lay a result over, if there is one."""
    address = input_address(source, volume)
    if address is None:
        return None
    below = open_display_source(address[0], pixels, axes=address[1])
    if len(below.volume.shape) != len(source.volume.shape):
        if volume is not None:
            raise ValueError(
                f"volume must have the axes of the output ({', '.join(source.volume.names)}), "
                f"got {', '.join(below.volume.names)}"
            )
        return None
    return below


def _slice_planes(source: DisplaySource) -> list[SlicePlane]:
    """Return slices across the last three axes and a projection; of two axes the plane."""
    shape = source.volume.shape
    last, spatial = len(shape) - 1, source.volume.spatial_ndim
    if len(shape) < 2:
        raise ValueError(f"a picture needs two axes, got {', '.join(source.volume.names)}")
    if spatial <= 2:
        return [SlicePlane((last - 1, last))]
    if planes := anatomical_planes(source.volume):
        return planes
    z, y, x = last - 2, last - 1, last
    return [SlicePlane((y, x)), SlicePlane((z, x)), SlicePlane((z, y)), SlicePlane((y, x), along=z)]


def _sizes(source: DisplaySource, pixels: int) -> list[int]:
    """Return the pixels per axis, in proportion to the physical extents."""
    extents = [n * s for n, s in zip(source.volume.shape, source.spacing, strict=True)]
    longest = max(extents[-min(3, source.volume.spatial_ndim) :])
    return [max(1, round(pixels * e / longest)) for e in extents]


def _values(source: DisplaySource, slice_planes: list[SlicePlane], sizes: list[int]) -> tuple[list[Array], list[float]]:
    position = [0.5] * len(sizes)
    values, shares = [], []
    for slice_plane in slice_planes:
        axes, size, share = slice_plane.axes, (sizes[slice_plane.axes[0]], sizes[slice_plane.axes[1]]), 1.0
        if slice_plane.along is None:
            picture = plane(source.volume, axes, size, position)
        else:
            picture, share = projection(source.volume, slice_plane.along, axes, size, position)
        down, across = slice_plane.flips
        values.append(picture[:, :: -1 if down else 1, :: -1 if across else 1])
        shares.append(share)
    return values, shares


def kind_of(source: DisplaySource, values: list[Array]) -> str:
    """Return the kind of picture for values, where the user names none."""
    if source.is_labels:
        return "labels"
    if is_rgb(source):
        return "rgb"
    if source.volume.channels == 1 and source.volume.dtype.kind in "bui":
        labels = np.unique(np.concatenate([v.reshape(-1) for v in values]))
        if source.volume.dtype.itemsize >= 4 and labels[0] >= 0:
            return "labels"
        if len(labels) <= colormaps.FEW_LABELS and int(labels[-1]) - int(labels[0]) < colormaps.FEW_LABELS:
            return "labels"
    return "scores" if source.record is not None and fractions(values) else "image"


def is_rgb(source: DisplaySource) -> bool:
    """Return True when the channels are red, green and blue."""
    return source.record is None and source.volume.channels == 3 and source.volume.dtype == np.uint8


def fractions(values: list[Array]) -> bool:
    """Return True when all values are floats from 0 to 1."""
    return all(v.dtype.kind == "f" and np.nanmin(v) >= 0 and np.nanmax(v) <= 1 for v in values)


def _windows(kind: str, values: list[Array]) -> list[tuple[float, float]]:
    """Return the values shown as black and white; each channel of an image has its own."""
    if kind != "image":
        return [colormaps.window_of(values)]
    return [colormaps.window_of([v[c] for v in values]) for c in range(len(values[0]))]


def _picture(values: Array, kind: str, windows: list[tuple[float, float]], colours: list[colormaps.Colour]) -> Array:
    """Return values `(C, H, W)` as a picture `(H, W, 3)` of 0 to 1."""
    if kind == "labels":
        return colormaps.labels_to_rgb(values[0])
    if kind == "rgb" and len(values) >= 3:
        return np.asarray(values[:3].transpose(1, 2, 0) / 255)
    if kind == "scores" and len(values) == 1:
        return colormaps.heat(colormaps.scaled(values[0], windows[0]))
    return colormaps.grey(values, windows, colours)


def _over(
    below: Array,
    values: Array,
    kind: str,
    windows: list[tuple[float, float]],
    colours: list[colormaps.Colour],
    *,
    bright: bool,
) -> Array:
    """Return a result over its input: labels with opaque outlines, scores as opaque as they are high."""
    if kind == "labels":
        opacity = np.where(colormaps.outlines(values[0]), 1, INSIDE * (values[0] != 0))
        return colormaps.laid_over(below, colormaps.labels_to_rgb(values[0]), opacity)
    level = colormaps.scaled(values, windows[0])
    if len(level) > 1:
        return colormaps.laid_over(0.8 * below, colormaps.mixed(level, colours), 0.75 * level.max(axis=0))
    opacity = level[0] if bright else 0.75 * level[0]
    return colormaps.laid_over(below if bright else 0.8 * below, colormaps.heat(level[0], bright=bright), opacity)


def _caption(source: DisplaySource, slice_plane: SlicePlane, share: float) -> str:
    names, shape = source.volume.names, source.volume.shape
    if slice_plane.along is not None:
        of = "" if share == 1 else f" of {share:.0%} of it"
        return f"highest along {names[slice_plane.along]}{of}"
    others = [a for a in range(len(names)) if a not in slice_plane.axes]
    fixed = [f"{names[a]} = {shape[a] // 2}" for a in others]
    name = slice_plane.name or "".join(names[a] for a in slice_plane.axes)
    return name + (f" at {', '.join(fixed)}" if fixed else "")


def _subtitle(source: DisplaySource) -> str:
    volume = source.volume
    size = " x ".join(map(str, volume.shape))
    channels = f", {volume.channels} channels" if volume.channels > 1 else ""
    level = f", level {source.level}" if source.level else ""
    total = human(float(np.prod(volume.shape, dtype=np.float64)) * volume.channels * volume.dtype.itemsize)
    objects = f", {sum(source.objects):,} objects" if source.objects else ""
    state = ", not finished yet" if source.record is not None and not source.record.complete else ""
    return f"{size} ({', '.join(volume.names)}){channels}, {volume.dtype}, {total}{objects}{level}{state}"


def _legend(
    source: DisplaySource, kind: str, values: list[Array], windows: list[tuple[float, float]], *, bright: bool
) -> Legend:
    if kind == "labels":
        labels = [int(v) for v in np.unique(np.concatenate([v.reshape(-1) for v in values])) if v]
        return tuple((colormaps.label_colour(v), str(v)) for v in labels) if len(labels) <= SHOWN else ()
    if kind == "rgb":
        return ()
    if len(values[0]) > 1:
        return tuple(zip(channel_colours(source.volume), channel_names(source.volume), strict=True))[:SHOWN]
    steps, (low, high) = np.linspace(0, 1, 5), windows[0]
    tones = colormaps.heat(steps, bright=bright) if kind == "scores" else np.repeat(steps[:, None], 3, axis=1)
    texts = [f"{low + s * (high - low):.4g}" for s in steps]
    rounded = [tuple(round(255 * float(t)) for t in tone) for tone in tones]
    return tuple(((c[0], c[1], c[2]), text) for c, text in zip(rounded, texts, strict=True))


def channel_names(volume: Volume) -> list[str]:
    """Return the channels' names by their coordinate, else by number."""
    names = volume.source.coords.get(str(volume.channel_axis))
    if names is not None and names.shape == (volume.channels,) and names.dtype.kind in "UOT":
        return [str(name) for name in names.values]
    return [f"channel {c}" for c in range(volume.channels)]


def channel_colours(volume: Volume) -> list[colormaps.Colour]:
    """Return the colours of the channels: those of the metadata, else by their number."""
    tones = [colormaps.label_colour(c + 1) for c in range(volume.channels)]
    display = list((volume.source.display or {}).values())
    own = [s.get("color") for s in display] if len(display) == len(tones) else [None] * len(tones)
    rgb = [
        tone if colour is None else tuple(bytes.fromhex(colour.lstrip("#")[:6]))
        for colour, tone in zip(own, tones, strict=True)
    ]
    return [(red, green, blue) for red, green, blue in rgb]
