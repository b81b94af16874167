"""Deciding: the plan made of a request, with sizes chosen where it left them open.

Reads metadata only, and calls the model with patches of zeros: once, or a few times where patch sizes are to be chosen.
Nothing is written.
"""

from __future__ import annotations

import contextlib
import math

import torch

from oocpatch.configuration.output_heads import OutputHeads, infer_heads
from oocpatch.configuration.run_config import AUTO, Request, is_auto
from oocpatch.engine.buffers import torch_dtype
from oocpatch.engine.device_transfer import is_staged
from oocpatch.errors import CorruptData, PlanTooLarge
from oocpatch.models.compilation import compiled_bytes
from oocpatch.models.input_spec import input_spec_of
from oocpatch.models.predictor import Probe
from oocpatch.models.preprocessing import NamedPreprocess, preprocess_name
from oocpatch.models.wrappers import ensemble
from oocpatch.outputs.integrity import is_metadata_damaged
from oocpatch.outputs.pyramid import with_pyramids
from oocpatch.outputs.record import ATTRIBUTE, OutputRecord
from oocpatch.planning.heads import common_unit
from oocpatch.planning.memory import ByteSizes, chunk_bytes
from oocpatch.planning.plan import Plan, differences, human
from oocpatch.planning.planner import MODEL_SHARE, MULTIPLE, batch_size, choose, patch_sizes


def make_plan(request: Request) -> Plan:
    """Decide everything about a run.

    Raises:
        ValueError: when the model does not take the patches, or does not return what it should.
        PlanTooLarge: when the run would need more memory or disk than allowed.
    """
    if request.patch_size:
        return _planned(request)
    failures: list[ValueError] = []
    for candidate in _candidates(request):
        try:
            candidate.refuse_patches()
            return _planned(candidate)
        except ValueError as error:
            failures.append(error)
    too_large = [error for error in failures if isinstance(error, PlanTooLarge)]
    raise (too_large or failures[::-1])[-1]


def _candidates(request: Request) -> list[Request]:
    """Requests with patch sizes that the model may take and the memory may hold, the largest first."""
    volume, loops = request.volume, request.looped
    fixed = input_spec_of(ensemble(request.models)).sides
    sizes = patch_sizes(volume.shape[loops:], volume.chunks[loops:], fixed)
    overlap = request.patch_overlap[loops:]
    found = [request.settled(size, AUTO) for size in sizes if all(o < n for o, n in zip(overlap, size, strict=True))]
    if not found:
        raise ValueError(f"patch_overlap must be smaller than the patches that patch_size='auto' tries, got {overlap}")
    # Learned from a small patch: trying a large one could take the very memory that is to be saved.
    small = [c for c in reversed(found) if min(c.patch_size[loops:]) >= MULTIPLE] or found[::-1]
    for candidate in small:
        with contextlib.suppress(ValueError):
            needed = _probed(candidate, torch.get_num_threads()).bytes / math.prod(candidate.patch_size)
            fitting = [c for c in found if math.prod(c.patch_size) * needed <= request.max_memory / MODEL_SHARE]
            return fitting or found[-1:]
    return found


def _probed(request: Request, threads: int) -> Probe:
    volume = request.volume
    predictor = request.predictor(torch_threads=threads)
    with predictor.ready():
        return predictor.probe(volume.channels, request.patch_size, torch_dtype(str(volume.dtype)))


def _planned(request: Request) -> Plan:
    """Decide everything about a run whose patches have a size."""
    volume = request.volume
    patch_bytes = volume.channels * math.prod(request.patch_size) * volume.dtype.itemsize
    if patch_bytes > request.max_memory:
        raise PlanTooLarge(
            f"one patch of {request.patch_size[request.looped :]} alone needs {human(patch_bytes, up=True)} but "
            f"max_memory is {human(request.max_memory)}; lower patch_size or raise max_memory"
        )
    if chunk_bytes(1, volume.chunk_bytes) > request.max_memory:
        raise PlanTooLarge(
            f"reading one chunk of the volume ({volume.chunks} voxels, {human(volume.chunk_bytes)}) needs "
            f"{human(chunk_bytes(1, volume.chunk_bytes), up=True)} but max_memory is {human(request.max_memory)}; "
            "raise max_memory, or store the volume in smaller chunks"
        )
    threads = torch.get_num_threads()
    probe = _probed(request, threads)
    layout = infer_heads(request, probe)
    if is_auto(request.options["batch_size"]):
        accepts = input_spec_of(ensemble(request.models))
        batch = batch_size(
            math.prod(request.patch_size),
            -(-probe.bytes // probe.least_batch) + patch_bytes,
            request.max_memory,
            patches=layout.grid.num_patches,
            least=accepts.least_batch,
            most=accepts.most_batch,
        )
        request = request.settled((), batch)
    options = request.options
    sizes = _weigh(request, layout, probe)
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
    made = Plan(
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
        # what is compiled is compiled for one layout, and a view of the ring has another in each block
        copies_input=probe.copies_input or options["compile"] is not None,
        may_skip=request.skips,
        core=tuple(a.size for a in choice.blocks.axes),
        sweep=choice.blocks.sweep,
        io_strategy=choice.io_strategy,
        concurrency=choice.concurrency,
        batch_size=options["batch_size"],
        torch_threads=threads,
        projected_memory=choice.projection.memory(choice.concurrency),
        projected_disk=choice.projection.disk,
        bytes_read=choice.projection.bytes_read,
        bytes_written=choice.projection.bytes_written,
        task_memory=choice.projection.task_memory,
        memory_parts=choice.projection.parts,
        model_note=_note(request),
    )
    return with_pyramids(made, request.max_memory)


def _note(request: Request) -> str:
    """What is around the model, in words; nothing for a model alone."""
    accepts, preprocess = input_spec_of(ensemble(request.models)), request.options["preprocess"]
    told = []
    if len(request.models) > 1:
        told.append(f"mean of {len(request.models)} models")
    if len(request.turns) > 1:
        told.append(f"mean of {len(request.turns)} turns")
    if preprocess is not None:
        named = isinstance(preprocess, NamedPreprocess)
        told.append(f"preprocess {preprocess_name(preprocess)}" if named else "preprocess by a function")
    if request.options["channels_last"]:
        told.append("channels last")
    if request.options["compile"]:
        told.append(f"compiled ({request.options['compile']})")
    if accepts.least_batch == accepts.most_batch:
        told.append(f"always called with {accepts.least_batch} patch(es)")
    return ", ".join(told)


def refuse_other_run(request: Request, found: OutputRecord, stored: Plan | None) -> None:
    """Refuse to go on with an output of a run with other parameters.

    Args:
        request: the arguments.
        found: what the output says of itself.
        stored: the plan in the workspace, if there is one.

    Raises:
        RunMismatch: naming each parameter that differs.
        CorruptData: when they differ because the output's metadata is damaged.
    """
    try:
        request.refuse_other_run(found)
    except Exception as error:
        other = bool(stored is not None and differences(stored.parameters, found.parameters))
        if other or is_metadata_damaged(request.output, ATTRIBUTE):
            raise CorruptData(
                f"the metadata of {request.output} is not what was written; start afresh with overwrite=True"
            ) from error
        raise


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
            f"the run to be resumed was planned with blocks that need {human(needed, up=True)} but max_memory is "
            f"{human(request.max_memory)}; raise max_memory, or start afresh with overwrite=True"
        )
    return plan.with_concurrency(workers, needed)


def _weigh(request: Request, layout: OutputHeads, probe: Probe) -> ByteSizes:
    """What a voxel, a chunk and a batch weigh."""
    volume, batch = request.volume, request.options["batch_size"]
    patch_bytes = math.prod(request.patch_size) * volume.channels * volume.dtype.itemsize
    windows = 0
    for head in layout.heads:
        output = probe.outputs[head.name]
        voxels = math.prod(output.shape[2:])
        patch_bytes += 0 if head.name in probe.aliased else voxels * output.shape[1] * output.dtype.itemsize
        if head.votes or (not head.crop and output.dtype != torch.float32):  # a copy as float32, one channel per class
            patch_bytes += voxels * head.channels * 4
        windows += 4 * voxels if head.blended else 0
    return ByteSizes(
        in_voxel_bytes=volume.channels * volume.dtype.itemsize,
        in_chunks=volume.chunks,
        in_chunk_bytes=volume.chunk_bytes,
        context=layout.context,
        heads=layout.heads,
        mask_voxel_bytes=0.0 if request.selection.mask is None else request.selection.mask.voxel_bytes,
        window_bytes=windows,
        batch_size=batch,
        model_bytes=probe.model_bytes(batch)
        + compiled_bytes(request.options["compile"], request.options["device"], batch * patch_bytes),
        batch_bytes=batch * patch_bytes,
        staged=is_staged(request.options["device"]),
    )
