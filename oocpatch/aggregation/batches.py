"""Batches of an aggregator: checks against their locations and earlier batches, and the heads of the first one."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oocpatch.aggregation.placement import AxisPlacement, HeadSpec, Patch
from oocpatch.aggregation.tiles import HeadTiles
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchLocation

SINGLE = "prediction"
"""Name of the output when batches are tensors, as `predict` has it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors `(B, C, *spatial)` by name, of `B` patches of subjects; `single`: one tensor and no dict."""

    tensors: dict[str, torch.Tensor]
    patches: list[Patch]
    single: bool
    subjects: set[int]

    @property
    def out_size(self) -> dict[str, Ints]:
        """Sizes of the patches' outputs by name."""
        return {name: tuple(tensor.shape[2:]) for name, tensor in self.tensors.items()}

    def patch(self, index: int) -> dict[str, torch.Tensor]:
        """Return the outputs of one patch by name: `(C, *out_size)` in main memory, in a storable dtype."""
        return {name: _storable(tensor[index].detach().cpu()) for name, tensor in self.tensors.items()}

    def label(self, name: str) -> str:
        """Return the name of a tensor in messages."""
        return "batch" if self.single else f"batch[{name!r}]"

    def check(self, heads: Mapping[str, HeadTiles], *, single: bool) -> None:
        """Raise ValueError for a batch that does not fit earlier ones."""
        if self.single != single:
            was, now = ("a tensor", "a dict") if single else ("a dict", "a tensor")
            raise ValueError(f"batch must be {was}, as it was before, got {now}")
        if self.tensors.keys() != heads.keys():
            raise ValueError(f"batch must have the keys {sorted(heads)}, as before, got {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            label, out_size, spec, known = self.label(name), self.out_size[name], heads[name].spec, heads[name].out_size
            if tensor.shape[1] != spec.channels:
                raise ValueError(f"{label} must have {spec.channels} channels, as before, got {tensor.shape[1]}")
            if not spec.blended and (dtype := _stored_dtype(tensor)) != spec.dtype:
                raise ValueError(f"{label} must have dtype {spec.dtype}, as before, got {dtype}")
            for size in {size for _, size in self.patches}:
                if known.get(size, out_size) != out_size or not all(map(AxisPlacement.fits, spec.axes, size, out_size)):
                    scale = tuple(f"{a.numerator}/{a.denominator}" for a in spec.axes)
                    times = "" if set(scale) == {"1/1"} else f" times {scale}"
                    before = f", and was {known[size]} before" if size in known else ""
                    less = _less([a.context for a in spec.axes])
                    rule = f"must have the spatial size of its locations{less}{times}{before}"
                    raise ValueError(f"{label} {rule}, got {out_size} for {size}")


def _less(context: Sequence[int]) -> str:
    return " less the context" if any(context) else ""


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # Zarr has no bfloat16, and float32 holds every value of it.
    return tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor


def _stored_dtype(tensor: torch.Tensor) -> str:
    return str(_storable(tensor[:0]).numpy(force=True).dtype)


def read_batch(batch: Any, locations: Any, shape: Ints, overlap: Ints, context: Ints) -> Batch:
    """Return a batch that fits its locations, which lie in the volume; raise TypeError or ValueError for others."""
    single = isinstance(batch, torch.Tensor)
    tensors = {SINGLE: batch} if single else batch
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        kinds = {type(t).__name__ for t in tensors.values()} if isinstance(tensors, Mapping) else {type(batch).__name__}
        raise TypeError(f"batch must be a tensor or a dict of tensors, got {', '.join(sorted(kinds))}")
    if not tensors:
        raise ValueError("batch must have at least one tensor, got an empty dict")
    locations = [locations] if isinstance(locations, PatchLocation) else locations
    if isinstance(locations, (str, bytes)) or not isinstance(locations, Sequence):
        raise TypeError(f"locations must be a list of PatchLocation, got {type(locations).__name__}")
    patches = [_read_location(location, shape, overlap, context) for location in locations]
    subjects = {index for place in locations if (index := getattr(place, "subject_index", None)) is not None}
    read = Batch(dict(tensors), patches, single, subjects)
    for name, tensor in tensors.items():
        label = read.label(name)
        if not isinstance(name, str) or not name or "/" in name or name.startswith(("__", ".")):
            raise ValueError(f"keys of batch must be names of Zarr arrays, got {name!r}")
        if tensor.ndim != len(shape) + 2:
            axes = ", ".join(["B", "C", *(f"axis {a}" for a in range(len(shape)))])
            raise ValueError(f"{label} must be ({axes}) for a volume of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.shape[0] != len(locations):
            raise ValueError(f"{label} must have one entry per location, got {tensor.shape[0]} and {len(locations)}")
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            raise ValueError(f"{label} must be a dense tensor of real numbers, got {tensor.dtype}, {tensor.layout}")
        if locations and not tensor.numel():
            raise ValueError(f"{label} must have at least one channel and one voxel, got {tuple(tensor.shape)}")
    return read


def without_context(start: Ints, size: Ints, context: Ints) -> Patch:
    """Return the part of a patch that its output is of."""
    return tuple(map(operator.add, start, context)), tuple(p - 2 * c for p, c in zip(size, context, strict=True))


def _read_location(location: Any, shape: Ints, overlap: Ints, context: Ints) -> Patch:
    try:
        start, size = tuple(map(int, location.index)), tuple(map(int, location.size))
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"locations must be a list of PatchLocation, got {location!r} in it") from error
    if not len(start) == len(size) == len(shape):
        raise ValueError(f"locations must have one value per axis of the volume {shape}, got {start} and {size}")
    if min(size) < 1:
        raise ValueError(f"locations must have positive sizes, got {size}")
    stop = tuple(map(operator.add, start, size))
    if (Box(start, stop) & Box.of_shape(shape)).empty:
        raise ValueError(f"locations must lie in the volume, at least in part, got {start} to {stop} for {shape}")
    if any(o >= p for o, p in zip(overlap, size, strict=True)):
        raise ValueError(f"patch_overlap must be smaller than patch_size on every axis, got {overlap} and {size}")
    if any(2 * c >= p for c, p in zip(context, size, strict=True)):
        raise ValueError(f"context must be smaller than half of a patch on every axis, got {context} for {size}")
    return without_context(start, size, context)


def head_specs(
    first: Batch, shape: Ints, output_shape: Ints | None, overlaps: Sequence[int | None], context: Ints
) -> list[HeadSpec]:
    """Return the heads that the first batch shows, not cut yet; overlaps and context are those of `AxisPlacement`."""
    size, specs = first.patches[0][1], []
    for name, out_size in first.out_size.items():
        if first.single and output_shape is None and out_size != size:  # as TorchIO: another scale must be asked for
            raise ValueError(
                f"batch must have the spatial size of its locations{_less(context)}, got {out_size} for {size}; "
                "pass output_shape when the model gives another number of voxels, or context when it drops a border"
            )
        outs: Sequence[int | None] = output_shape or (shape if first.single else (None,) * len(shape))
        axes = tuple(map(AxisPlacement.fitted, shape, outs, size, out_size, overlaps, context))
        if None in axes:
            raise ValueError(
                f"output_shape must be to the volume as {first.label(name)} is to its locations, rounded up or down, "
                f"got {output_shape} for {shape}, and {out_size} for {size}"
            )
        dtype = "float32" if None in overlaps else _stored_dtype(first.tensors[name])
        specs.append(HeadSpec(name, first.tensors[name].shape[1], dtype, tuple(a for a in axes if a is not None)))
    return specs
