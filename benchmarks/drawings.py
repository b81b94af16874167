"""Draw how objects of two patches are matched, for `docs/matching.md`; the results are what oocpatch makes of them."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import oocpatch
from oocpatch.visualization.colormaps import label_colour

Array = npt.NDArray[Any]

PATCH, OVERLAP, CELL, GAP = 9, 4, 20, 36
"""Columns of a patch, columns that both see, pixels of a voxel, pixels between drawings."""

SCENES = {
    "Both patches see it: one object": (
        """
        . . . . . . . . .     . . . . . . . . .
        . . . 1 1 1 1 1 1     . 3 3 3 3 . . . .
        . . 1 1 1 1 1 1 1     3 3 3 3 3 3 . . .
        . . . 1 1 1 1 1 1     3 3 3 3 3 . . . .
        . . . . . . . . .     . . . . . . . . .
        """
    ),
    "Touching cells stay apart": (
        """
        . . . . . . . . .     . . . . . . . . .
        . . 1 1 1 2 2 2 2     2 2 2 2 2 . . . .
        . . 1 1 1 2 2 2 2     2 2 2 2 2 2 . . .
        . . 1 1 1 1 2 2 2     1 2 2 2 2 2 . . .
        . . . . . . . . .     . . . . . . . . .
        """
    ),
    "Only the first patch sees it, and whole": (
        """
        . . . . . . . . .     . . . . . . . . .
        . . . 1 1 1 . . .     . . . . . . 1 1 .
        . . 1 1 1 1 1 1 .     . . . . . 1 1 1 1
        . . . 1 1 1 1 . .     . . . . . . 1 1 .
        . . . . . . . . .     . . . . . . . . .
        """
    ),
    "One patch sees two cells where the other sees one": (
        """
        . . . . . . . . .     . . . . . . . . .
        . . . . . 1 1 1 1     1 1 1 1 1 . . . .
        . . . . . 1 1 1 1     1 1 1 1 1 1 . . .
        . . . . . 1 1 1 1     2 2 2 2 2 2 . . .
        . . . . . . . . .     . . . . . . . . .
        """
    ),
}  # fmt: skip
"""Labels that two patches give, side by side; they share the last columns of the one and the first of the other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this verb."""
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"), help="where the drawing goes")


def run(arguments: argparse.Namespace) -> None:
    """Write the drawing."""
    (arguments.pictures / "matching.svg").write_text(matching())


def patches_of(scene: str) -> tuple[Array, Array]:
    """Return the labels of two patches, as they are written down."""
    rows = [[int(v) for v in line.replace(".", "0").split()] for line in scene.strip().splitlines()]
    both = np.array(rows, np.int32)
    return both[:, :PATCH], both[:, PATCH:]


def joined(one: Array, other: Array) -> Array:
    """Return what oocpatch makes of the labels of two patches."""
    height, width = len(one), 2 * PATCH - OVERLAP
    columns = np.broadcast_to(np.arange(width, dtype=np.int32), (height, width))

    def model(patches: Array) -> Array:
        return np.stack([[one if patch[0, 0, 0] == 0 else other] for patch in patches])

    settings = {"patch_size": (height, PATCH), "patch_overlap": (0, OVERLAP), "overlap_mode": "instances"}
    with tempfile.TemporaryDirectory() as folder:
        result = oocpatch.predict(
            columns, oocpatch.NumpyModel(model), Path(folder, "a.zarr"), **settings, work="light", progress=False
        )
        return np.asarray(result.values)


def matching() -> str:
    """Return the drawing as an SVG: a row per scene, with both patches and the result."""
    parts, top = [], 0
    width = 2 * (PATCH * CELL + GAP) + (2 * PATCH - OVERLAP) * CELL
    for title, scene in SCENES.items():
        one, other = patches_of(scene)
        parts.append(_text(0, top + 16, title, "start", 15))
        left, height = 0, len(one) * CELL
        for labels, name, common, start in (
            (one, "patch p", PATCH - OVERLAP, 0),
            (other, "patch q", 0, 4),
            (joined(one, other), "result", None, 8),
        ):
            parts += [_voxels(labels, left, top + 44, start), _text(left, top + 37, name, "start", 12)]
            if common is not None:
                parts.append(_frame(left + common * CELL, top + 44, OVERLAP * CELL, height))
            else:
                border = left + (PATCH - OVERLAP // 2) * CELL
                parts.append(f'<path d="M{border} {top + 40}v{height + 8}" stroke="#d1242f" stroke-width="2"/>')
            left += labels.shape[1] * CELL + GAP
        top += height + 72
    size = f'viewBox="-4 0 {width + 8} {top}" width="{width + 8}"'
    style = 'font-family="system-ui,sans-serif" fill="#1f2328"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n<rect x="-4" width="{width + 8}" height="{top}" '
        f'fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _voxels(labels: Array, left: int, top: int, start: int) -> str:
    """Return a grid of labels; each drawing has colours of its own, since each patch has numbers of its own."""
    height, width = (CELL * n for n in labels.shape)
    parts = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#eef1f4"/>']
    for (y, x), label in np.ndenumerate(labels):
        if label:
            place = f'x="{left + x * CELL}" y="{top + y * CELL}" width="{CELL}" height="{CELL}"'
            red, green, blue = label_colour(start + int(label))
            parts.append(f'<rect {place} fill="#{red:02x}{green:02x}{blue:02x}" stroke="#ffffff"/>')
            parts.append(_text(left + x * CELL + CELL // 2, top + y * CELL + 14, str(label), "middle", 11))
    return "\n".join(parts)


def _frame(left: int, top: int, width: int, height: int) -> str:
    place = f'x="{left}" y="{top}" width="{width}" height="{height}"'
    return f'<rect {place} fill="none" stroke="#1f2328" stroke-width="2" stroke-dasharray="5 3"/>'


def _text(x: int, y: int, text: str, anchor: str, size: int) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{text}</text>'
