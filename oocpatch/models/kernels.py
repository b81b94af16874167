"""Memory that torch's kernels take besides their operands and results, which no tensor shows.

The rules are torch's own choices between kernels, and what each was measured to take: on x86 with AVX-512, of which
other CPUs take less. On other devices the rules are a margin.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oocpatch.planning.box import Ints

LIBRARIES = {"oneDNN": (8 << 20, 1 << 18), "MKL": (4 << 20, 1 << 20)}
"""Bytes that a library keeps from its first use on, and for each other shape: compiled code, buffers of threads."""

MOST_BUFFERS = 24 << 20
"""Most bytes that a library keeps for other shapes."""

_NONE = ("", "")

PACKED = 4 << 20
"""Bytes of the packed parts of the matrices that MKL multiplies."""

GROUP = 16
"""Channels that oneDNN lays out together, filled up with zeros; sources of no more than half of it stay as they are."""

FEW_VALUES = 20480
"""Size of a sample without its last axis up to which torch leaves a plain convolution to its own kernels."""


@dataclass(frozen=True, slots=True)
class Operand:
    """Shape, dtype and layout of a tensor."""

    shape: Ints
    dtype: torch.dtype
    stride: Ints | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """True where the last axis is dense, and each other one goes over those after it."""
        return self._is_dense(range(len(self.shape)))

    @property
    def is_channels_last(self) -> bool:
        """True where the channels are dense, and not the spatial axes."""
        axes = len(self.shape)
        return axes > 3 and not self.is_contiguous and self._is_dense((0, *range(2, axes), 1))

    def _is_dense(self, order: Sequence[int]) -> bool:
        expected = 1
        for axis in reversed(order) if self.stride is not None else ():
            if self.shape[axis] != 1 and self.stride is not None and self.stride[axis] != expected:
                return False
            expected *= self.shape[axis]
        return True

    def grouped_bytes(self) -> int:
        """Return the bytes of the values `(B, C, *spatial)` as oneDNN lays them out."""
        channels = self.shape[1]
        return self.nbytes // max(1, channels) * -(-channels // GROUP) * GROUP


def scratch(
    operator: str, operands: Sequence[Operand], results: Sequence[Operand], arguments: Sequence[Any]
) -> Scratch:
    """Return the memory that an operator takes besides its operands and its results.

    Args:
        operator: name of the operator.
        operands: the tensors among its arguments.
        results: the tensors that it returns.
        arguments: all of its arguments, in the order of its signature.
    """
    if operator.startswith("aten.convolution.") and len(arguments) >= 9 and len(operands) > 1 and len(results) == 1:
        stride, transposed, groups = arguments[3], arguments[6], arguments[8]
        convolution = Convolution(operands[0], operands[1], results[0], max(stride), bool(transposed), int(groups))
        library = ("MKL", "") if convolution.is_plain() else ("oneDNN", str(convolution))
        return Scratch(convolution.scratch(), convolution.scratch(is_batch=True), library)
    nbytes, library = 0, _NONE
    if "conv" in operator:
        nbytes = sum(operand.nbytes for operand in (*operands, *results))
    elif "multi_head_attention" in operator or "transformer_encoder" in operator:
        nbytes = attention_scratch(operands, arguments)
    elif "mm" in operator or "linear" in operator or "attention" in operator:
        nbytes = sum(operand.nbytes for operand in (*operands, *results))
        nbytes = nbytes if operands and operands[0].dtype.itemsize < 4 else min(nbytes, PACKED)
        library = ("MKL", str([operand.shape for operand in operands]))
    elif "norm" in operator and operands and not operands[0].is_contiguous and not operands[0].is_channels_last:
        nbytes = operands[0].nbytes  # a copy in order
    elif operator == "aten.roll.default" and len(arguments[1]) > 1:
        nbytes = results[0].nbytes  # axis by axis
    return Scratch(nbytes, nbytes, library)


@dataclass(frozen=True, slots=True)
class Scratch:
    """Memory that an operator takes besides its operands and its results.

    Attributes:
        single: bytes for a batch of one patch.
        batch: bytes per patch of a larger one.
        library: the library that has the kernel, and the shapes that it keeps memory for; two empty texts: none.
    """

    single: int
    batch: int
    library: tuple[str, str] = _NONE


def library_bytes(used: Collection[tuple[str, str]]) -> int:
    """Return the bytes that libraries keep after kernels for such shapes.

    >>> library_bytes([]), library_bytes([("MKL", ""), ("oneDNN", "3x3")]) / 2**20
    (0, 12.25)
    """
    total = 0
    for library, (first, each) in LIBRARIES.items():
        shapes = [shape for name, shape in used if name == library]
        total += bool(shapes) * first + min(MOST_BUFFERS, each * sum(map(bool, shapes)))
    return total


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of one sample, or a transposed one."""

    source: Operand
    weight: Operand
    result: Operand
    stride: int = 1
    transposed: bool = False
    groups: int = 1

    def scratch(self, *, is_batch: bool = False) -> int:
        """Return the bytes that it takes besides its operands and its result, for a sample of a batch or a single one.

        >>> values = Operand((1, 1, 64, 64, 64), torch.float32)
        >>> features = Operand((1, 8, 64, 64, 64), torch.float32)
        >>> Convolution(values, Operand((8, 1, 3, 3, 3), torch.float32), features).scratch() >> 20
        27
        """
        copied = 0 if self.source.is_contiguous or self.source.is_channels_last else self.source.nbytes
        if self.weight.dtype not in (torch.float32, torch.bfloat16) or (not is_batch and self.is_plain()):
            return copied + self._laid_out()
        if self.source.is_channels_last or self.weight.is_channels_last:
            return self.weight.nbytes + (self.source.nbytes if self.source.is_contiguous else 0)
        return copied + self.weight.nbytes + self._regrouped()

    def is_plain(self) -> bool:
        """Return whether torch leaves it to its own kernels, which lay out the neighbourhood of each voxel."""
        side = 1 if len(self.weight.shape) == 3 else min(self.weight.shape[-2:])
        few = math.prod(self.source.shape[:4]) <= FEW_VALUES
        return few and side <= 3 and self.groups == 1 and self.weight.dtype == torch.float32

    def _laid_out(self) -> int:
        """Return the bytes of the neighbourhoods of all voxels."""
        voxels = (self.source if self.transposed else self.result).shape[2:]
        nbytes = math.prod(voxels) * math.prod(self.weight.shape[1:]) * self.weight.dtype.itemsize
        is_half = self.weight.dtype.itemsize < 4
        return nbytes + (self.source.nbytes + self.result.nbytes if is_half and self.transposed else 0)

    def _regrouped(self) -> int:
        """Return the bytes of source and result as oneDNN lays them out, of which the source goes before the result."""
        source, result = self.source.nbytes, self.result.grouped_bytes()
        if self.source.shape[1] > GROUP // 2:
            source = self.source.grouped_bytes()
        if self.transposed:
            return max(source + result - self.result.nbytes, 2 * result)
        spatial = len(self.weight.shape) - 2
        if self.groups > 1 and spatial == 3:
            return source + result
        reduced = 2 * source // self.stride**spatial if self.stride > 1 and max(self.weight.shape[2:]) == 1 else 0
        return max(source + result - self.result.nbytes, result) + reduced


def attention_scratch(operands: Sequence[Operand], arguments: Sequence[Any]) -> int:
    """Return the bytes of a fused layer of attention: queries, keys and values twice, and the weights of all heads."""
    batch, tokens, width = operands[0].shape
    heads = next((int(value) for value in arguments[2:5] if isinstance(value, int) and value < width), 1)
    size = operands[0].dtype.itemsize
    hidden = max((operand.shape[0] for operand in operands[1:] if len(operand.shape) == 2), default=0)
    return batch * tokens * size * (7 * width + heads * tokens + 2 * hidden)
