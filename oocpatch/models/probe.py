"""The memory that a call adds, counted and not measured: the same number on every run, so that plans do not vary."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oocpatch.planning.box import Ints
from oocpatch.planning.grid import Scale

SCRATCH = ("conv", "mm", "linear", "attention")
"""Operators whose kernels reorder their operands into buffers of their own, which no tensor shows."""


_ACTIVE: ContextVar[Footprint | None] = ContextVar("_ACTIVE", default=None)


class _Watching:
    """Sees the result of each operator.

    Torch keeps its compiler out of a handler that stands in the mode's own class, and imports the compiler for that:
    1.2 seconds of each start. One that is inherited from elsewhere is called as it is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see(str(func), args, result)
        return result

    def _see(self, operator: str, operands: Any, result: Any) -> None:
        raise NotImplementedError


class Footprint(_Watching, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts the bytes of the tensors that live while it is active.

    Args:
        known: tensors that were there before, and do not count.

    Attributes:
        peak: most bytes that lived at a time, with what kernels need besides.

    >>> with Footprint([]) as footprint:
    ...     _ = torch.zeros(1024) + 1
    >>> footprint.peak
    8192
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = [t.untyped_storage() for t in known]
        self._pointers = {s.data_ptr() for s in self._known}
        # by object: an address is used again as soon as it is free
        self._live: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self.peak = 0

    @classmethod
    def active(cls) -> Footprint | None:
        """The one that counts what this thread does, if there is one."""
        return _ACTIVE.get()

    def __enter__(self) -> Self:
        self._token = _ACTIVE.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._token)

    def count(self, other_bytes: int) -> None:
        """Count memory that is not torch's, as living now and no longer."""
        self.peak = max(self.peak, sum(self._live.values()) + other_bytes)

    def _see(self, operator: str, operands: Any, result: Any) -> None:
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in tensors:
            self._track(tensor.untyped_storage())
        scratch = 0
        if any(word in operator for word in SCRATCH):
            inputs = [t for t in tree_leaves(operands) if isinstance(t, torch.Tensor)]
            scratch = sum(t.numel() * t.element_size() for t in (*inputs, *tensors))
            if "conv" in operator and len(inputs) > 1 and len(tensors) == 1:
                scratch = max(scratch, convolution_scratch(inputs[0], inputs[1], tensors[0]))
        self.peak = max(self.peak, sum(self._live.values()) + scratch)

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self._pointers and storage.nbytes():
            self._live[storage] = storage.nbytes()


FEW = 5
"""Channels up to which a convolution in three dimensions is done as one product of matrices."""


def convolution_scratch(source: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> int:
    """Bytes that a convolution on a CPU takes besides its operands and its result.

    oneDNN copies both into a layout of 8 or 16 channels at a time, filled up with zeros. With few channels in three
    dimensions, and in float64 always, each voxel's neighbourhood is laid out instead, one sample at a time. Both were
    found by measuring 44 shapes: this was never less than what they took, but up to four times as much.

    >>> volume = torch.zeros(1, 1, 64, 64, 64)
    >>> convolution_scratch(volume, torch.zeros(8, 1, 3, 3, 3), volume.expand(1, 8, 64, 64, 64)) >> 20
    27
    """
    axes = weight.ndim - 2
    kernel = math.prod(weight.shape[2:])
    group = 8 if axes == 3 and kernel > 1 else 16
    filled = sum(
        t.numel() // max(1, t.shape[-axes - 1]) * -(-t.shape[-axes - 1] // group) * group * t.element_size()
        for t in (source, result)
        if t.ndim > axes
    )
    laid_out = math.prod(result.shape[-axes:]) * weight.shape[1] * kernel * weight.element_size()
    if weight.dtype == torch.float64:
        return max(filled, laid_out)
    if axes == 3 and weight.shape[1] <= FEW and 1 < kernel <= 27:
        return laid_out if source.shape[0] == 1 and weight.dtype == torch.float32 else max(filled, laid_out)
    return filled


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
