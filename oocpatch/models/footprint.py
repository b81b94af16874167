"""The memory and the operations that a call takes, counted and not measured, so that plans do not vary between runs."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar, Token
from typing import Any, Self

import torch

# Private, since torch has no public way to see the tensors that operators make; documented for users all the same.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SCRATCH = ("conv", "mm", "linear", "attention")
"""Operators whose kernels reorder their operands into buffers of their own, which no tensor shows."""

_PASSING_ON = frozenset(
    f"aten.{name}"
    for name in ("clone.default", "detach.default", "lift_fresh.default", "squeeze.dims", "unsqueeze.default")
)
"""Operators that also run around a model that calls none."""

_ACTIVE: ContextVar[Footprint | None] = ContextVar("_ACTIVE", default=None)


class _OperatorHandler:
    """Handler that passes on the result of each operator.

    Torch keeps its compiler out of a handler that is defined in the mode's own class, and imports the compiler for
    that: 1.2 seconds of each start. An inherited one is called as it is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where operators made of others arrive whole
            mode: Any = self
            with mode:
                result = func.decompose(*args, **kwargs) if hasattr(func, "decompose") else NotImplemented
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        raise NotImplementedError


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return torch's formulas for the operations of its operators, and those for fused ones that it leaves out.

    A `FlopCounterMode` itself would import torch's compiler, like any handler that is defined in its mode.
    """
    aten = torch.ops.aten
    formulas = dict(FlopCounterMode(display=False).flop_registry)
    attention = "_scaled_dot_product_flash_attention"
    formulas[getattr(aten, f"{attention}_for_cpu")] = formulas[getattr(aten, attention)]
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        formulas[getattr(aten, name)] = _fused_attention
    return formulas


def _fused_attention(source: torch.Tensor, *operands: Any, **_: Any) -> int:
    """Return the operations of an attention layer in one operator: `(B, tokens, channels)` and its weights."""
    weights = {id(t): t.numel() for t in _tensors(operands) if t.ndim == 2}
    return 2 * math.prod(source.shape[:-1]) * (sum(weights.values()) + 2 * math.prod(source.shape[-2:]))


class Footprint(_OperatorHandler, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counter of the bytes of the tensors that live while it is active, and of the operations that make them.

    Args:
        known: tensors that were there before, and do not count.

    Attributes:
        peak: most bytes that lived at a time, with what kernels need besides.
        operations: additions and multiplications of convolutions, products of matrices and attention.
        ran_operators: whether torch ran anything but what passes tensors on.

    >>> with Footprint([]) as footprint:
    ...     _ = torch.zeros(32, 32) @ torch.zeros(32, 32)
    >>> footprint.peak >= 3 * 4096, footprint.operations
    (True, 65536)
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = [t.untyped_storage() for t in known]
        self._pointers = {s.data_ptr() for s in self._known}
        # by object: an address is used again as soon as it is free
        self._live: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self.peak = self.operations = 0
        self.ran_operators = False
        self._tokens: list[Token[Footprint | None]] = []
        self._formulas = _formulas()

    @classmethod
    def active(cls) -> Footprint | None:
        """Return the footprint that is active in this thread, if any."""
        return _ACTIVE.get()

    def __enter__(self) -> Self:
        self._tokens.append(_ACTIVE.set(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._tokens.pop())

    def count(self, other_bytes: int) -> None:
        """Count memory that is not torch's, as living now and no longer."""
        self.peak = max(self.peak, sum(self._live.values()) + other_bytes)

    def _count(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        operator, tensors = str(func), list(_tensors(result))
        self.ran_operators |= operator not in _PASSING_ON
        formula = self._formulas.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            with contextlib.suppress(Exception):  # a formula that does not know these operands: the call goes on
                self.operations += int(formula(*args, **kwargs, out_val=result))
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided):
            if storage.data_ptr() not in self._pointers and storage.nbytes():
                self._live[storage] = storage.nbytes()
        scratch = 0
        if any(word in operator for word in SCRATCH):
            inputs = list(_tensors(args))
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
