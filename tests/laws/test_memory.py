"""Promises on memory: a run adds no more than its limit, no more than its plan said, whatever the size of the volume.

Volumes are sparse (no chunk was ever written), so a gigabyte of input costs no disk; the output is written in full.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

ROOT = Path(__file__).parents[2]
MIB = 2**20
LIMIT = 64 * MIB


def measured(root: Path, depth: int, **options: Any) -> dict[str, float]:
    """What a run over a sparse float32 volume of `depth` x 512 x 512 adds, from a fresh process."""
    volume, output = root / f"volume{depth}.zarr", root / f"out{depth}.zarr"
    if not volume.exists():
        zarr.create_array(volume, shape=(depth, 512, 512), chunks=(64, 64, 64), dtype="float32", fill_value=1)
    arguments = {"axes": "zyx", "patch_size": 32, "max_memory": LIMIT, "workers": 2, **options}
    command = [sys.executable, "-m", "tests.support.memory_child", str(volume), str(output), json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    shutil.rmtree(output)
    answer: dict[str, float] = json.loads(process.stdout)
    assert answer["lowest"] == pytest.approx(2, rel=1e-6)
    assert answer["highest"] == pytest.approx(2, rel=1e-6)
    return answer


def assert_within_bounds(run: dict[str, float], limit: int) -> None:
    assert run["projected"] <= limit
    assert run["added"] <= run["projected"], "the plan promised less than the run took"
    assert run["added"] <= limit


@pytest.mark.parametrize(("mode", "overlap"), [("crop", 0), ("hann", 16)])
def test_a_run_adds_no_more_memory_than_its_plan_and_its_limit(mode: str, overlap: int, tmp_path: Path) -> None:
    """Input and output are each three times the limit."""
    assert_within_bounds(measured(tmp_path, 192, patch_overlap=overlap, overlap_mode=mode), LIMIT)


def test_chunks_that_are_read_in_part_are_not_all_decoded_at_once(tmp_path: Path) -> None:
    """A sparse volume has nothing to decode; here each chunk is stored, and each layer of patches begins within one."""
    stored = zarr.create_array(tmp_path / "volume192.zarr", shape=(192, 256, 256), chunks=(64, 64, 64), dtype="float32")
    stored[:] = 1 + np.random.default_rng(0).random(stored.shape, dtype="float32") * 1e-7
    assert_within_bounds(measured(tmp_path, 192, patch_overlap=16, overlap_mode="hann"), LIMIT)


def test_buffers_on_the_way_to_a_device_are_planned_as_well(tmp_path: Path) -> None:
    """The device's own memory is counted with them, here as everywhere."""
    settings = {"patch_overlap": 16, "overlap_mode": "hann", "staged": True, "max_memory": 2 * LIMIT}
    assert_within_bounds(measured(tmp_path, 192, **settings), 2 * LIMIT)


def test_what_a_light_model_allocates_is_not_kept(tmp_path: Path) -> None:
    """Its tensors are as large as what a heap likes to keep, and leave holes in it that the next ones do not fit."""
    volume = tmp_path / "volume192.zarr"
    zarr.create_array(volume, shape=(4096, 8192, 3), chunks=(512, 512, 3), dtype="uint8", fill_value=1)
    settings = {"axes": "yxc", "patch_size": 500, "patch_overlap": 112, "output_dtype": "uint8", "light": True}
    assert_within_bounds(measured(tmp_path, 192, **settings, max_memory=192 * MIB), 192 * MIB)


def test_a_pyramid_keeps_the_limit_as_well(tmp_path: Path) -> None:
    settings = {"patch_overlap": 8, "overlap_mode": "average", "output_format": "ome-zarr", "max_memory": 32 * MIB}
    assert_within_bounds(measured(tmp_path, 192, **settings), 32 * MIB)


def test_a_tighter_limit_is_kept_as_well(tmp_path: Path) -> None:
    assert_within_bounds(measured(tmp_path, 96, patch_overlap=8, max_memory=24 * MIB), 24 * MIB)


def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    """256 and 768 MiB of input under 64 MiB."""
    small, large = measured(tmp_path, 256, patch_overlap=8), measured(tmp_path, 768, patch_overlap=8)
    for run in (small, large):
        assert_within_bounds(run, LIMIT)
    assert large["blocks"] >= small["blocks"]
    assert large["added"] <= small["added"] * 1.15 + 4 * MIB
