"""Moments: exact whatever the blocks, in whatever order, and stable where values are large."""

from __future__ import annotations

import numpy as np
import pytest

from oocpatch.objects import moments
from tests.support.measured_objects import columns_of, expected_columns, schema_of

ALL = ("area", "bbox", "centroid", "equivalent_diameter", "principal_axes", "axis_major_length", "axis_minor_length")


def volume(shape, dtype=np.uint32, objects=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 4, shape) > 0).astype(dtype) * rng.integers(1, objects, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(50,), (9, 13), (6, 7, 8), (3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_every_block_shape_gives_the_columns_of_a_loop_over_labels(shape, dtype):
    labels = volume(shape, dtype)
    expected = expected_columns(labels)
    for block, segment_size in ((None, moments.SEGMENT), (5, 16), (1, 4)):
        table = columns_of(schema_of(labels), labels, block=block, segment_size=segment_size)
        assert table.keys() == expected.keys() | {"label"}
        for name, values in expected.items():
            np.testing.assert_array_equal(table[name], values, err_msg=name)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int16, np.float32, np.float64, np.int64])
def test_intensities_are_those_of_a_loop_over_labels(dtype):
    labels = volume((6, 9, 11))
    rng = np.random.default_rng(1)
    intensity = (rng.random((2, *labels.shape)) * 250 - 100 * (np.dtype(dtype).kind in "if")).astype(dtype)
    expected = expected_columns(labels, intensity.astype(np.int64) if dtype is bool else intensity)
    for block, segment_size in ((None, moments.SEGMENT), (4, 16)):
        table = columns_of(schema_of(labels, intensity), labels, intensity, block, segment_size)
        for name, values in expected.items():
            np.testing.assert_allclose(table[name].astype(float), values.astype(float), rtol=1e-12, err_msg=name)
        assert table["min_0"].dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_small_integers_give_the_same_bits_for_all_blocks_and_orders(dtype):
    labels = volume((12, 12, 12), objects=3)
    intensity = np.random.default_rng(2).integers(0, 255, (1, *labels.shape)).astype(dtype)
    schema = schema_of(labels, intensity, ALL)
    whole = columns_of(schema, labels, intensity)
    parts = columns_of(schema, labels, intensity, 5, 64)
    for name, values in whole.items():
        assert values.tobytes() == parts[name].tobytes(), name


@pytest.mark.parametrize(
    ("dtype", "offset", "spread"), [(np.uint16, 60000, 3), (np.float32, 4096, 1), (np.float64, 1e9, 1)]
)
def test_deviations_survive_large_means(dtype, offset, spread):
    labels = volume((8, 8, 8), objects=3)
    noise = np.random.default_rng(3).integers(0, 2, (1, *labels.shape)) * spread
    intensity = (offset + noise).astype(dtype)
    expected = expected_columns(labels, noise.astype(float))
    table = columns_of(schema_of(labels, intensity), labels, intensity, 3)
    np.testing.assert_allclose(table["std"], expected["std"], rtol=1e-7)


def test_objects_of_one_value_deviate_by_nothing():
    labels = volume((8, 8), objects=3)
    for value, dtype in ((0.1, np.float64), (0.1, np.float32), (65535, np.uint16)):
        intensity = np.full((1, *labels.shape), value, dtype)
        table = columns_of(schema_of(labels, intensity), labels, intensity, 3)
        assert (table["std"] == 0).all()
        assert (table["mean"] == intensity.reshape(-1)[0]).all()


def test_nan_and_infinity_stay_in_the_objects_that_have_them():
    labels = np.array([[1, 1, 2, 2, 3, 3]])
    intensity = np.array([[[1.0, np.nan, np.inf, 1.0, 2.0, 4.0]]])
    table = columns_of(schema_of(labels, intensity), labels, intensity)
    assert np.isnan(table["mean"][0])
    assert np.isnan(table["min"][0])
    assert (table["min"][1], table["max"][1]) == (1.0, np.inf)
    assert (table["mean"][2], table["std"][2]) == (3.0, 1.0)


def test_labels_may_be_any_numbers():
    top = 2**64 - 1
    labels = np.array([[top, 0, 5], [top, 2**40, 2**63]], np.uint64)
    table = columns_of(schema_of(labels), labels, block=1)
    assert table["label"].dtype == np.uint64
    assert table["label"].tolist() == [5, 2**40, 2**63, top]
    assert table["area"].tolist() == [1, 1, 1, 2]


def test_sparse_labels_of_one_segment_are_told_apart():
    rng = np.random.default_rng(4)
    for span in (2**17, 2**21, 2**40):
        labels = rng.integers(0, span, (40, 40)).astype(np.int64)
        table = columns_of(schema_of(labels), labels, block=20)
        ids, counts = np.unique(labels[labels > 0], return_counts=True)
        np.testing.assert_array_equal(table["label"], ids)
        np.testing.assert_array_equal(table["area"], counts)


def test_an_ellipse_has_its_axes():
    y, x = np.mgrid[-60:61, -60:61]
    angle = np.deg2rad(30)
    along, across = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    labels = ((along / 40) ** 2 + (across / 20) ** 2 <= 1).astype(np.uint8)
    schema = schema_of(labels, properties=(*ALL, "orientation"))
    table = columns_of(schema, labels, block=50)
    assert table["axis_major_length"][0] == pytest.approx(80, rel=0.01)
    assert table["axis_minor_length"][0] == pytest.approx(40, rel=0.01)
    assert table["axis_1_length"][0] == table["axis_major_length"][0]
    direction = np.array([table["axis_1_y"][0], table["axis_1_x"][0]])
    assert abs(direction @ np.array([-np.sin(angle), np.cos(angle)])) == pytest.approx(1, abs=1e-3)
    # the angle between the y axis and the longest axis, as scikit-image has it
    assert np.tan(table["orientation"][0]) == pytest.approx(direction[1] / direction[0], rel=1e-6)
    assert table["equivalent_diameter"][0] == pytest.approx(2 * np.sqrt(labels.sum() / np.pi))


def test_a_ball_has_equal_axes_in_any_dimension():
    for ndim in (1, 2, 3, 4):
        grid = np.meshgrid(*[np.arange(-8, 9)] * ndim)
        labels = (sum(g**2 for g in grid) <= 64).astype(np.uint8)
        table = columns_of(schema_of(labels, properties=ALL), labels, block=6)
        lengths = [table[f"axis_{k}_length"][0] for k in range(1, ndim + 1)]
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-6)
        assert table["equivalent_diameter"][0] == pytest.approx(lengths[0], rel=0.03)


def test_products_that_do_not_fit_in_64_bits_are_exact():
    layout = moments.RowLayout(1, products=True)
    rows = np.zeros(2, layout.dtype)
    far = 2**20  # 2^23 voxels, as many at each place below, and as many again from there on
    count = rows["count"] = 2**23
    rows["label"] = 1
    rows["start"][:, 0], rows["stop"][:, 0] = (0, far), (far, 2 * far)
    rows["sums"] = count * (far - 1) // 2
    rows["products"] = count * (far - 1) * (2 * far - 1) // 6
    starts = np.array([0])
    merged = moments.merge_sorted(rows, starts, layout)
    variance = moments.covariances(merged, rows, starts, layout)[0, 0]
    assert variance == pytest.approx(((2 * far) ** 2 - 1) / 12, rel=1e-14)


def test_squares_that_do_not_fit_in_64_bits_are_exact():
    layout = moments.RowLayout(1, channels=1, intensity="<u2")
    rows = np.zeros(16, layout.dtype)
    rows["label"], rows["count"] = 1, 2**31
    rows["total"], rows["squares"] = 2**29 * 65535, 2**29 * 65535**2  # a quarter of the voxels are white
    starts = np.array([0])
    mean, variance = moments.variances(moments.merge_sorted(rows, starts, layout), rows, starts, layout)
    assert mean[0, 0] == 65535 / 4
    assert variance[0, 0] == 65535**2 * 3 / 16
