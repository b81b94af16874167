"""Promises on units of work: what a crash costs, that light models keep their blocks, and that plans do not vary."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.errors import PlanTooLarge
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.heads import Head
from oocpatch.planning.memory import ByteSizes
from oocpatch.planning.planner import BlockChoice, choose
from oocpatch.planning.workload import ACCELERATOR, HEAVY, LIGHT_SECONDS, Workload
from tests.support.cases import law

Ints = tuple[int, ...]
ASSUMED = Workload(HEAVY, is_assumed=True)
GIB = 1 << 30


def sizes_of(patch: Ints, unit: Ints, mode: str = "hann") -> ByteSizes:
    """One head of float32 with such write units, over a volume with chunks of the same size."""
    ones, zeros = ((1, 1),) * len(unit), (0,) * len(unit)
    head = Head("prediction", mode, ones, zeros, 1, "float32", False, 1, "float32", None, unit, unit)
    voxels = math.prod(patch)
    return ByteSizes(4, unit, 4 * math.prod(unit), zeros, (head,), 0.0, 4 * voxels, 1, 1 << 20, 8 * voxels)


def planned(
    shape: Ints, patch: Ints, overlap: Ints, unit: Ints, work: Workload | None, *, memory: int = GIB, **limits: int
) -> BlockChoice:
    unit = tuple(min(u, n) for u, n in zip(unit, shape, strict=True))
    grid = PatchGrid.of(shape, patch, overlap)
    return choose(grid, sizes_of(patch, unit), max_memory=memory, workload=work, **limits)


def patches_of_blocks(blocks: BlockGrid) -> list[int]:
    """Number of patches whose start lies in each core, counted one by one along each axis."""
    axes = []
    for a, axis in enumerate(blocks.grid.axes):
        starts = [axis.start(i) for i in range(axis.count)]
        cores = [blocks.axes[a].core(i) for i in range(blocks.axes[a].count)]
        axes.append([sum(low <= start < high for start in starts) for low, high in cores])
    return [math.prod(counts) for counts in itertools.product(*axes)]


def least_patches(blocks: BlockGrid, unit: Ints) -> int:
    """Patches of the fullest block of the blocks with fewest: every length of cores that is allowed is tried."""
    least = 1
    for a, axis in enumerate(blocks.grid.axes):
        lengths = range(unit[a], axis.length + unit[a], unit[a])
        alone = PatchGrid((axis,))
        grids = (BlockGrid.of(alone, (n,), (unit[a],), 0, crop=False) for n in lengths)
        least *= min(max(patches_of_blocks(grid)) for grid in grids)
    return least


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Ints, Ints, Ints, Ints]:
    """Shape, patch, overlap and write unit, of one to three axes."""
    axes = draw(
        st.lists(
            st.tuples(
                st.integers(1, 700), st.sampled_from((5, 16, 32, 48, 64)), st.integers(0, 47), st.integers(1, 100)
            ),
            min_size=1,
            max_size=3,
        )
    )
    shape, patch, overlap, unit = zip(*axes, strict=True)
    overlap = tuple(min(o, p * 3 // 4) for o, p in zip(overlap, patch, strict=True))
    return shape, patch, overlap, tuple(min(u, n) for u, n in zip(unit, shape, strict=True))


@law(60)
@given(geometries())
def test_a_crash_of_a_heavy_model_costs_two_percent_or_32_patches_wherever_cores_can_be_short_enough(
    geometry: tuple[Ints, Ints, Ints, Ints],
) -> None:
    choice = planned(*geometry, ASSUMED, memory=16 * GIB)
    counts = patches_of_blocks(choice.blocks)
    total = choice.blocks.grid.num_patches
    assert sum(counts) == total, "each patch is in one block"
    assert choice.blocks.patches_per_block == max(counts)
    limit = max(32, total // 50)
    assert choice.crash_limit == limit
    if choice.concurrency * max(counts) > limit:
        assert max(counts) == least_patches(choice.blocks, geometry[3])
        assert choice.concurrency == 1


@law(40)
@given(geometries(), st.sampled_from((64 << 20, GIB)), st.floats(0, 1e13))
def test_plans_keep_the_limits_and_do_not_vary(
    geometry: tuple[Ints, Ints, Ints, Ints], memory: int, operations: float
) -> None:
    try:
        without = planned(*geometry, None, memory=memory)
    except PlanTooLarge:
        with pytest.raises(PlanTooLarge):
            planned(*geometry, Workload(operations), memory=memory)
        return
    choice = planned(*geometry, Workload(operations), memory=memory)
    assert choice == planned(*geometry, Workload(operations), memory=memory)
    assert choice.projection.main.memory(choice.concurrency) <= memory
    lost = without.concurrency * without.blocks.patches_per_block
    if operations / 5e10 * lost <= LIGHT_SECONDS:
        assert choice == without, "a light model"
    assert choice.concurrency * choice.blocks.patches_per_block <= max(lost, choice.crash_limit or 0)


@law(40)
@given(geometries())
def test_work_that_is_no_loss_leaves_plans_as_they_are(geometry: tuple[Ints, Ints, Ints, Ints]) -> None:
    assert planned(*geometry, Workload(0.0)) == planned(*geometry, None)


CUBES = {
    "256, patches of 64": ((256,) * 3, (64,) * 3, (32,) * 3, 343, 32),
    "512, patches of 96": ((512,) * 3, (96,) * 3, (48,) * 3, 1000, 32),
    "512, patches of 64": ((512,) * 3, (64,) * 3, (32,) * 3, 3375, 67),
    "1024, patches of 96": ((1024,) * 3, (96,) * 3, (48,) * 3, 9261, 185),
    "thin": ((16, 4096, 4096), (16, 64, 64), (0, 32, 32), 16129, 322),
    "slide": ((50_000, 50_000), (512, 512), (128, 128), 16900, 338),
}


@pytest.mark.parametrize("name", CUBES)
def test_known_volumes_have_small_units(name: str) -> None:
    shape, patch, overlap, patches, limit = CUBES[name]
    choice = planned(shape, patch, overlap, (64,) * len(shape), ASSUMED, memory=4 * GIB)
    assert choice.blocks.grid.num_patches == patches
    assert choice.crash_limit == limit
    assert choice.concurrency * choice.blocks.patches_per_block <= limit
    assert choice.blocks.num_blocks >= 10
    whole = planned(shape, patch, overlap, (64,) * len(shape), None, memory=4 * GIB)
    assert whole.blocks.patches_per_block > limit


def test_a_block_of_a_very_heavy_model_takes_as_long_as_it_may_and_no_longer() -> None:
    geometry: tuple[Ints, Ints, Ints, Ints] = ((1024,) * 3, (64,) * 3, (32,) * 3, (64,) * 3)
    assert 1 < planned(*geometry, Workload(1e12)).blocks.patches_per_block <= 10  # ten tera-operations on a CPU
    device = planned(*geometry, Workload(1e12, ACCELERATOR)).blocks.patches_per_block
    assert 32 < device <= 200


def test_seams_take_no_more_than_their_share_of_the_work() -> None:
    """The less the work, the larger the blocks, up to those of a light model."""
    geometry: tuple[Ints, Ints, Ints, Ints] = ((512,) * 3, (64,) * 3, (32,) * 3, (64,) * 3)
    works = [planned(*geometry, Workload(n)) for n in (0.0, 3e8, 1e9, 3e9, 1e10, 1e11)]
    counts = [work.blocks.patches_per_block for work in works]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 4
    light = works[0].projection
    for work, operations in zip(works[1:4], (3e8, 1e9, 3e9), strict=True):
        more = work.projection.bytes_read + work.projection.bytes_written - light.bytes_read - light.bytes_written
        assert more / 1e9 <= 0.03 * 3375 * operations / 5e10


def test_limits_of_disk_come_first() -> None:
    geometry: tuple[Ints, Ints, Ints, Ints] = ((256,) * 3, (64,) * 3, (32,) * 3, (64,) * 3)
    free = planned(*geometry, ASSUMED)
    assert free.projection.disk > 64 << 20
    bounded = planned(*geometry, ASSUMED, max_disk=64 << 20)
    assert bounded.projection.disk <= 64 << 20
    assert bounded.blocks.patches_per_block > free.blocks.patches_per_block


def test_more_workers_are_those_that_a_crash_may_cost() -> None:
    geometry: tuple[Ints, Ints, Ints, Ints] = ((1024,) * 3, (64,) * 3, (32,) * 3, (64,) * 3)
    free, asked = planned(*geometry, ASSUMED), planned(*geometry, ASSUMED, workers=16)
    assert asked.blocks == free.blocks
    assert asked.crash_limit is not None
    assert 1 < asked.concurrency <= asked.crash_limit // asked.blocks.patches_per_block
    assert planned(*geometry, None, memory=4 * GIB, workers=3).concurrency == 3
