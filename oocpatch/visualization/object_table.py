"""Show tables of objects: areas as a histogram, columns as the properties of a viewer's segments."""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.run.object_table import objects
from oocpatch.storage.paths import local_path
from oocpatch.system import import_extra
from oocpatch.visualization.display_source import DisplaySource
from oocpatch.visualization.slices import PROJECTED

Array = npt.NDArray[Any]

ROWS = 1_000_000
"""Rows of a table that a browser gets at most."""
BINS = 32
WIDTH, HEIGHT, FOOT = 720, 160, 22
"""Sides of a histogram, in pixels; the foot has the labels of its axis."""


def read_table(table: str | os.PathLike[str]) -> Any:
    """Read a table of objects that `oocpatch.objects` or another program wrote.

    Raises:
        ValueError: for a file that is none.
    """
    path = local_path("table", table)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"table must end in .parquet or .csv, got {path.name}")
    if not path.is_file():
        raise ValueError(f"table must be a file, got {path}")
    pd = importlib.import_module("pandas")  # half a second of imports
    if path.suffix == ".parquet":
        import_extra("pyarrow", "objects", f"reading {path.name}")
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"table must be as its name says, but {path} cannot be read: {error}") from error
    if "label" not in frame.columns or frame["label"].dtype.kind not in "iu":
        raise ValueError(f"table must have integers in a column `label`, got the columns {', '.join(frame.columns)}")
    return frame


def measured_areas(source: DisplaySource) -> Any:
    """Return a table of the areas of a result's objects; None where it has none, or is too large to be read for it."""
    volume, record = source.volume, source.record
    if record is None or source.head is None or not record.complete or not source.objects:
        return None
    if math.prod(volume.shape) * volume.channels * volume.dtype.itemsize > PROJECTED:
        return None
    return objects(volume, properties=("area",), progress=False)


def histogram(areas: Array, unit: str) -> str:
    """Return a histogram of areas as an SVG with a caption, or nothing without any above zero.

    The upper end of each bin is the same multiple of its lower end.

    >>> histogram(np.array([4, 4, 8]), "um^2").count("<rect")
    32
    """
    areas = areas[areas > 0]
    if not len(areas):
        return ""
    least, most = float(areas.min()), float(areas.max())
    edges = np.geomspace(least, max(most, least * 2), BINS + 1)
    edges[[0, -1]] = least, max(most, least * 2)  # but for rounding
    counts = np.histogram(areas, edges)[0]
    step, scale = WIDTH / BINS, (HEIGHT - FOOT) / counts.max()
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{HEIGHT - FOOT - n * scale:.1f}" width="{step - 2:.1f}" '
        f'height="{n * scale:.1f}" fill="#3fb982"/>'
        for i, n in enumerate(counts)
    )
    texts = []
    for part, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")):
        value = edges[0] * (edges[-1] / edges[0]) ** part
        texts.append(f'<text x="{part * WIDTH:.0f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{_short(value)}</text>')
    caption = (
        f"{len(areas):,} in number; smallest {_short(least)}, median {_short(np.median(areas))}, "
        f"mean {_short(areas.mean())}, largest {_short(most)} {unit}".rstrip()
        + f"; at most {counts.max():,} in a bin"
    )
    style = 'font-size="12" font-family="system-ui,sans-serif" fill="#59636e"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" {style}>{bars}{"".join(texts)}</svg><p>{caption}</p>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def segment_properties(frame: Any) -> dict[str, Any]:
    """Return a table as neuroglancer's precomputed metadata: a row per segment, its numbers and texts.

    Raises:
        ValueError: if labels are not unique, or too many.
    """
    if len(frame) > ROWS:
        raise ValueError(f"table must have at most {ROWS:,} rows for a browser, got {len(frame):,}")
    if frame["label"].duplicated().any():
        raise ValueError("table must have one row per label for a browser, such as that of one index of time")
    properties = []
    for name in frame.columns.drop("label"):
        values = frame[name]
        if values.dtype.kind not in "iuf":
            properties.append({"id": str(name), "type": "string", "values": values.astype(str).tolist()})
            continue
        is_integer = values.dtype.kind in "iu" and values.abs().max() < 2**31
        numbers = values.tolist() if is_integer else [v if math.isfinite(v) else str(v) for v in values.tolist()]
        kind = "int32" if is_integer else "float32"
        properties.append({"id": str(name), "type": "number", "data_type": kind, "values": numbers})
    inline = {"ids": frame["label"].astype(str).tolist(), "properties": properties}
    return {"@type": "neuroglancer_segment_properties", "inline": inline}
