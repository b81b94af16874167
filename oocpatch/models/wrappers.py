"""Modules around models: functions as modules, functions of numpy arrays, and ensembles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from oocpatch.models.augmentation import FlipRotate
from oocpatch.models.input_spec import InputSpec, as_input, input_dtype
from oocpatch.models.named_outputs import map_outputs, named_outputs, unnamed


class Function(nn.Module):
    """A callable of patches as a module.

    Args:
        function: maps a tensor `(B, C, *patch)` to a tensor, an array, or what holds several of them.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        self.function = function

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the function's output for a batch."""
        return self.function(patches)


class NumpyModel(Function):
    """A function of numpy arrays as a model.

    Args:
        function: maps an array `(B, C, *patch)` in main memory, of the volume's dtype, to an array
            `(B, C', *patch)`, or a dict, tuple, list or dataclass of them.

    >>> highest = NumpyModel(lambda patches: patches.max(axis=1, keepdims=True))
    >>> highest(torch.tensor([[[1, 5], [3, 2]]])).tolist()
    [[[3, 5]]]
    """

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the function's output for a batch, on the batch's device."""
        result = self.function(patches.numpy(force=True))
        return map_outputs(functools.partial(_as_tensor, device=patches.device), result)


def _as_tensor(value: Any, device: torch.device) -> Any:
    """Return an array as a tensor; anything else as it is, for the caller to refuse."""
    if not isinstance(value, (np.ndarray, np.generic)) or isinstance(value, np.ma.MaskedArray):
        return value
    return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("="))).to(device)


def as_module(model: nn.Module | Callable[..., Any]) -> nn.Module:
    """Return a model as a module."""
    return model if isinstance(model, nn.Module) else Function(model)


def writes_unseen(model: Any) -> bool:
    """Return True if a model might write to its input without torch noticing: any code that is not a module's."""
    return any(isinstance(module, Function) for module in as_module(model).modules())


class NamedInputs(nn.Module):
    """A model of several tensors as one of a single tensor, whose channels are those of all.

    Args:
        model: is called with a tensor `(B, C, *patch)` by keyword for each input; first with one without a name.
        inputs: name and number of channels of each.

    >>> NamedInputs(lambda image, prior: image * prior, [("image", 1), ("prior", 1)])(torch.tensor([[[2], [3]]]))
    tensor([[[6]]])
    """

    def __init__(self, model: nn.Module | Callable[..., Any], inputs: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)
        self._ends = list(itertools.accumulate(count for _, count in self.inputs[:-1]))

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the model's output for a batch."""
        parts = torch.tensor_split(patches, self._ends, dim=1)
        named = {name: part for (name, _), part in zip(self.inputs, parts, strict=True)}
        return self.model(*([named.pop("")] if "" in named else []), **named)


def ensemble(
    models: Sequence[nn.Module | Callable[..., Any]],
    preprocess: nn.Module | Callable[..., Any] | None = None,
    transforms: Sequence[FlipRotate] = (),
) -> nn.Module | Callable[..., Any]:
    """Return models with preprocessing and augmentation as one model; a single model without either as it is."""
    if len(models) == 1 and preprocess is None and len(transforms) <= 1:
        return models[0]
    return EnsembleModel(models, preprocess, transforms)


class EnsembleModel(nn.Module):
    """Several models, with preprocessing and augmentation, as one model.

    It takes patches in the volume's dtype, and casts them to the dtype of each model.

    Args:
        models: whose outputs are averaged.
        preprocess: function of patches `(B, C, *patch)`.
        transforms: flips and rotations of patches, over which outputs are averaged.

    >>> doubled, tripled = (lambda x: 2 * x), (lambda x: 3 * x)
    >>> EnsembleModel([doubled, tripled], preprocess=lambda x: x + 1)(torch.ones(1, 1, 2)).tolist()
    [[[5.0, 5.0]]]
    """

    input_spec = InputSpec()
    """Patches of any dtype: it casts them itself."""

    def __init__(
        self,
        models: Sequence[nn.Module | Callable[..., Any]],
        preprocess: nn.Module | Callable[..., Any] | None = None,
        transforms: Sequence[FlipRotate] = (),
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList([as_module(model) for model in models])
        self.preprocess = None if preprocess is None else as_module(preprocess)
        self.transforms = tuple(transforms)

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the mean of all models over all transforms; with one of both, the model's own output.

        Raises:
            ValueError: when outputs cannot be averaged.
        """
        if self.preprocess is not None:
            patches = self.preprocess(patches)
        calls = len(self.models) * max(1, len(self.transforms))
        if calls == 1 and all(transform.is_identity for transform in self.transforms):
            return _called(self.models[0], patches)
        sums: dict[str, torch.Tensor] = {}
        identity = FlipRotate(tuple(range(patches.ndim - 2)), ())
        for transform in self.transforms or (identity,):
            transformed = transform.apply(patches)
            for model in self.models:
                _add(sums, named_outputs(_called(model, transformed)), transform, patches)
        return unnamed({name: values.div_(calls) for name, values in sums.items()})


def _called(model: nn.Module, patches: torch.Tensor) -> Any:
    return model(as_input(patches, input_dtype(model)))


def _add(sums: dict[str, torch.Tensor], outputs: dict[str, Any], transform: FlipRotate, patches: torch.Tensor) -> None:
    if sums and outputs.keys() != sums.keys():
        raise ValueError(
            "the model must return the same outputs each time to be averaged, "
            f"got {', '.join(sorted(sums))} and {', '.join(sorted(map(str, outputs)))}"
        )
    for name, value in outputs.items():
        values = transform.invert(_scores(name, value, patches))
        if name not in sums:
            kind = torch.float64 if values.dtype == torch.float64 else torch.float32
            sums[name] = values.to(kind, copy=True, memory_format=torch.contiguous_format)
        elif sums[name].shape != values.shape:
            raise ValueError(
                f"the model must return one shape for all that is averaged, got {tuple(sums[name].shape)} and "
                f"{tuple(values.shape)} of {name}: models of an ensemble must agree, and axes that augment exchanges "
                "must have one scale; average models of one kind, or use augment='flips'"
            )
        else:
            sums[name] += values


def _scores(name: str, value: Any, patches: torch.Tensor) -> torch.Tensor:
    """Return an output that can be averaged, as a tensor."""
    if value is None or isinstance(value, str):
        raise ValueError(f"the model must return a tensor or a dict of tensors, got {type(value).__name__}")
    values = torch.as_tensor(value, device=patches.device)
    if values.ndim not in {2, patches.ndim}:
        raise ValueError(f"the model must return {patches.ndim} axes (B, C, *patch), got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise ValueError(
            f"the model must return floats to be averaged (augment, several models), got {values.dtype} for {name}; "
            "return scores, and leave the choice of a class to postprocess='argmax'"
        )
    return values
