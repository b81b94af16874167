"""The memory and the operations that a call takes, counted and not measured, so that plans do not vary between runs."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from typing import Any, Self

import torch

# Private, since torch has no public way to see the tensors that operators make; documented for users all the same.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from oocpatch.errors import PlanTooLarge
from oocpatch.models.empty_batch import EmptyBatch, tensors_in
from oocpatch.models.kernels import Operand, library_bytes, scratch
from oocpatch.planning.memory import LEAST_MAPPED
from oocpatch.planning.plan import human

_PASSING_ON = frozenset(
    f"aten.{name}"
    for name in ("clone.default", "detach.default", "lift_fresh.default", "squeeze.dims", "unsqueeze.default")
)
"""Operators that also run around a model that calls none."""

FRAGMENTED = 2
"""Memory that the heap keeps, in units of what lives there at a time: freed tensors leave holes."""

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
            # a handler of functions would call the operator again, as a whole, and so without end
            with mode, torch._C.DisableTorchFunction():  # noqa: SLF001 - the only way
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


def _fused_attention(source: torch.Size, *operands: Any, **_: Any) -> int:
    """Return the operations of an attention layer in one operator, by the shapes of its tokens and its weights."""
    weights = sum(math.prod(shape) for shape in operands if isinstance(shape, torch.Size) and len(shape) == 2)
    return 2 * math.prod(source[:-1]) * (weights + 2 * math.prod(source[-2:]))


class Footprint(_OperatorHandler, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counter of the bytes of the tensors that live while it is active, and of the operations that make them.

    With `empty_batch`, tensors of a batch without patches count as they would with one: see `models.empty_batch`.

    Args:
        known: tensors that were there before, and do not count.
        empty_batch: whether the model is called with an empty batch, in place of a patch.
        limit: bytes above which the call is ended.

    Attributes:
        peak: most bytes that lived at a time, with what kernels need besides.
        batch_peak: the same per patch, if there were more patches.
        operations: additions and multiplications of convolutions, products of matrices and attention.
        ran_operators: whether torch ran anything but what passes tensors on.

    >>> with Footprint([]) as footprint:
    ...     _ = torch.zeros(32, 32) @ torch.zeros(32, 32)
    >>> footprint.peak >= 3 * 4096, footprint.operations
    (True, 65536)
    """

    def __init__(self, known: Iterable[torch.Tensor], *, empty_batch: bool = False, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # by object: an address is used again as soon as it is free
        self._known = {id(storage): storage for storage in (t.untyped_storage() for t in known)}
        self._live: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._shapes = EmptyBatch() if empty_batch else None
        self._limit = limit
        self.peak = self.batch_peak = self.operations = 0
        self._heap_peak = 0
        self._used = set[tuple[str, str]]()
        self.ran_operators = False
        self._tokens: list[Token[Footprint | None]] = []
        self._formulas = _formulas()

    @classmethod
    def active(cls) -> Footprint | None:
        """Return the footprint that is active in this thread, if any."""
        return _ACTIVE.get()

    def __enter__(self) -> Self:
        self._tokens.append(_ACTIVE.set(self))
        if self._shapes is not None:
            self._shapes.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if self._shapes is not None:
            self.operations += self._shapes.operations
            self._shapes.__exit__(*exception)  # type: ignore[no-untyped-call]
        _ACTIVE.reset(self._tokens.pop())

    @property
    def kept_bytes(self) -> int:
        """Bytes that stay with the libraries that have the kernels, and with the heap between tensors."""
        return library_bytes(self._used) + FRAGMENTED * self._heap_peak

    def count(self, other_bytes: int, batch_bytes: int | None = None) -> None:
        """Count memory that is not torch's, as living now and no longer.

        Args:
            other_bytes: bytes for this batch.
            batch_bytes: bytes per patch of a larger one; None: the same.

        Raises:
            PlanTooLarge: when there is more memory in use than the limit.
        """
        living = sum(self._live.values())
        self._heap_peak = max(self._heap_peak, sum(n for n in self._live.values() if n < LEAST_MAPPED))
        self.peak = max(self.peak, living + other_bytes)
        self.batch_peak = max(self.batch_peak, living + (other_bytes if batch_bytes is None else batch_bytes))
        if self._limit is not None and self.peak > self._limit:
            raise PlanTooLarge(f"more than {human(self.peak)}")

    def _count(self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
        operator, inputs, results = str(func), list(tensors_in((args, kwargs))), list(tensors_in(result))
        self.ran_operators |= operator not in _PASSING_ON
        if self._shapes is not None:
            self._shapes.follow(operator, inputs, results)
        formula = self._formulas.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            with contextlib.suppress(Exception):  # a formula that does not know these operands: the call goes on
                operands, options, output = map(self._with_shapes, (args, kwargs, result))
                self.operations += int(formula(*operands, **options, out_val=output))
        for tensor in results:
            if tensor.layout != torch.strided or id(storage := tensor.untyped_storage()) in self._known:
                continue
            if nbytes := storage.nbytes() or (0 in tensor.shape and self._operand(tensor).nbytes):
                self._live.setdefault(storage, nbytes)
        needed = scratch(operator, list(map(self._operand, inputs)), list(map(self._operand, results)), args)
        self._used.add(needed.library)
        self.count(needed.single, needed.batch)

    def _operand(self, tensor: torch.Tensor) -> Operand:
        shape = tuple(tensor.shape) if self._shapes is None else self._shapes.shape_of(tensor)
        return Operand(shape, tensor.dtype, tensor.stride() if tensor.layout == torch.strided else None)

    def _with_shapes(self, value: Any) -> Any:
        """Return operands or results of an operator with shapes in place of tensors, as formulas take them."""
        if isinstance(value, torch.Tensor):
            return torch.Size(self._operand(value).shape)
        if isinstance(value, Mapping):
            return {key: self._with_shapes(item) for key, item in value.items()}
        return type(value)(map(self._with_shapes, value)) if type(value) in (list, tuple) else value
