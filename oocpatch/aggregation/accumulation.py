"""Patches added up in any order, within a limit on memory: the sums of all heads, and what is known of the patches.

All that is in memory can be made from commits: `restore` does it after a crash, and after an interruption that tore a
patch apart. A commit holds whole patches, so a patch is either in all sums or in none. What is not committed yet is
added again by whoever goes on, and what is, is known to be there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from oocpatch.aggregation.commits import Body, Commits
from oocpatch.aggregation.grid_guess import GridGuess, whole_grid
from oocpatch.aggregation.head_spec import HeadSpec, memory_needed, tile_set_bytes
from oocpatch.aggregation.head_sums import DURABLE, OPEN, WRITTEN, HeadSums, Visit
from oocpatch.aggregation.locations import BYTES_EACH, Locations
from oocpatch.errors import CorruptData, PlanTooLarge
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.plan import human

logger = logging.getLogger("oocpatch")


class Accumulation:
    """The sums of all heads.

    Args:
        shape: spatial shape of the volume.
        overlap: what adjacent patches of the user's grid share.
        mode: how overlapping patches become one.
        specs: the heads.
        limit: bytes to stay under.
        on_full: called when memory is full and there is no workspace; it must `attach` one.

    Attributes:
        commits: the workspace; None while there is none.
        heads: the sums, by name.
    """

    def __init__(
        self,
        shape: Ints,
        overlap: Ints,
        *,
        mode: str,
        specs: list[HeadSpec],
        limit: int,
        on_full: Callable[[], None],
    ) -> None:
        self.commits: Commits | None = None
        self._shape, self._overlap, self._mode = shape, overlap, mode
        self._limit, self._on_full = limit, on_full
        self._specs = specs
        self._reserve = 0
        self._torn = False
        self._all_written = False
        self.heads: dict[str, HeadSums] = {}
        self._reset()

    def _reset(self) -> None:
        """Nothing was added; what is known of the model and of the output stays."""
        self.locations = Locations(self._shape)
        self.guess = GridGuess(self._shape, self._overlap)
        before = self.heads
        self.heads = {spec.name: HeadSums(spec, self._mode, self.locations, self.guess) for spec in self._specs}
        for name, head in before.items():
            self.heads[name].array = head.array
            self.heads[name].given = head.given
        self.generation = 0
        self._room = self._limit - self._reserve

    def attach(self, arrays: Mapping[str, Any], commits: Commits) -> None:
        """From now on there is an output to write to, and a workspace, which holds nothing of what was added so far."""
        if self.commits is None:
            self.locations.unfold()
        self.commits = commits
        for name, array in arrays.items():
            self.heads[name].array = array

    # Patches

    def expect(self, size: Ints, given: Mapping[str, Ints]) -> None:
        """Make sure that what patches of a size give has its place in memory.

        Raises:
            PlanTooLarge: when even one patch is too much for the limit.
        """
        for name, head in self.heads.items():
            head.given.setdefault(size, given[name])
        needed = memory_needed(self._specs, given)
        if needed > self._limit:
            raise PlanTooLarge(
                f"one patch needs {human(needed, up=True)} (the tiles it lies in, {self._tiles_told()}, and the "
                f"writing of one) but max_memory is {human(self._limit)}; lower output_chunks or raise max_memory"
            )
        self._reserve = max(self._reserve, needed - sum(tile_set_bytes(s, given[s.name]) for s in self._specs))
        self._measure_room()

    def _tiles_told(self) -> str:
        return ", ".join(f"{human(s.tile_bytes)} each for shape {s.tile}" for s in self._specs)

    def _measure_room(self) -> None:
        """What open tiles may take: the limit, less what writing takes, and what is kept on earlier generations."""
        books = self.locations.before(self.generation) * BYTES_EACH
        books += sum(head.book_bytes(self.generation) for head in self.heads.values())
        self._room = self._limit - self._reserve - books

    def has(self, start: Ints, size: Ints, *, durable: bool = False) -> bool:
        """Whether a patch was added; with `durable`, whether it will be there after a crash."""
        self.mend()
        if (self.locations.folded(start, size)) if durable else ((start, size) in self.locations):
            return True
        least = DURABLE if durable else WRITTEN
        at_home = self.guess.at_home(start, size)
        return at_home and all(head.covered(start, size, least) for head in self.heads.values())

    def add(self, start: Ints, size: Ints, outputs: Mapping[str, torch.Tensor]) -> None:
        """Add what a patch gave that was not added before, `(C, *given)` per head.

        Raises:
            CorruptData: when a part of the output is complete, but what the workspace holds of it is damaged.
        """
        self.mend()
        self.guess.see(start, size)
        at_home = self.guess.at_home(start, size)
        visits = {name: head.visit(start, size, at_home=at_home) for name, head in self.heads.items()}
        self._make_room(visits)
        self._torn = True
        for name, head in self.heads.items():
            head.add(visits[name], outputs[name], self.generation)
        self.locations.add(start, size)
        self._torn = False
        if self.commits is not None:
            for name, head in self.heads.items():
                self._write_complete(head, visits[name].tiles)

    def _write_complete(self, head: HeadSums, tiles: tuple[int, ...]) -> None:
        for tile in tiles:
            if head.complete(tile):
                self._write(head, tile)
                head.written(tile)

    def _write(self, head: HeadSums, tile: int) -> None:
        assert self.commits is not None
        with self._repairable():
            head.write(tile, self.commits, self.generation)

    def _make_room(self, visits: Mapping[str, Visit]) -> None:
        needed = self._needed(visits)
        if self._open_bytes + needed <= self._room:
            return
        if self.commits is None:
            self._on_full()
            for head in self.heads.values():
                self._write_complete(head, tuple(head.open))
            if self._open_bytes + needed <= self._room:
                return
        self.commit()
        self.generation += 1
        for head in self.heads.values():
            head.end_generation()
        self._measure_room()
        if self._limit - self._reserve - self._room > self._limit // 8:
            self._merge_pieces()
        if self._needed(visits) > self._room:
            raise PlanTooLarge(
                f"what is kept on patches in the workspace leaves {human(max(0, self._room))} of max_memory, which is "
                f"{human(self._limit)}, and one patch needs {human(needed, up=True)}; raise max_memory"
            )

    def _needed(self, visits: Mapping[str, Visit]) -> int:
        heads = self.heads.items()
        return sum(head.spec.tile_bytes * sum(t not in head.open for t in visits[name].tiles) for name, head in heads)

    @property
    def _open_bytes(self) -> int:
        return sum(head.spec.tile_bytes * len(head.open) for head in self.heads.values())

    # Output

    def finish(self) -> bool:
        """Bring all that was added into the output. Whether it is complete: all patches of a grid, and no tile left.

        Raises:
            CorruptData: when what the workspace holds is damaged.
        """
        self.mend()
        self.commit()
        grid = whole_grid(self._shape, self.locations)
        final = []
        for head in self.heads.values():
            for tile in head.unwritten():
                if not head.shown(tile):
                    self._write(head, tile)
                if grid is not None or head.complete(tile):
                    final.append((head, tile))
        # All at once, for what is final is so by the grid: damage to a later tile must not come in between.
        self._torn = True
        for head, tile in final:
            head.written(tile)
        if grid is not None:
            self.guess.settle(grid)
            for head in self.heads.values():
                head.state[head.state == OPEN] = WRITTEN  # what no patch touches is complete, too
        self._torn = False
        self.commit()
        return all(bool((head.state == DURABLE).all()) for head in self.heads.values())

    def tensor(self, name: str) -> torch.Tensor:
        """A head's output from what is in memory, `(C, *spatial)`."""
        self.mend()
        self.commit()
        head = self.heads[name]
        spec = head.spec
        out = torch.from_numpy(np.zeros((spec.channels, *head.placement.shape), spec.dtype))
        for tile in head.unwritten():
            out[(slice(None), *head.placement.box(tile).slices())] = head.values(tile, None, self.generation)
        return out

    # Commits

    @property
    def has_commits(self) -> bool:
        """Whether the workspace holds anything."""
        return self.commits is not None and self.commits.number > 0

    def commit(self) -> None:
        """Make all that was added durable, where there is a workspace."""
        self.mend()
        if self.commits is None:
            self.locations.fold(self.generation)
            return
        if self.changed:
            new = [[list(size), starts.tolist()] for size, starts in self.locations.new()]
            self._commit(new)

    @property
    def changed(self) -> bool:
        """Whether there is something that no commit says."""
        written = any(bool((head.state == WRITTEN).any()) for head in self.heads.values())
        return written or self.locations.has_new

    def _commit(self, new: list[Any], *, forget: bool = False, merge: bool = False) -> None:
        """Make a commit of what is in memory, and take it into account.

        Args:
            new: the patches that were added since the last one.
            forget: what was committed before, and is not written, counts no more.
            merge: the pieces of all generations become one per tile, of this generation, which ends with that.
        """
        assert self.commits is not None
        number = self.commits.number
        with self.commits.pieces() as pieces:
            if merge:
                heads = {n: h.save_merged(pieces, self.commits, self.generation) for n, h in self.heads.items()}
            else:
                heads = {name: head.save(pieces) for name, head in self.heads.items()}
        body = {
            "generation": self.generation,
            "forget": forget,
            "merge": merge,
            "all_written": self._all_written,
            "grid": self.guess.to_json(),
            "locations": new,
            "heads": heads,
        }
        self._torn = True
        self.commits.commit(body)
        self.locations.fold(self.generation)
        self._apply(body, number)
        self._all_written = False
        self._torn = False
        self.commits.keep_pieces(self._numbers())

    def _apply(self, body: Body, number: int) -> None:
        generation = body["generation"]
        if body["merge"]:
            self.locations.restart(generation)
        for name, head in self.heads.items():
            if body["merge"]:
                head.restart(generation)
            head.apply(body["heads"][name], number, generation)
        self.generation = generation + body["merge"]

    def _merge_pieces(self) -> None:
        """Where tiles have many pieces, make one of them, so that less is kept on them."""
        if sum(h.num_pieces - MANY * len(h.pieces) for h in self.heads.values()) >= 0:
            with self._repairable():
                self._commit([], merge=True)
            self._measure_room()

    def _numbers(self) -> set[int]:
        rows = [found["number"] for head in self.heads.values() for found in head.pieces.values()]
        return set(np.unique(np.concatenate(rows)).tolist()) if rows else set()

    def start_complete(self, grid: PatchGrid | None) -> None:
        """The output holds all patches of a grid, and there are no commits any more: the next one says so."""
        if grid is not None:
            self.guess.settle(grid)
        self._all_written = True
        for head in self.heads.values():
            head.state[:] = DURABLE

    def mend(self) -> None:
        """Take back what an interruption in the middle of a patch, or of a commit, left."""
        if self._torn:
            logger.warning("an interruption in the middle of a patch: what was not durable must be added again")
            self.restore()

    def restore(self) -> None:
        """Make all that is in memory from the commits."""
        complete = self._all_written, self.guess.home
        self._torn = True
        self._reset()
        if complete[0]:
            self.start_complete(complete[1])
        for number, body in enumerate(self._read()):
            self._replay(body, number)
        self._measure_room()
        self._torn = False
        if self.commits is not None:
            self._load()

    def _read(self) -> list[Body]:
        if self.commits is None:
            return []
        try:
            return self.commits.read()
        except CorruptData as error:
            logger.warning("%s: everything is computed again", error)
            self.commits.clear()
            return []

    def _replay(self, body: Body, number: int) -> None:
        if body["forget"]:
            self._clear()
        if body["all_written"]:
            for head in self.heads.values():
                head.state[:] = DURABLE
        self.guess.read_json(body["grid"])
        for size, starts in body["locations"]:
            self.locations.extend(np.array(starts, np.int64), tuple(size), body["generation"])
        self._apply(body, number)

    def _load(self) -> None:
        """Bring the sums of the last generation back; where that is too much, it has ended."""
        assert self.commits is not None
        held = sum(
            head.spec.tile_bytes * sum((rows["generation"] == self.generation).any() for rows in head.pieces.values())
            for head in self.heads.values()
        )
        try:
            self.commits.check_pieces(self._numbers())
            if held > self._room:
                self.generation += 1
                self._measure_room()
                return
            for head in self.heads.values():
                head.load(self.commits, self.generation)
        except CorruptData as error:
            logger.warning("%s: the patches behind what was not written yet are computed again", error)
            self._forget()

    @contextlib.contextmanager
    def _repairable(self) -> Iterator[None]:
        try:
            yield
        except CorruptData as error:
            self._forget()
            raise CorruptData(f"{error}; add the patches that are not in `done` again, and all is well") from error

    def _forget(self) -> None:
        """Pieces are damaged: what is written stays, all other patches must be added again."""
        self._clear()
        self.generation += 1
        self._commit([], forget=True)
        self._measure_room()

    def _clear(self) -> None:
        self.locations.clear()
        for head in self.heads.values():
            head.clear()


MANY = 4
"""Pieces per tile, on average, from which on merging them is worth reading and writing them once more."""
