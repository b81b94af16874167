"""Promises on neighbours: the driver's short answers are those of the block grid."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oocpatch.planning.blocks import BlockGrid, Neighbours
from oocpatch.planning.grid import PatchGrid


@st.composite
def grids(draw: st.DrawFn) -> BlockGrid:
    """Any block grid of up to three axes, at most a few hundred blocks."""
    axes = draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 8), st.integers(1, 12), st.integers(1, 5)),
            min_size=1,
            max_size=3,
        )
    )
    shape, patch, overlap, core, unit = zip(*axes, strict=True)
    overlap = tuple(min(o, p - 1) for o, p in zip(overlap, patch, strict=True))
    grid = PatchGrid.of(shape, patch, overlap, padded=draw(st.booleans()))
    return BlockGrid.of(grid, core, unit, sweep=draw(st.integers(0, len(axes) - 1)), crop=draw(st.booleans()))


@given(grids())
def test_sources_and_readers_are_those_of_the_block_grid(grid: BlockGrid) -> None:
    found = Neighbours(grid)
    for index in range(0, grid.num_blocks, max(1, grid.num_blocks // 60)):
        block = grid[index]
        assert sorted(found.sources(index)) == sorted(b.index for _, b in grid.sources(block))
        assert sorted(found.readers(index)) == sorted(grid.readers(block))
