"""Accumulation of patches in any order within a limit on memory: the tiles of all heads.

```text
            patches                        a patch of no known lattice
               |                                     |
 nothing --> in memory --complete--> final ----------+--> in memory again: values times their known weights
               |   ^
               v   |  least recently used first
            a file in the store
```

A tile takes each patch once and knows its patches, so tiles need not agree with each other at any moment: a patch that
is in some of its tiles only is added again, and goes to the others. That makes interruptions and damage cheap: a tile
that an interruption tore, or whose file is damaged, is dropped, and the patches in it count as not added. A patch is
durable once a commit counts it in each of its tiles, after their files are written.

A tile is complete when it has all patches of the lattice that all patches so far are of: a grid with the overlap that
the user gives and the size of the first patch, in the padded or the unpadded frame, as other patches show.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from oocpatch.aggregation.batches import HeadSpec, memory_needed
from oocpatch.aggregation.placement import Lattice, Patch
from oocpatch.aggregation.tile_store import TileStore
from oocpatch.aggregation.tiles import Tile, patch_window
from oocpatch.engine.buffers import torch_dtype
from oocpatch.errors import CorruptData, PlanTooLarge
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.plan import human

logger = logging.getLogger("oocpatch")
FILE_BYTES = 250
"""Bytes that are kept in memory of each tile that is in a file, besides its table of patches."""
FINAL, NONE = -1, 0
"""In a commit, in place of the number of patches in a tile: its final values are in the output; it has no patches."""


class Contents:
    """The patches in the tiles of a head, at one moment.

    Attributes:
        final: per tile, whether the output has its final values, with all patches of the home lattice.
        tables: tables of patches, `(n, 2, axes)`, of other tiles.
        nbytes: bytes that are kept here.
    """

    def __init__(self, counts: Ints) -> None:
        self.final = np.zeros(counts, bool)
        self.tables: dict[Ints, npt.NDArray[np.signedinteger]] = {}
        self.nbytes = self.final.nbytes

    def set(self, position: Ints, patches: Collection[Patch] = (), *, final: bool = False) -> None:
        """Replace what a tile has."""
        before = self.tables.pop(position, None)
        self.nbytes -= 0 if before is None else FILE_BYTES + before.nbytes
        self.final[position] = final
        if len(patches):
            table = np.array(list(patches))
            table = table.astype(np.min_scalar_type(-int(np.abs(table).max()) - 1))
            self.tables[position] = table
            self.nbytes += FILE_BYTES + table.nbytes

    def has(self, position: Ints, patch: Patch, home: Lattice | None) -> bool:
        """Return whether a patch is in a tile."""
        if self.final[position]:
            return home is not None and patch in home
        table = self.tables.get(position)
        return table is not None and bool((table == patch).all((1, 2)).any())


class HeadTiles:
    """The tiles of one head.

    Attributes:
        given: size of a patch's output, by size of the patch.
        array: the output's array; None while there is none.
        open: tiles in memory, the least recently used one first.
        stored: the tiles in files and in the output.
        durable: the same as commits have it.
        changed: tiles that no commit describes as they are.
        shown: tiles whose values so far are in the output.
    """

    def __init__(self, number: int, spec: HeadSpec) -> None:
        self.number, self.spec, self.placement = number, spec, spec.placement
        self.dtype = torch_dtype(spec.dtype)
        self.given: dict[Ints, Ints] = {}
        self.array: zarr.Array[Any] | None = None
        self.open: OrderedDict[Ints, Tile] = OrderedDict()
        self.stored, self.durable = Contents(self.placement.counts), Contents(self.placement.counts)
        self.changed: set[Ints] = set()
        self.shown: set[Ints] = set()

    def positions(self, patch: Patch) -> Sequence[Ints]:
        """Return the tiles that a patch lies in."""
        return list(self.placement.tiles(self.placement.extent(patch, self.given[patch[1]])))

    def has(self, position: Ints, patch: Patch, home: Lattice | None) -> bool:
        """Return whether a patch is in a tile, in memory or not."""
        tile = self.open.get(position)
        return self.stored.has(position, patch, home) if tile is None else patch in tile.patches

    def is_complete(self, position: Ints, lattice: Lattice) -> bool:
        """Return whether a tile has all patches of a lattice, if it has no others."""
        tile, starts = self.open.get(position), self.starts(lattice, position)
        if tile is None and self.stored.final[position]:
            return True
        patches = self.stored.tables.get(position, ()) if tile is None else tile.patches
        return len(patches) == math.prod(map(len, starts))

    def starts(self, lattice: Lattice, position: Ints) -> tuple[Ints, ...]:
        """Return the starts along each axis of the patches of a lattice that lie in a tile."""
        return self.placement.lattice_starts(lattice, self.given[lattice.size], position)

    def describe_changes(self) -> list[list[int]]:
        """Return position and number of patches of each tile that changed, or `FINAL` or `NONE`."""
        tables = self.stored.tables
        return [[*p, FINAL if self.stored.final[p] else len(tables.get(p, ()))] for p in sorted(self.changed)]

    def span(self, patch: Patch) -> tuple[Ints, Ints]:
        """Return start and size of a patch's output."""
        given = self.given[patch[1]]
        return self.placement.start(patch, given), given


class Accumulation:
    """The tiles of all heads, by the heads' names in `heads`.

    Args:
        shape: spatial shape of the volume.
        overlap: overlap of adjacent patches, as the user gives it.
        mode: the overlap mode.
        specs: the heads.
        limit: bytes of memory to stay under.
        on_full: called when memory is full and there is no store; it must `attach` one.
    """

    def __init__(
        self,
        shape: Ints,
        overlap: Ints,
        mode: str,
        specs: Sequence[HeadSpec],
        *,
        limit: int,
        on_full: Callable[[], None],
    ) -> None:
        self._shape, self._overlap, self._mode = shape, overlap, mode
        self._limit, self._on_full, self._reserve = limit, on_full, 0
        self._store: TileStore | None = None
        self._durable = False
        self.specs = specs
        self.heads = {spec.name: HeadTiles(number, spec) for number, spec in enumerate(specs)}
        self._window: tuple[Ints, torch.Tensor] = (), torch.empty(0)
        self._candidates: list[Lattice] = []
        self._home: Lattice | None = None
        self._durable_home: Lattice | None = None
        self._starts: dict[Ints, list[set[int]]] = {}
        self._stale: list[tuple[HeadTiles, Ints]] = []
        self._torn: tuple[HeadTiles, Ints] | None = None

    def attach(self, arrays: Mapping[str, zarr.Array[Any]], store: TileStore, *, durable: bool) -> None:
        """Write to an output from now on, and to a store, with a journal if what is there must survive a crash."""
        self._store, self._durable = store, durable
        for name, head in self.heads.items():
            head.array = arrays[name]

    def expect(self, size: Ints, given: Mapping[str, Ints]) -> None:
        """Prepare for patches of a size, and the sizes of their outputs by head.

        Raises:
            PlanTooLarge: when even one patch is too much for the limit.
        """
        tiles, reserve = memory_needed(self.specs, given)
        if tiles + reserve > self._limit:
            shapes = ", ".join(f"{human(s.tile_bytes)} each for shape {s.tile}" for s in self.specs)
            raise PlanTooLarge(
                f"one patch needs {human(tiles + reserve, up=True)} (the tiles it lies in, {shapes}, and the "
                f"writing of one) but max_memory is {human(self._limit)}; lower output_chunks or raise max_memory"
            )
        self._reserve = max(self._reserve, reserve)
        for name, head in self.heads.items():
            head.given.setdefault(size, given[name])

    def has(self, patch: Patch) -> bool:
        """Return whether a patch was added; where there is a journal, whether that survives a crash."""
        self._mend()
        for head in self.heads.values():
            if patch[1] not in head.given:
                return False
            for position in head.positions(patch):
                durable = self._durable and head.durable.has(position, patch, self._durable_home)
                if not durable and (self._durable or not head.has(position, patch, self._home)):
                    return False
        return True

    def add(self, patch: Patch, outputs: Callable[[], Mapping[str, torch.Tensor]]) -> bool:
        """Add the outputs of a patch, `(C, *given)` per head; return False if it was added before.

        Raises:
            CorruptData: when the file of a tile is damaged; the patches in it must be added again.
        """
        self._mend()
        self._narrow(patch)
        positions = {
            name: [p for p in head.positions(patch) if not head.has(p, patch, self._home)]
            for name, head in self.heads.items()
        }
        if not any(positions.values()):
            return False
        self._make_room(positions)
        for name, values in outputs().items():
            self._add_to(self.heads[name], positions[name], patch, values)
        self._write_complete(positions)
        return True

    def _narrow(self, patch: Patch) -> None:
        """Keep the lattices that a patch is of, too."""
        start, size = patch
        if not self._starts:
            padded = (False, True) if any(o // 2 for o in self._overlap) else (False,)
            grids = [PatchGrid.of(self._shape, size, self._overlap, padded=p) for p in padded]
            self._candidates = [Lattice.of_grid(grid) for grid in grids]
        self._candidates = [lattice for lattice in self._candidates if patch in lattice]
        self._home = self._candidates[0] if self._candidates else self._home
        for starts, at in zip(self._starts.setdefault(size, [set() for _ in size]), start, strict=True):
            starts.add(at)

    def _add_to(self, head: HeadTiles, positions: Sequence[Ints], patch: Patch, values: torch.Tensor) -> None:
        start, given = head.span(patch)
        extent, claims = head.placement.extent(patch, given), head.placement.claims(patch, given)
        if self._mode != "crop":
            values = values.to(torch.float32)
            if self._window[0] != given:
                self._window = given, patch_window(self._mode, given)
        for position in positions:
            if position not in head.open:
                head.open[position] = self._load(head, position)
            tile = head.open[position]
            head.open.move_to_end(position)
            self._torn = head, position
            tile.changed = True
            head.shown.discard(position)
            if self._mode != "crop":
                tile.add(start, values, self._window[1], extent)
            else:
                for key, box in claims:
                    tile.claim(key, box, start, values)
            tile.patches[patch] = None
            self._torn = None

    def _load(self, head: HeadTiles, position: Ints) -> Tile:
        """Return a tile as its file has it, else with the values of the output if these are final, else empty."""
        tile = Tile(head.placement.box(position), head.spec.channels, head.dtype)
        if (table := head.stored.tables.get(position)) is not None:
            assert self._store is not None
            try:
                patches = self._store.read_tile(head.number, position, len(table), tile.data.numpy())
            except CorruptData as error:
                head.stored.set(position)
                head.durable.set(position)
                head.changed.add(position)
                raise CorruptData(f"{error}; add the patches that are not in `done` again, and all is well") from error
            tile.patches = dict.fromkeys(patches)
        elif head.stored.final[position] and self._home is not None and head.array is not None:
            starts = itertools.product(*head.starts(self._home, position))
            tile.patches = dict.fromkeys((start, self._home.size) for start in starts)
            tile.data.copy_(torch.from_numpy(np.asarray(head.array[(slice(None), *tile.box.slices())])))
            if self._mode != "crop":
                tile.data *= tile.weights(self._mode, head.span)
        if self._mode == "crop":
            claims = [c for patch in tile.patches for c in head.placement.claims(patch, head.given[patch[1]])]
            tile.claims = [(key, box & tile.box) for key, box in claims]
        return tile

    # Room

    def _make_room(self, positions: Mapping[str, Sequence[Ints]]) -> None:
        """Close tiles until there is room for some."""
        heads = self.heads.items()
        while True:
            needed = sum(
                h.spec.tile_bytes * (len(h.open) + sum(p not in h.open for p in positions[n])) for n, h in heads
            )
            if needed <= (room := self._room()):
                return
            if self._store is None:
                self._on_full()
                self._write_complete({name: list(head.open) for name, head in heads})
            elif not self._close_one(positions):
                raise PlanTooLarge(
                    f"what is kept on patches in the workspace leaves {human(max(0, room))} of max_memory, which is "
                    f"{human(self._limit)}, and one patch needs {human(needed, up=True)}; raise max_memory"
                )

    def _room(self) -> int:
        """Return the bytes for open tiles: the limit without a quarter for all else, or what writing takes."""
        books = sum(head.stored.nbytes + head.durable.final.nbytes for head in self.heads.values())
        return self._limit - max(self._reserve, self._limit // 4) - books

    def _close_one(self, keep: Mapping[str, Sequence[Ints]]) -> bool:
        """Close the least recently used tile of the largest head that is none of some; return False if all are."""
        for head in sorted(self.heads.values(), key=lambda head: -head.spec.tile_bytes * len(head.open)):
            for position in head.open:
                if position not in keep[head.spec.name]:
                    self._save(head, position)
                    del head.open[position]
                    return True
        return False

    def _save(self, head: HeadTiles, position: Ints) -> None:
        """Write the file of an open tile, if it changed."""
        tile = head.open[position]
        if tile.changed:
            assert self._store is not None
            self._store.write(head.number, position, tile.patches, tile.data.numpy())
            head.stored.set(position, tile.patches)
            head.changed.add(position)
            tile.changed = False  # last: an interruption before it costs one more write

    # Output

    def _write_complete(self, positions: Mapping[str, Sequence[Ints]]) -> None:
        for head in self.heads.values() if self._store is not None and self._candidates else ():
            for position in positions[head.spec.name]:
                if position in head.open and all(head.is_complete(position, c) for c in self._candidates):
                    self._write(head, position)
                    self._finalize(head, position)

    def _write(self, head: HeadTiles, position: Ints) -> None:
        """Write a tile's values to the output: whole write units that no other tile has."""
        assert head.array is not None
        tile = head.open.get(position) or self._load(head, position)
        head.array[(slice(None), *tile.box.slices())] = self._values(head, tile).numpy()
        head.shown.add(position)

    def _values(self, head: HeadTiles, tile: Tile) -> torch.Tensor:
        return tile.data if self._mode == "crop" else tile.normalized(self._mode, head.span)

    def _finalize(self, head: HeadTiles, position: Ints) -> None:
        """Drop the sums of a tile whose final values are in the output."""
        if position in head.stored.tables:
            self._stale.append((head, position))
        head.stored.set(position, final=True)
        head.changed.add(position)
        head.open.pop(position, None)
        if not self._durable:
            self._delete_stale()

    def finish(self) -> Lattice | None:
        """Bring all that was added into the output; return the lattice over the volume that it is, if it is one.

        Raises:
            CorruptData: when the file of a tile is damaged; the patches in it must be added again.
        """
        self.commit()
        whole = self._whole()
        for head in self.heads.values():
            for position in sorted({*head.open, *head.stored.tables}):
                if position not in head.shown:
                    self._write(head, position)
        if whole is not None:
            self._home, self._candidates = whole, [lattice for lattice in self._candidates if lattice == whole]
            for head in self.heads.values():
                for position in sorted({*head.open, *head.stored.tables}):
                    self._finalize(head, position)
                head.stored.final[:] = True  # where no patch lies, too
            self.commit()
        return whole

    def _whole(self) -> Lattice | None:
        """Return the lattice over the volume of which all tiles have all patches, if there is one."""
        lattices = self._candidates if any(self._overlap) else []
        if not lattices and len(self._starts) == 1:
            ((size, starts),) = self._starts.items()
            lattice = Lattice(size, tuple(tuple(sorted(column)) for column in starts))
            finals = any(head.stored.final.any() for head in self.heads.values())
            lattices = [lattice] if lattice.covers(self._shape) and (lattice == self._home or not finals) else []
        for lattice in lattices:
            if all(h.is_complete(p, lattice) for h in self.heads.values() for p in np.ndindex(h.placement.counts)):
                return lattice
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """Return a head's output from what is in memory, `(C, *spatial)`."""
        self._mend()
        head = self.heads[name]
        out = torch.from_numpy(np.zeros((head.spec.channels, *head.placement.shape), head.spec.dtype))
        for tile in head.open.values():
            out[(slice(None), *tile.box.slices())] = self._values(head, tile)
        return out

    # Commits, interruptions and damage

    @property
    def changed(self) -> bool:
        """Whether there is something that no commit describes."""
        return any(h.changed or any(tile.changed for tile in h.open.values()) for h in self.heads.values())

    def commit(self) -> bool:
        """Make all that was added durable, where there is a journal; return whether there was anything."""
        self._mend()
        if self._store is None or not self._durable or not self.changed:
            return False
        for head in self.heads.values():
            for position in list(head.open):
                self._save(head, position)
        lattices = [astuple(lattice) for lattice in (*self._candidates, self._home) if lattice is not None]
        heads = [{"given": list(h.given.items()), "tiles": h.describe_changes()} for h in self.heads.values()]
        self._store.commit({"lattices": lattices, "heads": heads})
        self.settle()
        return True

    def settle(self, *, complete: bool = False) -> None:
        """Take note that a commit describes all that was added, or the record of an output that is complete."""
        self._durable_home = self._home
        for head in self.heads.values():
            for position in head.changed:
                head.durable.set(position, final=bool(head.stored.final[position]))
                if position in head.stored.tables:
                    head.durable.tables[position] = head.stored.tables[position]
            head.durable.final |= complete
            head.changed.clear()
        self._delete_stale()

    def _delete_stale(self) -> None:
        """Delete the files of tiles that are final."""
        assert self._store is not None
        while self._stale:
            head, position = self._stale.pop()
            if position not in head.stored.tables:
                self._store.path(head.number, position).unlink(missing_ok=True)

    def restore(self, base: Lattice | None, commits: Sequence[Any]) -> None:
        """Begin with the lattice of a complete output and the commits after that."""
        assert self._store is not None
        self._home = base
        heads, tiles = list(self.heads.values()), dict[tuple[int, Ints], int]()
        for head in heads:
            head.stored.final |= base is not None
        for body in commits:
            lattices = list(map(Lattice.from_json, body["lattices"]))  # the candidates, and home
            self._candidates, self._home = lattices[:-1], lattices[-1] if lattices else None
            for head, state in zip(heads, body["heads"], strict=True):
                head.given |= {tuple(size): tuple(given) for size, given in state["given"]}
                tiles |= {(head.number, tuple(position)): count for *position, count in state["tiles"]}
        if self._home is not None and (base is not None or FINAL in tiles.values()):
            self._starts[self._home.size] = list(map(set, self._home.starts))
        known, errors = set(), []
        for (number, position), count in tiles.items():
            heads[number].stored.set(position, final=count == FINAL)
            if count > NONE:
                try:
                    patches = self._store.read_tile(number, position, count, None)
                except CorruptData as error:
                    errors.append(error)
                    heads[number].changed.add(position)
                    continue
                known.add(self._store.path(number, position))
                heads[number].stored.set(position, patches)
                for patch in patches:
                    self._narrow(patch)
        if errors:
            logger.warning("%s (%d tiles in all): the patches in them must be added again", errors[0], len(errors))
        self._store.sweep(known)
        for head in heads:
            head.durable = copy.deepcopy(head.stored)
        self._durable_home = self._home

    def _mend(self) -> None:
        """Drop a tile that an interruption tore; what its file has stays."""
        if self._torn is not None:
            logger.warning("an interruption in the middle of a patch: what was not durable must be added again")
            head, position = self._torn
            head.open.pop(position, None)
            self._torn = None
