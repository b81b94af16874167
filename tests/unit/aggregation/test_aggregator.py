"""Promises of `PatchAggregator`: what comes out is what the contract says, whatever order, grid and limit."""

from __future__ import annotations

import gc
import itertools
import logging
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from oocpatch import PatchAggregator, PatchGrid, PatchLocation
from tests.support import aggregation, oracle
from tests.support.aggregation import Loop, add, assert_as_expected, loops
from tests.support.cases import MODES, law, scratch


def ones_of_torchio() -> tuple[torch.Tensor, list[PatchLocation]]:
    """Four patches (1, 3, 3) of a volume of 1 x 4 x 4 voxels, filled with 0, 2, 4 and 6."""
    locations = [PatchLocation((0, y, x), (1, 3, 3)) for y in (0, 1) for x in (0, 1)]
    return torch.stack([torch.full((1, 1, 3, 3), float(v)) for v in (0, 2, 4, 6)]), locations


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        ("crop", [(0, 0, 2, 2), (0, 0, 2, 2), (4, 4, 6, 6), (4, 4, 6, 6)]),
        ("average", [(0, 1, 1, 2), (2, 3, 3, 4), (2, 3, 3, 4), (4, 5, 5, 6)]),
        ("hann", [(0, 2 / 3, 4 / 3, 2), (4 / 3, 2, 8 / 3, 10 / 3), (8 / 3, 10 / 3, 4, 14 / 3), (4, 14 / 3, 16 / 3, 6)]),
    ],
)
def test_four_patches_give_the_values_that_torchio_1_gives(mode: str, rows: list[tuple[float, ...]]) -> None:
    aggregator = PatchAggregator((1, 4, 4), mode, patch_overlap=(0, 2, 2))
    aggregator.add_batch(*ones_of_torchio())
    np.testing.assert_allclose(aggregator.get_output()[0, 0], rows, rtol=1e-6, atol=1e-6)


@law(60)
@given(loop=loops(), batch=st.integers(1, 4), on_disk=st.booleans())
def test_any_loop_gives_what_the_oracle_says(loop: Loop, batch: int, on_disk: bool) -> None:
    with scratch() as root:
        aggregator = loop.aggregator(store=root / "out.zarr" if on_disk else None)
        add(aggregator, loop.patches, batch)
        assert_as_expected(aggregator.get_output().numpy(), loop)
        assert_as_expected(np.asarray(aggregator.get_array()[...]), loop)
        aggregator.close()


@law(50)
@given(loop=loops(most=40), data=st.data())
def test_a_loop_that_looks_flushes_and_starts_over_in_between_gives_the_same(loop: Loop, data: st.DataObject) -> None:
    with scratch() as root:
        store = root / "out.zarr" if data.draw(st.booleans()) else None
        aggregator, left, done = loop.aggregator(store=store), list(loop.patches), list[aggregation.Patch]()
        steps = st.sampled_from(("add", "add", "add", "flush", "output", "array", *(["crash"] * (store is not None))))
        while left:
            step = data.draw(steps)
            if step == "add" or not done:
                done.append(left.pop(0))
                add(aggregator, done[-1:])
            elif step == "flush":
                aggregator.flush()
            elif step == "crash":
                aggregator = loop.aggregator(store=store)
                left += [p for p in done if aggregation.location(p) not in aggregator.done]
            elif kept := unique(done, aggregator):
                partial = aggregation.aggregate(loop.shape, loop.mode, loop.overlap, kept)
                found = aggregator.get_output().numpy() if step == "output" else aggregator.get_array()[...]
                np.testing.assert_allclose(found, partial, rtol=2e-5, atol=2e-4)
        assert_as_expected(aggregator.get_output().numpy(), loop)
        aggregator.close()


def unique(patches: list[aggregation.Patch], aggregator: PatchAggregator) -> list[aggregation.Patch]:
    """The patches that an aggregator was given and has not lost."""
    aggregator.flush()
    found = {(start, values.shape): (start, values) for start, values in patches}
    return [patch for patch in found.values() if aggregation.location(patch) in aggregator.done]


def grid_patches(shape: tuple[int, ...], patch: int, overlap: int, channels: int = 2) -> list[aggregation.Patch]:
    size = (patch,) * len(shape)
    starts = aggregation.grid_starts(shape, size, (overlap,) * len(shape))
    return [(start, aggregation.values_at(start, size, channels, "float32")) for start in starts]


@pytest.mark.parametrize(
    ("mode", "order", "known"),
    [
        ("crop", "grid", True),
        ("crop", "shuffled", True),
        ("hann", "grid", True),
        ("hann", "shuffled", True),
        ("hann", "grid", False),
        ("gaussian", "shuffled", False),
    ],
)
def test_a_tight_limit_changes_no_value(mode: str, order: str, known: bool, tmp_path: Path) -> None:
    """Sums take 240 KiB; under 128 KiB, most of which is for writing, they leave memory before they are complete."""
    patches = grid_patches((160, 192), 16, 8)
    stated = (8, 8) if known else (0, 0)
    if order == "shuffled":
        random.Random(3).shuffle(patches)
    loop = Loop((160, 192), mode, stated, patches, (16, 16))
    aggregator = loop.aggregator(store=tmp_path / "out.zarr", max_memory="128KiB")
    add(aggregator, patches, 3)
    spilled = list((tmp_path / "out.zarr.oocpatch").glob("*/tiles/*"))
    assert spilled or (order == "grid" and stated == (8, 8)), "the limit was not tight enough to test anything"
    assert_as_expected(np.asarray(aggregator.get_array()[...]), loop)
    assert not (tmp_path / "out.zarr.oocpatch").exists()


def test_without_a_store_what_does_not_fit_goes_to_a_directory_that_goes_with_its_last_user() -> None:
    patches = grid_patches((96, 128), 16, 8)
    loop = Loop((96, 128), "hann", (8, 8), patches, (8, 8))
    aggregator = loop.aggregator(max_memory="64KiB")
    add(aggregator, patches)
    array = aggregator.get_array()
    folder = Path(str(array.store_path.store.root)).parent  # type: ignore[attr-defined]
    del aggregator
    gc.collect()
    assert_as_expected(np.asarray(array[...]), loop)
    assert folder.exists()
    del array
    for _ in range(100):  # threads of zarr let go of it a little later
        gc.collect()
        if not folder.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder} is still there")


def test_complete_parts_are_written_before_the_loop_ends(tmp_path: Path) -> None:
    patches = grid_patches((64, 16), 16, 8, channels=1)
    loop = Loop((64, 16), "hann", (8, 8), patches, (8, 8))
    aggregator = loop.aggregator(store=tmp_path / "out.zarr", max_memory="16KiB")
    add(aggregator, patches[:-2])
    written = zarr.open_array(tmp_path / "out.zarr" / "prediction", mode="r")[0]
    np.testing.assert_allclose(written[:32], loop.expected[0, :32], rtol=1e-5, atol=1e-5)
    assert not written[-8:].any()


@pytest.mark.parametrize(
    ("mode", "padding", "patch", "overlap"),
    [
        ("crop", None, (8, 6, 5), (4, 2, 0)),
        ("crop", "edge", (6, 6, 6), (4, 4, 4)),
        ("crop", None, (5, 7, 4), (2, 5, 3)),
        ("hann", "edge", (8, 6, 5), (4, 2, 0)),
        ("hann", None, (6, 6, 6), (4, 4, 4)),
        ("hann", "edge", (5, 7, 4), (2, 5, 3)),
        ("average", None, (5, 7, 4), (2, 5, 3)),
        ("gaussian", "edge", (6, 6, 6), (4, 4, 4)),
    ],
)
def test_the_same_grid_gives_what_predict_gives(
    mode: str, padding: str | None, patch: tuple[int, ...], overlap: tuple[int, ...], tmp_path: Path
) -> None:
    volume = np.random.default_rng(1).standard_normal((17, 13, 11)).astype(np.float32)

    def model(patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([patches * torch.linspace(0.5, 1.5, patches.shape[-1]), patches.flip(-1)], dim=1)

    expected = oocpatch.predict(
        volume,
        model,
        tmp_path / "out",
        patch_size=patch,
        patch_overlap=overlap,
        overlap_mode=mode,
        padding_mode=padding,
        progress=False,
    ).values
    grid = PatchGrid.of(volume.shape, patch, overlap, padded=padding is not None)
    source = oocpatch.Volume(volume)
    aggregator = PatchAggregator(volume.shape, mode, overlap, output_chunks=4)
    locations = list(grid)
    random.Random(0).shuffle(locations)
    for location in locations:
        patches = torch.from_numpy(source.read(location.box, padding or "edge"))[None]
        aggregator.add_batch(model(patches), [location])
    found = aggregator.get_output().numpy()
    if mode == "crop":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@law(45)
@given(data=st.data(), mode=st.sampled_from(MODES))
def test_the_identity_model_gives_the_volume_back(data: st.DataObject, mode: str) -> None:
    ndim = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.integers(1, (40, 18, 11, 6)[ndim - 1])) for _ in range(ndim))
    size = tuple(data.draw(st.integers(1, n)) for n in shape)
    overlap = tuple(data.draw(st.integers(0, p - 1)) for p in size)
    padded = data.draw(st.booleans())
    starts = aggregation.grid_starts(shape, size, overlap, padded=padded)
    volume = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    patches = [(start, aggregation.cut(volume, start, size)) for start in data.draw(st.permutations(starts[:200]))]
    if len(starts) > 200:
        return
    aggregator = PatchAggregator(shape, mode, overlap)
    add(aggregator, patches, 4)
    np.testing.assert_allclose(aggregator.get_output(), volume, rtol=0 if mode == "crop" else 1e-5, atol=1e-5)


def test_patches_of_another_size_of_volume_reach_beyond_it() -> None:
    """A volume smaller than a patch, as `predict` takes it."""
    aggregator = PatchAggregator((3, 4), "hann")
    patch = torch.arange(64, dtype=torch.float32).reshape(1, 1, 8, 8)
    aggregator.add_batch(patch, [PatchLocation((0, 0), (8, 8))])
    np.testing.assert_allclose(aggregator.get_output(), patch[0, :, :3, :4], rtol=1e-6)


# Outputs at another scale


def downsampled(values: np.ndarray[Any, Any], factor: int) -> np.ndarray[Any, Any]:
    """Means over cubes of `factor` voxels: what a model with that stride makes of `(C, *spatial)`."""
    for axis in range(1, values.ndim):
        n = values.shape[axis] // factor
        values = np.take(values, range(n * factor), axis).reshape(
            *values.shape[:axis], n, factor, *values.shape[axis + 1 :]
        )
        values = values.mean(axis + 1)
    return values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [2, 4])
def test_a_model_with_a_stride_gives_the_volume_at_its_scale(mode: str, factor: int) -> None:
    """Strides and borders are multiples of the factor, so every output voxel has one right value."""
    volume = np.random.default_rng(0).standard_normal((1, 32, 48)).astype(np.float32)
    starts = aggregation.grid_starts((32, 48), (16, 16), (8, 8))
    aggregator = PatchAggregator((32, 48), mode, 8, output_shape=(32 // factor, 48 // factor))
    add_scaled(aggregator, [(s, downsampled(aggregation.cut(volume, s, (16, 16)), factor)) for s in starts], (16, 16))
    np.testing.assert_allclose(aggregator.get_output(), downsampled(volume, factor), rtol=1e-5, atol=1e-6)


def add_scaled(aggregator: PatchAggregator, patches: list[aggregation.Patch], size: tuple[int, ...]) -> None:
    for start, values in patches:
        aggregator.add_batch(torch.from_numpy(values)[None], [PatchLocation(start, size)])


@pytest.mark.parametrize("mode", MODES)
def test_an_upsampling_model_gives_the_volume_at_its_scale(mode: str) -> None:
    volume = np.random.default_rng(0).standard_normal((2, 13, 10)).astype(np.float32)
    starts = aggregation.grid_starts((13, 10), (6, 5), (2, 3))
    aggregator = PatchAggregator((13, 10), mode, (2, 3), output_shape=(26, 20))
    patches = [(s, aggregation.cut(volume, s, (6, 5)).repeat(2, 1).repeat(2, 2)) for s in starts]
    add_scaled(aggregator, patches, (6, 5))
    np.testing.assert_allclose(aggregator.get_output(), volume.repeat(2, 1).repeat(2, 2), rtol=1e-5, atol=1e-6)


@law(45)
@given(
    data=st.data(),
    mode=st.sampled_from(MODES),
    scale=st.sampled_from(((1, 2), (1, 3), (1, 4), (1, 8), (2, 3), (3, 2), (2, 1), (5, 1))),
    padded=st.booleans(),
)
def test_a_full_grid_leaves_no_hole_at_any_scale_and_shape(
    data: st.DataObject, mode: str, scale: tuple[int, int], padded: bool
) -> None:
    """Any shape, any overlap; patches are a whole number of output voxels."""
    up, down = scale
    ndim = data.draw(st.integers(1, 2))
    size = tuple(down * data.draw(st.integers(1, 24 // down)) for _ in range(ndim))
    shape = tuple(data.draw(st.integers(p, 60)) for p in size)
    overlap = tuple(data.draw(st.integers(0, p - 1)) for p in size)
    starts = aggregation.grid_starts(shape, size, overlap, padded=padded)
    if len(starts) > 300:
        return
    outs = tuple(data.draw(st.sampled_from(sorted({max(1, n * up // down), -(-n * up // down)}))) for n in shape)
    given_size = tuple(p * up // down for p in size)
    aggregator = PatchAggregator(shape, mode, overlap, output_shape=outs)
    add_scaled(aggregator, [(s, np.ones((1, *given_size), np.float32)) for s in starts], size)
    found = aggregator.get_output().numpy()
    assert found.shape == (1, *outs)
    np.testing.assert_allclose(found, 1, rtol=1e-5)


def test_positions_at_another_scale_are_right_to_half_a_voxel() -> None:
    """A ramp over 101 voxels, a quarter of them in the output: 26."""
    ramp = np.arange(101, dtype=np.float32)[None]
    starts = aggregation.grid_starts((101,), (32,), (16,))
    aggregator = PatchAggregator((101,), "hann", 16, output_shape=(26,))
    add_scaled(aggregator, [(s, downsampled(aggregation.cut(ramp, s, (32,)), 4)) for s in starts], (32,))
    centres = np.arange(26) * 4 + 1.5
    assert np.abs(aggregator.get_output().numpy()[0] - centres).max() <= 4 * 0.75


def test_a_dict_has_one_output_per_key_with_channels_dtype_and_scale_of_its_own(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 100, (1, 12, 21)).astype(np.float32)
    aggregator = PatchAggregator((12, 21), "crop", 4, store=tmp_path / "out.zarr")
    for start in aggregation.grid_starts((12, 21), (8, 8), (4, 4)):
        patch = aggregation.cut(volume, start, (8, 8))
        outputs = {
            "labels": torch.from_numpy(patch.astype(np.uint8))[None],
            "coarse": torch.from_numpy(np.concatenate([downsampled(patch, 4)] * 3))[None],
            "fine": torch.from_numpy(patch.repeat(2, 1).repeat(2, 2))[None],
        }
        aggregator.add_batch(outputs, [PatchLocation(start, (8, 8))])
    labels = aggregator.get_array("labels")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[...], volume)
    np.testing.assert_array_equal(aggregator.get_output("fine"), volume.repeat(2, 1).repeat(2, 2))
    coarse = aggregator.get_output("coarse").numpy()
    assert coarse.shape == (3, 3, 6)
    np.testing.assert_array_equal(coarse[:, :, :4], np.concatenate([downsampled(volume[..., :16], 4)] * 3))
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert sorted(group.array_keys()) == ["coarse", "fine", "labels"]
    with pytest.raises(KeyError, match=r"'other'.*coarse"):
        aggregator.get_output("other")


# Dtypes and values


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float64"])
def test_crop_keeps_dtype_and_bits(dtype: str, tmp_path: Path) -> None:
    values = (np.random.default_rng(0).standard_normal((1, 1, 8)) * 100).astype(dtype)
    for store in (None, tmp_path / "out.zarr"):
        aggregator = PatchAggregator((8,), "crop", store=store)
        aggregator.add_batch(torch.from_numpy(values), [PatchLocation((0,), (8,))])
        assert aggregator.get_output().dtype == torch.from_numpy(values).dtype
        np.testing.assert_array_equal(aggregator.get_output(), values[0])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float64"])
def test_blending_sums_in_float32_whatever_the_dtype(dtype: str) -> None:
    aggregator = PatchAggregator((12,), "hann", 4)
    patch = torch.full((1, 1, 8), 200).to(torch.from_numpy(np.empty(0, dtype)).dtype)
    for start in (0, 4):
        aggregator.add_batch(patch, [PatchLocation((start,), (8,))])
    assert aggregator.get_output().dtype == torch.float32
    np.testing.assert_allclose(aggregator.get_output(), 200, rtol=1e-6)


def test_bfloat16_is_stored_as_float32() -> None:
    aggregator = PatchAggregator((4,), "crop")
    aggregator.add_batch(torch.arange(4).to(torch.bfloat16).reshape(1, 1, 4), [PatchLocation((0,), (4,))])
    assert aggregator.get_output().tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_a_tensor_with_gradients_is_taken_without_them() -> None:
    aggregator = PatchAggregator((4,))
    aggregator.add_batch(torch.ones(1, 1, 4, requires_grad=True), [PatchLocation((0,), (4,))])
    assert not aggregator.get_output().requires_grad


def test_what_is_not_finite_stays_in_its_patch() -> None:
    aggregator = PatchAggregator((12,), "average", 4)
    aggregator.add_batch(torch.full((1, 1, 8), torch.nan), [PatchLocation((0,), (8,))])
    aggregator.add_batch(torch.ones(1, 1, 8), [PatchLocation((4,), (8,))])
    assert torch.isnan(aggregator.get_output()[0]).tolist() == [True] * 8 + [False] * 4


def test_voxels_that_no_patch_covers_are_zero() -> None:
    for mode in MODES:
        aggregator = PatchAggregator((10,), mode)
        aggregator.add_batch(torch.full((1, 1, 4), 5.0), [PatchLocation((3,), (4,))])
        np.testing.assert_allclose(aggregator.get_output(), [[0, 0, 0, 5, 5, 5, 5, 0, 0, 0]], rtol=1e-6)


def test_a_patch_that_comes_again_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    aggregator = PatchAggregator((6,), "average", 2)
    aggregator.add_batch(torch.ones(2, 1, 4), [PatchLocation((0,), (4,))] * 2)
    with caplog.at_level(logging.INFO, logger="oocpatch"):
        aggregator.add_batch(torch.full((2, 1, 4), 5.0), [PatchLocation((0,), (4,)), PatchLocation((2,), (4,))])
    assert aggregator.get_output().tolist() == [[1, 1, 3, 3, 5, 5]]
    assert aggregator.num_repeated == 2
    assert "1 patches were added before" in caplog.text


def test_a_patch_off_the_grid_opens_what_is_written_again(tmp_path: Path) -> None:
    patches = grid_patches((32, 16), 16, 8)
    extra = [((s, 3), aggregation.values_at((s, 3), (9, 12), 2, "float32")) for s in (-2, 5, 20)]
    for mode in MODES:
        loop = Loop((32, 16), mode, (8, 8), [*patches, *extra], (4, 4))
        aggregator = loop.aggregator(store=tmp_path / mode)
        add(aggregator, patches)
        array = aggregator.get_array()
        assert not Path(f"{tmp_path / mode}.oocpatch").exists(), "the grid is complete"
        add(aggregator, extra[:1])
        add(aggregator := again(aggregator, loop, tmp_path / mode), extra[1:])
        assert_as_expected(np.asarray(aggregator.get_array()[...]), loop)
        assert_as_expected(np.asarray(array[...]), loop)
        aggregator.close()
        assert not Path(f"{tmp_path / mode}.oocpatch").exists()


def again(aggregator: PatchAggregator, loop: Loop, store: Path) -> PatchAggregator:
    """Another process would go on so."""
    aggregator.flush()
    return loop.aggregator(store=store)


# Order and bits


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_arrival_does_not_matter(mode: str) -> None:
    patches = grid_patches((20, 14), 6, 3)
    found = []
    for seed in range(4):
        random.Random(seed).shuffle(patches)
        aggregator = PatchAggregator((20, 14), mode, 3, output_chunks=5)
        add(aggregator, patches, 1 + seed)
        found.append(aggregator.get_output())
    for other in found[1:]:
        if mode == "crop":
            assert torch.equal(other, found[0])
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("mode", ["crop", "hann"])
def test_going_on_in_the_same_order_gives_the_same_bits(mode: str, tmp_path: Path) -> None:
    """Wherever the loop stops, and however batches fall after that, under a limit that moves sums in and out."""
    patches = grid_patches((64, 64), 16, 8)
    random.Random(1).shuffle(patches)
    loop = Loop((64, 64), mode, (8, 8), patches, (8, 8))
    whole = loop.aggregator(store=tmp_path / "whole", max_memory="40KiB")
    add(whole, patches, 2)
    for stop, kept in itertools.product((5, 23, 40), (3, 19)):
        store = tmp_path / f"{stop}-{kept}"
        aggregator = loop.aggregator(store=store, max_memory="40KiB")
        add(aggregator, patches[: stop - kept if kept < stop else stop], 2)
        aggregator.flush()
        add(aggregator, patches[stop - kept : stop] if kept < stop else [], 2)
        aggregator = loop.aggregator(store=store, max_memory="40KiB")
        add(aggregator, [p for p in patches if aggregation.location(p) not in aggregator.done], 3)
        np.testing.assert_array_equal(aggregator.get_array()[...], whole.get_array()[...])


# What it refuses


PATCH = PatchLocation((0, 0), (4, 4))
GOOD = torch.ones(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_shape": (0, 4)}, r"spatial_shape must be at least 1 on every axis, got \(0, 4\)"),
        ({"spatial_shape": ()}, r"spatial_shape must have one size per axis, got \(\)"),
        ({"spatial_shape": 8}, "spatial_shape must have one size per axis, got 8"),
        ({"spatial_shape": (2**30, 2**30)}, r"spatial_shape must have fewer than 2\*\*60 voxels"),
        ({"overlap_mode": "mean"}, "overlap_mode must be one of crop, average, hann, gaussian, got 'mean'"),
        ({"overlap_mode": None}, "overlap_mode must be one of crop, average, hann, gaussian, got None"),
        ({"patch_overlap": -2}, "patch_overlap must be at least 0"),
        ({"patch_overlap": (2, 2, 2)}, "patch_overlap must have one value per spatial axis"),
        ({"output_shape": (4,)}, "output_shape must have one value per spatial axis"),
        ({"output_shape": (0, 4)}, "output_shape must be at least 1"),
        ({"output_chunks": 0}, "output_chunks must be at least 1"),
        ({"max_memory": "lots"}, "max_memory must be a number of bytes"),
        ({"max_memory": 0}, "max_memory must be positive"),
        ({"store": "s3://bucket/out.zarr"}, "store must be a path on a local or shared file system"),
        ({"store": "/dev/null/out.zarr"}, "store must be in a directory"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchAggregator(**{"spatial_shape": (8, 8), **arguments})


@pytest.mark.parametrize(
    ("batch", "locations", "message"),
    [
        (GOOD, [PatchLocation((8, 0), (4, 4))], r"locations must lie in the volume, at least in part, got \(8, 0\) to"),
        (GOOD, [PatchLocation((-4, 0), (4, 4))], "locations must lie in the volume"),
        (GOOD, [PATCH, PATCH], "batch must have one entry per location, got 1 and 2"),
        (GOOD, [], "batch must have one entry per location, got 1 and 0"),
        (GOOD[0], [PATCH], r"batch must be \(B, C, axis 0, axis 1\) for a volume of shape \(8, 8\), got \(2, 4, 4\)"),
        (GOOD, [PatchLocation((0,), (4,))], "locations must have one value per axis of the volume"),
        (GOOD, [PatchLocation((0, 0), (4, 5))], r"spatial size of its locations, got \(4, 4\) for \(4, 5\)"),
        (GOOD, [PatchLocation((0, 0), (4, 0))], "locations must have positive sizes"),
        (GOOD[:, :0], [PATCH], "batch must have at least one channel"),
        (GOOD.to(torch.complex64), [PATCH], "batch must be a dense tensor of real numbers"),
        (GOOD[..., :2], [PatchLocation((0, 0), (4, 2))], "patch_overlap must be smaller than patch_size"),
        ({}, [PATCH], "batch must have at least one tensor, got an empty dict"),
        ({"a/b": GOOD}, [PATCH], "keys of batch must be names of Zarr arrays, got 'a/b'"),
        ({"a": GOOD, "b": GOOD[:0]}, [PATCH], r"batch\['b'\] must have one entry per location"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch: Any, locations: list[PatchLocation], message: str) -> None:
    aggregator = PatchAggregator((8, 8), "average", 2)
    with pytest.raises(ValueError, match=message):
        aggregator.add_batch(batch, locations)
    aggregator.add_batch(GOOD, [PATCH])  # it is as good as new
    assert aggregator.get_output()[0, 0].tolist() == [1.0] * 4 + [0.0] * 4


@pytest.mark.parametrize(
    ("batch", "locations"),
    [(GOOD.numpy(), [PATCH]), ([GOOD], [PATCH]), ({"a": 1}, [PATCH]), (GOOD, "PATCH"), (GOOD, [(0, 0)]), (GOOD, None)],
)
def test_what_is_no_batch_or_no_locations_is_refused(batch: Any, locations: Any) -> None:
    with pytest.raises(TypeError, match="must be a"):
        PatchAggregator((8, 8)).add_batch(batch, locations)


@pytest.mark.parametrize(
    ("mode", "batch", "message"),
    [
        ("crop", GOOD[:, :1], "batch must have 2 channels, as before, got 1"),
        ("crop", GOOD.double(), "batch must have dtype float32, as before, got float64"),
        ("hann", {"a": GOOD}, "batch must be a tensor, as it was before, got a dict"),
    ],
)
def test_a_batch_unlike_the_first_is_refused(mode: str, batch: Any, message: str) -> None:
    aggregator = PatchAggregator((8, 8), mode)
    aggregator.add_batch(GOOD, [PATCH])
    with pytest.raises(ValueError, match=message):
        aggregator.add_batch(batch, [PatchLocation((4, 4), (4, 4))])
    np.testing.assert_array_equal(aggregator.get_output()[:, 4:], 0)


def test_other_keys_than_before_are_refused() -> None:
    aggregator = PatchAggregator((8, 8))
    aggregator.add_batch({"a": GOOD, "b": GOOD}, [PATCH])
    with pytest.raises(ValueError, match=r"batch must have the keys \['a', 'b'\], as before, got \['a'\]"):
        aggregator.add_batch({"a": GOOD}, [PatchLocation((4, 4), (4, 4))])
    with pytest.raises(ValueError, match="batch must be a dict, as it was before, got a tensor"):
        aggregator.add_batch(GOOD, [PatchLocation((4, 4), (4, 4))])


@pytest.mark.parametrize("key", [None, "prediction"])
def test_before_the_first_batch_there_is_no_output(key: str | None) -> None:
    with pytest.raises(KeyError, match="no batch was added yet"):
        PatchAggregator((8, 8)).get_output(key)
    with pytest.raises(KeyError, match="no batch was added yet"):
        PatchAggregator((8, 8)).get_array(key)


def test_a_key_is_asked_for_where_there_are_keys_and_only_there() -> None:
    one, many = PatchAggregator((8, 8)), PatchAggregator((8, 8))
    one.add_batch(GOOD, [PATCH])
    many.add_batch({"a": GOOD}, [PATCH])
    with pytest.raises(KeyError, match="no output for key 'a'"):
        one.get_output("a")
    with pytest.raises(KeyError, match=r"no output for key None; there are \['a'\]"):
        many.get_output()


@pytest.mark.parametrize("given", [(3, 3), (5, 4), (1, 1)])
def test_an_output_shape_that_the_model_cannot_mean_is_refused(given: tuple[int, int]) -> None:
    aggregator = PatchAggregator((80, 80), output_shape=(40, 40))
    with pytest.raises(ValueError, match=r"output_shape must be to the volume as batch is to its locations"):
        aggregator.add_batch(torch.ones(1, 1, *given), [PatchLocation((0, 0), (8, 8))])


def test_a_limit_too_small_for_one_patch_is_refused_with_the_numbers(tmp_path: Path) -> None:
    aggregator = PatchAggregator((8, 8), store=tmp_path / "out.zarr", max_memory=1000)
    with pytest.raises(
        oocpatch.PlanTooLarge, match=r"one patch needs .* but max_memory is 1000 B; lower output_chunks"
    ):
        aggregator.add_batch(GOOD, [PATCH])
    assert not list(tmp_path.iterdir())


def test_locations_of_any_class_with_index_and_size_will_do() -> None:
    class Place:
        index, size = (0, 0), [4, 4]

    aggregator = PatchAggregator((8, 8))
    aggregator.add_batch(GOOD, [Place()])  # type: ignore[list-item]
    assert PATCH in aggregator.done


def test_the_window_of_the_contract_is_what_weighs() -> None:
    """Two patches with values 0 and 1: the result is the share of the second window."""
    for mode in ("hann", "gaussian"):
        aggregator = PatchAggregator((9,), mode, 3)
        aggregator.add_batch(torch.tensor([[[0.0] * 6], [[1.0] * 6]]), [PatchLocation((s,), (6,)) for s in (0, 3)])
        window = oracle.window(mode, 6)
        share = window[:3] / (window[3:] + window[:3])
        np.testing.assert_allclose(aggregator.get_output()[0, 3:6], share, rtol=1e-5)
