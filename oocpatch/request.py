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
from oocpatch.inference.finish import POSTPROCESSES
from oocpatch.inference.models import load_model, model_identity
from oocpatch.inference.predictor import Model, Predictor, Probe, resolve_device
from oocpatch.inference.stages import torch_dtype
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Ints
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.memory import Sizes, chunk_bytes
from oocpatch.planning.plan import Head, Plan, differences, human
from oocpatch.planning.planner import choose
from oocpatch.storage.output import OutputRecord, default_chunks
from oocpatch.storage.volume import Volume

HEAD_NAME = "prediction"


@dataclass(frozen=True)
class Request:
    """The checked arguments of `predict`.

    Attributes:
        volume, model: what to read, and what to run.
        output, workspace: directories of the result, and of what is kept until it is done.
        patch_size, patch_overlap: with one entry per looped axis (1 and 0) in front of the spatial ones.
        postprocess: as a function.
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
    postprocess: Callable[..., Any] | None
    max_memory: int
    max_disk: int | None
    block_shape: Ints | None
    parameters: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def looped(self) -> int:
        return len(self.volume.shape) - self.volume.spatial_ndim

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
            asked, there = self._blocks(tuple(record.details["unit"])), record.details["block_shape"]
            if list(asked) != list(there):
                found["block_shape"] = (list(asked), list(there))
        if found:
            told = "; ".join(f"{name}: {old!r} before, {new!r} now" for name, (new, old) in found.items())
            raise RunMismatch(
                f"{self.output} belongs to a run with other parameters ({told}); "
                "repeat its call, choose another output, or start afresh with overwrite=True",
                tuple(found),
            )

    @property
    def grid(self) -> PatchGrid:
        padded = self.options["padding_mode"] is not None
        return PatchGrid.of(self.volume.shape, self.patch_size, self.patch_overlap, padded=padded)

    def _blocks(self, unit: Ints) -> Ints:
        """The block shape asked for, as the planner would round it."""
        assert self.block_shape is not None
        core = (*unit[: self.looped], *self.block_shape)
        crop = self.options["overlap_mode"] == "crop"
        return BlockGrid.of(self.grid, core, unit, 0, crop=crop).core_shape[self.looped :]


def make_request(
    volume: Any,
    model: Model | str,
    output: str | os.PathLike[str],
    *,
    patch_size: int | Sequence[int],
    patch_overlap: int | Sequence[int],
    overlap_mode: str,
    padding_mode: str | None,
    fill: float,
    axes: str | Sequence[str] | None,
    batch_size: int,
    device: str,
    autocast: bool,
    postprocess: str | Callable[..., Any] | None,
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
    mask: None,
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
    door.not_yet("mask", mask)
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
        "overlap_mode": door.overlap_mode(overlap_mode),
        "padding_mode": door.padding_mode(padding_mode),
        "fill": door.number("fill", fill),
        "batch_size": door.positive("batch_size", batch_size),
        "device": found_device,
        "autocast": bool(autocast),
        "output_dtype": door.dtype("output_dtype", output_dtype),
        "output_chunks": spatial("output_chunks", output_chunks),
        "output_shards": spatial("output_shards", output_shards),
        "output_fill": door.number("output_fill", output_fill),
        "allow_nonfinite": bool(allow_nonfinite),
        "workers": None if workers is None else door.positive("workers", workers),
    }
    parameters = {
        "volume": data.identity,
        "axes": list(data.axes.names),
        "model": model_identity(model),
        "patch_size": patch[looped:],
        "patch_overlap": overlap[looped:],
        "overlap_mode": options["overlap_mode"],
        "padding_mode": options["padding_mode"],
        "fill": door.plain(fill),
        "batch_size": options["batch_size"],
        "device": torch.device(found_device).type,
        "autocast": options["autocast"],
        "postprocess": model_identity(postprocess) if callable(postprocess) else postprocess,
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
        postprocess=door.postprocess(postprocess, POSTPROCESSES),
        max_memory=door.memory_limit(max_memory),
        max_disk=None if max_disk is None else door.num_bytes("max_disk", max_disk),
        block_shape=spatial("block_shape", block_shape),
        parameters=parameters,
        options=options,
    )


def _volume(volume: Any, axes: str | Sequence[str] | None) -> Volume:
    return Volume(volume.source if isinstance(volume, Volume) else volume, axes)


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
    head = _head(request, probe)
    chunks, unit = _chunks(request, head)
    sizes = _sizes(request, head, probe, unit)
    core = None if request.block_shape is None else (*unit[: request.looped], *request.block_shape)
    choice = choose(
        request.grid,
        unit,
        sizes,
        crop=options["overlap_mode"] == "crop",
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
        overlap_mode=options["overlap_mode"],
        head=head,
        core=tuple(a.size for a in choice.blocks.axes),
        unit=unit,
        sweep=choice.blocks.sweep,
        chunks=chunks,
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


def _head(request: Request, probe: Probe) -> Head:
    """What becomes of the model's output: channels and dtypes after blending and postprocess."""
    mode, output = request.options["overlap_mode"], probe.output
    values = (output if mode == "crop" else output.to(torch.float32))[0]
    sums = values.dtype
    channels = values.shape[0]
    out_dtype = str(values.numpy(force=True).dtype)
    if request.postprocess is not None:
        result = _postprocessed(request, values)
        out_channels = result.shape[0]
        out_dtype = str(result.numpy(force=True).dtype)
        if request.parameters["postprocess"] == "argmax":
            out_dtype = str(np.min_scalar_type(max(channels - 1, 0)))
    else:
        out_channels = channels
    name = request.volume.channel_axis
    if name is None and out_channels > 1:
        name = "channel"
    return Head(
        name=HEAD_NAME,
        channels=channels,
        dtype=str(torch.empty(0, dtype=sums).numpy().dtype),
        out_channels=out_channels,
        out_dtype=request.options["output_dtype"] or out_dtype,
        channel_axis=name,
        copies_input=probe.copies_input,
    )


def _postprocessed(request: Request, values: torch.Tensor) -> torch.Tensor:
    assert request.postprocess is not None
    looped = tuple(range(1, 1 + request.looped))
    scores = values.squeeze(looped) if looped else values
    try:
        result = torch.as_tensor(request.postprocess(scores))
    except Exception as error:
        raise ValueError(
            f"postprocess failed on scores of shape {tuple(scores.shape)}: {type(error).__name__}: {error}"
        ) from error
    if result.ndim != scores.ndim or result.shape[1:] != scores.shape[1:]:
        raise ValueError(
            f"postprocess must return (C, {', '.join(map(str, scores.shape[1:]))}), got {tuple(result.shape)}"
        )
    return result


def _chunks(request: Request, head: Head) -> tuple[Ints, Ints]:
    """The output's chunks and its write unit, in voxels per axis."""
    volume, looped = request.volume, request.looped
    default = default_chunks(volume, np.dtype(head.out_dtype).itemsize)
    shape, shards = volume.shape[looped:], request.options["output_shards"]
    chunks: Ints = request.options["output_chunks"] or default[looped:]
    if request.options["output_chunks"] is None and shards is not None:
        chunks = tuple(c if s % c == 0 else s for c, s in zip(chunks, shards, strict=True))
    unit = door.write_unit(chunks, shards, shape)
    return (*default[:looped], *door.clipped(chunks, shape)), (*default[:looped], *unit)


def _sizes(request: Request, head: Head, probe: Probe, unit: Ints) -> Sizes:
    volume, batch = request.volume, request.options["batch_size"]
    voxels = math.prod(request.patch_size)
    cast = request.options["overlap_mode"] != "crop" and probe.output.dtype != torch.float32
    inputs = voxels * volume.channels * volume.dtype.itemsize
    outputs = 0 if probe.aliased else voxels * head.channels * probe.output.dtype.itemsize
    outputs += cast * voxels * head.channels * 4
    out_voxel = head.out_channels * np.dtype(head.out_dtype).itemsize
    return Sizes(
        in_voxel=volume.channels * volume.dtype.itemsize,
        sum_voxel=head.channels * np.dtype(head.dtype).itemsize,
        out_voxel=out_voxel,
        channels=max(head.channels, head.out_channels),
        in_chunk=volume.chunks,
        in_chunk_bytes=volume.chunk_bytes,
        out_unit_bytes=math.prod(unit) * out_voxel,
        batch=batch,
        model_bytes=batch * probe.bytes,
        batch_bytes=batch * (inputs + outputs),
    )
