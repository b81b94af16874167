"""Specifications of a model's input: read from its file, or inferred from its parameters.

Files of torch.export and ONNX fix what was fixed when they were written: the number of patches in a batch, channels,
sides, a dtype. Knowing it before the first call gives a clear error instead of the model's own, and lets sizes be
chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oocpatch.models.named_outputs import joined, map_outputs, owned_outputs
from oocpatch.planning.box import Ints


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The batches `(B, C, *patch)` that a model takes.

    Attributes:
        least_batch: fewest patches of a call.
        most_batch: most patches of a call; None: any number.
        channels: channels; None: unknown.
        sides: voxels of a patch per axis, None where they are free; None: unknown, even their number.
        dtype: dtype of the patches; None: unknown.

    >>> InputSpec(sides=(64, None)).validate(1, (96, 96))
    Traceback (most recent call last):
    ...
    ValueError: the model takes patches of 64 x any only, got 96 x 96; patch_size="auto" chooses what it takes
    """

    least_batch: int = 1
    most_batch: int | None = None
    channels: int | None = None
    sides: tuple[int | None, ...] | None = None
    dtype: torch.dtype | None = None

    def validate(self, channels: int, patch_size: Ints) -> None:
        """Refuse patches of other channels or sides than these.

        Raises:
            ValueError: naming the channels or sides that the model takes.
        """
        sides = patch_size if self.sides is None else self.sides
        if len(sides) != len(patch_size):
            raise ValueError(
                f"the model takes patches of {len(sides)} axes, got {len(patch_size)}: {_sides(patch_size)}; "
                "say with axes which axes of the volume are spatial"
            )
        if any(side not in (None, n) for side, n in zip(sides, patch_size, strict=True)):
            raise ValueError(
                f"the model takes patches of {_sides(sides)} only, got {_sides(patch_size)}; "
                'patch_size="auto" chooses what it takes'
            )
        if self.channels not in (None, channels):
            raise ValueError(
                f"the model takes {self.channels} channel(s), and the volume has {channels}; "
                "give it a volume of as many channels, or select them with a preprocess"
            )

    def intersection(self, other: InputSpec) -> InputSpec:
        """Return the batches that two models both take.

        Raises:
            ValueError: when there are none.
        """
        return InputSpec(
            least_batch=max(self.least_batch, other.least_batch),
            most_batch=min((m for m in (self.most_batch, other.most_batch) if m is not None), default=None),
            channels=_common("channels", self.channels, other.channels),
            sides=_common_sides(self.sides, other.sides),
            dtype=None,
        )


def input_spec_of(model: Any) -> InputSpec:
    """Return the batches that a model takes; of an ensemble, those that all its models take.

    >>> input_spec_of(nn.Identity())
    InputSpec(least_batch=1, most_batch=None, channels=None, sides=None, dtype=None)
    """
    common = InputSpec()
    if isinstance(model, nn.Module):
        specs = (getattr(module, "input_spec", None) for module in model.modules())
        for spec in (item for item in specs if isinstance(item, InputSpec)):
            common = spec if common == InputSpec() else common.intersection(spec)
    return common


def input_dtype(model: Any) -> torch.dtype | None:
    """Return the dtype that patches are cast to: that of the model's file, else of its floating point parameters.

    >>> input_dtype(nn.Conv2d(1, 1, 3).half())
    torch.float16
    """
    if isinstance(spec := getattr(model, "input_spec", None), InputSpec):
        return spec.dtype
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)


def as_input(patches: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return patches cast to the dtype that a model takes.

    Raises:
        ValueError: when they do not fit: floats or larger integers for a model that takes integers.
    """
    if dtype is None or patches.dtype == dtype:
        return patches
    if not dtype.is_floating_point and torch.promote_types(patches.dtype, dtype) != dtype:
        raise ValueError(
            f"the model takes patches of {_name(dtype)}, which do not hold {_name(patches.dtype)}; "
            "convert the volume, or export the model for floats"
        )
    return patches.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common(name: str, one: int | None, other: int | None) -> int | None:
    if one is not None and other is not None and one != other:
        raise ValueError(f"the models of an ensemble must take the same {name}, got {one} and {other}")
    return other if one is None else one


def _common_sides(
    one: tuple[int | None, ...] | None, other: tuple[int | None, ...] | None
) -> tuple[int | None, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    if len(one) != len(other):
        raise ValueError(f"the models of an ensemble must take the same axes, got {_sides(one)} and {_sides(other)}")
    return tuple(_common("sides", a, b) for a, b in zip(one, other, strict=True))


def _sides(sides: tuple[int | None, ...]) -> str:
    return " x ".join("any" if side is None else str(side) for side in sides)


class ModelFile(nn.Module):
    """A model of a file with an input specification; it is called with as many patches as it takes.

    Args:
        program: the model.
        input_spec: the batches that it takes.

    >>> two_at_a_time = ModelFile(nn.Identity(), InputSpec(least_batch=2, most_batch=2))
    >>> two_at_a_time(torch.arange(3)[:, None]).tolist()
    [[0], [1], [2]]
    """

    def __init__(self, program: nn.Module, input_spec: InputSpec) -> None:
        super().__init__()
        self.program = program
        self.input_spec = input_spec

    def forward(self, patches: torch.Tensor) -> Any:
        """Return the outputs for any number of patches `(B, C, *patch)`."""
        least, most = self.input_spec.least_batch, self.input_spec.most_batch or len(patches)
        outputs = []
        parts = torch.split(patches, most)
        for part in parts:
            missing = max(0, least - len(part))
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            output = owned_outputs(self.program, filled) if len(parts) > 1 else self.program(filled)
            outputs.append(map_outputs(functools.partial(_first, count=len(part)), output) if missing else output)
        return joined(outputs)


def _first(output: Any, count: int) -> Any:
    """Return an output for the first patches of a batch; what is no tensor of patches as it is."""
    return output[:count] if isinstance(output, torch.Tensor) and output.ndim else output
