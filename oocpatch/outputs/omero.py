"""Display settings of an image: names, colours and contrast windows of its channels, as `omero` in its metadata.

The windows come from the values of the first level of the pyramid that is small enough to be read whole: from the
percentile 1 to the percentile 99.5. The window of scores between 0 and 1 is always 0 to 1.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store

from oocpatch.outputs.integrity import DESCRIBED, verify_files
from oocpatch.planning.box import Box
from oocpatch.storage.checksums import text_checksum
from oocpatch.storage.paths import StoragePath

WHITE = "FFFFFF"
COLOURS = ("00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF")
"""Colours of several channels; further channels are hidden at first."""

LEVEL = 1 << 22
"""Voxels per channel of the level whose values are read; of a larger coarsest level, parts are read."""

READ, SAMPLES = 32 << 20, 1 << 16
"""Bytes of a channel that are read, and number of values sampled from them."""

FRACTIONS = frozenset({"softmax", "sigmoid"})
"""Postprocessing steps whose results are between 0 and 1."""


def channel_settings(path: StoragePath, details: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `omero` metadata of the images of an output by their groups; labels have none.

    All levels of the output must be complete; `details` and `parameters` are those of its record.
    """
    settings = {}
    for head, pyramid in zip(details["heads"], details.get("pyramids") or (), strict=False):
        if pyramid["method"] == "mean":
            postprocess = parameters.get("postprocess")
            postprocess = postprocess.get(head) if isinstance(postprocess, Mapping) else postprocess
            group = pyramid["levels"][0].rpartition("scale0/")[0].strip("/")
            is_share = postprocess in FRACTIONS
            display = {} if is_share else details.get("display", {}).get(head, {})
            settings[group] = image_settings(path, group, head, pyramid["levels"], display, fractions=is_share)
    return settings


def image_settings(
    path: StoragePath, group: str, head: str, levels: Sequence[str], display: Mapping[str, Any], *, fractions: bool
) -> dict[str, Any]:
    """Return the `omero` metadata of one image; `display` are settings of channels by their names, and prevail."""
    store = path.store()
    attributes: Any = zarr.open_group(store, path=group, mode="r", use_consolidated=False).attrs.asdict()
    axes = attributes["ome"]["multiscales"][0]["axes"]
    channel = next((a for a, axis in enumerate(axes) if axis["type"] == "channel"), None)
    arrays = [zarr.open_array(store, path=level, mode="r") for level in levels]
    count = 1 if channel is None else arrays[0].shape[channel]
    array = next((a for a in arrays if math.prod(a.shape) <= LEVEL * count), arrays[-1])
    if channel is None:
        names, selections = list(display) or [head], [(slice(None),) * array.ndim]
    else:
        names = _channel_names(store, levels[0], axes[channel]["name"], count)
        before, after = (slice(None),) * channel, (slice(None),) * (array.ndim - channel - 1)
        selections = [(*before, slice(c, c + 1), *after) for c in range(len(names))]
    several = len(names) > 1
    channels = [
        {
            "label": name,
            "color": COLOURS[number % len(COLOURS)] if several else WHITE,
            "active": number < len(COLOURS),
            "window": window_of(_values(array, selection), array.dtype, fractions=fractions),
            **display.get(name, {}),
        }
        for number, (name, selection) in enumerate(zip(names, selections, strict=True))
    ]
    depth = next((a for a, axis in enumerate(axes) if axis["name"] == "z"), None)
    middle = 0 if depth is None else arrays[0].shape[depth] // 2
    return {
        "channels": channels,
        "rdefs": {"model": "color" if several else "greyscale", "defaultT": 0, "defaultZ": middle},
    }


def _channel_names(store: Store, finest: str, axis: str, count: int) -> list[str]:
    """Return the names of the channels from their coordinate, if there is one, else numbers."""
    try:
        coordinate = zarr.open_array(store, path=f"{finest.rpartition('/')[0]}/{axis}", mode="r")
        names = [str(name) for name in np.asarray(coordinate[...])]
    except (OSError, KeyError, ValueError):
        names = []
    return names if len(names) == count else [f"channel {number}" for number in range(count)]


def _values(array: zarr.Array[Any], selection: tuple[slice, ...]) -> npt.NDArray[Any]:
    """Sample evenly spaced values of a channel, read chunk by chunk."""
    bounds = [part.indices(n)[:2] for part, n in zip(selection, array.shape, strict=True)]
    box = Box(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))
    pieces = math.prod(-(-n // c) for n, c in zip(box.shape, array.chunks, strict=True))
    every = -(-pieces // max(16, READ // (math.prod(array.chunks) * array.dtype.itemsize)))
    step = max(1, math.prod(box.shape) // every // SAMPLES)
    sampled = itertools.islice(box.split(array.chunks), 0, None, every)
    # copies: a view would keep its whole chunk in memory
    return np.concatenate([np.asarray(array[piece.slices()]).reshape(-1)[::step].copy() for piece in sampled])


def window_of(values: npt.NDArray[Any], dtype: npt.DTypeLike, *, fractions: bool = False) -> dict[str, Any]:
    """Return the values shown as black and white (`start`, `end`) and the range of their sliders (`min`, `max`).

    >>> window_of(np.arange(201), np.uint8)
    {'min': 0, 'max': 255, 'start': 2, 'end': 199}
    >>> window_of(np.full(9, 0.25), np.float32)
    {'min': 0.25, 'max': 1.25, 'start': 0.25, 'end': 1.25}
    """
    if fractions and np.dtype(dtype).kind == "f":
        return {"min": 0.0, "max": 1.0, "start": 0.0, "end": 1.0}
    values = values[np.isfinite(values)].astype(np.float64)
    low, high = (0.0, 1.0) if not values.size else (_short(v) for v in np.percentile(values, (1, 99.5)))
    least, most = (low, high) if not values.size else (_short(float(values.min())), _short(float(values.max())))
    if not high > low:
        low, high = (least, most) if most > least else (low, low + max(1.0, abs(low)))
    least, most = min(least, low), max(most, high)
    if np.dtype(dtype).kind not in "iu":
        return {"min": least, "max": most, "start": low, "end": high}
    limits = np.iinfo(np.dtype(dtype))
    start, end = math.floor(low), math.ceil(high)
    if limits.bits <= 16:  # a slider over the range of a wider type would not be usable
        return {"min": int(limits.min), "max": max(int(limits.max), end), "start": start, "end": end}
    return {"min": min(math.floor(least), start), "max": max(math.ceil(most), end), "start": start, "end": end}


def _short(value: float) -> float:
    """Round to six digits."""
    return float(f"{value:.6g}")


def write_channel_settings(
    path: StoragePath,
    settings: Mapping[str, Any],
    details: Mapping[str, Any],
    update_details: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Write `omero` into the metadata of the images that are in groups of the output, and return its new details.

    The new CRCs are recorded before, so that after a crash each file has one of its two recorded CRCs.

    `settings` are those of `channel_settings`; that of the output's own group is written by `write_record`. The details
    of the output's record are replaced by `update_details`.
    """
    omero_of = {f"{group}/zarr.json": omero for group, omero in settings.items() if group}
    verify_files(path, details, omero_of)
    texts = {}
    for name, omero in omero_of.items():
        metadata = json.loads((path / name).read_text())
        metadata["attributes"]["ome"]["omero"] = omero
        texts[name] = json.dumps(metadata, indent=2)
    crcs = {name: text_checksum(text) for name, text in texts.items()}
    if texts:
        update_details({**details, DESCRIBED: crcs})
    for name, text in texts.items():
        (path / name).write_atomic(text)
    new_details = {name: value for name, value in details.items() if name != DESCRIBED}
    return {**new_details, "files": {**details["files"], **crcs}}
