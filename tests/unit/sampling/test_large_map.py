"""Promises on size: a map of 2^31 voxels is measured, and drawn from, in bounded memory.

The map is sparse: chunks that were never written cost no disk, and are read like all others.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr

from tests.support.children import Children
from tests.support.draws import assert_fits

MIB = 2**20
SHAPE, CHUNK = (2048, 1024, 1024), 128
WEIGHTS = {(0, 0, 0): 200, (700, 401, 402): 2, (1300, 800, 150): 1, (2015, 991, 991): 4, (2016, 992, 992): 7}
"""Voxels of the map that are not zero."""


@pytest.mark.parametrize("kind", ["weighted", "label"])
def test_a_map_of_two_to_the_31_voxels_is_drawn_from_exactly_in_bounded_memory(
    kind: str, children: Children, tmp_path: Path
) -> None:
    voxels = zarr.create_array(tmp_path / "map.zarr", shape=SHAPE, chunks=(CHUNK,) * 3, dtype="uint8")
    for centre, weight in WEIGHTS.items():
        voxels[centre] = weight
    # Patches of 64 have centres from 32 to n - 32: the first voxel cannot be one, the last two can.
    answer = children.measure("tests.support.large_map_child", tmp_path / "map.zarr", kind)
    inside = {centre: weight for centre, weight in WEIGHTS.items() if centre != (0, 0, 0)}
    total = sum(inside.values()) if kind == "weighted" else len(inside)
    expected = {
        tuple(c - 32 for c in centre): (weight if kind == "weighted" else 1) / total
        for centre, weight in inside.items()
    }
    assert_fits(Counter({tuple(corner): count for corner, count in answer["corners"]}), expected)
    assert np.prod(SHAPE) == 2**31
    assert answer["added"] < 96 * MIB, "of a map of 2 GiB"
