"""A request: the checked arguments of one call, and the plan made of them.

Reads metadata only, and calls the model once with one patch of zeros. Nothing is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oocpatch import door
from oocpatch.errors import PlanTooLarge, RunMismatch
from oocpatch.inference.buffers import torch_dtype
from oocpatch.inference.finish import POSTPROCESSES
from oocpatch.inference.models import load_model, model_identity
from oocpatch.inference.predictor import Model, Predictor, Probe, resolve_device
from oocpatch.inference.selection import Mask
from oocpatch.layout import Layout, lay_out
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.head import common_unit, patch_grid
from oocpatch.planning.memory import HeadSizes, Sizes, chunk_bytes
from oocpatch.planning.plan import Plan, differences, human
from oocpatch.planning.planner import choose
from oocpatch.storage.output import OutputRecord
from oocpatch.storage.volume import Volume


@dataclass(frozen=True)
class Request:
    """The checked arguments of `predict`.

    Attributes:
        volume, model: what to read, and what to run.
        output, workspace: directories of the result, and of what is kept until it is done.
        patch_size, patch_overlap: with one entry per looped axis (1 and 0) in front of the spatial ones.
        mask: which patches to compute; None: all.
        max_memory, max_disk: in bytes.
        block_shape: as asked for, spatial.
        parameters: the fingerprint.
        options: all other arguments by name.
    """

    volume: Volume
    model: Model
    output: Path
    workspace: Path
    patch_size: Ints
    patch_overlap: Ints
    mask: Mask | None
    max_memory: int
    max_disk: int | None
    block_shape: Ints | None
    parameters: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def looped(self) -> int:
        return len(self.volume.shape) - self.volume.spatial_ndim

    @property
    def skips(self) -> bool:
        """Whether patches may be skipped."""
        return self.mask is not None or self.options["skip_value"] is not None

    def predictor(self, *, copies_input: bool = True, torch_threads: int | None = None) -> Predictor:
        """The model, as a function of batches."""
        return Predictor(
            self.model,
            device=self.options["device"],
            autocast=self.options["autocast"],
            looped=self.looped,
            copies_input=copies_input,
            torch_threads=torch_threads,
        )

    def refuse_other_run(self, record: OutputRecord) -> None:
        """Refuse to go on with a run that was started with other arguments.

        Raises:
            RunMismatch: naming each parameter that differs.
        """
        found = differences(self.parameters, record.parameters)
        if not found and self.block_shape is not None:
            asked, there = self._blocks(record.details), record.details["block_shape"]
            if list(asked) != list(there):
                found["block_shape"] = (list(asked), list(there))
        if found:
            told = "; ".join(f"{name}: {old!r} before, {new!r} now" for name, (new, old) in found.items())
            raise RunMismatch(
                f"{self.output} belongs to a run with other parameters ({told}); "
                "repeat its call, choose another output, or start afresh with overwrite=True",
                tuple(found),
            )

    def _blocks(self, stored: Mapping[str, Any]) -> Ints:
        """The block shape asked for, as the planner rounded it."""
        assert self.block_shape is not None
        unit = tuple(stored["unit"])
        core = (*unit[: self.looped], *self.block_shape)
        geometry = (tuple(stored["context"]), tuple(stored["snap"]))
        padded = self.options["padding_mode"] is not None
        grid = patch_grid(self.volume.shape, self.patch_size, self.patch_overlap, *geometry, padded=padded)
        return BlockGrid.of(grid, core, unit, 0, crop=False).core_shape[self.looped :]


def make_request(
    volume: Any,
    model: Model | str,
    output: str | os.PathLike[str],
    *,
    patch_size: int | Sequence[int],
    patch_overlap: int | Sequence[int],
    overlap_mode: str | Mapping[str, str],
    num_classes: int | None,
    padding_mode: str | None,
    fill: float,
    axes: str | Sequence[str] | None,
    batch_size: int,
    device: str,
    autocast: bool,
    postprocess: str | Callable[..., Any] | Mapping[str, Any] | None,
    output_dtype: Any,
    output_chunks: int | Sequence[int] | None,
    output_shards: int | Sequence[int] | None,
    output_fill: float,
    allow_nonfinite: bool,
    max_memory: int | float | str,
    max_disk: int | float | str | None,
    block_shape: int | Sequence[int] | None,
    workspace: str | os.PathLike[str] | None,
    workers: int | None,
    mask: Any,
    skip_empty: bool,
    client: None,
    output_format: str,
) -> Request:
    """Check the arguments of `predict`.

    Raises:
        ValueError, TypeError: for the first one that will not do.
    """
    target = door.local_path("output", output)
    place = door.local_path("workspace", workspace) if workspace is not None else beside(target, "")
    data = volume if isinstance(volume, Volume) and axes is None else _volume(volume, axes)
    for name, path in (("output", target), ("workspace", place)):
        door.apart(name, path, data)
        door.writable(name, path)
    door.not_yet("client", client)
    door.one_of("output_format", output_format, ("auto", "zarr"))
    if isinstance(model, str):
        model = load_model(model)
    if not callable(model):
        raise TypeError(f"model must be a torch.nn.Module, a callable or a model spec, got {type(model).__name__}")
    looped = len(data.shape) - data.spatial_ndim
    patch = (1,) * looped + door.sizes("patch_size", patch_size, data, least=1)
    overlap = (0,) * looped + door.sizes("patch_overlap", patch_overlap, data)
    PatchGrid.of(data.shape, patch, overlap)
    found_device = resolve_device(device)

    def spatial(name: str, value: int | Sequence[int] | None) -> Ints | None:
        return None if value is None else door.sizes(name, value, data, least=1)

    options = {
        "overlap_mode": door.per_head(overlap_mode, door.overlap_mode),
        "num_classes": None if num_classes is None else door.positive("num_classes", num_classes),
        "postprocess": door.per_head(postprocess, lambda value: door.postprocess(value, POSTPROCESSES)),
        "padding_mode": door.padding_mode(padding_mode),
        "fill": door.number("fill", fill),
        "batch_size": door.positive("batch_size", batch_size),
        "device": found_device,
        "autocast": bool(autocast),
        "output_dtype": door.per_head(output_dtype, lambda value: door.dtype("output_dtype", value)),
        "output_chunks": spatial("output_chunks", output_chunks),
        "output_shards": spatial("output_shards", output_shards),
        "output_fill": door.number("output_fill", output_fill),
        "allow_nonfinite": bool(allow_nonfinite),
        "skip_value": empty_value(data) if skip_empty else None,
        "workers": None if workers is None else door.positive("workers", workers),
    }
    found_mask = None if mask is None else _mask(mask, data)
    parameters = {
        "volume": data.identity,
        "axes": list(data.axes.names),
        "model": model_identity(model),
        "patch_size": patch[looped:],
        "patch_overlap": overlap[looped:],
        "overlap_mode": options["overlap_mode"],
        "num_classes": options["num_classes"],
        "padding_mode": options["padding_mode"],
        "fill": door.plain(fill),
        "mask": None if found_mask is None else found_mask.volume.identity,
        "skip_empty": bool(skip_empty),
        "batch_size": options["batch_size"],
        "device": torch.device(found_device).type,
        "autocast": options["autocast"],
        "postprocess": door.per_head(postprocess, lambda value: model_identity(value) if callable(value) else value),
        "output_dtype": options["output_dtype"],
        "output_chunks": options["output_chunks"],
        "output_shards": options["output_shards"],
        "output_fill": door.plain(output_fill),
        "allow_nonfinite": options["allow_nonfinite"],
        "torch": torch.__version__.split("+")[0],
    }
    return Request(
        volume=data,
        model=model,
        output=target,
        workspace=place,
        patch_size=patch,
        patch_overlap=overlap,
        mask=found_mask,
        max_memory=door.memory_limit(max_memory),
        max_disk=None if max_disk is None else door.num_bytes("max_disk", max_disk),
        block_shape=spatial("block_shape", block_shape),
        parameters=parameters,
        options=options,
    )


def _volume(volume: Any, axes: str | Sequence[str] | None) -> Volume:
    return Volume(volume.source if isinstance(volume, Volume) else volume, axes)


def _mask(mask: Any, volume: Volume) -> Mask:
    """A checked mask.

    Raises:
        ValueError: when it cannot lie over the volume.
    """
    given = mask if isinstance(mask, Volume) else Volume(mask)
    for names in (volume.names, volume.names[-volume.spatial_ndim :]):
        if len(given.source.shape) == len(names):
            found = Volume(given.source, names)
            if any(m > n for m, n in zip(found.shape[::-1], volume.shape[::-1], strict=False)):
                raise ValueError(
                    f"mask must not have more voxels than the volume on any axis, got {found.shape} for {volume.shape}"
                )
            return Mask(found, volume.shape)
    spatial = ", ".join(volume.names[-volume.spatial_ndim :])
    raise ValueError(
        f"mask must have the volume's spatial axes ({spatial}), at any resolution, got shape {given.source.shape}"
    )


def empty_value(volume: Volume) -> float:
    """What voxels hold that were never written."""
    array = volume.source.array
    value = None if array is None else array.fill_value
    return 0.0 if value is None else float(value)


def beside(output: Path, suffix: str) -> Path:
    """What a run keeps beside its output: the workspace, and with a suffix the lock."""
    return output.with_name(f"{output.name}.oocpatch{suffix}")


def make_plan(request: Request) -> Plan:
    """Decide everything about a run.

    Raises:
        ValueError: when the model does not take the patches, or does not return what it should.
        PlanTooLarge: when the run would need more memory or disk than allowed.
    """
    volume, options = request.volume, request.options
    patch_bytes = volume.channels * math.prod(request.patch_size) * volume.dtype.itemsize
    if patch_bytes > request.max_memory:
        raise PlanTooLarge(
            f"one patch of {request.patch_size[request.looped :]} needs {human(patch_bytes)} but max_memory is "
            f"{human(request.max_memory)}; lower patch_size or raise max_memory"
        )
    if chunk_bytes(1, volume.chunk_bytes) > request.max_memory:
        raise PlanTooLarge(
            f"reading one chunk of the volume ({volume.chunks} voxels, {human(volume.chunk_bytes)}) needs "
            f"{human(chunk_bytes(1, volume.chunk_bytes))} but max_memory is {human(request.max_memory)}; "
            "raise max_memory, or store the volume in smaller chunks"
        )
    threads = torch.get_num_threads()
    predictor = request.predictor(torch_threads=threads)
    with predictor.ready():
        probe = predictor.probe(volume.channels, request.patch_size, torch_dtype(str(volume.dtype)))
    layout = lay_out(request, probe)
    sizes = _sizes(request, layout, probe)
    core = None
    if request.block_shape is not None:
        core = (*common_unit(layout.heads)[: request.looped], *request.block_shape)
    choice = choose(
        layout.grid,
        sizes,
        max_memory=request.max_memory,
        max_disk=request.max_disk,
        block_shape=core,
        workers=options["workers"],
    )
    return Plan(
        parameters=request.parameters,
        axes=volume.names,
        spatial=volume.spatial_ndim,
        shape=volume.shape,
        in_channels=volume.channels,
        in_dtype=str(volume.dtype),
        in_chunks=volume.chunks,
        patch_size=request.patch_size,
        patch_overlap=request.patch_overlap,
        padding_mode=options["padding_mode"],
        fill=options["fill"],
        context=layout.context,
        snap=layout.snap,
        heads=layout.heads,
        copies_input=probe.copies_input,
        skips=request.skips,
        core=tuple(a.size for a in choice.blocks.axes),
        sweep=choice.blocks.sweep,
        way=choice.way,
        concurrency=choice.concurrency,
        batch_size=options["batch_size"],
        torch_threads=threads,
        projected_memory=choice.projection.memory(choice.concurrency),
        projected_disk=choice.projection.disk,
        bytes_read=choice.projection.bytes_read,
        bytes_written=choice.projection.bytes_written,
        task_memory=choice.projection.task_memory,
        memory_parts=choice.projection.parts,
    )


def resumed(plan: Plan, request: Request) -> Plan:
    """A stored plan, at the concurrency that this call allows.

    Raises:
        PlanTooLarge: when even one task at a time needs more memory than this call allows.
    """
    shared = plan.projected_memory - plan.concurrency * plan.task_memory
    workers = request.options["workers"] or plan.concurrency
    while workers > 1 and shared + workers * plan.task_memory > request.max_memory:
        workers -= 1
    needed = shared + workers * plan.task_memory
    if needed > request.max_memory:
        raise PlanTooLarge(
            f"the run to be resumed was planned with blocks that need {human(needed)} but max_memory is "
            f"{human(request.max_memory)}; raise max_memory, or start afresh with overwrite=True"
        )
    return plan.at(workers, needed)


def _sizes(request: Request, layout: Layout, probe: Probe) -> Sizes:
    """What a voxel, a chunk and a batch weigh."""
    volume, batch = request.volume, request.options["batch_size"]
    patch_bytes = math.prod(request.patch_size) * volume.channels * volume.dtype.itemsize
    heads, windows = [], 0
    for head in layout.heads:
        output = probe.outputs[head.name]
        voxels = math.prod(output.shape[2:])
        patch_bytes += 0 if head.name in probe.aliased else voxels * output.shape[1] * output.dtype.itemsize
        if head.votes or (not head.crop and output.dtype != torch.float32):  # a copy as float32, one channel per class
            patch_bytes += voxels * head.channels * 4
        windows += 4 * voxels if head.blended else 0
        heads.append(
            HeadSizes(
                scale=head.scale,
                unit=head.unit,
                crop=head.crop,
                sum_voxel=head.stored * np.dtype(head.dtype).itemsize,
                out_voxel=head.out_channels * np.dtype(head.out_dtype).itemsize,
                channels=max(head.stored, head.out_channels),
            )
        )
    return Sizes(
        in_voxel=volume.channels * volume.dtype.itemsize,
        in_chunk=volume.chunks,
        in_chunk_bytes=volume.chunk_bytes,
        context=layout.context,
        heads=tuple(heads),
        mask_voxel=0.0 if request.mask is None else request.mask.voxel_bytes,
        window_bytes=windows,
        batch=batch,
        model_bytes=batch * probe.bytes,
        batch_bytes=batch * patch_bytes,
    )
