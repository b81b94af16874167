"""Tiles: sums over one part of an output, and the patches that are in them, in memory, in a file, or final.

A tile takes each patch once, in any order. In the blending modes window times values is added to it. In `crop` mode
values are copied, and where claims overlap the greater key holds the voxel. Weights are not stored: they follow from
the patches.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.aggregation.placement import HeadSpec, Key, Lattice, Patch
from oocpatch.engine.buffers import buffer, torch_dtype
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.windows import axis_window

MAPPED_TILE = 1 << 16
"""Bytes from which a tile is mapped: others leave holes in the heap when they come and go, and took 50 MiB under 24."""
FILE_BYTES = 250
"""Bytes that are kept in memory of each tile that is in a file, besides its table of patches."""
FINAL, NONE = -1, 0
"""In a commit, in place of the number of patches in a tile: its final values are in the output; it has no patches."""

Span = tuple[tuple[int, int], ...]
"""Start and size of a patch's output along each axis, in voxels of the output."""


class Tile:
    """Sums `data (C, *box.shape)` over a box of the output, the patches in them, and for `crop` their claims."""

    def __init__(self, box: Box, data: torch.Tensor) -> None:
        self.box, self.data = box, data
        self.patches: dict[Patch, None] = {}
        self.claims: list[tuple[Key, Box]] = []
        self.changed = False  # since it was stored

    def add(self, start: Ints, values: torch.Tensor, window: torch.Tensor, box: Box) -> None:
        """Add window `(*out_size)` times values `(C, *out_size)`, from `start` on, in a box."""
        part = box & self.box
        inner = part.slices(start)
        self._view(part).addcmul_(values[(slice(None), *inner)], window[inner])

    def claim(self, key: Key, box: Box, start: Ints, values: torch.Tensor) -> None:
        """Copy the values of a claim, `(C, *out_size)` from `start` on, where no greater claim holds the voxels."""
        part = box & self.box
        if part.empty:
            return
        target = self._view(part)
        others = [other & part for greater, other in self.claims if greater > key and other.meets(part)]
        before = target.clone() if others else target
        target.copy_(values[(slice(None), *part.slices(start))])
        for other in others:
            inner = (slice(None), *other.slices(part.start))
            target[inner] = before[inner]
        self.claims.append((key, box))

    def _view(self, box: Box) -> torch.Tensor:
        return self.data[(slice(None), *box.slices(self.box.start))]


class HeadTiles:
    """The tiles of one head, by position.

    Attributes:
        out_size: size of a patch's output, by size of the patch.
        open: tiles in memory, the least recently used one first.
        tables: patches of the tiles that have a file, `(n, 2, axes)`, in the order in which they were added.
        final: per tile, whether the output has its final values, with all patches of the home lattice.
        nbytes: bytes of the two before.
        committed: of each tile that changed since the last commit, the number of patches that this counts, or `FINAL`.
        shown: tiles whose values so far are in the output.
    """

    def __init__(self, number: int, spec: HeadSpec, mode: str) -> None:
        self.number, self.spec, self._mode = number, spec, mode
        self.out_size: dict[Ints, Ints] = {}
        self.open: OrderedDict[Ints, Tile] = OrderedDict()
        self.tables: dict[Ints, npt.NDArray[np.signedinteger]] = {}
        self.final = np.zeros(spec.counts, bool)
        self.nbytes = self.final.nbytes
        self.committed: dict[Ints, int] = {}
        self.shown: set[Ints] = set()
        self._window: tuple[Ints, torch.Tensor] = (), torch.empty(0, device="cpu")

    # Patches

    def count(self, position: Ints) -> int:
        """Return the number of patches in the file of a tile, or `FINAL`."""
        return FINAL if self.final[position] else len(self.tables.get(position, ()))

    def note_change(self, position: Ints) -> None:
        """Remember what the last commit counts in a tile, before that changes."""
        self.committed.setdefault(position, self.count(position))

    def set_table(self, position: Ints, patches: Collection[Patch] = ()) -> None:
        """Replace the patches that the file of a tile has."""
        if (before := self.tables.pop(position, None)) is not None:
            self.nbytes -= FILE_BYTES + before.nbytes
        if patches:
            table = np.array(list(patches))
            self.tables[position] = table.astype(np.min_scalar_type(-int(np.abs(table).max()) - 1))
            self.nbytes += FILE_BYTES + self.tables[position].nbytes

    def unfinished(self) -> list[Ints]:
        """Return the tiles whose final values are not in the output, and that have patches."""
        return sorted({*self.open, *(p for p in self.tables if not self.final[p])})

    def positions(self, patch: Patch) -> list[Ints]:
        """Return the tiles that a patch lies in."""
        return self.spec.tiles(patch, self.out_size[patch[1]])

    def has(self, position: Ints, patch: Patch, home: Lattice | None, *, durable: bool = False) -> bool:
        """Return whether a patch is in a tile, in memory or not; with `durable`, whether a commit counts it there."""
        if not durable and position in self.open:
            return patch in self.open[position].patches
        count = self.count(position)
        count = self.committed.get(position, count) if durable else count
        if count == FINAL:
            return home is not None and patch in home
        return count > NONE and bool((self.tables[position][:count] == patch).all((1, 2)).any())

    def is_complete(self, position: Ints, lattice: Lattice) -> bool:
        """Return whether a tile has all patches of a lattice, if it has no others."""
        tile = self.open.get(position)
        count = self.count(position) if tile is None else len(tile.patches)
        return count == FINAL or count == math.prod(map(len, self.starts(lattice, position)))

    def starts(self, lattice: Lattice, position: Ints) -> tuple[Ints, ...]:
        """Return the starts along each axis of the patches of a lattice that lie in a tile."""
        return self.spec.lattice_starts(lattice, self.out_size[lattice.size], position)

    # Sums

    def new_tile(self, position: Ints) -> Tile:
        """Return a tile without patches."""
        box = self.spec.box(position)
        shape = (self.spec.channels, *box.shape)
        return Tile(box, buffer(shape, torch_dtype(self.spec.dtype), "cpu", MAPPED_TILE))

    def window(self, out_size: Ints) -> torch.Tensor:
        """Return the blending weights of a patch with an output of `out_size` voxels, float32."""
        if self._window[0] != out_size:
            whole = {tuple((0, size) for size in out_size): 1}
            self._window = out_size, sum_windows(self._mode, Box.of_shape(out_size), whole)
        return self._window[1]

    def weights(self, tile: Tile) -> torch.Tensor | None:
        """Return the sum of the windows of the patches in a tile, float32 `(*box.shape)`; None in `crop` mode."""
        if not self.spec.blended:
            return None
        spans = (zip(self.spec.start(p, self.out_size[p[1]]), self.out_size[p[1]], strict=True) for p in tile.patches)
        return sum_windows(self._mode, tile.box, Counter(map(tuple, spans)))

    def values(self, tile: Tile) -> torch.Tensor:
        """Return the sums of a tile divided by the weights where these are above zero; in `crop` mode, the data."""
        weights = self.weights(tile)
        return tile.data if weights is None else tile.data / weights.masked_fill_(weights <= 0, 1)


def sum_windows(mode: str, box: Box, spans: Mapping[Span, int]) -> torch.Tensor:
    """Return the sum over a box of the windows of outputs of patches, float32 `(*box.shape)`.

    Patches that differ along the first axis only share the sum along the others: on a grid it is an outer product.

    Args:
        mode: a blending mode.
        box: the box, in voxels of the output.
        spans: the outputs, each with the number of patches that have it.

    >>> sum_windows("hann", Box((0,), (5,)), {((0, 3),): 1, ((2, 3),): 1})
    tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000])
    """
    if not box.start:
        return torch.tensor(float(sum(spans.values())), dtype=torch.float32, device="cpu")
    others: defaultdict[tuple[int, int], list[tuple[Span, int]]] = defaultdict(list)
    for (first, *rest), number in sorted(spans.items()):
        others[first].append((tuple(rest), number))
    firsts: defaultdict[tuple[tuple[Span, int], ...], list[tuple[int, int]]] = defaultdict(list)
    for first, rests in others.items():
        firsts[tuple(rests)].append(first)
    low, length = box.start[0], box.shape[0]
    total = torch.zeros(box.shape, dtype=torch.float32, device="cpu")
    for shared, along in firsts.items():
        line = np.zeros(length)
        for start, size in along:
            a, b = max(start, low), min(start + size, low + length)
            if a < b:
                line[a - low : b - low] += axis_window(mode, size)[a - start : b - start]
        factor = torch.from_numpy(line).to(torch.float32).reshape(-1, *(1,) * (len(box.start) - 1))
        total.addcmul_(factor, sum_windows(mode, Box(box.start[1:], box.stop[1:]), dict(shared)))
    return total
