"""Functions as modules: what is no `torch.nn.Module` gets a place in one, and functions of numpy arrays get arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn


class Function(nn.Module):
    """A callable of patches as a module.

    Args:
        function: maps a tensor `(B, C, *patch)` to a tensor, an array, or a dict of them.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        self.function = function

    @property
    def described(self) -> tuple[object, ...]:
        """What says which model it is."""
        return (type(self).__name__, self.function)

    def forward(self, patches: torch.Tensor) -> Any:
        """The function's output for a batch."""
        return self.function(patches)


class NumpyModel(Function):
    """A function of numpy arrays as a model.

    Args:
        function: maps an array `(B, C, *patch)` in main memory, of the volume's dtype, to an array
            `(B, C', *patch)` or a dict of them.

    >>> highest = NumpyModel(lambda patches: patches.max(axis=1, keepdims=True))
    >>> highest(torch.tensor([[[1, 5], [3, 2]]])).tolist()
    [[[3, 5]]]
    """

    def forward(self, patches: torch.Tensor) -> Any:
        """The function's output for a batch, on the batch's device."""
        result = self.function(patches.numpy(force=True))
        if isinstance(result, dict):
            return {name: _tensor(value, patches.device) for name, value in result.items()}
        return _tensor(result, patches.device)


def _tensor(value: Any, device: torch.device) -> Any:
    """An array as a tensor; what is no array stays what it is, for the caller to refuse."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.ascontiguousarray(native)).to(device)


def as_module(model: nn.Module | Callable[..., Any]) -> nn.Module:
    """A model as a module."""
    return model if isinstance(model, nn.Module) else Function(model)


def writes_unseen(model: Any) -> bool:
    """Whether a model might write to its input without torch noticing: any code that is not a module's."""
    if not isinstance(model, nn.Module):
        return True
    return any(isinstance(module, Function) for module in model.modules())
