"""Memory that kernels take besides their operands and results, which no tensor shows.

Rules from measurements, each with the shapes that it was measured with. They hold for torch on a CPU; elsewhere they
are a margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oocpatch.planning.box import Ints

REORDERING = ("conv", "mm", "linear", "attention")
"""Operators whose kernels reorder their operands into buffers of their own."""

FEW = 5
"""Channels up to which a convolution in three dimensions is done as one product of matrices."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Shape and dtype of a tensor."""

    shape: Ints
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


def scratch(operator: str, inputs: Sequence[Operand], results: Sequence[Operand]) -> int:
    """Return the bytes that an operator takes besides its operands and its results."""
    if not any(word in operator for word in REORDERING):
        return 0
    reordered = sum(operand.nbytes for operand in (*inputs, *results))
    if "conv" in operator and len(inputs) > 1 and len(results) == 1:
        return max(reordered, convolution_scratch(inputs[0], inputs[1], results[0]))
    return reordered


def convolution_scratch(source: Operand, weight: Operand, result: Operand) -> int:
    """Return the bytes that a convolution on a CPU takes besides its operands and its result.

    oneDNN copies both into a layout of 8 or 16 channels at a time, filled up with zeros. With few channels in three
    dimensions, and in float64 always, each voxel's neighbourhood is laid out instead, one sample at a time. Both were
    found by measuring 44 shapes: this was never less than what they took, but up to four times as much.

    >>> patch, features = Operand((1, 1, 64, 64, 64), torch.float32), Operand((1, 8, 64, 64, 64), torch.float32)
    >>> convolution_scratch(patch, Operand((8, 1, 3, 3, 3), torch.float32), features) >> 20
    27
    """
    axes = len(weight.shape) - 2
    kernel = math.prod(weight.shape[2:])
    group = 8 if axes == 3 and kernel > 1 else 16
    filled = sum(
        t.nbytes // max(1, t.shape[-axes - 1]) * -(-t.shape[-axes - 1] // group) * group
        for t in (source, result)
        if len(t.shape) > axes
    )
    laid_out = math.prod(result.shape[-axes:]) * weight.shape[1] * kernel * weight.dtype.itemsize
    if weight.dtype == torch.float64:
        return max(filled, laid_out)
    if axes == 3 and weight.shape[1] <= FEW and 1 < kernel <= 27:
        return laid_out if source.shape[0] == 1 and weight.dtype == torch.float32 else max(filled, laid_out)
    return filled
