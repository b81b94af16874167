"""Objects of models patch by patch: numbering, whole objects, matching and assembly, against loops over voxels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.engine.patch_objects import compact, patch_objects, seen_whole
from oocpatch.objects.instances import matches
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box
from oocpatch.planning.grid import GridAxis, PatchGrid
from tests.support.cases import law
from tests.support.instances import assembled, in_blocks, oracle, owners

Array = npt.NDArray[Any]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint64"])
def test_labels_keep_their_order_and_lose_their_gaps(dtype: str) -> None:
    labels = np.array([[0, 120, 7], [7, 0, 5]], dtype)
    numbered, count = compact(labels)
    assert numbered.tolist() == [[0, 3, 2], [2, 0, 1]]
    assert (count, numbered.dtype) == (3, np.uint8)


def test_large_labels_are_numbered_as_small_ones_are() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 400, (20, 30))
    scattered = np.sort(rng.choice(2**62, 400, replace=False))[labels]
    for values in (scattered, np.where(labels == 0, 0, scattered)):
        numbers = np.unique(values, return_inverse=True)[1].reshape(labels.shape) + int(values.min() > 0)
        numbered, count = compact(values)
        assert np.array_equal(numbered, numbers)
        assert (count, numbered.dtype) == (numbers.max(), np.uint16)


def test_a_patch_without_objects_has_none() -> None:
    numbered, count = compact(np.zeros((3, 4), np.int32))
    assert (count, numbered.any()) == (0, False)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (np.array([0.0, 1.0]), TypeError, "must be integers, got float64"),
        (np.array([True, False]), TypeError, "must be integers, got bool"),
        (np.array([0, -3, 1]), ValueError, "must be 0 or more, 0 the background, got -3"),
    ],
)
def test_what_are_no_labels_of_objects_is_refused(labels: Array, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compact(labels)


def test_objects_at_a_face_are_cut_unless_the_volume_ends_there() -> None:
    labels = np.array([[1, 0, 2], [0, 0, 0], [3, 4, 0]])
    whole = {
        (0, 0): [True, False, False, False],
        (1, 1): [False, False, False, False],
        (7, 7): [False, False, False, True],
        (8, 8): [False, False, False, True],  # beyond the border
        (7, 0): [False, False, True, True],
    }
    for start, expected in whole.items():
        box = Box(start, (start[0] + 3, start[1] + 3))
        assert seen_whole(labels, 4, box, (10, 10)).tolist() == expected, start


def test_objects_are_not_cut_along_looped_axes() -> None:
    labels = np.array([[[0, 1, 0]]])
    assert seen_whole(labels, 1, Box((4, 0, 0), (5, 1, 3)), (9, 1, 9), looped=1).tolist() == [True]
    assert seen_whole(labels, 1, Box((4, 0, 0), (5, 1, 3)), (9, 2, 9), looped=1).tolist() == [False]


def test_an_object_of_which_its_patch_owns_nothing_takes_no_voxels() -> None:
    labels = np.array([0, 1, 0, 2, 2, 0])
    objects = patch_objects(labels, Box((0,), (6,)), Box((0,), (4,)), (20,))
    assert objects.extends.tolist() == [True, True]
    objects = patch_objects(labels, Box((0,), (6,)), Box((0,), (3,)), (20,))
    assert objects.extends.tolist() == [True, False]


@pytest.mark.parametrize(
    ("one", "other", "threshold", "pairs"),
    [
        pytest.param([1, 1, 1, 1], [2, 2, 0, 0], 0.5, [(1, 2)], id="at the threshold"),
        pytest.param([1, 1, 1, 1], [2, 2, 0, 0], 0.51, [], id="below it"),
        pytest.param([1, 1, 0, 0], [0, 0, 1, 1], 0.01, [], id="touching is nothing"),
        pytest.param([1, 1, 1, 1], [1, 1, 2, 2], 0.5, [(1, 1)], id="of equals the lower one"),
        pytest.param([1, 1, 2, 2], [3, 3, 3, 3], 0.5, [(1, 3)], id="of equals the lower one, the other way"),
        pytest.param([1, 1, 1, 2], [1, 2, 2, 2], 0.25, [(1, 2)], id="2 prefers another, whose best is not 1"),
        pytest.param([0, 0], [1, 1], 0.5, [], id="no objects"),
    ],
)
def test_objects_match_where_each_is_the_best_of_the_other(
    one: list[int], other: list[int], threshold: float, pairs: list[tuple[int, int]]
) -> None:
    ones, others = matches(np.array(one), np.array(other), threshold)
    assert list(zip(ones.tolist(), others.tolist(), strict=True)) == pairs


@st.composite
def volumes_in_patches(draw: st.DrawFn) -> tuple[PatchGrid, list[Array | None], float, list[Box]]:
    """A grid, the labels of its patches, a threshold and blocks."""
    ndim = draw(st.integers(1, 3))
    longest = {1: 24, 2: 9, 3: 5}[ndim]
    shape = tuple(draw(st.integers(1, longest)) for _ in range(ndim))
    sizes = tuple(draw(st.integers(2, longest)) for _ in range(ndim))
    overlap = tuple(draw(st.integers(max(0, p - 4), p - 1)) for p in sizes)
    grid = PatchGrid.of(shape, sizes, overlap, padded=draw(st.booleans()))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    frame = tuple(n + 2 * p for n, p in zip(shape, sizes, strict=True))
    coarse = rng.integers(0, draw(st.integers(2, 9)), [-(-n // 2) for n in frame])
    truth = coarse[np.ix_(*(np.arange(n) // 2 for n in frame))]
    noise, skipped = draw(st.sampled_from([0.0, 0.1, 0.4])), draw(st.sampled_from([0.0, 0.0, 0.3]))
    patches: list[Array | None] = []
    for place in grid:
        box = Box(place.index_ini, place.index_fin)
        seen = truth[box.slices(tuple(-p for p in sizes))]
        seen = np.where(rng.random(seen.shape) < noise, rng.integers(0, 9, seen.shape), seen)
        numbers = np.concatenate([[0], rng.permutation(9) + 1 + 10**9 * int(rng.random() < 0.2)])
        patches.append(None if rng.random() < skipped else numbers[seen])
    step = tuple(draw(st.integers(1, n)) for n in shape)
    return grid, patches, draw(st.sampled_from([1e-9, 0.3, 0.5, 0.75, 1.0])), list(Box.of_shape(shape).split(step))


@law(60)
@given(volumes_in_patches())
def test_objects_of_patches_are_those_of_loops_over_voxels(
    case: tuple[PatchGrid, list[Array | None], float, list[Box]],
) -> None:
    grid, patches, match, blocks = case
    owner = owners(grid)
    labels = [np.zeros(grid.patch_size, np.int64) if patch is None else patch for patch in patches]
    for number, patch in enumerate(patches):
        if patch is None:
            owner[owner == number] = -1
    starts = [place.index_ini for place in grid]
    expected, count = oracle(grid.shape, starts, labels, lambda voxel: int(owner[voxel]), match)
    result, found = assembled(grid, patches, match, blocks)
    assert np.array_equal(result, expected)
    assert found == count


@law(60)
@given(volumes_in_patches(), st.data())
def test_objects_do_not_depend_on_blocks(
    case: tuple[PatchGrid, list[Array | None], float, list[Box]], data: st.DataObject
) -> None:
    grid, patches, match, _ = case
    ndim = len(grid.axes)
    core = tuple(data.draw(st.integers(1, n)) for n in grid.shape)
    unit = tuple(data.draw(st.integers(1, 3)) for _ in range(ndim))
    blocks = BlockGrid.of(grid, core, unit, data.draw(st.integers(0, ndim - 1)), crop=False)
    expected, count = assembled(grid, patches, match, [Box.of_shape(grid.shape)])
    result, found = in_blocks(blocks, patches, match)
    assert np.array_equal(result, expected)
    assert found == [count]


@law(20)
@given(volumes_in_patches(), st.data())
def test_objects_are_counted_at_each_time(
    case: tuple[PatchGrid, list[Array | None], float, list[Box]], data: st.DataObject
) -> None:
    grid, patches, match, _ = case
    times = data.draw(st.integers(1, 3))
    shifted = [patches[t:] + patches[:t] for t in range(times)]
    core = (data.draw(st.integers(1, times)), *(data.draw(st.integers(1, n)) for n in grid.shape))
    whole = PatchGrid((GridAxis(times, 1), *grid.axes))
    blocks = BlockGrid.of(whole, core, (1,) * len(core), data.draw(st.integers(0, len(core) - 1)), crop=False)
    labels = [None if patch is None else patch[None] for patch in itertools.chain.from_iterable(shifted)]
    result, found = in_blocks(blocks, labels, match, looped=1)
    for t, at_time in enumerate(shifted):
        expected, count = assembled(grid, at_time, match, [Box.of_shape(grid.shape)])
        assert np.array_equal(result[t], expected)
        assert found[t] == count
