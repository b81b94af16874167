"""Shapes of the tensors of a call with an empty batch, as they would be with one patch.

A network takes neither time nor memory for a batch without patches, and runs all of its operators on it. A tensor with
a side of zero stands for one in which that side is a number of items: 1 for the batch, more where the batch was merged
with channels, windows or heads. The number follows from operator to operator.

```text
 (0, C, H, W) --view--> (0, 49, C)        --linear--> (0, 49, 3 C)      --view--> (0, H, W, 3 C)
  1 item                H W / 49 items                H W / 49 items                1 item
```
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from oocpatch.planning.box import Ints

_RESHAPING = frozenset(f"aten.{name}.default" for name in ("view", "_unsafe_view", "_reshape_alias", "view_copy"))
"""Operators that keep the number of values, and so may change the number of items."""

_ITERATING = frozenset({"aten.unbind.int", "aten.split.Tensor", "aten.split_with_sizes.default"})
"""Operators that have no result for an empty batch: what is done with the patches is not seen."""

_RESHAPES = frozenset({torch.Tensor.view, torch.Tensor.reshape, torch.reshape})

_COPIES = frozenset({torch.Tensor.contiguous, torch.Tensor.reshape, torch.reshape, torch.Tensor.flatten, torch.flatten})
"""Functions that copy tensors whose values are not in order; those without values are always in order."""

_NORMS = frozenset({functional.batch_norm, functional.instance_norm, torch.batch_norm, torch.instance_norm})


class EmptyBatch(TorchFunctionMode):
    """Numbers of items of tensors while it is active.

    Where torch takes other steps for no values, or fails, it takes those for values: sides that a model leaves open
    with -1, copies, norms and attention.

    Attributes:
        operations: operations of attention that are not seen as those of an operator.

    >>> with EmptyBatch() as empty:
    ...     torch.zeros(0, 4, 6).reshape(0, -1).shape, empty.shape_of(torch.zeros(0, 4, 6))
    (torch.Size([0, 24]), (1, 4, 6))
    """

    def __init__(self) -> None:
        super().__init__()
        self._items: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[Ints, int]] = weakref.WeakKeyDictionary()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], torch.Tensor) or 0 not in args[0].shape:
            return func(*args, **kwargs)
        if func in _NORMS and all(len(t) == args[0].shape[1] for t in tensors_in((args[1:], kwargs))):
            return torch.empty_like(args[0].contiguous() if "instance" in func.__name__ else args[0])
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            result = func(*args, **kwargs)
            _attend_with_weights(args[0], args[1], args[4])
            return result
        if func in _COPIES and not kwargs and not self._is_contiguous(args[0]):
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        if func in _RESHAPES and not kwargs:
            args = _without_open_side(*args)
        return func(*args, **kwargs)

    def _attend(  # noqa: PLR0917 - torch's signature
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        """Do what `scaled_dot_product_attention` does, which answers by itself where there are no values."""
        sides = {tensor.shape[-1] for tensor in (query, key, value)}
        is_fused = query.ndim == 4 and len(sides) == 1 and dropout_p == 0 and not options.get("enable_gqa")
        if query.device.type == "cpu" and is_fused:
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - what torch would call
            return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=options.get("scale"))[0]
        if query.device.type == "cpu":
            apart = torch.ops.aten._scaled_dot_product_attention_math  # noqa: SLF001 - what torch would call
            return apart(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]
        self.operations += 2 * math.prod(self.shape_of(query)[:-1]) * key.shape[-2] * (key.shape[-1] + value.shape[-1])
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def _is_contiguous(self, tensor: torch.Tensor) -> bool:
        expected = 1
        for side, stride in zip(reversed(self.shape_of(tensor)), reversed(tensor.stride()), strict=True):
            if side != 1 and stride != expected:
                return False
            expected *= side
        return True

    def shape_of(self, tensor: torch.Tensor) -> Ints:
        """Return the shape that a tensor would have with one patch."""
        shape = tuple(tensor.shape)
        if 0 not in shape:
            return shape
        items, first = self._items_of(tensor), shape.index(0)
        return tuple(items if axis == first else n or 1 for axis, n in enumerate(shape))

    def follow(self, operator: str, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Note the numbers of items of an operator's results.

        Raises:
            ValueError: when the operator takes a batch apart.
        """
        empty = [tensor for tensor in inputs if 0 in tensor.shape]
        if empty and not results and operator in _ITERATING:
            raise ValueError("the patches of an empty batch cannot be iterated over")
        most = max((self._items_of(tensor) for tensor in empty), default=1)
        for result in results:
            if 0 not in result.shape:
                continue
            items = most
            if operator in _RESHAPING and empty:
                items = max(1, math.prod(self.shape_of(empty[0])) // math.prod(n for n in result.shape if n))
            elif operator == "aten.cat.default" and _merged(empty, result):
                items = sum(self._items_of(tensor) for tensor in empty)
            self._items.setdefault(result.untyped_storage(), {})[tuple(result.shape)] = items

    def _items_of(self, tensor: torch.Tensor) -> int:
        return self._items.get(tensor.untyped_storage(), {}).get(tuple(tensor.shape), 1)


def _without_open_side(tensor: torch.Tensor, *sides: Any) -> tuple[Any, ...]:
    """Return the arguments of a reshape with a number in place of -1."""
    shape = list(sides[0]) if len(sides) == 1 and isinstance(sides[0], Sequence) else list(sides)
    if 0 not in shape or shape.count(-1) != 1:
        return tensor, *sides
    others = math.prod(n for n in shape if n > 0)
    shape[shape.index(-1)] = math.prod(n for n in tensor.shape if n) // others
    return tensor, shape


def _attend_with_weights(query: torch.Tensor, key: torch.Tensor, heads: int) -> None:
    """Make the weights of an attention layer, and what they weigh, from tokens `(N, B, width)`, as torch does."""
    each = query.shape[-1] // heads
    queries, keys = (t.new_empty((t.shape[1], heads, len(t), each)) for t in (query, key))
    torch.softmax(queries @ keys.transpose(-2, -1), -1) @ keys


def _merged(tensors: Sequence[torch.Tensor], result: torch.Tensor) -> bool:
    """Return whether tensors were concatenated along the side of the batch: no other side has grown."""
    return math.prod(n for n in result.shape if n) == math.prod(n for n in tensors[0].shape if n) and len(tensors) > 1


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the operands or results of an operator."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
