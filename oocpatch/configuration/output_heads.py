"""The outputs of a run: heads, their scales, dtypes and chunks, and the grid that fits them all.

They follow from the outputs of the probe and from the configuration. Nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from oocpatch.configuration.run_config import RunConfig
from oocpatch.models.postprocessing import Postprocess, is_argmax, postprocess_of
from oocpatch.models.predictor import is_vectors
from oocpatch.models.probe import Geometry, Probe
from oocpatch.outputs.ome_labels import parent_image
from oocpatch.outputs.ome_zarr import image_groups
from oocpatch.outputs.record import METADATA
from oocpatch.outputs.row_arrays import LOOPS, STARTS
from oocpatch.planning.arguments import check_fits, clipped_chunks, of_head, write_unit
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import GridAxis, PatchGrid, Scale
from oocpatch.planning.heads import Head, VectorHead, distinct_channel_axes, patch_grid
from oocpatch.planning.shards import shards_of_input, shards_of_many_chunks
from oocpatch.volumes.volume import default_chunks

EXAMINED = 16
"""Voxels along each axis of the scores that a postprocess is tried with."""

IDS = "uint32"
"""Dtype of ids of objects, unless another one is asked for."""


@dataclass(frozen=True, slots=True)
class OutputHeads:
    """Heads and the grid of their patches.

    Attributes:
        heads: the outputs.
        context: voxels that the model takes beyond its output, on each side.
        snap: patch starts are multiples of it.
        grid: the patches that the model gives, in the volume's frame.
        vectors: the outputs that are a vector per patch.
    """

    heads: tuple[Head, ...]
    context: Ints
    snap: Ints
    grid: PatchGrid
    vectors: tuple[VectorHead, ...] = ()


def infer_heads(config: RunConfig, probe: Probe) -> OutputHeads:
    """Return the heads that the model's outputs become.

    Raises:
        ValueError: when the outputs do not fit the configuration.
    """
    loops = config.looped
    for name in probe.outputs:
        if name in config.volume.axes.names:
            raise ValueError(f"the model's output {name!r} must not have the name of an axis")
        if name == METADATA:
            raise ValueError(f"the model's output must not be named {name!r}, which is a file of Zarr; rename it")
        if name in config.volume.source.coords:
            raise ValueError(
                f"the model's output {name!r} must not have the name of a coordinate of the volume, since one of them "
                f"would be lost; pass volume.drop_vars({name!r}), or rename either"
            )
    for name, value in (
        ("overlap_mode", config.patches.overlap_mode),
        ("postprocess", config.model.postprocess),
        ("output_dtype", config.outputs.output_dtype),
    ):
        unknown = sorted(set(value) - set(probe.outputs)) if isinstance(value, Mapping) else []
        if unknown:
            raise ValueError(f"{name} names {unknown}, but the model's outputs are {sorted(probe.outputs)}")
    dense = {name: output for name, output in probe.outputs.items() if not is_vectors(output)}
    vectors = tuple(_vector_head(config, name, o) for name, o in probe.outputs.items() if is_vectors(o))
    if vectors and not dense and config.model.postprocess is not None:
        raise ValueError(
            f"postprocess must be None for a model that returns vectors of patches only, got "
            f"{config.model.postprocess!r}; let the model do it"
        )
    geometry = _answers_per_stride(config, dense, probe.geometry)
    context, trims = _context(geometry) if geometry else ((0,) * config.volume.spatial_ndim, {})
    scales = {n: ((1, 1),) * loops + g.scale for n, g in geometry.items()}
    snap = tuple(math.lcm(*(s[a][1] for s in scales.values())) for a in range(len(config.patch_size)))
    if any(n <= 2 * c for n, c in zip(config.patch_size[loops:], context, strict=True)):
        raise ValueError(
            f"patch_size must be more than twice what the model loses at each side ({context}) on every axis, "
            f"got {config.patch_size[loops:]}"
        )
    around = (0,) * loops + context
    sizes = (config.patch_size, config.patch_overlap, around, snap)
    is_padded, is_even = config.patches.is_padded, config.patches.is_even
    grid = patch_grid(config.volume.shape, *sizes, padded=is_padded, even=is_even, extent=config.extent)
    if config.finds_objects:
        _check_overlap(grid.axes[loops:], config.volume.names[loops:])
    heads = [_head(config, name, output, scales[name], (0,) * loops + trims[name]) for name, output in dense.items()]
    return OutputHeads(_with_channel_axes(config, heads), around, snap, grid, vectors)


def _vector_head(config: RunConfig, name: str, output: torch.Tensor) -> VectorHead:
    """Return the head of an output that is a vector per patch, `(1, D)`.

    Raises:
        ValueError: for a name that another array has, and options that vectors do not have.
    """
    if name in {STARTS, LOOPS}:
        raise ValueError(f"the model's output {name!r} must have another name where an output is a vector per patch")
    if config.finds_objects:
        raise ValueError(f"overlap_mode must not be 'instances' where an output is a vector per patch, as {name!r} is")
    for option, value in (("postprocess", config.model.postprocess), ("overlap_mode", config.patches.overlap_mode)):
        if isinstance(value, Mapping) and name in value:
            raise ValueError(f"{option} must not name {name!r}, which is a vector per patch")
    dtype = str(output.numpy(force=True).dtype)
    asked = of_head(config.outputs.output_dtype, name, None)
    if asked is not None and not (np.dtype(asked).kind == np.dtype(dtype).kind == "f"):
        if isinstance(config.outputs.output_dtype, Mapping):
            raise ValueError(f"output_dtype must be of floats for the vectors {name!r} of {dtype}, got {asked}")
        asked = None  # it is that of the other outputs
    return VectorHead(name, output.shape[1], str(np.dtype(asked or dtype)))


def _answers_per_stride(
    config: RunConfig, outputs: Mapping[str, torch.Tensor], geometry: Mapping[str, Geometry]
) -> Mapping[str, Geometry]:
    """Return the geometry of outputs, where one answer per patch is a voxel per stride, in the middle of its patch.

    Raises:
        ValueError: where patches overlap by an odd number, or other outputs have more voxels.
    """
    overlap, names = config.patch_overlap[config.looped :], [n for n, o in outputs.items() if _is_answer(config, o)]
    if not any(overlap) or not names:
        return geometry
    if len(names) < len(outputs) or any(o % 2 for o in overlap) or config.patches.is_even:
        raise ValueError(
            "patch_overlap must be 0, or even where all outputs are one answer per patch, a voxel of the output, and "
            f"patch_starts is 'regular', got {overlap} for {', '.join(map(repr, names))}; or let the model expand its "
            "answer to the patch"
        )
    sizes = zip(config.patch_size[config.looped :], overlap, strict=True)
    of_all = Geometry(tuple((1, size - o) for size, o in sizes), tuple(o // 2 for o in overlap))
    return dict.fromkeys(geometry, of_all)


def _with_channel_axes(config: RunConfig, heads: list[Head]) -> tuple[Head, ...]:
    """Return the heads with channel axes that readers can open together.

    In an OME-Zarr, labels of one channel beside an image have none: viewers split images by channels, and labels with
    one more axis than the parts of their image would not follow sliders.
    """
    if not config.outputs.ome:
        is_dataset = len({head.scale for head in heads}) == 1
        axes = distinct_channel_axes(heads, config.volume.channels) if is_dataset else [h.channel_axis for h in heads]
        return tuple(replace(head, channel_axis=axis) for head, axis in zip(heads, axes, strict=True))
    groups = image_groups(tuple(heads))
    beside = {name for name, group in groups.items() if group.startswith("labels/")}
    if len(heads) == 1 and heads[0].labels and parent_image(config.output) is not None:
        beside.add(heads[0].name)
    return tuple(replace(h, channel_axis=None) if h.name in beside and h.out_channels == 1 else h for h in heads)


def _is_answer(config: RunConfig, output: torch.Tensor) -> bool:
    """Return whether an output is one answer per patch, `(1, C, 1, 1)`, of patches that are larger."""
    return math.prod(output.shape[2:]) == 1 < math.prod(config.patch_size)


def _context(geometry: Mapping[str, Geometry]) -> tuple[Ints, dict[str, Ints]]:
    """Return the common context of all heads, and the voxels to trim from each head's output."""
    axes = range(len(next(iter(geometry.values())).border))
    context = []
    for a in axes:
        least = max(g.border[a] for g in geometry.values())
        fits = (c for c in range(least, least + 1024) if all(_trim(g, a, c) is not None for g in geometry.values()))
        smallest = next(fits, None)
        if smallest is None:
            raise ValueError(f"the model's outputs must fit one grid, got {dict(geometry)}")
        context.append(smallest)
    trims = {n: tuple(_trim(g, a, context[a]) or 0 for a in axes) for n, g in geometry.items()}
    return tuple(context), trims


def _trim(geometry: Geometry, axis: int, context: int) -> int | None:
    """Return the voxels to trim from each side of an output to fit a context; None where they are not whole."""
    times, per = geometry.scale[axis]
    cut, rest = divmod((context - geometry.border[axis]) * times, per)
    return None if rest else cut


def _head(config: RunConfig, name: str, output: torch.Tensor, scale: tuple[Scale, ...], trim: Ints) -> Head:
    """Return the head of one output: channels and dtypes after blending and postprocess, and chunks."""
    loops = config.looped
    mode = of_head(config.patches.overlap_mode, name, "hann")
    postprocess = postprocess_of(config.model.postprocess, name, mode)
    values = output[0] if mode in {"crop", "instances"} else _zeros(output[0], torch.float32)
    if mode == "vote":
        values = _one_channel_per_class(values, config.patches.num_classes, name)
    is_objects = mode == "instances"
    if is_objects:
        _check_labels(values, of_head(config.outputs.output_dtype, name, None), name)
    channels = values.shape[0]
    out_channels, out_dtype = channels, str(values.numpy(force=True).dtype)
    if postprocess is not None:
        result = _postprocessed(postprocess, values, loops)
        if values.device.type != "cpu":  # normalize tasks have sums in main memory
            _postprocessed(postprocess, values.cpu(), loops)
        out_channels, out_dtype = result.shape[0], str(result.numpy(force=True).dtype)
        if is_argmax(postprocess, channels):
            out_dtype = str(np.min_scalar_type(max(channels - 1, 0)))
    out_dtype = IDS if is_objects else out_dtype
    labels = np.dtype(out_dtype).kind in "bui"  # not because `output_dtype` asks for rounding
    axis = (config.target or config.volume).channel_axis
    if axis is None and out_channels > 1:
        axis = "channel"
    if out_channels == 1 and _is_answer(config, output):
        axis = None  # a map of one answer per patch has the spatial axes only
    out_dtype = of_head(config.outputs.output_dtype, name, None) or out_dtype
    check_fits("output_fill", config.outputs.output_fill, out_dtype)
    position = loops if config.outputs.ome else config.volume.channel_position
    chunks, unit = _chunks(config, np.dtype(out_dtype).itemsize, scale, by_index=axis is not None and position > 0)
    return Head(
        name=name,
        mode=mode,
        scale=scale,
        trim=trim,
        channels=channels,
        dtype=str(torch.empty(0, dtype=values.dtype, device="cpu").numpy().dtype),
        dense=(config.skips or mode == "monai") and not is_objects,
        out_channels=out_channels,
        out_dtype=out_dtype,
        channel_axis=axis,
        chunks=chunks,
        unit=unit,
        labels=labels,
        channel_position=position,
        match=config.patches.match if is_objects else None,
    )


def _zeros(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros of the shape of others, which take no memory."""
    return torch.zeros((), dtype=dtype, device=like.device).expand(like.shape)


def _check_labels(values: torch.Tensor, dtype: str | None, name: str) -> None:
    """Check that an output of the model, `(C, *spatial)`, is labels of objects, and the dtype of the output.

    Raises:
        ValueError: naming the rule.
    """
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"overlap_mode 'instances' needs integer labels of objects, got {kind} from {name!r}")
    if len(values) != 1:
        raise ValueError(f"overlap_mode 'instances' needs labels in one channel, got {len(values)} from {name!r}")
    if dtype is not None and np.dtype(dtype).kind not in "iu":
        raise ValueError(f"output_dtype must be of integers for overlap_mode 'instances', got {dtype} for {name!r}")


def _check_overlap(axes: Sequence[GridAxis], names: Sequence[str]) -> None:
    """Refuse patches of objects that do not overlap; a patch of one voxel, as of a 2-D model, has an axis to itself.

    Raises:
        ValueError: naming the axes.
    """
    without = [n for a, n in zip(axes, names, strict=True) if a.count > 1 and a.patch > 1 and a.overlap == 0]
    if without or all(a.overlap == 0 for a in axes):
        raise ValueError(
            "patch_overlap must not be 0 for overlap_mode 'instances': objects are matched where the patches of the "
            f"output overlap, and along {', '.join(without or names)} these do not"
        )


def _one_channel_per_class(labels: torch.Tensor, classes: int | None, name: str) -> torch.Tensor:
    """Return zeros with one channel per class for labels `(1, *spatial)`.

    Raises:
        ValueError: when the output holds no labels, or `num_classes` is missing.
    """
    if classes is None:
        raise ValueError("num_classes must be given where overlap_mode is 'vote': votes are counted class by class")
    if labels.shape[0] != 1:
        raise ValueError(f"overlap_mode 'vote' needs labels in one channel, got {labels.shape[0]} from {name!r}")
    return _zeros(labels.expand(classes, *labels.shape[1:]), torch.float32)


def _postprocessed(postprocess: Postprocess, values: torch.Tensor, loops: int) -> torch.Tensor:
    looped = tuple(range(1, 1 + loops))
    scores = values.squeeze(looped) if looped else values
    some = (len(scores), *(min(n, EXAMINED) for n in scores.shape[1:]))  # it works voxel by voxel
    scores = torch.zeros(some, dtype=scores.dtype, device=scores.device)
    try:
        result = torch.as_tensor(postprocess(scores), device=scores.device)
    except Exception as error:
        raise ValueError(
            f"postprocess failed on scores of shape {tuple(scores.shape)}: {type(error).__name__}: {error}"
        ) from error
    if result.ndim != scores.ndim or result.shape[1:] != scores.shape[1:]:
        raise ValueError(
            f"postprocess must return (C, {', '.join(map(str, scores.shape[1:]))}), got {tuple(result.shape)}"
        )
    return result


def _chunks(config: RunConfig, itemsize: int, scale: tuple[Scale, ...], *, by_index: bool) -> tuple[Ints, Ints]:
    """Return chunks and write unit of an output in its own voxels; by default they cover the volume's chunks.

    With `by_index` looped axes come before the channels, and each index of them is a write of its own.
    """
    volume, loops = config.volume, config.looped
    shape = tuple(-(-n * times // per) for n, (times, per) in zip(volume.shape, scale, strict=True))
    small = volume.shards is not None and config.outputs.output_shards is None
    default = tuple(
        min(n, times * max(1, round(c / per)))
        for c, n, (times, per) in zip(default_chunks(volume, itemsize, small=small), shape, scale, strict=True)
    )
    asked, shards = config.outputs.output_chunks, config.outputs.output_shards or None
    chunks: Ints = asked or default[loops:]
    if asked is None and shards is not None:
        chunks = tuple(c if s % c == 0 else s for c, s in zip(chunks, shards, strict=True))
    unit = write_unit(chunks, shards, shape[loops:])
    if by_index:
        default = (*(1,) * loops, *default[loops:])
    return (*default[:loops], *clipped_chunks(chunks, shape[loops:])), (*default[:loops], *unit)


def default_shards(config: RunConfig, heads: Sequence[Head], shapes: Sequence[Ints]) -> list[Ints | None]:
    """Return the shards that each head should have where none are asked for: the input's, or those of many chunks."""
    volume, loops, limit = config.volume, config.looped, config.limits.max_memory
    if config.outputs.output_shards is not None:
        return [None] * len(heads)
    shards: list[Ints | None] = []
    for head, shape in zip(heads, shapes, strict=True):
        if volume.shards is None:
            shard = shards_of_many_chunks(head, shape, np.dtype(head.out_dtype).itemsize, limit)
        else:
            shard = shards_of_input(head, volume.shards)
        if shard is not None and head.channel_axis is not None and head.channel_position > 0:
            shard = (*head.unit[:loops], *shard[loops:])  # each index of looped axes is a write of its own
        shards.append(shard)
    return shards
