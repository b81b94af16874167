"""The planes a block must hold, as projected and as its schedule really needs them, and the batches of its patches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oocpatch.planning.grid import GridAxis
from oocpatch.planning.sweep import batches, capacity, groups


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


@given(st.integers(0, 300), st.integers(1, 40), st.integers(1, 5))
def test_batches_hold_each_patch_once_and_keep_all_lanes_busy(patches: int, most: int, lanes: int) -> None:
    parts = batches(patches, most, lanes)
    assert [i for part in parts for i in part] == list(range(patches))
    assert all(1 <= len(part) <= most for part in parts)
    if lanes > 1:  # in turns, the lanes get as many patches each, but for one
        shares = [sum(map(len, parts[lane::lanes])) for lane in range(lanes)]
        assert max(shares) == -(-patches // lanes)
    else:
        assert len(parts) == -(-patches // most)
