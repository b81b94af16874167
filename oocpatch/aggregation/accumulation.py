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

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch

from oocpatch.aggregation.aggregated_output import AggregatedOutput, table_patches
from oocpatch.aggregation.placement import HeadSpec, Lattice, Patch, memory_needed
from oocpatch.aggregation.tiles import FINAL, NONE, HeadTiles, Tile
from oocpatch.engine.buffers import torch_dtype
from oocpatch.errors import CorruptData, PlanTooLarge
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.plan import human

logger = logging.getLogger("oocpatch")


class Accumulation:
    """The sums of all heads.

    Attributes:
        specs: the heads.
        heads: their tiles, by name.
        single: whether batches are tensors and no dicts.
        output: the output that takes what is complete, and what does not fit into memory; None: none is needed so far.
    """

    def __init__(
        self,
        shape: Ints,
        overlap: Ints,
        context: Ints,
        mode: str,
        specs: Sequence[HeadSpec],
        *,
        single: bool,
        limit: int,
        output: AggregatedOutput | None,
    ) -> None:
        self._shape, self._overlap, self._context = shape, overlap, context
        self._limit, self._reserve = limit, 0
        self.specs, self.single, self.output = specs, single, output
        self._durable = output is not None
        self.heads = {spec.name: HeadTiles(number, spec, mode) for number, spec in enumerate(specs)}
        self._candidates: list[Lattice] = []
        self._home: Lattice | None = None
        self._starts: dict[Ints, list[set[int]]] = {}

    def create_output(self) -> AggregatedOutput:
        """Create the output; where nothing must survive a crash, a temporary one."""
        output = self.output or AggregatedOutput.temporary()
        output.create(self.specs, single=self.single)
        self.output = output
        return output

    def expect(self, size: Ints, out_size: Mapping[str, Ints]) -> None:
        """Prepare for patches of a size, with outputs of these sizes; raise PlanTooLarge when one is too much."""
        tiles, reserve = memory_needed(self.specs, out_size)
        if tiles + reserve > self._limit:
            shapes = ", ".join(f"{human(s.tile_bytes)} each for shape {s.tile}" for s in self.specs)
            raise PlanTooLarge(
                f"one patch needs {human(tiles + reserve, up=True)} (the tiles it lies in, {shapes}, and the "
                f"writing of one) but max_memory is {human(self._limit)}; lower output_chunks or raise max_memory"
            )
        self._reserve = max(self._reserve, reserve)
        for name, head in self.heads.items():
            head.out_size.setdefault(size, out_size[name])

    def has(self, patch: Patch) -> bool:
        """Return whether a patch was added; where there is a journal, whether that survives a crash."""
        return all(
            patch[1] in head.out_size
            and all(head.has(p, patch, self._home, durable=self._durable) for p in head.positions(patch))
            for head in self.heads.values()
        )

    def add(self, patch: Patch, outputs: Callable[[], Mapping[str, torch.Tensor]]) -> bool:
        """Add the outputs of a patch, `(C, *out_size)` per head; return False if it was added before."""
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
            whole = tuple(p + 2 * c for p, c in zip(size, self._context, strict=True))
            grids = [PatchGrid.of(self._shape, whole, self._overlap, padded=p) for p in padded]
            self._candidates = [Lattice.of_grid(grid, self._context) for grid in grids]
        self._candidates = [lattice for lattice in self._candidates if patch in lattice]
        self._home = self._candidates[0] if self._candidates else self._home
        for starts, at in zip(self._starts.setdefault(size, [set() for _ in size]), start, strict=True):
            starts.add(at)

    def _add_to(self, head: HeadTiles, positions: Sequence[Ints], patch: Patch, values: torch.Tensor) -> None:
        out_size = head.out_size[patch[1]]
        start, claims = head.spec.start(patch, out_size), head.spec.claims(patch, out_size)
        values = values.to(torch.float32) if head.spec.blended else values
        for position in positions:
            # A tile that an interruption tears is not among the open ones, and forgotten.
            tile = head.open.pop(position, None) or self._load(head, position)
            tile.changed = True
            head.shown.discard(position)
            for key, box in claims:
                if head.spec.blended:
                    tile.add(start, values, head.window(out_size), box)
                else:
                    tile.claim(key, box, start, values)
            tile.patches[patch] = None
            head.open[position] = tile

    def _load(self, head: HeadTiles, position: Ints) -> Tile:
        """Return a tile with the values of the output if these are final, else as its file has it, else empty."""
        tile = head.new_tile(position)
        table = head.tables.get(position)
        if head.final[position] and self._home is not None and self.output is not None:
            # Patches of a file that is still there come first, in its order, since commits count from the first one.
            starts = itertools.product(*head.starts(self._home, position))
            known = [] if table is None else table_patches(table)
            tile.patches = dict.fromkeys([*known, *((start, self._home.size) for start in starts)])
            values = self.output.arrays[head.spec.name][(slice(None), *tile.box.slices())]
            tile.data.copy_(torch.from_numpy(np.asarray(values)))
            if (weights := head.weights(tile)) is not None:
                tile.data *= weights
        elif table is not None and self.output is not None:
            try:
                patches = self.output.read_tile(head.number, position, len(table), tile.data.numpy())
            except CorruptData as error:
                head.set_table(position)
                head.committed[position] = NONE
                raise CorruptData(f"{error}; add the patches that are not in `done` again, and all is well") from error
            tile.patches = dict.fromkeys(patches)
        if not head.spec.blended:
            tile.claims = [c for patch in tile.patches for c in head.spec.claims(patch, head.out_size[patch[1]])]
        return tile

    # Room

    def _make_room(self, positions: Mapping[str, Sequence[Ints]]) -> None:
        """Close tiles until there is room for some."""
        heads = self.heads.items()
        while True:
            needed = sum(
                h.spec.tile_bytes * (len(h.open) + sum(p not in h.open for p in positions[n])) for n, h in heads
            )
            # Half is for all else, or what writing takes; a third, where one patch needs more.
            room = self._limit - max(self._reserve, self._limit // 3) - sum(head.nbytes for _, head in heads)
            if needed <= min(room, self._limit // 2):
                return
            if self.output is None:
                self.create_output()
                self._write_complete({name: list(head.open) for name, head in heads})
            elif not self._close_one(positions):
                if needed <= room:
                    return
                raise PlanTooLarge(
                    f"what is kept on patches in the workspace leaves {human(max(0, room))} of max_memory, which is "
                    f"{human(self._limit)}, and one patch needs {human(needed, up=True)}; raise max_memory"
                )

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
        if tile.changed and self.output is not None:
            self.output.write_tile(head.number, position, tile.patches, tile.data.numpy())
            head.note_change(position)
            head.set_table(position, tile.patches)
            head.final[position] = False
            tile.changed = False  # last: an interruption before it costs one more write

    # Output

    def _write_complete(self, positions: Mapping[str, Sequence[Ints]]) -> None:
        for head in self.heads.values() if self.output is not None and self._candidates else ():
            for position in positions[head.spec.name]:
                if position in head.open and all(head.is_complete(position, c) for c in self._candidates):
                    self._write(head, position)
                    self._finalize(head, position)

    def _write(self, head: HeadTiles, position: Ints) -> None:
        """Write a tile's values to the output: whole write units that no other tile has."""
        assert self.output is not None
        tile = head.open.get(position) or self._load(head, position)
        self.output.arrays[head.spec.name][(slice(None), *tile.box.slices())] = head.values(tile).numpy()
        head.shown.add(position)
        head.final[position] = False  # the output may have more than the home lattice

    def _finalize(self, head: HeadTiles, position: Ints) -> None:
        """Drop the sums of a tile whose final values are in the output; a commit that counts them needs their file."""
        head.note_change(position)
        head.final[position] = True
        head.open.pop(position, None)
        if not self._durable:
            self._drop_file(head, position)

    def _drop_file(self, head: HeadTiles, position: Ints) -> None:
        if position in head.tables and self.output is not None:
            self.output.remove_tile(head.number, position)
            head.set_table(position)

    def finish(self) -> None:
        """Bring all patches into the output; if they are a lattice over the volume, record that it is complete."""
        assert self.output is not None
        if self.output.is_complete and not self._changed:
            return
        self.commit()
        whole = self._whole()
        for head in self.heads.values():
            for position in head.unfinished():
                if position not in head.shown:
                    self._write(head, position)
        if whole is not None:
            self._home, self._candidates = whole, [lattice for lattice in self._candidates if lattice == whole]
            for head in self.heads.values():
                for position in head.unfinished():
                    self._finalize(head, position)
                head.final[:] = True  # where no patch lies, too
            self.commit()
            self.complete(whole)

    def complete(self, lattice: Lattice | None) -> None:
        """Record that the output is complete: with all patches of a lattice, or since no patches are taken any more."""
        assert self.output is not None
        self.output.update(
            complete=True,
            out_size={name: list(head.out_size.items()) for name, head in self.heads.items()},
            lattice=None if lattice is None else astuple(lattice),
            final=lattice is None,
        )
        for head in self.heads.values():
            head.committed.clear()

    def _whole(self) -> Lattice | None:
        """Return the lattice over the volume of which all tiles have all patches, if there is one."""
        lattices = self._candidates
        if not lattices and len(self._starts) == 1:
            ((size, starts),) = self._starts.items()
            lattice = Lattice(size, tuple(tuple(sorted(column)) for column in starts))
            finals = any(head.final.any() for head in self.heads.values())
            lattices = (
                [lattice]
                if lattice.covers(self._shape, self._context) and (lattice == self._home or not finals)
                else []
            )
        for lattice in lattices:
            if all(h.is_complete(p, lattice) for h in self.heads.values() for p in np.ndindex(h.spec.counts)):
                return lattice
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """Return a head's output from what is in memory, `(C, *spatial)`."""
        head = self.heads[name]
        out = torch.zeros((head.spec.channels, *head.spec.shape), dtype=torch_dtype(head.spec.dtype), device="cpu")
        for tile in head.open.values():
            out[(slice(None), *tile.box.slices())] = head.values(tile)
        return out

    # Commits, interruptions and damage

    @property
    def _changed(self) -> bool:
        """True where there is something that no commit describes."""
        return any(h.committed or any(tile.changed for tile in h.open.values()) for h in self.heads.values())

    def commit(self) -> None:
        """Make all that was added durable, where there is a journal."""
        if self.output is None or not self._durable or not self._changed:
            return
        for head in self.heads.values():
            for position in head.open:
                self._save(head, position)
        lattices = [astuple(lattice) for lattice in (*self._candidates, self._home) if lattice is not None]
        heads = [
            {"out_size": list(h.out_size.items()), "tiles": [[*p, h.count(p)] for p in sorted(h.committed)]}
            for h in self.heads.values()
        ]
        self.output.commit({"lattices": lattices, "heads": heads})
        for head in self.heads.values():
            for position in head.committed:
                if head.final[position]:
                    self._drop_file(head, position)
            head.committed.clear()
        self.output.update(complete=False)

    def restore(self, base: Lattice | None, commits: Sequence[Any]) -> None:
        """Begin with the lattice of a complete output and the commits after that."""
        assert self.output is not None
        self._home = base
        heads, counts = list(self.heads.values()), dict[tuple[int, Ints], int]()
        for head in heads:
            head.final[:] = base is not None
        for body in commits:
            lattices = list(map(Lattice.from_json, body["lattices"]))  # the candidates, and home
            self._candidates, self._home = lattices[:-1], lattices[-1] if lattices else None
            for head, state in zip(heads, body["heads"], strict=True):
                head.out_size |= {tuple(size): tuple(out_size) for size, out_size in state["out_size"]}
                counts |= {(head.number, tuple(position)): count for *position, count in state["tiles"]}
        if self._home is not None and (base is not None or FINAL in counts.values()):
            self._starts[self._home.size] = list(map(set, self._home.starts))
        errors = []
        for (number, position), count in counts.items():
            heads[number].final[position] = count == FINAL
            if count > NONE:
                try:
                    patches = self.output.read_tile(number, position, count, None)
                except CorruptData as error:
                    errors.append(error)
                    heads[number].committed[position] = NONE
                    continue
                heads[number].set_table(position, patches)
                for patch in patches:
                    self._narrow(patch)
        if errors:
            logger.warning("%s (%d tiles in all): the patches in them must be added again", errors[0], len(errors))
