"""Batches of an aggregator: checks against their locations and earlier batches, and the heads of the first one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch

from oocpatch.aggregation.placement import AxisPlacement, Patch, Placement
from oocpatch.planning.box import Box, Ints, worthwhile
from oocpatch.planning.grid import PatchLocation
from oocpatch.volumes.volume import DEFAULT_CHUNKS

TILE_BYTES = 1 << 20
"""Bytes of the sums of one tile, where the limit is large: enough to be worth a write."""
LEAST_CHUNK = 64
"""Voxels below which default chunks are not made smaller."""
WRITING = 6
"""Tiles' worth of bytes while one is written: its sums, its values, and chunks on their way through zarr."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """One output of the model.

    Attributes:
        name: name of its array.
        channels: its channels.
        dtype: dtype of its sums and of its array, as numpy calls it.
        axes: the placement of its patches, per axis.
        chunks: chunks of the array, spatial.
        tile: shape of a tile, whole chunks, spatial.
    """

    name: str
    channels: int
    dtype: str
    axes: tuple[AxisPlacement, ...]
    chunks: Ints = ()
    tile: Ints = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the head that `dataclasses.asdict` made JSON of."""
        axes = tuple(AxisPlacement(**axis) for axis in value["axes"])
        return cls(value["name"], value["channels"], value["dtype"], axes, tuple(value["chunks"]), tuple(value["tile"]))

    @property
    def placement(self) -> Placement:
        return Placement(self.axes, self.tile)

    @property
    def voxel_bytes(self) -> int:
        """Bytes of one voxel, all channels."""
        return self.channels * np.dtype(self.dtype).itemsize

    @property
    def tile_bytes(self) -> int:
        """Bytes of the sums of one tile."""
        return self.voxel_bytes * math.prod(self.tile)

    def cut(self, given: Ints, chunks: Ints | None, limit: int) -> HeadSpec:
        """Return the head with chunks and tiles: default chunks shrink until a patch takes half of the limit."""
        shape = tuple(a.out for a in self.axes)
        side = DEFAULT_CHUNKS.get(len(shape), 16)
        options = [chunks] if chunks is not None else [(side >> k,) * len(shape) for k in range(side.bit_length())]
        for option in options:
            clipped = tuple(min(c, n) for c, n in zip(option, shape, strict=True))
            voxels = min(TILE_BYTES, limit // 64) // self.voxel_bytes
            tile = tuple(min(t, n) for t, n in zip(worthwhile(clipped, shape, voxels), shape, strict=True))
            spec = replace(self, chunks=clipped, tile=tile)
            if sum(memory_needed([spec], {spec.name: given})) <= limit // 2 or math.prod(clipped) <= LEAST_CHUNK:
                break
        return spec


def memory_needed(specs: Sequence[HeadSpec], given: Mapping[str, Ints]) -> tuple[int, int]:
    """Return the bytes that adding one patch takes: for its tiles, and for its values and the writing of one tile."""
    tiles = sum(s.tile_bytes * s.placement.most_tiles(given[s.name]) for s in specs)
    patch = sum((2 * s.voxel_bytes + 4) * math.prod(given[s.name]) for s in specs)
    return tiles, patch + WRITING * max(s.tile_bytes for s in specs)


SINGLE = "prediction"
"""Name of the output when batches are tensors, as `predict` has it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose tensors fit its locations.

    Attributes:
        tensors: `(B, C, *spatial)`, by name.
        patches: start and size of each patch, in voxels of the volume.
        single: whether it is one tensor and no dict.
    """

    tensors: dict[str, torch.Tensor]
    patches: list[Patch]
    single: bool

    def patch(self, index: int) -> dict[str, torch.Tensor]:
        """Return the outputs of one patch by name: `(C, *given)` in main memory, in a dtype that an array can have."""
        return {name: _storable(tensor[index].detach().cpu()) for name, tensor in self.tensors.items()}

    def given(self, name: str) -> Ints:
        """Return the size of the patches' outputs."""
        return tuple(self.tensors[name].shape[2:])

    def all_given(self) -> dict[str, Ints]:
        """Return the sizes of the patches' outputs by name."""
        return {name: self.given(name) for name in self.tensors}

    def check(self, heads: Mapping[str, tuple[HeadSpec, Mapping[Ints, Ints]]], *, single: bool, blended: bool) -> None:
        """Raise ValueError for a batch that does not fit what came before."""
        if self.single != single:
            was, now = ("a tensor", "a dict") if single else ("a dict", "a tensor")
            raise ValueError(f"batch must be {was}, as it was before, got {now}")
        if self.tensors.keys() != heads.keys():
            raise ValueError(f"batch must have the keys {sorted(heads)}, as before, got {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            self._check_head(tensor, *heads[name], "batch" if single else f"batch[{name!r}]", blended=blended)

    def _check_head(
        self, tensor: torch.Tensor, spec: HeadSpec, known: Mapping[Ints, Ints], label: str, *, blended: bool
    ) -> None:
        given = tuple(tensor.shape[2:])
        if tensor.shape[1] != spec.channels:
            raise ValueError(f"{label} must have {spec.channels} channels, as before, got {tensor.shape[1]}")
        dtype = str(_storable(tensor[:0]).numpy(force=True).dtype)
        if not blended and dtype != spec.dtype:
            raise ValueError(f"{label} must have dtype {spec.dtype}, as before, got {dtype}")
        for size in {size for _, size in self.patches}:
            if known.get(size, given) != given or not all(map(AxisPlacement.fits, spec.axes, size, given)):
                scale = tuple(f"{a.numerator}/{a.denominator}" for a in spec.axes)
                same = all(a.numerator == a.denominator for a in spec.axes)
                before = f", and was {known[size]} before" if size in known else ""
                raise ValueError(
                    f"{label} must have the spatial size of its locations{'' if same else f' times {scale}'}{before}, "
                    f"got {given} for {size}"
                )


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # Zarr has no bfloat16, and float32 holds every value of it.
    return tensor.to(torch.float32) if tensor.dtype == torch.bfloat16 else tensor


def read_batch(batch: Any, locations: Any, shape: Ints, overlap: Ints) -> Batch:
    """Check that a batch fits its locations, and these the volume.

    Raises:
        TypeError: when they are not tensors and locations.
        ValueError: when they do not fit.
    """
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
    patches = [_read_location(location, shape, overlap) for location in locations]
    for name, tensor in tensors.items():
        label = "batch" if single else f"batch[{name!r}]"
        if not isinstance(name, str) or not name or "/" in name or name.startswith(("__", ".")):
            raise ValueError(f"keys of batch must be names of Zarr arrays, got {name!r}")
        if tensor.ndim != len(shape) + 2:
            axes = ", ".join(["B", "C", *(f"axis {a}" for a in range(len(shape)))])
            raise ValueError(f"{label} must be ({axes}) for a volume of shape {shape}, got {tuple(tensor.shape)}")
        if tensor.shape[0] != len(patches):
            raise ValueError(f"{label} must have one entry per location, got {tensor.shape[0]} and {len(patches)}")
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            raise ValueError(f"{label} must be a dense tensor of real numbers, got {tensor.dtype}, {tensor.layout}")
        if patches and not tensor.numel():
            raise ValueError(f"{label} must have at least one channel and one voxel, got {tuple(tensor.shape)}")
    return Batch(dict(tensors), patches, single)


def _read_location(location: Any, shape: Ints, overlap: Ints) -> Patch:
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


def head_specs(first: Batch, shape: Ints, output_shape: Ints | None, trims: Sequence[int | None]) -> list[HeadSpec]:
    """Return the heads that the first batch shows, not cut yet.

    Args:
        first: the batch.
        shape: spatial shape of the volume.
        output_shape: that of the output, if the user gave one.
        trims: voxels that `crop` trims from each side of a patch; None for the blending modes.

    Raises:
        ValueError: when the sizes of the model's outputs do not fit.
    """
    size, specs = first.patches[0][1], []
    for name, tensor in first.tensors.items():
        given = first.given(name)
        outs: Sequence[int | None] = output_shape or ((None,) * len(shape))
        if first.single and output_shape is None:
            outs = shape  # as TorchIO: another scale must be asked for
            if given != size:
                raise ValueError(
                    f"batch must have the spatial size of its locations, got {given} for {size}; "
                    "pass output_shape when the model gives another number of voxels"
                )
        axes = tuple(map(AxisPlacement.fitted, shape, outs, size, given, trims))
        if None in axes:
            label = "batch" if first.single else f"batch[{name!r}]"
            raise ValueError(
                f"output_shape must be to the volume as {label} is to its locations, rounded up or down, got "
                f"{output_shape} for {shape}, and {given} for {size}"
            )
        dtype = "float32" if None in trims else str(_storable(tensor[:0]).numpy(force=True).dtype)
        specs.append(HeadSpec(name, tensor.shape[1], dtype, tuple(a for a in axes if a is not None)))
    return specs
