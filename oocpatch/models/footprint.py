"""The memory that a call adds, counted and not measured: the same number on every run, so that plans do not vary."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Self

import torch

# Private, since torch has no public way to see the tensors that operators make; documented for users all the same.
from torch.utils._python_dispatch import TorchDispatchMode

SCRATCH = ("conv", "mm", "linear", "attention")
"""Operators whose kernels reorder their operands into buffers of their own, which no tensor shows."""

_ACTIVE: ContextVar[Footprint | None] = ContextVar("_ACTIVE", default=None)


class _OperatorHandler:
    """Handler that passes on the result of each operator.

    Torch keeps its compiler out of a handler that is defined in the mode's own class, and imports the compiler for
    that: 1.2 seconds of each start. An inherited one is called as it is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(str(func), args, result)
        return result

    def _count(self, operator: str, operands: Any, result: Any) -> None:
        raise NotImplementedError


class Footprint(_OperatorHandler, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counter of the bytes of the tensors that live while it is active.

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
        """Return the footprint that is active in this thread, if any."""
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

    def _count(self, operator: str, operands: Any, result: Any) -> None:
        tensors = list(_tensors(result))
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided):
            if storage.data_ptr() not in self._pointers and storage.nbytes():
                self._live[storage] = storage.nbytes()
        scratch = 0
        if any(word in operator for word in SCRATCH):
            inputs = list(_tensors(operands))
            scratch = sum(t.numel() * t.element_size() for t in (*inputs, *tensors))
            if "conv" in operator and len(inputs) > 1 and len(tensors) == 1:
                scratch = max(scratch, convolution_scratch(inputs[0], inputs[1], tensors[0]))
        self.count(scratch)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the operands or results of an operator."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


FEW = 5
"""Channels up to which a convolution in three dimensions is done as one product of matrices."""


def convolution_scratch(source: torch.Tensor, weight: torch.Tensor, result: torch.Tensor) -> int:
    """Return the bytes that a convolution on a CPU takes besides its operands and its result.

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
