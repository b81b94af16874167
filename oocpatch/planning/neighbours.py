"""Who reads whose partials, by index alone: what the driver asks a hundred times for every block.

Along each axis a block spills into the next one or it does not; everything else follows. So a few numbers per position
along an axis are kept, and no `Block` is made to answer.
"""

from __future__ import annotations

import itertools

from oocpatch.planning.blocks import BlockGrid


class Neighbours:
    """Sources and readers of the blocks of a grid, as indices.

    The same as `BlockGrid.sources` and `BlockGrid.readers`, in the time of a few additions.

    Args:
        blocks: the block grid.

    >>> from oocpatch.planning.grid import PatchGrid
    >>> grid = BlockGrid.of(PatchGrid.of((24, 24), (4, 4), (2, 2)), core=(8, 8), unit=(4, 4), sweep=0, crop=False)
    >>> found = Neighbours(grid)
    >>> found.sources(4), found.readers(4)
    ([3, 1, 0], [4, 5, 7, 8])
    """

    def __init__(self, blocks: BlockGrid) -> None:
        self._counts = blocks.counts
        self._strides = [1] * len(self._counts)
        for axis in reversed(range(len(self._counts) - 1)):
            self._strides[axis] = self._strides[axis + 1] * self._counts[axis + 1]
        # bytes: one for each position along an axis
        self._spills = [bytes(axis.spill(i) > 0 for i in range(axis.count)) for axis in blocks.axes]

    def sources(self, index: int) -> list[int]:
        """The blocks whose seams enter a block."""
        return self._sums(index, -1)[1:]

    def readers(self, index: int) -> list[int]:
        """The blocks whose normalize task reads a block's partials, itself first if it keeps sums of its own."""
        found = self._sums(index, 1)
        return found if len(self._sums(index, -1)) > 1 else found[1:]

    def _sums(self, index: int, sign: int) -> list[int]:
        """A block and its neighbours on one side, in the fixed order of axes."""
        rest, steps = index, []
        for count, stride, spills in zip(self._counts, self._strides, self._spills, strict=True):
            position, rest = divmod(rest, stride)
            other = position if sign > 0 else position - 1
            inside = position + 1 < count if sign > 0 else position > 0
            steps.append((0, sign * stride) if inside and spills[other] else (0,))
        return [index + sum(step) for step in itertools.product(*steps)]
