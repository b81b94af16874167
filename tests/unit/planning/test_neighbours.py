"""Promises on neighbours: indices computed in a few additions are those that follow from the seams of the blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from oocpatch.planning.blocks import BlockGrid, Neighbours
from oocpatch.planning.heads import patch_grid


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
    none, one = (0,) * len(axes), (1,) * len(axes)
    grid = patch_grid(shape, patch, overlap, none, one, padded=draw(st.booleans()), even=draw(st.booleans()))
    return BlockGrid.of(grid, core, unit, sweep=draw(st.integers(0, len(axes) - 1)), crop=draw(st.booleans()))


@given(grids())
def test_sources_and_readers_follow_from_the_seams(grid: BlockGrid) -> None:
    neighbours = Neighbours(grid)
    blocks = [grid[index] for index in range(grid.num_blocks)]
    for block in blocks[:: max(1, len(blocks) // 30)]:
        sources = [b.index for b in blocks if b is not block and not (b.reach & block.core).empty]
        readers = [b.index for b in blocks if b is not block and not (block.reach & b.core).empty]
        assert sorted(neighbours.sources(block.index)) == sources
        assert sorted(b.index for _, b in grid.sources(block)) == sources
        assert sorted(neighbours.readers(block.index)) == sorted([block.index] * any(block.open) + readers)
