"""Outputs of models by name: of one tensor, or of whatever a model returns its tensors in."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

DEFAULT_HEAD = "prediction"
"""Name of the output of a model that returns one tensor."""

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def named_outputs(result: Any) -> dict[str, Any]:
    """Return what a model returned, by name; what is None is left out.

    Items of dicts have their keys as names; those of named tuples and dataclasses, the names of their fields; those of
    other tuples and of lists, their numbers, unless there is only one. Names of nested ones are joined by points.

    Raises:
        ValueError: for names that no array can have, for two outputs of one name, and for none.

    >>> named_outputs(1), named_outputs((1, None)), named_outputs([1, 2]), named_outputs({"a": (1, 2), "b": None})
    ({'prediction': 1}, {'prediction': 1}, {'0': 1, '1': 2}, {'a.0': 1, 'a.1': 2})
    """
    outputs: dict[str, Any] = {}
    for name, value in _leaves("", result):
        if name in outputs:
            raise ValueError(f"the model must return outputs of different names, got {name!r} twice")
        outputs[name] = value
    if not outputs:
        raise ValueError(f"the model must return a tensor or a dict of tensors, got an empty {type(result).__name__}")
    return outputs


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    items, is_numbered = _items(value)
    if items is None:
        yield name or DEFAULT_HEAD, value
        return
    present = {key: item for key, item in items.items() if item is not None}
    if is_numbered and len(present) == 1:
        yield from _leaves(name, *present.values())
        return
    for key, item in present.items():
        if not isinstance(key, str) or not PLAIN_NAME.fullmatch(key):
            raise ValueError(f"the model must return a dict whose keys can be names of arrays, got {key!r}")
        yield from _leaves(f"{name}.{key}" if name else key, item)


def _items(value: Any) -> tuple[Mapping[Any, Any] | None, bool]:
    """Return the items of what holds outputs, None for anything else; and whether their names are numbers."""
    if isinstance(value, Mapping):
        return value, False
    if isinstance(value, tuple | list):
        fields = getattr(value, "_fields", getattr(value, "__match_args__", ()))  # the latter: torch.return_types
        is_numbered = len(fields) != len(value)
        return dict(zip(map(str, range(len(value))) if is_numbered else fields, value, strict=True)), is_numbered
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, False
    return None, False


def unnamed(outputs: Mapping[str, Any]) -> Any:
    """Return outputs as a model returns them: one without a name of its own as it is, others as a dict.

    >>> unnamed({"prediction": 1}), unnamed({"scores": 1})
    (1, {'scores': 1})
    """
    return outputs[DEFAULT_HEAD] if outputs.keys() == {DEFAULT_HEAD} else dict(outputs)


def map_outputs(function: Callable[[Any], Any], result: Any) -> Any:
    """Return what a model returned with a function applied to each output."""
    return unnamed({name: function(value) for name, value in named_outputs(result).items()})


def joined(results: Sequence[Any]) -> Any:
    """Return what a model returned for parts of a batch as for the batch."""
    if len(results) == 1:
        return results[0]
    parts = [named_outputs(result) for result in results]
    return unnamed({name: torch.cat([torch.as_tensor(part[name]) for part in parts]) for name in parts[0]})


def owned_outputs(call: Callable[[torch.Tensor], Any], inputs: torch.Tensor) -> dict[str, Any]:
    """Call a model, and return its outputs by name, none in memory that it writes to in its next call.

    Args:
        call: the model. What it keeps a reference to is copied, and what torch did not allocate.
        inputs: what it is called with. Outputs in the memory of these are not copied.
    """
    outputs = named_outputs(call(inputs))
    for name in list(outputs):
        output = outputs.pop(name)
        with contextlib.suppress(Exception):  # what is no tensor is for the caller to refuse
            if np.ma.is_masked(output):
                raise TypeError("a tensor has no mask")
            # no longer the tensor itself: whoever holds that, keeps it
            output = torch.as_tensor(output, device=inputs.device).detach()
            if not in_same_memory(output, inputs) and _is_kept(output):
                output = output.clone()
        outputs[name] = output
    return outputs


def in_same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors have the same storage, be it empty.

    >>> empty = torch.zeros(0, 3)
    >>> in_same_memory(empty, empty[:, 1:]), in_same_memory(empty, empty.clone())
    (True, False)
    """
    # Private: addresses, which are public, are all 0 for empty ones.
    return bool(first.untyped_storage()._cdata == second.untyped_storage()._cdata)  # noqa: SLF001


def _is_kept(tensor: torch.Tensor) -> bool:
    """Return True if others than this tensor have its memory, or may have it since torch did not allocate it."""
    return not tensor.untyped_storage().resizable() or _references(tensor) != _references(torch.empty(1))


def _references(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    # Private, since torch has no public count of the tensors in a storage; without it, all count as kept.
    count = getattr(torch._C, "_storage_Use_Count", lambda _: id(tensor))  # noqa: SLF001
    return int(count(storage._cdata))  # noqa: SLF001
