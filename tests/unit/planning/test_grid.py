"""Promises on the grid of patches, against a list of all starts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oocpatch.planning.blocks import BlockAxis, core_length
from oocpatch.planning.grid import GridAxis
from oocpatch.planning.sweep import axis_totals
from tests.support import oracle


@st.composite
def axes(draw: st.DrawFn) -> GridAxis:
    """Any axis of evenly spaced patches, some grown by a context."""
    patch = draw(st.integers(1, 40))
    axis = GridAxis(draw(st.integers(1, 400)), patch, draw(st.integers(0, patch - 1)), even=True)
    return axis.grown(draw(st.integers(0, 3)))


@given(axes(), st.data())
def test_evenly_spaced_patches_are_found_by_the_spans_that_they_start_in_and_meet(
    axis: GridAxis, data: st.DataObject
) -> None:
    if data.draw(st.booleans()):
        low = data.draw(st.integers(0, axis.length - 1))
        high = data.draw(st.integers(low + 1, axis.length))
        axis = axis.within(low, high)
        assert axis.start(0) <= low < high <= axis.start(axis.count - 1) + axis.patch
        assert high - low < axis.patch or (axis.start(0), axis.last + axis.patch) == (low, high)
    starts = [axis.start(i) for i in range(axis.count)]
    spans = st.integers(min(axis.first, 0), axis.length + 3)
    start, stop = sorted((data.draw(spans), data.draw(spans)))
    owned = [i for i, s in enumerate(starts) if (start <= s or start <= 0) and s < stop]
    assert list(axis.indices(start, stop)) == owned
    if start < stop:
        met = [i for i, s in enumerate(starts) if s < stop and s + axis.patch > start]
        assert list(axis.meeting(start, stop)) == met


@given(axes())
def test_evenly_spaced_patches_cover_the_axis_with_at_least_the_overlap(axis: GridAxis) -> None:
    starts = np.array([axis.start(i) for i in range(axis.count)])
    assert axis.begin is not None or starts[0] == -(max(0, axis.patch - axis.length) // 2)
    assert starts[-1] == axis.last
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= axis.stride).all()
    spans = [axis.crop_span(i) for i in range(axis.count)]
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, axis.length)
    assert all(s <= a and b <= s + axis.patch for s, (a, b) in zip(starts, spans, strict=True))


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_evenly_spaced_starts_are_those_of_the_oracle(length: int, patch: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, patch - 1))
    axis = GridAxis(length, patch, overlap, even=True)
    starts = oracle.starts(max(length, patch), patch, overlap, even=True)
    assert [axis.start(i) - axis.first for i in range(axis.count)] == starts


@given(axes(), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_totals_of_evenly_spaced_patches_bound_every_block(axis: GridAxis, core: int, unit: int, chunk: int) -> None:
    blocks = BlockAxis(axis, core_length(axis, core, unit), crop=False, step=unit)
    spans = axis_totals(blocks, chunk).spans
    for i in range(blocks.count):
        patches = blocks.patches(i)
        extent = axis.start(patches[-1]) + axis.patch - axis.start(patches[0]) if patches else 0
        assert len(patches) <= max(s.patch_count for s in spans)
        assert extent <= max(s.extent for s in spans)
        assert blocks.spill(i) <= max(s.halo for s in spans)


def test_an_output_of_another_scale_is_refused_for_evenly_spaced_patches() -> None:
    with pytest.raises(ValueError, match="patch_starts 'even' needs outputs of the volume's scale, got one of 1/2"):
        GridAxis(20, 8, 4, even=True).scaled((1, 2))
