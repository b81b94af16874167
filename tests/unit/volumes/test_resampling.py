"""Volumes on another grid: scipy is the oracle, on the whole volume at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from oocpatch.planning.box import Box
from oocpatch.volumes.model_grid import ModelGrid
from oocpatch.volumes.resampling import AxisMap, resampled, stored_volume
from oocpatch.volumes.volume import Volume


def whole(values: Any, sizes: tuple[int, ...], orders: tuple[int, ...]) -> Any:
    """Return an array resampled as a whole, axis by axis, with outer edges that coincide."""
    values = np.asarray(values, np.float64)
    for axis, (size, order) in enumerate(zip(sizes, orders, strict=True)):
        at = (np.arange(size) + 0.5) * values.shape[axis] / size - 0.5
        lines = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        padded = np.pad(lines, [(0, 0), (32, 32)], mode="edge")
        line = scipy.ndimage.spline_filter1d(padded, order, axis=1, mode="mirror") if order > 1 else padded
        at = np.rint(at + 1e-9) if order == 0 else at
        result = [
            scipy.ndimage.map_coordinates(one, [at + 32], order=order, prefilter=False, mode="mirror") for one in line
        ]
        shape = np.moveaxis(values, axis, -1).shape[:-1]
        values = np.moveaxis(np.array(result).reshape(*shape, size), -1, axis)
    return values


def image(shape: tuple[int, ...], steps: tuple[float, ...], dtype: str = "float32", unit: str = "um") -> Any:
    """Return random voxels with coordinates."""
    names = "zyx"[-len(shape) :]
    values = np.random.default_rng(0).uniform(0, 200, shape).astype(dtype)
    coords = {n: ((n,), 3.0 + s * np.arange(k), {"units": unit}) for n, k, s in zip(names, shape, steps, strict=True)}
    return xarray.DataArray(values, dims=tuple(names), coords=coords)


@settings(max_examples=25)
@given(
    sizes=st.tuples(*[st.tuples(st.integers(1, 40), st.integers(1, 40)) for _ in range(2)]),
    orders=st.tuples(*[st.sampled_from([0, 1, 3])] * 2),
    cut=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(["uint8", "int16", "float32", "float64"]),
)
def test_every_box_is_part_of_the_whole_volume_resampled(sizes: Any, orders: Any, cut: Any, dtype: str) -> None:
    shape, target = zip(*sizes, strict=True)
    data = np.random.default_rng(1).uniform(0, 200, shape).astype(dtype)
    maps = [AxisMap.over(n, m, order) for n, m, order in zip(shape, target, orders, strict=True)]
    volume = resampled(Volume(data), maps)
    expected = whole(data, target, orders)
    assert volume.shape == target
    for box in Box.of_shape(target).split(cut):
        np.testing.assert_allclose(volume.read(box)[0], expected[box.slices()], rtol=0, atol=1e-5 * 200)


def test_edges_coincide_as_those_of_scipys_zoom() -> None:
    data = np.random.default_rng(2).random((20, 30))
    for order in (1, 3):
        volume = resampled(Volume(data), [AxisMap.over(20, 13, order), AxisMap.over(30, 47, order)])
        zoomed = scipy.ndimage.zoom(data, (13 / 20, 47 / 30), order=order, mode="nearest", grid_mode=True)
        np.testing.assert_allclose(volume.read(Box.of_shape((13, 47)))[0], zoomed, atol=1e-5)


def test_boxes_that_are_read_linearly_have_the_same_bits_however_a_volume_is_cut() -> None:
    data = np.random.default_rng(3).random((40, 50), dtype=np.float32)
    volume = resampled(Volume(data), [AxisMap.over(40, 29), AxisMap.over(50, 77)])
    expected = volume.read(Box.of_shape(volume.shape))
    for box in Box.of_shape(volume.shape).split((7, 5)):
        assert np.array_equal(volume.read(box), expected[(slice(None), *box.slices())])


def test_the_channel_stays_where_it_is_and_time_is_not_resampled() -> None:
    data = np.random.default_rng(4).random((3, 8, 6, 2), dtype=np.float32)
    volume = Volume(data, "tyxc")
    half = resampled(volume, [AxisMap(3), AxisMap.over(8, 4), AxisMap.over(6, 3)])
    assert half.source.shape == (3, 4, 3, 2)
    expected = data.reshape(3, 4, 2, 3, 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(half.read(Box.of_shape(half.shape)), np.moveaxis(expected, -1, 0), atol=1e-6)
    np.testing.assert_allclose(
        half.source.load((slice(1, 2), slice(0, 4), slice(1, 3), slice(1, 2))), expected[1:2, :, 1:, 1:], atol=1e-6
    )


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [
        ("1um", (10, 15)),
        ("500nm", (20, 30)),
        (0.25, (40, 60)),
        ([1, 0.5], (10, 30)),
        ({"y": 2.0}, (5, 30)),
        ({"y": "2 um", "x": 0.3}, (5, 50)),
        ("0.7um", (14, 21)),
        (ModelGrid(0.001, unit="millimeter"), (10, 15)),
        (ModelGrid("1um", unit="millimeter"), (10, 15)),
    ],
)
def test_a_spacing_gives_whole_voxels_over_the_same_extent(spacing: Any, shape: tuple[int, ...]) -> None:
    volume = Volume(image((20, 30), (0.5, -0.5)))
    grid = ModelGrid.of(spacing, volume)
    assert grid is not None
    on_grid = grid.over(volume)
    assert on_grid.shape == shape
    for name, own, sign in zip("yx", (20, 30), (1, -1), strict=True):
        at = on_grid.source.coords[name]
        step = own * 0.5 / len(at)
        edge = 3.0 - sign * 0.25
        np.testing.assert_allclose(at, edge + sign * step * (np.arange(len(at)) + 0.5))
        assert at.attrs == {"units": "um"}


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        (0, "must be positive and finite"),
        ("0.5 second", "must be in the unit of axis y, micrometer, got second"),
        ("half", "must be a number, or one with a unit such as '0.5um', got 'half'"),
        ({"q": 1.0}, "must name spatial axes"),
        ([1.0], "must have one value per spatial axis"),
        (ModelGrid(1.0, order=2), "order of a spline must be one of"),
        (ModelGrid(orientation="RAS"), "needs three spatial axes"),
    ],
)
def test_a_spacing_that_is_none_is_refused(spacing: Any, message: str) -> None:
    volume = Volume(image((20, 30), (0.5, 0.5)))
    with pytest.raises(ValueError, match=message):
        ModelGrid.of(spacing, volume).over(volume)  # type: ignore[union-attr]


def test_a_volume_without_coordinates_is_refused() -> None:
    volume = Volume(np.zeros((4, 5)))
    with pytest.raises(ValueError, match="spacing needs coordinates along y, which the volume does not have"):
        ModelGrid.of(0.5, volume).over(volume)  # type: ignore[union-attr]
    assert ModelGrid.of({}, volume).over(volume) is volume  # type: ignore[union-attr]


def ome_zarr(path: Path, data: Any, levels: int) -> Path:
    """Write an image with levels of means over voxels of 0.5 um."""
    group, datasets = zarr.create_group(path), []
    for level in range(levels):
        group.create_array(str(level), data=data, chunks=(16, 16), dimension_names=("y", "x"))
        scale, start = 0.5 * 2**level, 7.0 + 0.25 * (2**level - 1)
        transforms = [{"type": "scale", "scale": [scale] * 2}, {"type": "translation", "translation": [start] * 2}]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
        data = data.reshape(data.shape[0] // 2, 2, data.shape[1] // 2, 2).mean(axis=(1, 3), dtype=np.float32)
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return path


@pytest.mark.parametrize(("spacing", "level"), [(0.4, 0), (0.9, 0), (1.0, 1), (1.3, 1), (2.0, 2), (5.0, 2)])
def test_the_nearest_finer_level_is_read_and_its_own_voxels_as_they_are(
    spacing: float, level: int, tmp_path: Path
) -> None:
    y, x = np.meshgrid(np.arange(64), np.arange(96), indexing="ij")
    path = ome_zarr(tmp_path / "image.zarr", (y * 2 + x).astype(np.float32), 3)
    volume = Volume(path)
    on_grid = ModelGrid.of(spacing, volume).over(volume, lambda n: Volume(path, level=n))  # type: ignore[union-attr]
    assert stored_volume(on_grid).source.location == path / str(level)
    assert (stored_volume(on_grid) is on_grid) == (spacing in (1.0, 2.0))
    values, inner = on_grid.read(Box.of_shape(on_grid.shape))[0], (slice(2, -2),) * 2
    at = [np.asarray(on_grid.source.coords[n].values, np.float64) for n in "yx"]
    expected = (at[0][:, None] - 7) / 0.5 * 2 + (at[1] - 7) / 0.5  # a plane stays one, where nothing is missing
    np.testing.assert_allclose(values[inner], expected[inner], rtol=1e-5)
    scale, start = on_grid.source.image.levels[0].scale, on_grid.source.image.levels[0].translation  # type: ignore[union-attr]
    np.testing.assert_allclose([start[0], start[0] + scale[0]], at[0][:2])


def test_a_chunk_that_changes_changes_the_tags_of_boxes_that_depend_on_it(tmp_path: Path) -> None:
    path = ome_zarr(tmp_path / "image.zarr", np.ones((64, 96), np.float32), 1)
    on_grid = ModelGrid.of(0.8, Volume(path)).over(Volume(path))  # type: ignore[union-attr]
    boxes = list(Box.of_shape(on_grid.shape).split((10, 10)))
    before = [on_grid.for_run().tags(box).tolist() for box in boxes]
    zarr.open_array(path / "0", mode="r+")[20, 20] = 2
    after = [on_grid.for_run().tags(box).tolist() for box in boxes]
    chunk = Box((10, 10), (20, 20))  # its voxels on the grid, with those around them
    meeting = Box(tuple(a - 1 for a in chunk.start), tuple(b + 1 for b in chunk.stop))
    changed = [box for box, a, b in zip(boxes, before, after, strict=True) if a != b]
    assert changed
    assert all(box.meets(meeting) for box in changed)
    assert all(len(tags) == 1 for tags in after)


def test_orientation_turns_and_flips_axes() -> None:
    affine = np.array([[0, 0, -2.0, 9], [3, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]])  # A, S, L
    data = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    volume = Volume(xarray.DataArray(data, dims=("x", "y", "z"), attrs={"affine": affine.tolist()}))
    turned = ModelGrid.of(ModelGrid(orientation="RAS"), volume).over(volume)  # type: ignore[union-attr]
    assert turned.names == ("z", "x", "y")
    assert turned.dtype == volume.dtype
    assert np.array_equal(turned.read(Box.of_shape(turned.shape))[0], data.transpose(2, 0, 1)[::-1])
