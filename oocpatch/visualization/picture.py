"""The picture of a volume or a result: middle slices, laid over the input, and a projection."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.arguments import one_of, positive
from oocpatch.planning.plan import human
from oocpatch.storage.paths import local_path
from oocpatch.visualization import colormaps as colours
from oocpatch.visualization.canvas import Figure, Panel
from oocpatch.visualization.display_source import DisplaySource, folder_of, local_name, open_display_source
from oocpatch.visualization.slices import plane, projection
from oocpatch.volumes.volume import Volume

Array = npt.NDArray[Any]
Legend = tuple[tuple[tuple[int, int, int], str], ...]
KINDS = ("auto", "labels", "scores", "image", "rgb")
BRIGHT = 0.5
"""An input that is lighter on average, such as a slide, has scores in dark colours over it."""
SHOWN = 24
"""Labels that a legend names."""


@dataclass(frozen=True)
class SlicePlane:
    """A plane to look at.

    Attributes:
        axes: which run down and across.
        along: the axis of a projection; None: a slice.
    """

    axes: tuple[int, int]
    along: int | None = None


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

    A result is laid over its input where that is known: a run notes the path of its volume. What a picture shows is
    read chunk by chunk, from the smallest level that fills it.

    Args:
        output: what `predict` or `convert` wrote, or whatever `predict` takes.
        picture: PNG to write; default: beside the output.
        volume: the input to lay the result over; default: what the run noted, if it is still there. False: none.
        head: which of several outputs; default: the first.
        kind: `"labels"` (a colour each), `"scores"`, `"image"`, `"rgb"`, or found out.
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
    sheet = figure_of(output, volume=volume, head=head, kind=kind, axes=axes, pixels=pixels)
    data = sheet.png()
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
    """The panels of a picture, undrawn; arguments as for `view`."""
    one_of("kind", kind, KINDS)
    positive("pixels", pixels)
    sight = open_display_source(output, pixels, head=head, axes=axes)
    below, bright = input_of(sight, volume, pixels), False
    cuts = _cuts(sight)
    sizes = _sizes(sight, pixels)
    values, notes = _values(sight, cuts, sizes)
    chosen = kind_of(sight, values) if kind == "auto" else kind
    windows = [(0.0, 1.0)] if chosen == "scores" and fractions(values) else _windows(chosen, values)
    captions = [_caption(sight, cut, note) for cut, note in zip(cuts, notes, strict=True)]
    rows = []
    if below is not None:
        grounds, _ = _values(below, cuts, sizes)
        ground_kind = "rgb" if is_rgb(below) else "image"
        light = _windows(ground_kind, grounds)
        pictures = [_picture(v, ground_kind, light) for v in grounds]
        rows.append(tuple(Panel(p, f"input, {c}") for p, c in zip(pictures, captions, strict=True)))
        if chosen in ("labels", "scores"):
            bright = float(np.mean([p.mean() for p in pictures])) > BRIGHT
            over = [_over(p, v, chosen, windows, bright=bright) for p, v in zip(pictures, values, strict=True)]
            rows.append(tuple(Panel(p, f"{chosen} over it, {c}") for p, c in zip(over, captions, strict=True)))
        else:  # one image over another shows neither
            shown = [_picture(v, chosen, windows) for v in values]
            rows.append(tuple(Panel(p, f"result, {c}") for p, c in zip(shown, captions, strict=True)))
    else:
        shown = [_picture(v, chosen, windows) for v in values]
        rows.append(tuple(Panel(p, c) for p, c in zip(shown, captions, strict=True)))
    name = Path(os.fspath(output)).name if isinstance(output, (str, os.PathLike)) else "volume"
    return Figure(tuple(rows), name, _subtitle(sight), _legend(sight, chosen, values, windows, bright=bright))


def noted_volume(sight: DisplaySource) -> str | None:
    """The path of the volume that a run noted, if it is still there."""
    noted = None if sight.record is None else sight.record.details.get("settings", {}).get("volume")
    there = isinstance(noted, str) and (Path(noted.partition("::")[0]).exists() or folder_of(noted) is not None)
    return noted if there else None


def input_of(sight: DisplaySource, volume: Any, pixels: int) -> DisplaySource | None:
    """What to lay a result over."""
    noted = noted_volume(sight) if volume is None else None
    volume = noted if volume is None else volume
    if volume is None or volume is False:
        return None
    axes = sight.record.parameters.get("axes") if noted and sight.record is not None else None
    found = open_display_source(volume, pixels, axes=axes)
    if len(found.volume.shape) != len(sight.volume.shape):
        if noted is None:
            raise ValueError(
                f"volume must have the axes of the output ({', '.join(sight.volume.names)}), "
                f"got {', '.join(found.volume.names)}"
            )
        return None
    return found


def _cuts(sight: DisplaySource) -> list[SlicePlane]:
    """Slices across the last three axes, and a projection; of two axes the plane."""
    shape = sight.volume.shape
    last, spatial = len(shape) - 1, sight.volume.spatial_ndim
    if len(shape) < 2:
        raise ValueError(f"a picture needs two axes, got {', '.join(sight.volume.names)}")
    if spatial <= 2:
        return [SlicePlane((last - 1, last))]
    z, y, x = last - 2, last - 1, last
    return [SlicePlane((y, x)), SlicePlane((z, x)), SlicePlane((z, y)), SlicePlane((y, x), along=z)]


def _sizes(sight: DisplaySource, pixels: int) -> list[int]:
    """Pixels per axis, in the proportions of the world."""
    spatial = sight.volume.spatial_ndim
    extents = [n * s for n, s in zip(sight.volume.shape, sight.spacing, strict=True)]
    longest = max(extents[-min(3, spatial) :])
    return [max(1, round(pixels * e / longest)) for e in extents]


def _values(sight: DisplaySource, cuts: list[SlicePlane], sizes: list[int]) -> tuple[list[Array], list[float]]:
    position = [0.5] * len(sizes)
    values, seen = [], []
    for cut in cuts:
        size = sizes[cut.axes[0]], sizes[cut.axes[1]]
        if cut.along is None:
            values.append(plane(sight.volume, cut.axes, size, position))
            seen.append(1.0)
        else:
            found, share = projection(sight.volume, cut.along, cut.axes, size, position)
            values.append(found)
            seen.append(share)
    return values, seen


def kind_of(sight: DisplaySource, values: list[Array]) -> str:
    """How to show values, where nobody says."""
    if sight.is_labels:
        return "labels"
    if is_rgb(sight):
        return "rgb"
    if sight.volume.channels == 1 and sight.volume.dtype.kind in "bui":
        found = np.unique(np.concatenate([v.reshape(-1) for v in values]))
        if len(found) <= colours.FEW_LABELS and int(found[-1]) - int(found[0]) < colours.FEW_LABELS:
            return "labels"
    return "scores" if sight.record is not None and fractions(values) else "image"


def is_rgb(sight: DisplaySource) -> bool:
    """Whether the channels are red, green and blue."""
    return sight.record is None and sight.volume.channels == 3 and sight.volume.dtype == np.uint8


def fractions(values: list[Array]) -> bool:
    """Whether all values are floats from 0 to 1."""
    return all(v.dtype.kind == "f" and np.nanmin(v) >= 0 and np.nanmax(v) <= 1 for v in values)


def _windows(kind: str, values: list[Array]) -> list[tuple[float, float]]:
    """What is black and white: of each channel of an image by itself, since they may measure different things."""
    if kind != "image":
        return [colours.window_of(values)]
    return [colours.window_of([v[c] for v in values]) for c in range(len(values[0]))]


def _picture(values: Array, kind: str, windows: list[tuple[float, float]]) -> Array:
    """`(C, H, W)` as `(H, W, 3)` of 0 to 1."""
    if kind == "labels":
        return colours.labels_to_rgb(values[0])
    if kind == "rgb" and len(values) >= 3:
        return np.asarray(values[:3].transpose(1, 2, 0) / 255)
    if kind == "scores" and len(values) == 1:
        return colours.heat(colours.scaled(values[0], windows[0]))
    return colours.grey(values, windows)


def _over(below: Array, values: Array, kind: str, windows: list[tuple[float, float]], *, bright: bool) -> Array:
    """A result over its input: labels half through, scores as far as they are high."""
    if kind == "labels":
        return colours.laid_over(below, colours.labels_to_rgb(values[0]), 0.55 * (values[0] != 0))
    level = colours.scaled(values, windows[0])
    if len(level) > 1:
        return colours.laid_over(0.8 * below, colours.mixed(level), 0.75 * level.max(axis=0))
    opacity = level[0] if bright else 0.75 * level[0]
    return colours.laid_over(below if bright else 0.8 * below, colours.heat(level[0], bright=bright), opacity)


def _caption(sight: DisplaySource, cut: SlicePlane, seen: float) -> str:
    names, shape = sight.volume.names, sight.volume.shape
    if cut.along is not None:
        of = "" if seen == 1 else f" of {seen:.0%} of it"
        return f"highest along {names[cut.along]}{of}"
    others = [a for a in range(len(names)) if a not in cut.axes]
    fixed = [f"{names[a]} = {shape[a] // 2}" for a in others]
    return f"{names[cut.axes[0]]}{names[cut.axes[1]]}" + (f" at {', '.join(fixed)}" if fixed else "")


def _subtitle(sight: DisplaySource) -> str:
    volume = sight.volume
    size = " x ".join(map(str, volume.shape))
    channels = f", {volume.channels} channels" if volume.channels > 1 else ""
    level = f", level {sight.level}" if sight.level else ""
    total = human(float(np.prod(volume.shape, dtype=np.float64)) * volume.channels * volume.dtype.itemsize)
    state = ", not finished yet" if sight.record is not None and not sight.record.complete else ""
    return f"{size} ({', '.join(volume.names)}){channels}, {volume.dtype}, {total}{level}{state}"


def _legend(
    sight: DisplaySource, kind: str, values: list[Array], windows: list[tuple[float, float]], *, bright: bool
) -> Legend:
    if kind == "labels":
        found = [int(v) for v in np.unique(np.concatenate([v.reshape(-1) for v in values])) if v][:SHOWN]
        return tuple((colours.label_colour(v), str(v)) for v in found)
    if kind == "rgb":
        return ()
    if len(values[0]) > 1:
        names = _channel_names(sight.volume)
        return tuple((colours.label_colour(c + 1), name) for c, name in enumerate(names[:SHOWN]))
    steps, (low, high) = np.linspace(0, 1, 5), windows[0]
    tones = colours.heat(steps, bright=bright) if kind == "scores" else np.repeat(steps[:, None], 3, axis=1)
    told = [f"{low + s * (high - low):.4g}" for s in steps]
    rounded = [tuple(round(255 * float(t)) for t in tone) for tone in tones]
    return tuple(((c[0], c[1], c[2]), text) for c, text in zip(rounded, told, strict=True))


def _channel_names(volume: Volume) -> list[str]:
    """As the coordinate says, or by number."""
    found = volume.source.coords.get(str(volume.channel_axis))
    if found is not None and found.shape == (volume.channels,) and found.dtype.kind in "UOT":
        return [str(name) for name in found.values]
    return [f"channel {c}" for c in range(volume.channels)]
