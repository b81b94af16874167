"""The numbers of patches to compute: of each block as it selects them, and of the plan, its display and its parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from oocpatch.engine import patch_selection
from oocpatch.engine.patch_selection import Mask, Selection
from oocpatch.planning.blocks import BlockGrid, core_length
from oocpatch.planning.box import Box
from oocpatch.planning.grid import PatchGrid
from oocpatch.volumes.volume import Volume


@given(seed=st.integers(0, 10**6), ndim=st.integers(1, 3), at_a_time=st.sampled_from([1, 50, 1 << 20]))
def test_each_block_counts_the_patches_that_it_selects(seed: int, ndim: int, at_a_time: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(5, 30, ndim))
    patch = tuple(int(n) for n in rng.integers(2, 9, ndim))
    grid = PatchGrid.of(shape, patch, tuple(int(rng.integers(0, p)) for p in patch))
    core = tuple(core_length(axis, int(rng.integers(1, 20)), 4) for axis in grid.axes)
    blocks = BlockGrid.of(grid, core, (4,) * ndim, 0, crop=False)
    values = rng.random(tuple(int(rng.integers(1, n + 1)) for n in shape)) > 0.9
    start = tuple(int(rng.integers(0, n)) for n in shape)
    box = Box(start, tuple(int(rng.integers(a + 1, n + 1)) for a, n in zip(start, shape, strict=True)))
    mask = Mask.over(Volume(np.zeros(shape)), Volume(values))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch_selection, "COUNTED_AT_A_TIME", at_a_time)
        for selection in (Selection(mask), Selection(None, box), Selection(mask, box)):
            counts = selection.count(blocks).reshape(-1)
            assert counts.tolist() == [len(selection.of(grid, blocks.patches(blocks[i]))) for i in range(len(blocks))]


def test_plan_progress_and_result_count_the_patches_that_are_computed(tmp_path: Path) -> None:
    mask = np.zeros((32, 32), bool)
    mask[:9, 3] = True
    calls, events = [], []

    def model(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches))
        return patches

    settings = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 8, "mask": mask}
    volume = np.ones((32, 32), np.float32)
    planned = oocpatch.plan(volume, model, tmp_path / "out.zarr", progress=events.append, **settings)
    assert planned.patches == 3  # those that start at rows 0, 4 and 8, and at column 0
    assert "3 of 8 x 8" in str(planned)
    assert "46 more are left out" in str(planned)
    assert planned.patches_per_block == 2
    calls.clear()
    planned.run()
    assert sum(calls) == sum(event.patches for event in events) == 3
    assert oocpatch.status(tmp_path / "out.zarr").patches_total == 3
