"""The oracle of aggregators, in numpy, written from the public contract alone, and ways to draw loops for them.

The oracle, `aggregate`, holds everything at once, sums in float64 and takes patches one by one. It uses nothing of the
package.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from oocpatch import PatchAggregator, PatchLocation
from tests.support import oracle

Array = np.ndarray[Any, Any]
Ints = tuple[int, ...]
Patch = tuple[Ints, Array]
"""Start in the volume, and values `(C, *patch)`."""


def aggregate(shape: Ints, mode: str, overlap: Ints, patches: Iterable[Patch], context: Ints | None = None) -> Array:
    """What becomes of patches: `(C, *shape)`, float64, or for `crop` the patches' own values and dtype; holes are 0.

    Starts are those of the model's input; `context` is what the values lack on each side of it.
    """
    found = list(patches)
    first = found[0][1]
    context = context or (0,) * len(shape)
    if mode == "crop":
        return _cropped(shape, overlap, found, context)
    found = [(tuple(s + c for s, c in zip(start, context, strict=True)), values) for start, values in found]
    sums, weights = np.zeros((len(first), *shape)), np.zeros(shape)
    for start, values in found:
        weight = functools.reduce(np.multiply.outer, [oracle.window(mode, p) for p in values.shape[1:]])
        inside, part = _inside(start, values.shape[1:], shape)
        sums[(slice(None), *inside)] += (values * weight)[(slice(None), *part)]
        weights[inside] += weight[part]
    return np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)


def _inside(start: Ints, size: Sequence[int], shape: Ints) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    low = [max(0, s) for s in start]
    high = [min(n, s + p) for s, p, n in zip(start, size, shape, strict=True)]
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return inside, tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))


def _cropped(shape: Ints, overlap: Ints, patches: list[Patch], context: Ints) -> Array:
    """Voxel by voxel: of the patches that claim it, the one with the greatest start holds it.

    Along an axis, a claim on a voxel that the patch would lose if it were not at the border counts less than any other.
    """
    first = patches[0][1]
    out = np.zeros((len(first), *shape), first.dtype)
    best: dict[Ints, tuple[Any, ...]] = {}
    for start, values in patches:
        size = tuple(m + 2 * c for m, c in zip(values.shape[1:], context, strict=True))
        ranges = []
        for s, p, n, o, c in zip(start, size, shape, overlap, context, strict=True):
            low = s + o // 2 if s > 0 else max(0, s + c)
            high = s + p - o // 2 if s + p < n else min(n, s + p - c)
            ranges.append(range(low, high))
        for voxel in itertools.product(*ranges):
            inner = zip(voxel, start, overlap, size, strict=True)
            key = tuple((v >= s + o // 2, s, p) for v, s, o, p in inner)
            if voxel not in best or key > best[voxel]:
                best[voxel] = key
                index = tuple(v - s - c for v, s, c in zip(voxel, start, context, strict=True))
                out[(slice(None), *voxel)] = values[(slice(None), *index)]
    return out


def grid_starts(shape: Ints, patch: Ints, overlap: Ints, *, padded: bool = False) -> list[Ints]:
    """The corners of a full grid, in the frame of the unpadded volume."""
    axes = []
    for n, p, o in zip(shape, patch, overlap, strict=True):
        grow = o // 2 if padded else 0
        axes.append([s - grow for s in oracle.starts(max(n + 2 * grow, p), p, o)])
    return list(itertools.product(*axes))


def cut(volume: Array, start: Ints, size: Ints) -> Array:
    """A patch of `volume (C, *spatial)`; what lies outside is -1000."""
    inside, part = _inside(start, size, volume.shape[1:])
    patch = np.full((len(volume), *size), -1000).astype(volume.dtype)
    patch[(slice(None), *part)] = volume[(slice(None), *inside)]
    return patch


@dataclass(frozen=True)
class Loop:
    """One volume's patches, in the order in which a loop adds them, some more than once."""

    shape: Ints
    mode: str
    overlap: Ints
    """What the aggregator is given; in the blending modes it need not be true."""
    patches: list[Patch]
    chunks: Ints | None
    context: Ints | None = None

    @functools.cached_property
    def expected(self) -> Array:
        patches = {(s, v.shape): (s, v) for s, v in self.patches}.values()
        return aggregate(self.shape, self.mode, self.overlap, patches, self.context)

    def aggregator(self, **options: Any) -> PatchAggregator:
        if self.context:
            options["context"] = self.context
        return PatchAggregator(self.shape, self.mode, self.overlap, output_chunks=self.chunks, **options)


def location(patch: Patch, context: Ints | None = None) -> PatchLocation:
    start, values = patch
    lacking = context or (0,) * len(start)
    return PatchLocation(start, tuple(m + 2 * c for m, c in zip(values.shape[1:], lacking, strict=True)))


def add(aggregator: PatchAggregator, patches: Sequence[Patch], batch: int = 1, *, context: Ints | None = None) -> None:
    """Add patches in batches of those that have one size."""
    for _, group in itertools.groupby(patches, key=lambda patch: patch[1].shape):
        while members := list(itertools.islice(group, batch)):
            tensor = torch.from_numpy(np.stack([values for _, values in members]))
            aggregator.add_batch(tensor, [location(patch, context) for patch in members])


def values_at(start: Ints, size: Ints, channels: int, dtype: str) -> Array:
    """What a model might say of a patch: other values at every place, and for every patch."""
    seed = [s + 1000 for s in start] + list(size)
    values = np.random.default_rng(seed).standard_normal((channels, *size)) * 50
    return values.astype(dtype)


@st.composite
def loops(draw: st.DrawFn, modes: Sequence[str] = ("crop", "average", "hann", "gaussian"), most: int = 120) -> Loop:
    """A full grid (padded or not), a part of one, one with patches of no grid among it, or none but such; shuffled."""
    ndim = draw(st.integers(1, 4))
    longest = (40, 18, 11, 6)[ndim - 1]
    shape = tuple(draw(st.integers(1, longest)) for _ in range(ndim))
    mode = draw(st.sampled_from(modes))
    patch = tuple(draw(st.integers(1, n)) for n in shape)
    overlap = tuple(draw(st.integers(0, p - 1)) for p in patch)
    kind = draw(st.sampled_from(("grid", "grid", "padded", "part", "mixed", "loose")))
    places: list[tuple[Ints, Ints]] = []
    if kind != "loose":
        places = [(s, patch) for s in grid_starts(shape, patch, overlap, padded=kind == "padded")]
        assume(len(places) <= most)
    if kind in {"mixed", "loose"}:
        for _ in range(draw(st.integers(1, 8))):
            size = patch if kind == "mixed" else tuple(draw(st.integers(o + 1, longest)) for o in overlap)
            places.append((tuple(draw(st.integers(1 - p, n - 1)) for p, n in zip(size, shape, strict=True)), size))
    order = draw(st.permutations(range(len(places)))) if draw(st.booleans()) else list(range(len(places)))
    order = order[: draw(st.integers(1, len(order)))] if kind == "part" else order
    order = [*order, *draw(st.lists(st.sampled_from(order), max_size=3))]
    stated = overlap if mode == "crop" or draw(st.booleans()) else (0,) * ndim
    dtype = draw(st.sampled_from(("float32", "uint8", "int16", "float64"))) if mode == "crop" else "float32"
    channels = draw(st.integers(1, 3))
    chunks = tuple(draw(st.integers(1, n)) for n in shape) if draw(st.booleans()) else None
    patches = [(s, values_at(s, size, channels, dtype)) for s, size in places]
    return Loop(shape, mode, stated, [patches[i] for i in order], chunks)


def assert_as_expected(found: Array, loop: Loop) -> None:
    expected = loop.expected
    if loop.mode == "crop":
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found.dtype == np.float32
        # A few roundings of float32 per patch that a voxel lies in.
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)


@st.composite
def loops_with_context(draw: st.DrawFn) -> Loop:
    """A full grid of a model without padding, in the padded or the unpadded frame, shuffled."""
    ndim = draw(st.integers(1, 3))
    longest = (40, 18, 11)[ndim - 1]
    shape = tuple(draw(st.integers(3, longest)) for _ in range(ndim))
    patch = tuple(draw(st.integers(3, n)) for n in shape)
    overlap = tuple(draw(st.integers(0, p - 1)) for p in patch)
    context = tuple(draw(st.integers(0, o // 2)) for o in overlap)
    starts = grid_starts(shape, patch, overlap, padded=draw(st.booleans()))
    assume(len(starts) <= 120)
    size = tuple(p - 2 * c for p, c in zip(patch, context, strict=True))
    channels = draw(st.integers(1, 2))
    patches = [(start, values_at(start, size, channels, "float32")) for start in starts]
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    mode = draw(st.sampled_from(("crop", "average", "hann", "gaussian")))
    stated = overlap if mode == "crop" or draw(st.booleans()) else (0,) * ndim
    return Loop(shape, mode, stated, draw(st.permutations(patches)), chunks, context)
