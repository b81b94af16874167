"""The sums of one head: tiles in memory, pieces of tiles in the workspace, and tiles that are written.

```text
              patches                         patches of no grid
                 |                                    |
 nothing --> open, in memory --complete--> written ---+--> open again: values times their known weights
                 |     ^                      ^
                 v     |                      |
              pieces in the workspace --------+   sums of several generations are added, in their order
```

Sums leave memory together: then a generation ends, and a tile that is touched again starts anew from zero. A tile that
is still in memory may have a piece, too, its state at the last commit, which the next one replaces.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from oocpatch.aggregation.commits import Commits, PieceWriter
from oocpatch.aggregation.grid_guess import GridGuess
from oocpatch.aggregation.head_spec import HeadSpec
from oocpatch.aggregation.locations import Locations
from oocpatch.aggregation.placement import Key, TiledGrid
from oocpatch.aggregation.tile_sums import PatchSet, TileSums, divided, merged, patch_window
from oocpatch.engine.buffers import torch_dtype
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchGrid

OPEN, WRITTEN, DURABLE = 0, 1, 2
"""States of a tile: not written; written, which no commit says so far; written, and a commit says so."""

Rows = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Visit:
    """What one patch means for one head.

    Attributes:
        start: where its output lies.
        claims: what it claims; in the blending modes, one box.
        extent: the box of all claims.
        tiles: the tiles that it must be added to.
    """

    start: Ints
    claims: list[tuple[Key, Box]]
    extent: Box
    tiles: tuple[int, ...]


class HeadSums:
    """The sums of one head.

    Args:
        spec: what the head is.
        mode: how overlapping patches become one.
        locations: all patches that were added.
        guess: the grid they are of.

    Attributes:
        open: tiles in memory.
        state: of each tile, one byte.
        given: the size of what a patch of a size gives.
        reopened: tiles that were written and opened again, with their generation then.
        pieces: what the workspace holds of each tile.
        array: the output's array; None while there is none.
    """

    def __init__(self, spec: HeadSpec, mode: str, locations: Locations, guess: GridGuess) -> None:
        self.spec = spec
        self.placement = spec.placement
        self.given: dict[Ints, Ints] = {}
        self.array: zarr.Array[Any] | None = None
        self._mode = mode
        self._dtype = torch_dtype(spec.dtype)
        self._locations, self._guess = locations, guess
        self._windows: dict[Ints, torch.Tensor] = {}
        self._tiled: dict[PatchGrid, TiledGrid] = {}
        axes = (len(spec.tile),)
        fields = [("generation", "i4"), ("number", "i4"), ("offset", "i8"), ("crc", "u4")]
        self._row = np.dtype([*fields, ("start", "i4", axes), ("stop", "i4", axes)])
        self.clear()
        self.state = np.zeros(self.placement.num_tiles, np.uint8)

    def clear(self) -> None:
        """Forget all sums; what is written stays so."""
        self.open: dict[int, TileSums] = {}
        self.pieces: dict[int, Rows] = {}
        self.reopened: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._just_reopened: set[int] = set()
        self._shown: set[int] = set()

    @property
    def blended(self) -> bool:
        return self._mode != "crop"

    def visit(self, start: Ints, size: Ints, *, at_home: bool) -> Visit:
        """Where a patch goes: which tiles it must be added to."""
        given = self.given[size]
        extent = self.placement.extent(start, size, given)
        tiles = tuple(t for t in self.placement.touched(extent) if not (at_home and self._has_home_patches(t)))
        claims = self.placement.claims(start, size, given)
        return Visit(self.placement.start(start, size, given), claims, extent, tiles)

    def _has_home_patches(self, tile: int) -> bool:
        """Whether all patches of the home grid that touch a tile are in it."""
        return self.state[tile] != OPEN or tile in self.reopened

    def covered(self, start: Ints, size: Ints, least: int) -> bool:
        """Whether all that a patch of the home grid touches is written; `least` is the state that counts."""
        given = self.given.get(size)
        if given is None:
            return False
        tiles = list(self.placement.touched(self.placement.extent(start, size, given)))
        return bool(tiles) and all(self.state[t] >= least for t in tiles)

    def add(self, visit: Visit, values: torch.Tensor, generation: int) -> None:
        """Add what one patch gave, `(C, *given)`."""
        if self._mode != "crop":
            values = values.to(torch.float32)
            window = self._window(tuple(values.shape[1:]))
        for tile in visit.tiles:
            sums = self._opened(tile, generation)
            if self._mode == "crop":
                for key, box in visit.claims:
                    sums.claim(key, box, visit.start, values)
            else:
                sums.add(visit.start, values, window, visit.extent)
            self._counts[tile] += 1
            self._shown.discard(tile)

    def _window(self, given: Ints) -> torch.Tensor:
        if given not in self._windows:
            self._windows = {given: patch_window(self._mode, given)}  # patches of another size are rare
        return self._windows[given]

    def _opened(self, tile: int, generation: int) -> TileSums:
        self._counts[tile] = self._count(tile)
        if tile not in self.open:
            sums = TileSums(self.placement.box(tile), self.spec.channels, self._dtype)
            if self.state[tile] != OPEN:
                self._reopen(tile, sums, generation)
            self.open[tile] = sums
        return self.open[tile]

    def _count(self, tile: int) -> int:
        """Number of patches in a tile that is not written; those of pieces that were read are counted once."""
        if tile not in self._counts and tile in self.pieces:
            self._counts[tile] = sum(len(starts) for _, starts, _ in self._patches(tile))
        return self._counts.get(tile, 0)

    def _reopen(self, tile: int, sums: TileSums, generation: int) -> None:
        """Make sums of a written tile's values: its weights are those of the home grid."""
        home = self._guess.home
        assert home is not None
        tiled = self._grid_tiles(home)
        size, starts = home.patch_size, tiled.starts(tile)
        values = self._read(sums.box)
        claims = []
        if self._mode == "crop":
            claims = [c for s in itertools.product(*starts) for c in self.placement.claims(s, size, tiled.given)]
        else:
            values *= self._product(size, starts).weights(self._mode, sums.box)
        sums.restore(sums.box, values, claims)
        sums.changed = True
        self.state[tile] = OPEN
        self.reopened[tile] = generation
        self._just_reopened.add(tile)
        self.pieces.pop(tile, None)
        self._counts[tile] = tiled.count(tile)

    def _read(self, box: Box) -> torch.Tensor:
        assert self.array is not None
        return torch.from_numpy(np.asarray(self.array[(slice(None), *box.slices())]))

    def complete(self, tile: int) -> bool:
        """Whether no patch is missing in a tile that is not written, by all that is known of the grid."""
        grids = self._guess.grids
        return bool(grids) and all(self._grid_tiles(g).count(tile) == self._count(tile) for g in grids)

    def _grid_tiles(self, grid: PatchGrid) -> TiledGrid:
        if grid not in self._tiled:
            self._tiled[grid] = TiledGrid(grid, self.placement, self.given[grid.patch_size])
        return self._tiled[grid]

    def unwritten(self) -> Iterator[int]:
        """The tiles that patches were added to and that are not written, in order."""
        yield from sorted(t for t in {*self.open, *self.pieces} if self.state[t] == OPEN)

    def shown(self, tile: int) -> bool:
        """Whether all that was added to a tile is in the output, be it complete or not."""
        return tile in self._shown

    def write(self, tile: int, commits: Commits, generation: int) -> None:
        """Write a tile's values to the output: whole write units that no other tile has."""
        assert self.array is not None
        self.array[(slice(None), *self.placement.box(tile).slices())] = self.values(tile, commits, generation).numpy()
        self._shown.add(tile)

    def written(self, tile: int) -> None:
        """A tile's values are in the output, and final: let go of its sums."""
        self.state[tile] = WRITTEN
        self.open.pop(tile, None)
        self._counts.pop(tile, None)

    def values(self, tile: int, commits: Commits | None, generation: int) -> torch.Tensor:
        """The output over a tile, `(C, *box)`, from all that was added to it.

        Raises:
            CorruptData: when a piece is damaged.
        """
        total = self._total(tile, commits, generation)
        if self._mode == "crop":
            return total
        return divided(self._mode, total, self.placement.box(tile), self._patch_sets(tile))

    def _total(self, tile: int, commits: Commits | None, generation: int) -> torch.Tensor:
        """All sums of a tile, `(C, *box)`: those of pieces, in their order, and those in memory."""
        box, sums = self.placement.box(tile), self.open.get(tile)
        rows = [row for row in self.pieces.get(tile, ()) if row["generation"] != generation or sums is None]
        if sums is not None and not rows:
            return sums.data
        total = torch.zeros((self.spec.channels, *box.shape), dtype=self._dtype)
        assert commits is not None
        if self._mode == "crop":
            sources = [(*self._piece(row, commits), self._claims(tile, int(row["generation"]))) for row in rows]
            if sums is not None:
                sources.append((sums.box, sums.data.numpy(), sums.claims))
            merged(total, box, sources)
            return total
        for row in rows:
            part, data = self._piece(row, commits)
            total[(slice(None), *part.slices(box.start))] += torch.from_numpy(data)
        return total if sums is None else total.add_(sums.data)

    def _claims(self, tile: int, generation: int) -> list[tuple[Key, Box]]:
        """The claims behind the piece of a tile that a generation left."""
        return [
            claim
            for size, starts, generations in self._patches(tile)
            for start in starts[generations == generation].tolist()
            for claim in self.placement.claims(tuple(start), size, self.given[size])
        ]

    def _patch_sets(self, tile: int) -> list[PatchSet]:
        """The patches behind a tile's sums."""
        if self._guess.grids and self.complete(tile):
            grid = self._guess.grids[0]
            return [self._product(grid.patch_size, self._grid_tiles(grid).starts(tile))]
        found = []
        for size, starts, _ in self._patches(tile):
            sets = tuple(np.unique(column).tolist() for column in starts.T)
            if math.prod(map(len, sets)) == len(starts):
                found.append(self._product(size, sets))
            else:
                placed = [self.placement.start(tuple(s), size, self.given[size]) for s in starts.tolist()]
                found.append(PatchSet(self.given[size], np.array(placed, np.int64).reshape(-1, len(size))))
        return found

    def _product(self, size: Ints, starts: tuple[list[int], ...]) -> PatchSet:
        given = self.given[size]
        axes = zip(self.placement.axes, starts, size, given, strict=True)
        return PatchSet(given, tuple([a.start(s, p, m) for s in found] for a, found, p, m in axes))

    def _patches(self, tile: int) -> Iterator[tuple[Ints, npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
        """The patches in a tile's sums, as far as they are folded: size, starts, and generations of their pieces."""
        box = self.placement.box(tile)
        sizes = set(self._locations.sizes)
        if tile in self.reopened and self._guess.home is not None:
            sizes.add(self._guess.home.patch_size)
        for size in sorted(sizes):
            given, first = self.given[size], self.placement.axes[0]
            # A little more than can be: rounding, and what the border moves, is less than three voxels of the output.
            low = (box.start[0] - given[0] - 3) * first.denominator // first.numerator
            high = (box.stop[0] + 3) * first.denominator // first.numerator + 1
            starts, generations = self._locations.between(size, low, high)
            inside = np.ones(len(starts), bool)
            for axis, (place, a, b) in enumerate(zip(self.placement.axes, box.start, box.stop, strict=True)):
                found, inverse = np.unique(starts[:, axis], return_inverse=True)
                spans = (place.extent(s, size[axis], given[axis]) for s in found.tolist())
                inside &= np.array([low < b and high > a for low, high in spans], bool)[inverse]
            starts, generations = starts[inside], generations[inside]
            if tile in self.reopened:
                starts, generations = self._with_home(tile, size, starts, generations)
            if len(starts):
                yield size, starts, generations

    def _with_home(
        self, tile: int, size: Ints, starts: npt.NDArray[np.int64], generations: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """The patches of a tile that was opened again: those of the home grid came with its values."""
        home = self._guess.home
        assert home is not None
        others = np.array([not self._guess.at_home(tuple(s), size) for s in starts.tolist()], bool)
        starts, generations = starts[others], generations[others]
        if size != home.patch_size:
            return starts, generations
        known = np.array(list(itertools.product(*self._grid_tiles(home).starts(tile))), np.int64)
        numbers = np.full(len(known), self.reopened[tile], np.int32)
        return np.concatenate([known, starts]), np.concatenate([numbers, generations])

    def save(self, pieces: PieceWriter) -> dict[str, Any]:
        """Write the sums that changed; what a commit must say of this head."""
        changed = [(tile, sums.touched, sums.view(sums.touched)) for tile, sums in self.open.items() if sums.changed]
        return self._saved(pieces, changed)

    def save_merged(self, pieces: PieceWriter, commits: Commits, generation: int) -> dict[str, Any]:
        """Write one piece for all that there are of a tile, when none is in memory; what a commit must say of it."""
        whole = ((t, self.placement.box(t), self._total(t, commits, generation)) for t in sorted(self.pieces))
        return self._saved(pieces, whole)

    def _saved(self, pieces: PieceWriter, sums: Iterable[tuple[int, Box, torch.Tensor]]) -> dict[str, Any]:
        rows = []
        for tile, part, data in sums:
            offset, crc = pieces.append(data.numpy())
            rows.append([tile, offset, crc, *part.start, *part.stop])
        return {
            "pieces": rows,
            "written": np.flatnonzero(self.state == WRITTEN).tolist(),
            "reopened": sorted(self._just_reopened),
            "given": [[size, given] for size, given in self.given.items()],
        }

    def apply(self, body: dict[str, Any], number: int, generation: int) -> None:
        """Take a commit into account: one that was just made, or one that was read."""
        axes = len(self.spec.tile)
        self.given.update({tuple(size): tuple(given) for size, given in body["given"]})
        for tile in body["reopened"]:
            self.state[tile] = OPEN
            self.reopened[tile] = generation
            self.pieces.pop(tile, None)
        for tile, offset, crc, *corners in body["pieces"]:
            row = np.array([(generation, number, offset, crc, corners[:axes], corners[axes:])], self._row)
            old = self.pieces.get(tile, np.empty(0, self._row))
            self.pieces[tile] = np.concatenate([old[old["generation"] != generation], row])
        for tile in body["written"]:
            self.state[tile] = DURABLE
            self.pieces.pop(tile, None)
            self.reopened.pop(tile, None)
        for sums in self.open.values():
            sums.changed = False
        self._just_reopened.clear()

    def restart(self, generation: int) -> None:
        """All pieces are of one generation from now on; they come with the commit that says so."""
        self.pieces.clear()
        self.reopened = dict.fromkeys(self.reopened, generation)

    @property
    def num_pieces(self) -> int:
        return sum(map(len, self.pieces.values()))

    def load(self, commits: Commits, generation: int) -> None:
        """Bring the sums of a generation back into memory.

        Raises:
            CorruptData: when a piece is damaged.
        """
        for tile, rows in self.pieces.items():
            for row in rows[rows["generation"] == generation]:
                part, data = self._piece(row, commits)
                claims = self._claims(tile, generation) if self._mode == "crop" else []
                self._opened(tile, generation).restore(part, torch.from_numpy(data), claims)

    def _piece(self, row: Any, commits: Commits) -> tuple[Box, npt.NDArray[Any]]:
        part = Box(tuple(row["start"].tolist()), tuple(row["stop"].tolist()))
        shape = (self.spec.channels, *part.shape)
        return part, commits.piece(
            int(row["number"]), int(row["offset"]), int(row["crc"]), shape, np.dtype(self.spec.dtype)
        )

    def end_generation(self) -> None:
        """Let go of the sums in memory; pieces hold them."""
        self.open.clear()

    def book_bytes(self, generation: int) -> int:
        """Bytes, about, of what is kept on the pieces of earlier generations, and of the tiles' states."""
        rows = [int((found["generation"] < generation).sum()) for found in self.pieces.values()]
        return sum(rows) * self._row.itemsize + TILE_BYTES * int(np.count_nonzero(rows)) + self.state.nbytes


TILE_BYTES = 400
"""A tile in two dicts, and its array of rows."""
