"""The layout of a run's outputs: heads, their scales, dtypes and chunks, and the grid that fits them all.

What the probe showed meets what the user asked for. Nothing is read but the probe's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from oocpatch.models.postprocessing import POSTPROCESSES, Postprocess, postprocess_of
from oocpatch.models.predictor import Probe
from oocpatch.models.probe import Geometry
from oocpatch.planning.arguments import check_fits, clipped_chunks, of_head, write_unit
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid, Scale
from oocpatch.planning.heads import Head, patch_grid
from oocpatch.volumes.volume import Volume, default_chunks


class Asked(Protocol):
    """What the user asked for, as far as it shapes the outputs; see `request.Request`."""

    @property
    def volume(self) -> Volume: ...

    @property
    def patch_size(self) -> Ints: ...

    @property
    def patch_overlap(self) -> Ints: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def looped(self) -> int: ...

    @property
    def skips(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class OutputHeads:
    """Heads and the grid of their patches.

    Attributes:
        heads: the outputs.
        context: voxels that the model takes beyond its output, on each side.
        snap: patch starts are multiples of it.
        grid: the patches that the model gives, in the volume's frame.
    """

    heads: tuple[Head, ...]
    context: Ints
    snap: Ints
    grid: PatchGrid


def infer_heads(request: Asked, probe: Probe) -> OutputHeads:
    """Decide what becomes of the model's outputs.

    Raises:
        ValueError: when they cannot be what was asked for.
    """
    loops = request.looped
    for name in probe.outputs:
        if name in request.volume.axes.names:
            raise ValueError(f"the model's output {name!r} must not have the name of an axis")
    for name, given in (
        ("overlap_mode", request.options["overlap_mode"]),
        ("postprocess", request.options["postprocess"]),
        ("output_dtype", request.options["output_dtype"]),
    ):
        unknown = sorted(set(given) - set(probe.outputs)) if isinstance(given, Mapping) else []
        if unknown:
            raise ValueError(f"{name} names {unknown}, but the model's outputs are {sorted(probe.outputs)}")
    context, trims = _context(probe.geometry)
    scales = {n: ((1, 1),) * loops + g.scale for n, g in probe.geometry.items()}
    snap = tuple(math.lcm(*(s[a][1] for s in scales.values())) for a in range(len(request.patch_size)))
    if any(n <= 2 * c for n, c in zip(request.patch_size[loops:], context, strict=True)):
        raise ValueError(
            f"patch_size must be more than twice what the model loses at each side ({context}) on every axis, "
            f"got {request.patch_size[loops:]}"
        )
    around = (0,) * loops + context
    padded = request.options["padding_mode"] is not None
    grid = patch_grid(request.volume.shape, request.patch_size, request.patch_overlap, around, snap, padded=padded)
    heads = [
        _head(request, name, output, scales[name], (0,) * loops + trims[name]) for name, output in probe.outputs.items()
    ]
    return OutputHeads(tuple(heads), around, snap, grid)


def _context(geometry: Mapping[str, Geometry]) -> tuple[Ints, dict[str, Ints]]:
    """The common context of all heads, and what is cut from each head's output, in its own voxels."""
    axes = range(len(next(iter(geometry.values())).border))
    context = []
    for a in axes:
        least = max(g.border[a] for g in geometry.values())
        fits = (c for c in range(least, least + 1024) if all(_trim(g, a, c) is not None for g in geometry.values()))
        found = next(fits, None)
        if found is None:
            raise ValueError(f"the model's outputs must fit one grid, got {dict(geometry)}")
        context.append(found)
    trims = {n: tuple(_trim(g, a, context[a]) or 0 for a in axes) for n, g in geometry.items()}
    return tuple(context), trims


def _trim(geometry: Geometry, axis: int, context: int) -> int | None:
    """Voxels to cut from each side of an output so that it fits a context; None: not a whole number."""
    times, per = geometry.scale[axis]
    cut, rest = divmod((context - geometry.border[axis]) * times, per)
    return None if rest else cut


def _head(request: Asked, name: str, output: torch.Tensor, scale: tuple[Scale, ...], trim: Ints) -> Head:
    """What becomes of one output: channels and dtypes after blending and postprocess, and chunks."""
    options, loops = request.options, request.looped
    mode = of_head(options["overlap_mode"], name, "hann")
    postprocess = postprocess_of(request.options, name, mode)
    values = (output if mode == "crop" else output.to(torch.float32))[0]
    if mode == "vote":
        values = _ballot_paper(values, options["num_classes"], name)
    channels = values.shape[0]
    out_channels, out_dtype = channels, str(values.numpy(force=True).dtype)
    if postprocess is not None:
        result = _postprocessed(postprocess, values, loops)
        out_channels, out_dtype = result.shape[0], str(result.numpy(force=True).dtype)
        if postprocess is POSTPROCESSES["argmax"]:
            out_dtype = str(np.min_scalar_type(max(channels - 1, 0)))
    labels = np.dtype(out_dtype).kind in "bui"  # not because `output_dtype` asks for rounding
    axis = request.volume.channel_axis
    if axis is None and out_channels > 1:
        axis = "channel"
    out_dtype = of_head(options["output_dtype"], name, None) or out_dtype
    check_fits("output_fill", options["output_fill"], out_dtype)
    chunks, unit = _chunks(request, np.dtype(out_dtype).itemsize, scale)
    return Head(
        name=name,
        mode=mode,
        scale=scale,
        trim=trim,
        channels=channels,
        dtype=str(torch.empty(0, dtype=values.dtype).numpy().dtype),
        dense=request.skips,
        out_channels=out_channels,
        out_dtype=out_dtype,
        channel_axis=axis,
        chunks=chunks,
        unit=unit,
        labels=labels,
    )


def _ballot_paper(labels: torch.Tensor, classes: int | None, name: str) -> torch.Tensor:
    """One channel per class for labels `(1, *spatial)`.

    Raises:
        ValueError: when they are no labels, or nobody said how many classes there are.
    """
    if classes is None:
        raise ValueError("num_classes must be given where overlap_mode is 'vote': votes are counted class by class")
    if labels.shape[0] != 1:
        raise ValueError(f"overlap_mode 'vote' needs labels in one channel, got {labels.shape[0]} from {name!r}")
    return labels.new_zeros((classes, *labels.shape[1:]), dtype=torch.float32)


def _postprocessed(postprocess: Postprocess, values: torch.Tensor, loops: int) -> torch.Tensor:
    looped = tuple(range(1, 1 + loops))
    scores = values.squeeze(looped) if looped else values
    try:
        result = torch.as_tensor(postprocess(scores))
    except Exception as error:
        raise ValueError(
            f"postprocess failed on scores of shape {tuple(scores.shape)}: {type(error).__name__}: {error}"
        ) from error
    if result.ndim != scores.ndim or result.shape[1:] != scores.shape[1:]:
        raise ValueError(
            f"postprocess must return (C, {', '.join(map(str, scores.shape[1:]))}), got {tuple(result.shape)}"
        )
    return result


def _chunks(request: Asked, itemsize: int, scale: tuple[Scale, ...]) -> tuple[Ints, Ints]:
    """Chunks and write unit of an output, in its own voxels per axis; by default they cover what the volume's do."""
    volume, loops = request.volume, request.looped
    shape = tuple(-(-n * times // per) for n, (times, per) in zip(volume.shape, scale, strict=True))
    default = tuple(
        min(n, times * max(1, round(c / per)))
        for c, n, (times, per) in zip(default_chunks(volume, itemsize), shape, scale, strict=True)
    )
    asked, shards = request.options["output_chunks"], request.options["output_shards"]
    chunks: Ints = asked or default[loops:]
    if asked is None and shards is not None:
        chunks = tuple(c if s % c == 0 else s for c, s in zip(chunks, shards, strict=True))
    unit = write_unit(chunks, shards, shape[loops:])
    if request.options["ome"]:  # time comes before channels there, and each index of it is a write of its own
        default = (*(1,) * loops, *default[loops:])
    return (*default[:loops], *clipped_chunks(chunks, shape[loops:])), (*default[:loops], *unit)
