"""The planes a block must hold, as projected and as its schedule really needs them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oocpatch.planning.grid import GridAxis
from oocpatch.planning.sweep import capacity, groups


@given(st.data())
def test_the_projected_capacity_holds_every_group_of_a_long_sweep_and_the_one_read_ahead(data: st.DataObject) -> None:
    patch = data.draw(st.integers(1, 9))
    length, overlap = data.draw(st.integers(1, 300)), data.draw(st.integers(0, patch - 1))
    axis = GridAxis(length, patch, overlap, even=data.draw(st.booleans()))
    chunk, per_group = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    layers = range(axis.count)
    for prefetch in (False, True):
        reads, sums = capacity(axis, layers, per_group, chunk, prefetch=prefetch)
        schedule = groups(axis, layers, per_group, chunk)
        for i, group in enumerate(schedule):
            following = schedule[min(i + prefetch, len(schedule) - 1)]
            assert max(group.read_stop, following.read_stop) - group.start <= reads
            assert group.stop - group.start <= sums
