"""Objects of models patch by patch: an oracle, voxel by voxel, and the pieces of `oocpatch.objects` put together."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from oocpatch.engine.patch_objects import PatchObjects, PatchObjectsWriter, patch_objects
from oocpatch.objects.instance_table import decode_sections, encode_sections, make_table, merge_table
from oocpatch.objects.instances import Assembly, matches
from oocpatch.objects.merge import MergeGrid
from oocpatch.objects.neighbourhood import Neighbourhood
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchGrid

Array = npt.NDArray[Any]
Voxel = tuple[int, ...]
Thing = tuple[int, int]
"""An object: the number of its patch, and its label there."""


def oracle(
    shape: Ints, starts: Sequence[Voxel], patches: Sequence[Array], owner_of: Callable[[Voxel], int], match: float
) -> tuple[Array, int]:
    """Return the objects of a volume and their number, from the labels of its patches, by loops over voxels.

    `owner_of` returns the number of the patch that owns a voxel, -1 if none does.
    """
    seen, is_whole = _views(shape, starts, patches)
    sets: dict[Thing, set[Thing]] = {thing: {thing} for thing in is_whole}
    for (p, one), (q, other) in itertools.combinations(enumerate(seen), 2):
        common = [(one[v], other[v]) for v in one.keys() & other.keys()]
        for a, b in _best_pairs(common, match):
            joined = sets[p, a] | sets[q, b]
            for thing in joined:
                sets[thing] = joined
    things: dict[Voxel, Thing] = {}
    for voxel in itertools.product(*map(range, shape)):
        owner = owner_of(voxel)
        if owner >= 0 and seen[owner][voxel]:
            things[voxel] = owner, seen[owner][voxel]
    owned = set(things.values())
    for voxel in itertools.product(*map(range, shape)):
        for number, voxels in enumerate(seen):
            thing = number, voxels.get(voxel, 0)
            if voxel not in things and thing in owned and is_whole[thing]:
                things[voxel] = thing
    ids: dict[frozenset[Thing], int] = {}
    result = np.zeros(shape, np.int64)
    for voxel in sorted(things):
        result[voxel] = ids.setdefault(frozenset(sets[things[voxel]]), len(ids) + 1)
    return result, len(ids)


def owners(grid: PatchGrid) -> Array:
    """The patch that decides each voxel: without half an overlap at sides that have a neighbour; later ones win."""
    owner = np.full(grid.shape, -1)
    for number, index in enumerate(itertools.product(*map(range, grid.counts))):
        starts = [
            max(0, axis.start(i) + (axis.overlap // 2 if i else 0)) for axis, i in zip(grid.axes, index, strict=True)
        ]
        stops = [axis.start(i) + axis.patch for axis, i in zip(grid.axes, index, strict=True)]
        owner[tuple(slice(a, max(a, b)) for a, b in zip(starts, stops, strict=True))] = number
    return owner


def _views(
    shape: Ints, starts: Sequence[Voxel], patches: Sequence[Array]
) -> tuple[list[dict[Voxel, int]], dict[Thing, bool]]:
    """Return the label that each patch gives to each voxel of the volume, and whether each object is seen whole."""
    seen: list[dict[Voxel, int]] = []
    is_whole: dict[Thing, bool] = {}
    for number, (start, labels) in enumerate(zip(starts, patches, strict=True)):
        voxels: dict[Voxel, int] = {}
        for at in itertools.product(*map(range, labels.shape)):
            place, label = tuple(a + b for a, b in zip(at, start, strict=True)), int(labels[at])
            if all(0 <= v < n for v, n in zip(place, shape, strict=True)):
                voxels[place] = label
            if label:
                cut = any(
                    (a == 0 and v > 0) or (a == size - 1 and v < n - 1)
                    for a, size, v, n in zip(at, labels.shape, place, shape, strict=True)
                )
                is_whole[number, label] = is_whole.get((number, label), True) and not cut
        seen.append(voxels)
    return seen, is_whole


def _best_pairs(common: list[tuple[int, int]], match: float) -> list[tuple[int, int]]:
    """Return the pairs of labels that are each other's best match, from the labels of all common voxels."""
    ratios: dict[tuple[int, int], Fraction] = {}
    for a, b in {(a, b) for a, b in common if a and b}:
        both = sum(x == a and y == b for x, y in common)
        either = sum(x == a or y == b for x, y in common)
        ratios[a, b] = Fraction(both, either)
    pairs = []
    for (a, b), ratio in ratios.items():
        best_b = min((-r, y) for (x, y), r in ratios.items() if x == a)[1]
        best_a = min((-r, x) for (x, y), r in ratios.items() if y == b)[1]
        if (best_a, best_b) == (a, b) and float(ratio) >= match:
            pairs.append((a, b))
    return pairs


def assembled(
    grid: PatchGrid, patches: Sequence[Array | None], match: float, blocks: Sequence[Box]
) -> tuple[Array, int]:
    """Return the objects of a volume, block by block, from the labels of its patches; None: a patch was skipped."""
    shape, indices = grid.shape, list(itertools.product(*map(range, grid.counts)))
    boxes = {number: grid.box(index) for number, index in enumerate(indices)}
    objects: dict[int, PatchObjects] = {}
    firsts, nodes = {}, 0
    for number, labels in enumerate(patches):
        if labels is not None:
            objects[number] = patch_objects(labels, boxes[number], grid.crop_box(indices[number]), shape)
            firsts[number], nodes = nodes, nodes + objects[number].count
    inside = {number: boxes[number] & Box.of_shape(shape) for number in objects}
    parents = list(range(nodes + 1))

    def root(node: int) -> int:
        while parents[node] != node:
            node = parents[node]
        return node

    for one, other in itertools.combinations(objects, 2):
        common = inside[one] & inside[other]
        if not common.empty:
            seen = (objects[n].labels[common.slices(inside[n].start)] for n in (one, other))
            for a, b in zip(*matches(*seen, match), strict=True):
                parents[root(firsts[other] + int(b))] = root(firsts[one] + int(a))
    result = np.zeros(shape, np.int64)
    for block in blocks:
        assembly = Assembly(block)
        for number, found in objects.items():
            assembly.paint(found, inside[number], grid.crop_box(indices[number]), firsts[number])
        result[block.slices()] = assembly.objects()
    ids: dict[int, int] = {}
    flat = result.reshape(-1)
    for place, node in enumerate(flat.tolist()):
        if node:
            flat[place] = ids.setdefault(root(node), len(ids) + 1)
    return result, len(ids)


class Files:
    """The files of a block, in memory."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.contents: dict[str, bytes] = {}

    def write_file(self, _head: int, name: str, content: bytes) -> None:
        assert name not in self.contents
        self.contents[name] = content

    def read_file(self, _head: int, name: str) -> bytes | None:
        return self.contents.get(name)


def in_blocks(
    blocks: BlockGrid, patches: Sequence[Array | None], match: float, *, looped: int = 0, max_memory: int = 1 << 26
) -> tuple[Array, list[int]]:
    """Return the objects of a volume, and their numbers, as a run finds them: stored, assembled and merged."""
    grid = blocks.grid
    shape, every = grid.shape, [Files(index) for index in range(len(blocks))]
    for files in every:
        writer: Any = PatchObjectsWriter(files, blocks, files.block, number=0, looped=looped)  # type: ignore[arg-type]
        for index in itertools.product(*blocks.patches(blocks[files.block])):
            labels = patches[int(np.ravel_multi_index(index, grid.counts))]
            if labels is not None:
                writer.add(index, torch.from_numpy(labels[None]))
        writer.close()
    around = [
        Neighbourhood(blocks, index, number=0, looped=looped, read=every.__getitem__)  # type: ignore[arg-type]
        for index in range(len(blocks))
    ]
    tables = [decode_sections(encode_sections(make_table(one, looped, match))) for one in around]
    ids: dict[tuple[int, int], list[Array]] = defaultdict(list)
    rows, plane = blocks.axes[looped], math.prod(shape[looped + 1 :])
    starts = [rows.core(row)[0] * plane for row in range(rows.count)]
    places = MergeGrid(blocks.counts[looped:], (*starts, shape[looped] * plane))

    def merged(first: int, section: int) -> int:
        def write(block: int, _piece: int, new: Array) -> None:
            ids[first + block, section].append(new)

        return merge_table(places, lambda block: tables[first + block][section], write, max_memory)

    firsts = range(0, len(blocks), len(places))
    found = [merged(first, section) for first in firsts for section in range(len(tables[first]))]
    result = np.full(shape, -1)
    for index, one in enumerate(around):
        numbers = np.zeros(one.count + 1, np.int64)
        for section, table in enumerate(tables[index]):
            numbers[table.numbers] = np.concatenate([*ids[index, section], np.zeros(0, np.uint64)])
        for slab in one.slabs():
            result[slab.slices()] = numbers[one.assemble(slab)[0]]
    return result, found
