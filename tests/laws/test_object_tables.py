"""Promises on tables of objects: whatever the labels, blocks and memory, they are those of a loop over labels."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.objects import polygons
from tests.support.cases import law
from tests.support.measured_objects import boxes_of, columns_of, expected_columns, filled, schema_of

LONGEST = {1: 60, 2: 16, 3: 8, 4: 5}
TOP = {"uint8": 255, "int32": 2**31 - 1, "uint64": 2**64 - 1}


@st.composite
def cases(draw):
    """Labels, of few ids that may be any, an intensity of one channel, and a block."""
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, LONGEST[ndim]), min_size=ndim, max_size=ndim)))
    dtype = draw(st.sampled_from(sorted(TOP)))
    ids = draw(st.lists(st.integers(1, TOP[dtype]), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    labels = np.array([0, *ids], dtype)[rng.integers(0, len(ids) + 1, shape)]
    intensity = (rng.random((1, *shape)) * 1000).astype(draw(st.sampled_from(("uint8", "int16", "float32"))))
    return labels, intensity, draw(st.integers(1, max(shape)))


@given(case=cases(), segment=st.sampled_from((4, 16, 1 << 18)))
@law(100)
def test_a_table_is_that_of_a_loop_over_labels(case, segment):
    labels, intensity, block = case
    schema = schema_of(labels, intensity)
    table, expected = columns_of(schema, labels, intensity, block, segment), expected_columns(labels, intensity)
    assert table["label"].tolist() == expected["label"].tolist()
    for name in ("area", *(n for n in expected if n.startswith(("bbox", "centroid")))):
        np.testing.assert_array_equal(table[name], expected[name], err_msg=name)
    for name in ("mean", "min", "max", "std"):
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-9, atol=1e-9, err_msg=name)


@given(case=cases())
@law(60)
def test_polygons_hold_the_pixels_of_their_objects(case):
    labels, _, block = case
    labels = labels.reshape(labels.shape[0], -1)
    dtype = polygons.corner_dtype(0)
    parts = [polygons.find_corners(labels[b], [s.start for s in b], (), dtype) for b in boxes_of(labels.shape, block)]
    corners = polygons.merge_corners(parts)
    ids = [int(i) for i in np.unique(labels) if i]
    for label, shape in zip(ids, polygons.trace(corners), strict=True):
        np.testing.assert_array_equal(filled(shape, labels.shape), labels == label)
