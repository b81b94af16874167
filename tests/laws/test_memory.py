"""Promises on memory: a run adds no more than its limit, no more than its plan said, whatever the size of the volume.

Volumes are sparse (no chunk was ever written), so a gigabyte of input costs no disk; the output is written in full.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from benchmarks.architectures import ARCHITECTURES
from tests.support.children import Children

MIB = 2**20
LIMIT = 64 * MIB
Measured = Callable[..., dict[str, float]]
LIBRARIES = 32 * MIB if torch.version.cuda else 0
"""Pages of libraries that a first call reads, 20 MiB more of torch's builds for CUDA; the system may drop them."""


@pytest.fixture
def measured(children: Children, tmp_path: Path) -> Measured:
    """What a run over a sparse float32 volume of `depth` x 512 x 512 adds, from a fresh process."""
    return functools.partial(measure, children, tmp_path)


def measure(children: Children, root: Path, depth: int, **options: Any) -> dict[str, float]:
    volume, output = root / f"volume{depth}.zarr", root / f"out{depth}.zarr"
    if not volume.exists():
        zarr.create_array(volume, shape=(depth, 512, 512), chunks=(64, 64, 64), dtype="float32", fill_value=1)
    arguments = {"axes": "zyx", "patch_size": 32, "max_memory": LIMIT, "workers": 2, "work": "light", **options}
    answer: dict[str, float] = children.measure("tests.support.memory_child", volume, output, arguments)
    shutil.rmtree(output)
    assert answer["lowest"] == pytest.approx(2, rel=1e-6)
    assert answer["highest"] == pytest.approx(2, rel=1e-6)
    return answer


def assert_within_bounds(run: dict[str, float], limit: int) -> None:
    assert run["projected"] <= limit
    assert run["added"] <= run["projected"], "the plan promised less than the run took"
    assert run["added"] <= limit


@pytest.mark.parametrize(("mode", "overlap"), [("crop", 0), ("hann", 16)])
def test_a_run_adds_no_more_memory_than_its_plan_and_its_limit(mode: str, overlap: int, measured: Measured) -> None:
    """Input and output are each three times the limit."""
    assert_within_bounds(measured(192, patch_overlap=overlap, overlap_mode=mode), LIMIT)


def test_chunks_that_are_read_in_part_are_not_all_decoded_at_once(measured: Measured, tmp_path: Path) -> None:
    """A sparse volume has nothing to decode; here each chunk is stored, and each layer of patches begins within one."""
    stored = zarr.create_array(tmp_path / "volume192.zarr", shape=(192, 256, 256), chunks=(64, 64, 64), dtype="float32")
    stored[:] = 1 + np.random.default_rng(0).random(stored.shape, dtype="float32") * 1e-7
    assert_within_bounds(measured(192, patch_overlap=16, overlap_mode="hann"), LIMIT)


def test_buffers_on_the_way_to_a_device_are_planned_as_well(measured: Measured) -> None:
    """The CPU stands in for the device, which has a limit of its own: both are main memory here."""
    assert_within_bounds(measured(192, patch_overlap=16, overlap_mode="hann", staged=True), 2 * LIMIT)


def test_memory_that_a_light_model_allocates_is_freed(measured: Measured, tmp_path: Path) -> None:
    """Its tensors are as large as what a heap likes to keep, and leave holes in it that the next ones do not fit."""
    volume = tmp_path / "volume192.zarr"
    zarr.create_array(volume, shape=(4096, 8192, 3), chunks=(512, 512, 3), dtype="uint8", fill_value=1)
    settings = {"axes": "yxc", "patch_size": 500, "patch_overlap": 112, "output_dtype": "uint8", "light": True}
    assert_within_bounds(measured(192, **settings, max_memory=192 * MIB), 192 * MIB)


def test_what_the_heap_retains_for_a_network_is_within_its_plan(children: Children, tmp_path: Path) -> None:
    """A call of this one leaves holes of twice its tensors, and the heap may have as much as these."""
    options = {"name": "SegResNet, 4 channels, 96^3", "directory": str(tmp_path), "threads": 1, "batch_size": 1}
    options |= {"max_memory": "700MiB"}
    run = children.measure("tests.support.task_child", "benchmarks.network_tasks", "run_network", options)
    assert run["retained"] > 256 * MIB
    assert run["peak"] <= run["projected"] <= 700 * MIB


@pytest.mark.parametrize(("network", "limit"), [("StarDist, 3 heads, 256^2", "160MiB"), ("32 channels", "128MiB")])
def test_a_network_adds_no_more_memory_than_its_plan(
    network: str, limit: str, children: Children, tmp_path: Path
) -> None:
    """Two of those that `python -m benchmarks networks` measures."""
    name = next(name for name in ARCHITECTURES if network in name)
    options = {"name": name, "directory": str(tmp_path), "max_memory": limit, "threads": 1, "batch_size": 1}
    run = children.measure("tests.support.task_child", "benchmarks.network_tasks", "run_network", options)
    assert run["peak"] - LIBRARIES <= run["projected"] <= 1.4 * run["peak"]
    assert run["planning_peak"] < 16 * MIB


def test_a_pyramid_adds_no_more_memory_than_the_limit(measured: Measured) -> None:
    settings = {"patch_overlap": 8, "overlap_mode": "average", "output_format": "ome-zarr", "max_memory": 32 * MIB}
    assert_within_bounds(measured(96, **settings), 32 * MIB)


def test_a_run_adds_no_more_memory_than_a_tighter_limit(measured: Measured) -> None:
    assert_within_bounds(measured(96, patch_overlap=8, max_memory=24 * MIB), 24 * MIB)


def test_memory_does_not_grow_with_the_volume(measured: Measured) -> None:
    """128 and 448 MiB of input under 64 MiB. The peaks of two runs differ by a few buffers, which rarely meet."""
    small, large = measured(128, patch_overlap=8), measured(448, patch_overlap=8)
    for run in (small, large):
        assert_within_bounds(run, LIMIT)
    assert large["blocks"] >= small["blocks"]
    assert large["added"] <= small["added"] + 16 * MIB  # a twentieth of what the volume is larger by


def test_resampling_adds_no_more_memory_than_its_plan_and_its_limit(measured: Measured, tmp_path: Path) -> None:
    """Patches of larger voxels, and scores that come back to the grid of the volume."""
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    group = zarr.create_group(
        tmp_path / "volume96.zarr", attributes={"ome": {"version": "0.5", "multiscales": [image]}}
    )
    group.create_array("0", shape=(96, 256, 256), chunks=(64, 64, 64), dtype="float32", fill_value=1)
    settings = {"patch_overlap": 8, "spacing": 1.5, "output_format": "zarr"}
    assert_within_bounds(measured(96, **settings, max_memory=48 * MIB), 48 * MIB)


def test_computing_a_lazy_result_adds_no_more_memory_than_its_limit(children: Children, tmp_path: Path) -> None:
    """But for the chunks that Dask keeps until they are summed: one for each of its threads, and one that waits."""
    zarr.create_array(tmp_path / "in.zarr", shape=(64, 256, 256), chunks=(64, 64, 64), dtype="float32", fill_value=1)
    options = {"axes": "zyx", "patch_size": 32, "patch_overlap": 16, "workers": 2, "max_memory": 32 * MIB}
    run = children.measure("tests.support.memory_child", tmp_path / "in.zarr", "", {**options, "lazy": True})
    assert (run["mean"], run["chunks"]) == (pytest.approx(2), 16)
    assert run["added"] <= 32 * MIB + 4 * MIB


def test_labelling_adds_no_more_memory_than_its_plan_and_its_limit(children: Children, tmp_path: Path) -> None:
    """Noise has an object in every twelfth voxel, a hundred thousand of which blocks share."""
    noise = np.random.default_rng(0).random((128, 192, 192)) < 0.2
    zarr.create_array(tmp_path / "volume.zarr", data=noise, chunks=(64, 64, 64))
    options = {"max_memory": 40 * MIB, "workers": 2, "output_chunks": 64}
    paths = tmp_path / "volume.zarr", tmp_path / "labels.zarr"
    run = children.measure("tests.support.label_memory_child", *paths, options)
    assert run["objects"] > 300_000
    assert run["blocks"] > 4
    assert_within_bounds(run, 40 * MIB)
