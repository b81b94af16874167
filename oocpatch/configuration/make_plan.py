"""The plan of a run, made of its configuration; sizes are chosen where the configuration leaves them open.

Reads metadata only, and a mask that is not large, and calls the model with patches of zeros: once, or a few times where
patch sizes are to be chosen.
Nothing is written.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from dataclasses import replace

import torch

from oocpatch.configuration.label_plan import make_label_plan
from oocpatch.configuration.output_heads import OutputHeads, default_shards, infer_heads
from oocpatch.configuration.run_config import RunConfig
from oocpatch.configuration.table_plan import make_table_plan
from oocpatch.engine.buffers import torch_dtype
from oocpatch.engine.device_transfer import device_memory, is_staged
from oocpatch.engine.patch_selection import Selection
from oocpatch.errors import CorruptData, PlanTooLarge
from oocpatch.models.compilation import compiled_bytes
from oocpatch.models.input_spec import input_spec_of
from oocpatch.models.predictor import torch_threads
from oocpatch.models.preprocess_steps import Step
from oocpatch.models.preprocessing import steps_of
from oocpatch.models.probe import Probe, probe_model
from oocpatch.models.reuse import probed
from oocpatch.models.work import workload_of
from oocpatch.models.wrappers import ensemble
from oocpatch.outputs.integrity import is_metadata_damaged
from oocpatch.outputs.pyramid import with_pyramids
from oocpatch.outputs.record import ATTRIBUTE, OutputRecord
from oocpatch.outputs.row_arrays import with_rows
from oocpatch.planning.heads import common_unit
from oocpatch.planning.memory import ByteSizes, chunk_bytes
from oocpatch.planning.plan import Plan, differences, human, pack_counts
from oocpatch.planning.planner import (
    MODEL_SHARE,
    MULTIPLE,
    batch_size,
    choose,
    patch_sizes,
    with_fewer_calls,
    with_retained_memory,
)
from oocpatch.planning.shards import fitted_units
from oocpatch.planning.workload import crash_limit
from oocpatch.storage.forks import in_new_thread_if_forked
from oocpatch.volumes.content import MASK, VOLUME

FILE_BYTES = 512
"""Bytes of the record of a stored output, and of its share of directories."""

MOST_CALLS = 4
"""Calls of the model at a time. More take more memory, and gain little: while one waits, the others work."""

CALL_OPERATIONS = 20e9
"""Operations of a call beside others that are enough: a few tenths of a second of a core, many times what it costs."""

COUNTED_VOXELS = 1 << 28
"""Voxels of a mask up to which planning reads it, to count the patches to compute: a second or two."""


def counted(plan: Plan, selection: Selection) -> Plan:
    """Return a plan with the number of patches to compute of each block, if a mask or a box selects them."""
    return replace(plan, selected=pack_counts(selection.count(plan.block_grid).reshape(-1))) if selection else plan


def make_plan(config: RunConfig) -> Plan:
    """Decide everything about a run.

    Raises:
        ValueError: when the model does not take the patches, or does not return what it should.
        PlanTooLarge: when the run would need more memory or disk than allowed.
    """
    if config.labelling is not None:
        return make_label_plan(config, config.labelling)
    if config.table is not None:
        return make_table_plan(config, config.table)
    if config.patch_size:
        return _planned(config)
    failures: list[ValueError] = []
    for candidate in _candidates(config):
        try:
            candidate.check_patches()
            return _planned(candidate)
        except ValueError as error:
            failures.append(error)
    too_large = [error for error in failures if isinstance(error, PlanTooLarge)]
    raise (too_large or failures[::-1])[-1]


def _candidates(config: RunConfig) -> list[RunConfig]:
    """Return configurations with patch sizes that the model may take and the memory may hold, the largest first."""
    volume, loops = config.volume, config.looped
    fixed = input_spec_of(ensemble(config.models)).sides
    sizes = patch_sizes(volume.shape[loops:], volume.chunks[loops:], fixed)
    overlap = config.patch_overlap[loops:]
    larger = [size for size in sizes if all(o < n for o, n in zip(overlap, size, strict=True))]
    candidates = [config.with_sizes(size, 0) for size in larger]
    if not candidates:
        raise ValueError(f"patch_overlap must be smaller than the patches that patch_size='auto' tries, got {overlap}")
    # Probed with a small patch: a large one could take the very memory that is to be saved.
    small = [c for c in reversed(candidates) if min(c.patch_size[loops:]) >= MULTIPLE] or candidates[::-1]
    for candidate in small:
        with contextlib.suppress(ValueError):
            voxel_bytes = _probed(candidate, torch_threads()).batch_bytes / math.prod(candidate.patch_size)
            share = _model_memory(config) / MODEL_SHARE
            return [c for c in candidates if math.prod(c.patch_size) * voxel_bytes <= share] or candidates[-1:]
    return candidates


def _probed(config: RunConfig, threads: int) -> Probe:
    volume, limit = config.volume, _model_memory(config)
    channels = sum(count for _, count in config.model_inputs) or volume.channels
    dtype = torch_dtype(str(volume.dtype))

    def call() -> Probe:
        predictor = config.pipeline.predictor(threads=threads)
        with predictor.ready():
            call_once = functools.partial(probe_model, predictor, channels, config.patch_size, dtype, limit)
            probe = in_new_thread_if_forked(call_once)
        return replace(probe, is_stateless=probe.is_stateless and config.pipeline.is_stateless)

    if not config.knows_model or not all(isinstance(step, Step) for step in steps_of(config.model.preprocess)):
        return call()
    of_volume = (VOLUME, MASK, "box")  # of which the probe depends on nothing but channels and dtype
    parameters = {name: value for name, value in config.parameters.items() if name not in of_volume}
    names = (volume.names, config.looped, config.model.device, torch.get_default_dtype())
    return probed(config.models, (parameters, config.patch_size, channels, dtype, limit, threads, *names), call)


def _planned(config: RunConfig) -> Plan:
    """Decide everything about a run whose patches have a size."""
    volume = config.volume
    patch_bytes = volume.channels * math.prod(config.patch_size) * volume.dtype.itemsize
    if patch_bytes > config.limits.max_memory:
        raise PlanTooLarge(
            f"one patch of {config.patch_size[config.looped :]} alone needs {human(patch_bytes, up=True)} but "
            f"max_memory is {human(config.limits.max_memory)}; lower patch_size or raise max_memory"
        )
    if chunk_bytes(1, volume.chunk_bytes) > config.limits.max_memory:
        raise PlanTooLarge(
            f"reading one chunk of the volume ({volume.chunks} voxels, {human(volume.chunk_bytes)}) needs "
            f"{human(chunk_bytes(1, volume.chunk_bytes), up=True)} but max_memory is "
            f"{human(config.limits.max_memory)}; "
            "raise max_memory, or store the volume in smaller chunks"
        )
    threads = torch_threads()
    probe = _probed(config, threads)
    outputs = infer_heads(config, probe)
    if not config.patches.batch_size:
        input_spec = input_spec_of(ensemble(config.models))
        batch = batch_size(
            math.prod(config.patch_size),
            -(-probe.batch_bytes // probe.least_batch) + patch_bytes,
            _model_memory(config),
            patches=outputs.grid.num_patches,
            least=input_spec.least_batch,
            most=input_spec.most_batch,
        )
        config = config.with_sizes((), batch)
    plan = _plan_for(config, outputs, probe, threads)
    shapes = [frame.grid.shape for frame in plan.frames]
    shards = default_shards(config, outputs.heads, shapes)
    if not any(shards):
        return plan
    whole = config.volume.shards is not None
    for units in fitted_units(outputs.heads, shards, plan.core, shapes, whole=whole):
        heads = tuple(replace(head, unit=unit) for head, unit in zip(outputs.heads, units, strict=True))
        with contextlib.suppress(PlanTooLarge):
            sharded = _plan_for(config, replace(outputs, heads=heads), probe, threads)
            is_asked = config.limits.block_shape is None or sharded.core == plan.core
            most = None if plan.crash_limit is None else max(plan.crash_limit, plan.crash_patches)
            if is_asked and (most is None or sharded.crash_patches <= most):
                return sharded
    return plan


def _plan_for(config: RunConfig, outputs: OutputHeads, probe: Probe, threads: int) -> Plan:
    """Return the plan of a run with such outputs, of which the write units are known.

    Raises:
        PlanTooLarge: when nothing fits.
    """
    volume, sizes = config.volume, _byte_sizes(config, outputs, probe)
    core = None
    if config.limits.block_shape is not None:
        core = (*common_unit(outputs.heads, len(volume.shape))[: config.looped], *config.limits.block_shape)
    transforms, device = len(config.pipeline.transforms), config.model.device
    workload = workload_of(config.limits.work, probe, config.models, transforms=transforms, device=device)
    # light models cost less than their calls' threads do
    most_calls = min(threads, MOST_CALLS) if probe.operations > 0 and probe.is_stateless else 1
    choice = choose(
        outputs.grid,
        sizes,
        max_memory=config.limits.max_memory,
        max_disk=config.limits.max_disk,
        block_shape=core,
        workers=config.execution.threads,
        workload=workload,
        side_by_side=[_byte_sizes(config, outputs, probe, n) for n in range(2, most_calls + 1)],
    )
    needed, on_device = choice.projection.main, choice.projection.device
    # those of a call wait for each other, for longer than a light one takes
    sharing = max(choice.calls, 1 if workload.operations else choice.nominal_concurrency)
    plan = Plan(
        parameters=config.parameters,
        axes=volume.names,
        spatial=volume.spatial_ndim,
        shape=volume.shape,
        in_channels=volume.channels,
        in_dtype=str(volume.dtype),
        in_chunks=volume.chunks,
        patch_size=config.patch_size,
        patch_overlap=config.patch_overlap,
        patch_starts=config.patches.patch_starts,
        extent=config.extent,
        padding_mode=config.patches.padding_mode,
        fill=config.patches.fill,
        context=outputs.context,
        snap=outputs.snap,
        heads=outputs.heads,
        vectors=outputs.vectors,
        model_inputs=config.model_inputs,
        # what is compiled is compiled for one layout, and a view of the ring has another in each block
        copies_input=probe.copies_input or config.model.compile is not None,
        may_skip=config.skips,
        core=tuple(a.size for a in choice.blocks.axes),
        sweep=choice.blocks.sweep,
        io_strategy=choice.io_strategy,
        concurrency=choice.concurrency,
        batch_size=config.patches.batch_size,
        torch_threads=max(1, threads // sharing),
        calls=choice.calls,
        lanes=choice.calls,
        patches_per_call=_patches_per_call(config.patches.batch_size, probe, choice.calls),
        projected_memory=needed.memory(choice.concurrency),
        projected_device_memory=on_device.memory(choice.concurrency),
        projected_disk=choice.projection.disk,
        bytes_read=choice.projection.bytes_read,
        bytes_written=choice.projection.bytes_written,
        task_memory=needed.task_memory,
        task_device_memory=on_device.task_memory,
        memory_parts=needed.parts,
        device_parts=on_device.parts,
        model_note=_note(config),
        classes=() if config.package is None else config.package.classes,
        box=None if config.data.box is None else (config.data.box.start, config.data.box.stop),
        skip_value=config.skip_value,
        output_fill=config.outputs.output_fill,
        allow_nonfinite=config.outputs.allow_nonfinite,
        work=str(workload),
        crash_limit=choice.crash_limit,
        merge_memory=config.limits.max_memory - needed.memory(0) if config.finds_objects else 0,
    )
    mask = config.selection.mask
    if mask is None or math.prod(mask.volume.shape) <= COUNTED_VOXELS:
        plan = counted(plan, config.selection)
    plan = with_retained_memory(_with_stored_outputs(plan, config, probe), config.limits.max_memory)
    plan = with_rows(plan, config.limits.max_memory)
    return with_pyramids(plan, config.limits.max_memory)


def _with_stored_outputs(plan: Plan, config: RunConfig, probe: Probe) -> Plan:
    """Return a plan that stores the model's outputs, if a crash would cost too much otherwise and the disk has room."""
    if plan.crash_limit is None or plan.crash_patches <= min(plan.crash_limit, crash_limit(plan.patches)):
        return plan
    of_patch = sum(math.prod(o.shape[1:]) * o.dtype.itemsize + 2 * FILE_BYTES for o in probe.outputs.values())
    # of the blocks at work, and of those that are done, but whose records are not durable yet
    blocks = min(plan.blocks, 2 * max(plan.concurrency, config.execution.workers or 1))
    disk = plan.projected_disk + blocks * plan.patches_per_block * of_patch
    if config.limits.max_disk is not None and disk > config.limits.max_disk:
        return plan
    return replace(plan, stores_outputs=True, projected_disk=disk)


def _note(config: RunConfig) -> str:
    """Describe what is around the model; nothing for a model alone."""
    model, transforms = config.model, config.pipeline.transforms
    input_spec = input_spec_of(ensemble(config.models))
    notes = []
    if config.data.spacing is not None:
        notes.append(str(config.data.spacing))
    if len(config.models) > 1:
        notes.append(f"mean of {len(config.models)} models")
    if len(transforms) > 1:
        notes.append(f"mean of {len(transforms)} flips and rotations")
    if steps := steps_of(model.preprocess):
        named = [step.name if isinstance(step, Step) else "by a function" for step in steps]
        notes.append(f"preprocess {' and '.join(named)}")
    if model.channels_last:
        notes.append("channels last")
    if model.compile:
        notes.append(f"compiled ({model.compile})")
    if input_spec.least_batch == input_spec.most_batch:
        notes.append(f"always called with {input_spec.least_batch} patch(es)")
    return ", ".join(notes)


def check_same_run(config: RunConfig, record: OutputRecord, stored: Plan | None) -> None:
    """Refuse to continue an output of a run with other parameters.

    Args:
        config: the checked arguments.
        record: the record of the run in the output's attributes.
        stored: the plan in the workspace, if there is one.

    Raises:
        RunMismatch: naming each parameter that differs.
        CorruptData: when they differ because the output's metadata is damaged.
    """
    try:
        config.check_same_run(record)
    except Exception as error:
        other = bool(stored is not None and differences(stored.parameters, record.parameters))
        if other or is_metadata_damaged(config.output, ATTRIBUTE):
            raise CorruptData(
                f"the metadata of {config.output} is not what was written; start afresh with overwrite=True"
            ) from error
        raise


def resumed_plan(plan: Plan, config: RunConfig) -> Plan:
    """Return a stored plan with as many tasks, and then calls of the model, at a time as this call allows.

    Raises:
        PlanTooLarge: when even one of each needs more memory than this call allows.
    """
    limits = config.limits.max_memory, _device_memory(config) or 0 if plan.device_parts else 0
    plan = with_retained_memory(plan, 0)
    most = min(config.execution.threads or plan.concurrency, plan.most_concurrent or plan.blocks)
    lowered = _with_concurrency(plan, most)
    for workers in range(most - 1, 0, -1):
        if _fits(lowered, limits):
            break
        lowered = _with_concurrency(plan, workers)
    for calls in range(plan.calls - 1, 0, -1):
        if _fits(lowered, limits):
            break
        lowered = with_fewer_calls(lowered, calls)
    if not _fits(lowered, limits):
        on_device = lowered.projected_memory <= limits[0]
        size = lowered.projected_device_memory if on_device else lowered.projected_memory
        limit, advice = ("its device has", "free memory there") if on_device else ("max_memory is", "raise max_memory")
        raise PlanTooLarge(
            f"the run to be resumed was planned with blocks that need {human(size, up=True)} but {limit} "
            f"{human(limits[on_device])}; {advice}, or start afresh with overwrite=True"
        )
    shared = 0 if plan.reads_voxels else lowered.projected_memory - lowered.concurrency * lowered.task_memory
    lowered = replace(lowered, merge_memory=limits[0] - shared if plan.merges else 0)
    lowered = with_retained_memory(lowered, limits[0])
    # which end the run, and may need more than blocks do
    return with_pyramids(with_rows(lowered, limits[0]), limits[0])


def _with_concurrency(plan: Plan, workers: int) -> Plan:
    """Return a plan with another number of tasks at a time, and the memory that it needs then."""
    more = workers - plan.concurrency
    on_device = plan.projected_device_memory + more * plan.task_device_memory if plan.device_parts else 0
    memory = plan.projected_memory + more * plan.task_memory
    return replace(plan, concurrency=workers, projected_memory=memory, projected_device_memory=on_device)


def _fits(plan: Plan, limits: tuple[int, int]) -> bool:
    """Return whether a plan needs no more than these bytes of main memory and of its device."""
    return plan.projected_memory <= limits[0] and plan.projected_device_memory <= limits[1]


def _device_memory(config: RunConfig) -> int | None:
    """Return the bytes that a process may take on a device with memory of its own; None: it is main memory."""
    if not is_staged(config.model.device):
        return None
    execution, processes = config.execution, 1
    if execution.client is not None:  # of the host with most of them
        hosts = Counter(address.rpartition(":")[0] for address in execution.client.nthreads())
        processes = max(hosts.values(), default=1)
    elif execution.processes:
        processes = execution.workers or 1
    known = device_memory(config.model.device, processes)
    return config.limits.max_memory if known is None else known


def _model_memory(config: RunConfig) -> int:
    """Return the bytes where the model is: on its device, or in main memory."""
    on_device = _device_memory(config)
    return config.limits.max_memory if on_device is None else on_device


def _patches_per_call(batch_size: int, probe: Probe, calls: int) -> int:
    """Return the most patches of a call: of calls side by side, their part of a batch, or less if that is much work.

    More patches in a call save nothing then: they take more memory, whose pages take time.
    """
    if calls == 1:
        return batch_size
    enough = math.ceil(CALL_OPERATIONS / probe.operations)
    return min(batch_size, max(probe.least_batch, min(-(-batch_size // calls), enough)))


def _byte_sizes(config: RunConfig, outputs: OutputHeads, probe: Probe, calls: int = 1) -> ByteSizes:
    """Return the bytes of a voxel, a chunk, and the patches of so many calls at a time."""
    volume, batch = config.volume, _patches_per_call(config.patches.batch_size, probe, calls)
    patch_bytes = math.prod(config.patch_size) * volume.channels * volume.dtype.itemsize
    windows = 0
    for head in outputs.heads:
        output = probe.outputs[head.name]
        voxels = math.prod(output.shape[2:])
        patch_bytes += 0 if head.name in probe.aliased else voxels * output.shape[1] * output.dtype.itemsize
        is_moved = head.crop or head.has_objects
        if head.votes or not (is_moved or output.dtype == torch.float32):  # a copy as float32, one channel per class
            patch_bytes += voxels * head.channels * 4
        windows += 4 * voxels if head.blended else 0
    if config.context is not None:  # and what both are joined in
        both = volume.channels + 2 * config.context.channels
        patch_bytes += math.prod(config.patch_size) * both * volume.dtype.itemsize
    patch_bytes += sum(probe.outputs[v.name].shape[1] * probe.outputs[v.name].dtype.itemsize for v in outputs.vectors)
    return ByteSizes(
        in_voxel_bytes=volume.channels * volume.dtype.itemsize,
        in_chunks=volume.chunks,
        in_chunk_bytes=max(volume.chunk_bytes, 0 if config.context is None else config.context.chunk_bytes),
        context=outputs.context,
        heads=outputs.heads,
        mask_voxel_bytes=0.0 if config.selection.mask is None else config.selection.mask.voxel_bytes,
        window_bytes=windows,
        batch_size=config.patches.batch_size,
        model_bytes=probe.model_bytes(batch)
        + compiled_bytes(config.model.compile, config.model.device, batch * patch_bytes),
        batch_bytes=batch * patch_bytes,
        device_memory=_device_memory(config),
        row_bytes=sum(vectors.row_bytes for vectors in outputs.vectors),
        calls=calls,
    )
