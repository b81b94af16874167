"""Which grid a loop goes through, as far as its patches tell.

Patches arrive one by one, in any order. Those of a full grid are known in advance, so that a part of the output is
known to be complete long before the loop ends. The grid's overlap is told by the user, its patch size by the first
patch, and whether its frame is padded by patches that only one of the two grids has.
"""

from __future__ import annotations

import math
from typing import Any

from oocpatch.aggregation.locations import Locations
from oocpatch.aggregation.placement import grid_through, on_grid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid


class GridGuess:
    """The grids that all patches so far are of.

    Args:
        shape: spatial shape of the volume.
        overlap: what adjacent patches share, as the user told.

    Attributes:
        grids: the grids that are left; none once a patch was of neither.
        home: one of those that were left last; None when there never was one.

    >>> guess = GridGuess((12,), (2,))
    >>> for start in (2, 6):
    ...     guess.see((start,), (4,))
    ...     print([grid.axes[0].padded for grid in guess.grids])
    [False]
    [False]
    """

    def __init__(self, shape: Ints, overlap: Ints) -> None:
        self._shape = shape
        self._overlap = overlap
        self._begun = False
        self.grids: list[PatchGrid] = []
        self.home: PatchGrid | None = None

    def see(self, start: Ints, size: Ints) -> None:
        """Take a patch into account."""
        if not self._begun:
            self._begun = True
            padded = (False, True) if any(o // 2 for o in self._overlap) else (False,)
            self.grids = [PatchGrid.of(self._shape, size, self._overlap, padded=p) for p in padded]
        if self.grids:
            self.grids = [grid for grid in self.grids if on_grid(grid, start, size)]
            self.home = self.grids[0] if self.grids else self.home

    def settle(self, grid: PatchGrid) -> None:
        """All patches of a grid have come, and no others."""
        self._begun = True
        self.grids, self.home = [grid], grid

    def at_home(self, start: Ints, size: Ints) -> bool:
        """Whether a patch is of the home grid."""
        return self.home is not None and on_grid(self.home, start, size)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "begun": self._begun,
            "grids": [_grid_to_json(g) for g in self.grids],
            "home": None if self.home is None else _grid_to_json(self.home),
        }

    def read_json(self, value: dict[str, Any]) -> None:
        """Take over what `to_json` gave."""
        self._begun = value["begun"]
        self.grids = [self._grid(g) for g in value["grids"]]
        self.home = None if value["home"] is None else self._grid(value["home"])

    def _grid(self, value: list[Any]) -> PatchGrid:
        size, overlap, padded = value
        return PatchGrid.of(self._shape, tuple(size), tuple(overlap), padded=padded)


def _grid_to_json(grid: PatchGrid) -> list[Any]:
    return [list(grid.patch_size), [a.overlap for a in grid.axes], grid.axes[0].padded]


def whole_grid(shape: Ints, locations: Locations) -> PatchGrid | None:
    """The grid whose patches are exactly those of `locations`, all of them folded; None when there is none.

    >>> import numpy as np
    >>> seen = Locations((10,))
    >>> seen.extend(np.array([[0], [3], [6]]), (4,), generation=0)
    >>> len(whole_grid((10,), seen))
    3
    """
    if len(locations.sizes) != 1:
        return None
    (size,) = locations.sizes
    starts = locations.axis_starts(size)
    if math.prod(map(len, starts)) != len(locations):
        return None
    return grid_through(shape, size, starts)
