"""Batches of an aggregator: checked against their locations and what came before, and what the first one tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oocpatch.aggregation.head_spec import HeadSpec, laid_out
from oocpatch.aggregation.head_sums import HeadSums
from oocpatch.aggregation.placement import AxisPlacement
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.grid import PatchLocation

SINGLE = "prediction"
"""Name of the output when batches are tensors, as `predict` has it."""

Place = tuple[Ints, Ints]


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose tensors fit its locations.

    Attributes:
        tensors: `(B, C, *spatial)`, by name.
        places: start and size of each patch, in voxels of the volume.
        single: whether the user gave one tensor.
    """

    tensors: dict[str, torch.Tensor]
    places: list[Place]
    single: bool

    def patch(self, index: int) -> dict[str, torch.Tensor]:
        """What one patch gave, by name: `(C, *given)` in main memory, in a dtype that an output can have."""
        return {name: _storable(tensor[index].detach().cpu()) for name, tensor in self.tensors.items()}

    def given(self) -> dict[Ints, dict[str, Ints]]:
        """By size of patch, the size of what patches gave, by name."""
        given = {name: tuple(tensor.shape[2:]) for name, tensor in self.tensors.items()}
        return dict.fromkeys((size for _, size in self.places), given)

    def check(self, heads: Mapping[str, HeadSums], *, single: bool) -> None:
        """Refuse a batch that does not fit what came before.

        Raises:
            ValueError: in that case.
        """
        if self.single != single:
            was, now = ("a tensor", "a dict") if single else ("a dict", "a tensor")
            raise ValueError(f"batch must be {was}, as it was before, got {now}")
        if self.tensors.keys() != heads.keys():
            raise ValueError(f"batch must have the keys {sorted(heads)}, as before, got {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            self._check_head(tensor, heads[name], "batch" if single else f"batch[{name!r}]")

    def _check_head(self, tensor: torch.Tensor, head: HeadSums, told: str) -> None:
        spec, given = head.spec, tuple(tensor.shape[2:])
        if tensor.shape[1] != spec.channels:
            raise ValueError(f"{told} must have {spec.channels} channels, as before, got {tensor.shape[1]}")
        dtype = str(_storable(tensor[:0]).numpy(force=True).dtype)
        if not head.blended and dtype != spec.dtype:
            raise ValueError(f"{told} must have dtype {spec.dtype}, as before, got {dtype}")
        for size in dict.fromkeys(size for _, size in self.places):
            if head.given.get(size, given) != given or not spec.placement.fits(size, given):
                scale = tuple(f"{a.numerator}/{a.denominator}" for a in spec.axes)
                same = all(a.numerator == a.denominator for a in spec.axes)
                known = f", and was {head.given[size]} before" if size in head.given else ""
                raise ValueError(
                    f"{told} must have the spatial size of its locations{'' if same else f' times {scale}'}{known}, "
                    f"got {given} for {size}"
                )


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # Zarr has no bfloat16, and float32 holds every value of it.
    return tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor


def read_batch(batch: Any, locations: Any, shape: Ints, overlap: Ints) -> Batch:
    """Check that a batch fits its locations, and these the volume.

    Raises:
        TypeError: when they are no tensors, or no locations.
        ValueError: when they do not fit.
    """
    single = isinstance(batch, torch.Tensor)
    tensors = {SINGLE: batch} if single else batch
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise TypeError(f"batch must be a tensor or a dict of tensors, got {_kind(batch)}")
    if not tensors:
        raise ValueError("batch must have at least one tensor, got an empty dict")
    places = [_place(location, shape, overlap) for location in _listed(locations)]
    for name, tensor in tensors.items():
        told = "batch" if single else f"batch[{name!r}]"
        if not isinstance(name, str) or not name or "/" in name or name.startswith(("__", ".")):
            raise ValueError(f"keys of batch must be names of Zarr arrays, got {name!r}")
        if tensor.ndim != len(shape) + 2:
            axes = ", ".join(["B", "C", *(f"axis {a}" for a in range(len(shape)))])
            raise ValueError(f"{told} must be ({axes}) for a volume of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.shape[0] != len(places):
            raise ValueError(f"{told} must have one entry per location, got {tensor.shape[0]} and {len(places)}")
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            raise ValueError(f"{told} must be a dense tensor of real numbers, got {tensor.dtype}, {tensor.layout}")
        if places and not tensor.numel():
            raise ValueError(f"{told} must have at least one channel and one voxel, got {tuple(tensor.shape)}")
    return Batch(dict(tensors), places, single)


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return "a dict of " + ", ".join(sorted({type(v).__name__ for v in value.values()}))
    return type(value).__name__


def _listed(locations: Any) -> Sequence[Any]:
    if isinstance(locations, (str, bytes, Mapping)) or not isinstance(locations, Sequence):
        if isinstance(locations, PatchLocation):
            return [locations]
        raise TypeError(f"locations must be a list of PatchLocation, got {type(locations).__name__}")
    return locations


def _place(location: Any, shape: Ints, overlap: Ints) -> Place:
    try:
        start, size = tuple(map(int, location.index)), tuple(map(int, location.size))
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"locations must be a list of PatchLocation, got {location!r} in it") from error
    if not len(start) == len(size) == len(shape):
        raise ValueError(f"locations must have one value per axis of the volume {shape}, got {start} and {size}")
    if any(p < 1 for p in size):
        raise ValueError(f"locations must have positive sizes, got {size}")
    stop = tuple(a + p for a, p in zip(start, size, strict=True))
    if (Box(start, stop) & Box.of_shape(shape)).empty:
        raise ValueError(f"locations must lie in the volume, at least in part, got {start} to {stop} for {shape}")
    if any(o >= p for o, p in zip(overlap, size, strict=True)):
        raise ValueError(f"patch_overlap must be smaller than patch_size on every axis, got {overlap} and {size}")
    return start, size


def head_specs(
    first: Batch,
    *,
    shape: Ints,
    output_shape: Ints | None,
    trim: Ints | None,
    blended: bool,
    chunks: Ints | None,
    limit: int,
) -> list[HeadSpec]:
    """What the first batch tells of the heads: channels, dtypes and scales; and how their outputs are cut.

    Args:
        first: the batch.
        shape: spatial shape of the volume.
        output_shape: that of the output, if the user told.
        trim: what `crop` trims from each side of a patch.
        blended: whether patches are blended, in float32.
        chunks: chunks of the output, if the user told.
        limit: bytes to stay under.

    Raises:
        ValueError: when the sizes of what the model gives do not fit.
    """
    specs = []
    for name, tensor in first.tensors.items():
        given = tuple(tensor.shape[2:])
        axes = _axes(first, name, shape=shape, output_shape=output_shape, trims=trim or (None,) * len(shape))
        dtype = "float32" if blended else str(_storable(tensor[:0]).numpy(force=True).dtype)
        spec = HeadSpec(name, tensor.shape[1], dtype, axes, (1,), (1,))
        specs.append(laid_out(spec, given, chunks, limit // len(first.tensors)))
    return specs


def _axes(
    first: Batch, name: str, *, shape: Ints, output_shape: Ints | None, trims: Sequence[int | None]
) -> tuple[AxisPlacement, ...]:
    size, given = first.places[0][1], tuple(first.tensors[name].shape[2:])
    outs: Sequence[int | None] = output_shape or ((None,) * len(shape))
    if first.single and output_shape is None:
        outs = shape  # as TorchIO: another scale must be asked for
        if given != size:
            raise ValueError(
                f"batch must have the spatial size of its locations, got {given} for {size}; "
                "pass output_shape when the model gives another number of voxels"
            )
    found = [AxisPlacement.fitted(*values) for values in zip(shape, outs, size, given, trims, strict=True)]
    axes = tuple(a for a in found if a is not None)
    if len(axes) < len(found):
        told = "batch" if first.single else f"batch[{name!r}]"
        raise ValueError(
            f"output_shape must be to the volume as {told} is to its locations, rounded up or down, got {output_shape} "
            f"for {shape}, and {given} for {size}"
        )
    return axes
