"""Geometry: how the size of what a model gives depends on the size of what it takes.

Along each axis, a network gives `scale * (n - 2 * border)` voxels for `n`: it has a scale (a stride-4 encoder: 1/4; an
upsampler: 2) and a border (what convolutions without padding eat on each side). One size of patch does not tell the two
apart, so that a model whose output has another size than its input is called with a second one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from oocpatch.planning.box import Ints
from oocpatch.planning.grid import Scale

MORE = (32, 64)
"""Voxels by which the second patch is larger; else it is twice as large: what most networks accept."""

SIMPLE = 32
"""Largest denominator of a scale that is believed when a model takes no other size of patch."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Scale and border of one output, per axis; the border in voxels of the volume."""

    scale: tuple[Scale, ...]
    border: Ints


def measure(
    patch: Ints, shapes: Mapping[str, Ints], other: Callable[[Ints], Mapping[str, Ints] | None]
) -> dict[str, Geometry]:
    """Scale and border of each output.

    Args:
        patch: what the model was given, in voxels per axis.
        shapes: what it gave, by name of the output.
        other: calls the model with another size; None: it does not take it.

    Raises:
        ValueError: when the sizes follow from no scale and border.

    >>> measure((20,), {"a": (16,), "b": (10,)}, lambda n: {"a": (n[0] - 4,), "b": (n[0] // 2,)})
    {'a': Geometry(scale=((1, 1),), border=(2,)), 'b': Geometry(scale=((1, 2),), border=(0,))}
    """
    ones = tuple((1, 1) for _ in patch)
    if all(shape == patch for shape in shapes.values()):
        return {name: Geometry(ones, (0,) * len(patch)) for name in shapes}
    larger, seen = None, None
    for larger in (*(tuple(n + m for n in patch) for m in MORE), tuple(2 * n for n in patch)):
        seen = other(larger)
        if seen is not None:
            break
    found = {}
    for name, shape in shapes.items():
        axes = [
            _simple(n, m) if seen is None or larger is None else _exact(n, m, larger[a], seen[name][a])
            for a, (n, m) in enumerate(zip(patch, shape, strict=True))
        ]
        if any(axis is None for axis in axes):
            told = f", and {seen[name]} for {larger}" if seen is not None else ""
            raise ValueError(
                f"the model's output {name!r} must be a multiple or a fraction of its input, or smaller by a border, "
                f"got {shape} for patches of {patch}{told}; try patches whose sides are multiples of 32"
            )
        known = [axis for axis in axes if axis is not None]
        found[name] = Geometry(tuple(s for s, _ in known), tuple(b for _, b in known))
    return found


def _exact(n: int, m: int, larger: int, more: int) -> tuple[Scale, int] | None:
    """Scale and border of an axis that gives `m` voxels for `n`, and `more` for `larger`."""
    scale = Fraction(more - m, larger - n)
    if scale <= 0:
        return None
    border = (n - m / scale) / 2
    return None if border < 0 or border.denominator != 1 else (_pair(scale), int(border))


def _simple(n: int, m: int) -> tuple[Scale, int] | None:
    """Scale and border of an axis of which only one size is known: a simple scale, else a border."""
    scale = Fraction(m, n)
    if scale.denominator <= SIMPLE and scale.numerator <= SIMPLE:
        return _pair(scale), 0
    return ((1, 1), (n - m) // 2) if m < n and (n - m) % 2 == 0 else None


def _pair(scale: Fraction) -> Scale:
    return scale.numerator, scale.denominator
