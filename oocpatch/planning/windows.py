"""Windows: the blending weights of a patch, and their sums over a full grid, as one 1-D array per axis.

Windows are outer products of these, and so are their sums on a full grid: the dense array is never needed. On a grid
with skipped patches the engine sums windows voxel by voxel instead.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from oocpatch.planning.choices import OVERLAP_MODES
from oocpatch.planning.grid import GridAxis

Floats = npt.NDArray[np.float64]

FLOOR = 1e-3
"""Least weight of a patch for `monai`; the smallest product, if that is larger."""


def axis_window(mode: str, n: int) -> Floats:
    """Return the blending weights of a patch along one axis of `n` voxels, float64 `(n,)`, all above zero.

    `average`: ones. `hann`: the symmetric Hann window of `n + 2` points without its two zeros. `gaussian`: sigma
    `n / 8` about the centre, without a floor (a floor makes seams: measured 1.4e-3 rms against 1.8e-5). `nnunet`: the
    same about voxel `n // 2`, which is half a voxel beyond the centre where `n` is even. `monai`: as `gaussian`; the
    product over the axes has a floor, see `FLOOR`.

    Raises:
        ValueError: for an unknown mode; `crop` has no blending weights.

    >>> axis_window("hann", 3).round(3).tolist()
    [0.5, 1.0, 0.5]
    """
    i = np.arange(n, dtype=np.float64)
    if mode == "average":
        return np.ones(n)
    if mode == "hann":
        return np.asarray(np.sin(np.pi * (i + 1) / (n + 1)) ** 2)
    if mode in ("gaussian", "nnunet", "monai"):
        centre = n // 2 if mode == "nnunet" else (n - 1) / 2
        return np.asarray(np.exp(-0.5 * ((i - centre) / (n / 8)) ** 2))
    raise ValueError(f"overlap_mode must be one of {', '.join(OVERLAP_MODES)}, got {mode!r}")


def axis_weights(mode: str, axis: GridAxis) -> Floats:
    """Return the sum of the windows of all patches along one axis, float64 `(length,)`; ones for `crop`.

    The sums are above zero everywhere, so that dividing by them needs no clamping.

    >>> axis_weights("average", GridAxis(6, 4, 2)).tolist()
    [1.0, 1.0, 2.0, 2.0, 1.0, 1.0]
    """
    if mode == "crop":
        return np.ones(axis.length)
    window, total = axis_window(mode, axis.patch), np.zeros(axis.length)
    for i in range(axis.count):
        start = axis.start(i)
        a, b = max(0, start), min(axis.length, start + axis.patch)
        total[a:b] += window[a - start : b - start]
    return total
