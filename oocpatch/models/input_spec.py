"""What a model takes: as its file says, or as its parameters let one guess.

Files of torch.export and ONNX fix what was fixed when they were written: the number of patches in a batch, channels,
sides, a dtype. Knowing it before the first call gives a clear refusal instead of the model's own words, and lets sizes
be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from oocpatch.planning.box import Ints


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The batches `(B, C, *patch)` that a model takes.

    Attributes:
        least_batch: fewest patches of a call.
        most_batch: most patches of a call; None: any number.
        channels: channels; None: not said.
        sides: voxels of a patch per axis, None where they are free; None: not said, not even the number of axes.
        dtype: dtype of the patches; None: not said.

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
            ValueError: naming what is taken.
        """
        if self.sides is not None and len(self.sides) != len(patch_size):
            raise ValueError(
                f"the model takes patches of {len(self.sides)} axes, got {len(patch_size)}: {_sides(patch_size)}"
            )
        if self.sides is not None and any(s not in (None, n) for s, n in zip(self.sides, patch_size, strict=True)):
            raise ValueError(
                f"the model takes patches of {_sides(self.sides)} only, got {_sides(patch_size)}; "
                'patch_size="auto" chooses what it takes'
            )
        if self.channels not in (None, channels):
            raise ValueError(f"the model takes {self.channels} channel(s), and the volume has {channels}")

    def and_also(self, other: InputSpec) -> InputSpec:
        """What two models both take.

        Raises:
            ValueError: when there is nothing of the kind.
        """
        return InputSpec(
            least_batch=max(self.least_batch, other.least_batch),
            most_batch=min((m for m in (self.most_batch, other.most_batch) if m is not None), default=None),
            channels=_common("channels", self.channels, other.channels),
            sides=_common_sides(self.sides, other.sides),
            dtype=None,
        )


def input_spec_of(model: Any) -> InputSpec:
    """What a model takes, all of an ensemble together.

    >>> input_spec_of(nn.Identity())
    InputSpec(least_batch=1, most_batch=None, channels=None, sides=None, dtype=None)
    """
    found = InputSpec()
    if isinstance(model, nn.Module):
        told = (getattr(module, "accepts", None) for module in model.modules())
        for accepts in (item for item in told if isinstance(item, InputSpec)):
            found = accepts if found == InputSpec() else found.and_also(accepts)
    return found


def input_dtype(model: Any) -> torch.dtype | None:
    """The dtype that patches are cast to: as the model's file says, else that of parameters that are floating point.

    >>> input_dtype(nn.Conv2d(1, 1, 3).half())
    torch.float16
    """
    accepts = getattr(model, "accepts", None)
    if isinstance(accepts, InputSpec):
        return accepts.dtype
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
    return None


def as_input(patches: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Patches cast to what a model takes.

    Raises:
        ValueError: when they do not fit: floats or larger integers for a model that takes integers.
    """
    if dtype is None or patches.dtype == dtype:
        return patches
    if not dtype.is_floating_point and torch.promote_types(patches.dtype, dtype) != dtype:
        raise ValueError(f"the model takes patches of {_name(dtype)}, which do not hold {_name(patches.dtype)}")
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
    """A model that was loaded from a file which says what it takes.

    Args:
        program: the model.
        accepts: what it takes.

    >>> two_at_a_time = ModelFile(nn.Identity(), InputSpec(least_batch=2, most_batch=2))
    >>> two_at_a_time(torch.arange(3)[:, None]).tolist()
    [[0], [1], [2]]
    """

    def __init__(self, program: nn.Module, accepts: InputSpec) -> None:
        super().__init__()
        self.program = program
        self.accepts = accepts

    def forward(self, patches: torch.Tensor) -> Any:
        """Outputs for any number of patches `(B, C, *patch)`."""
        least, most = self.accepts.least_batch, self.accepts.most_batch or len(patches)
        outputs = []
        for part in torch.split(patches, most):
            missing = max(0, least - len(part))
            filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append(first(self.program(filled), len(part)))
        return joined(outputs)


def joined(outputs: Sequence[Any]) -> Any:
    """The outputs of parts of a batch, tensors or dicts of them, as those of the batch."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], dict):
        return {name: joined([output[name] for output in outputs]) for name in outputs[0]}
    return torch.cat([torch.as_tensor(output) for output in outputs])


def first(output: Any, count: int) -> Any:
    """What a batch's output, a tensor or a dict of them, has for its first patches; anything else stays as it is."""
    if isinstance(output, dict):
        return {name: first(value, count) for name, value in output.items()}
    return output[:count] if isinstance(output, torch.Tensor) else output
