"""Slices as radiologists look at them, of volumes whose affine says where the patient's right, front and head are."""

from __future__ import annotations

import numpy as np

from oocpatch.visualization.slices import SlicePlane
from oocpatch.volumes.affine import ENDS, WORLD, orientation_of, spacing_of
from oocpatch.volumes.volume import Volume

RIGHT_LEFT, FRONT_BACK, HEAD_FEET = range(3)
FROM_TO = ("RL", "AP", "SI")
"""Ends of the world's axes at the left or upper side of a picture, and at the opposite side."""


def anatomical_planes(volume: Volume) -> list[SlicePlane]:
    """Return the axial, coronal and sagittal slices and an axial projection; none for a volume without an affine.

    The patient's right is on the left, the front is up in axial slices and on the left in sagittal ones, the head is
    up in the others. An axis that is oblique to the patient counts as the nearest one.

    >>> array = np.zeros((4, 5, 6))
    >>> import xarray
    >>> scan = xarray.DataArray(array, dims=("x", "y", "z"), attrs={"affine": np.diag([-2, 2, 3, 1]).tolist()})
    >>> [(p.name, p.axes, p.flips) for p in anatomical_planes(Volume(scan))][0]
    ('axial', (1, 0), (True, False))
    """
    stored = np.asarray(volume.source.attrs.get("affine", ()), np.float64)
    if stored.shape != (4, 4) or sorted(volume.names[-volume.spatial_ndim :]) != list(WORLD):
        return []
    if not all(spacing_of(affine := volume.affine)):
        return []
    looped = len(volume.names) - len(WORLD)
    axes: dict[int, tuple[int, bool]] = {}  # of the volume, by those of the world; whether a picture shows it reversed
    for axis, code in enumerate(orientation_of(affine)):
        world = next(w for w, ends in enumerate(ENDS) if code in ends)
        axes[world] = looped + axis, code == FROM_TO[world][0]

    def slice_plane(name: str, down: int, across: int, along: int | None = None) -> SlicePlane:
        return SlicePlane(
            (axes[down][0], axes[across][0]),
            None if along is None else axes[along][0],
            name,
            (axes[down][1], axes[across][1]),
            FROM_TO[across] + FROM_TO[down],
        )

    return [
        slice_plane("axial", FRONT_BACK, RIGHT_LEFT),
        slice_plane("coronal", HEAD_FEET, RIGHT_LEFT),
        slice_plane("sagittal", HEAD_FEET, FRONT_BACK),
        slice_plane("axial", FRONT_BACK, RIGHT_LEFT, HEAD_FEET),
    ]
