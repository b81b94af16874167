"""One call of `predict`: check the arguments, plan, refuse or resume, run the stages, record success.

```text
 arguments -> RunConfig -> (output there?) -> complete: open it | other parameters: refuse | begun: its stored plan
                                           -> nothing:  probe the model, plan, refuse what is too large
           -> lock -> output and workspace are made -> stages -> success recorded -> workspace deleted
```
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from oocpatch.configuration.label_plan import with_larger_ids
from oocpatch.configuration.make_plan import counted, make_plan, resumed_plan
from oocpatch.configuration.output_grid import on_output_grid
from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import OutputBusy, TooManyObjects
from oocpatch.execution.array_job import ArrayJobPart
from oocpatch.outputs.ome_labels import register_label
from oocpatch.outputs.output import Result, open_result
from oocpatch.outputs.record import inspect_output
from oocpatch.planning.plan import Plan, lines_of
from oocpatch.planning.schedule import Occupancy
from oocpatch.progress import OnProgress
from oocpatch.provenance import DefaultNumber, DefaultText, run_settings
from oocpatch.run.cluster_use import describe_occupancy, expected_occupancy, idle_workers, on_all_devices
from oocpatch.run.driver import (
    all_done,
    complete,
    complete_rows,
    discard_workspace,
    open_executor,
    plan_of,
    run_details,
    run_of,
    set_up,
)
from oocpatch.run.export_result import check_export, export_result
from oocpatch.run.input_changes import InputChanges, compare_input
from oocpatch.run.output_grid_run import keep_scores_record, run_part, shown_plan, with_computed_scores
from oocpatch.run.stored_run import busy, reopen_changed, stored_plan, stored_run, warn_of_lost_workspace
from oocpatch.storage.locks import beside, clear_dead, holder, locked, locked_in_turn, locks
from oocpatch.workspace.ledger import WHOLE, LedgerTail, open_ledger
from oocpatch.workspace.workspace import Workspace

logger = logging.getLogger("oocpatch")

# Defaults of what a model package may set: an equal value that the caller gives wins over the package's.
_NO_OVERLAP, _ONE_PATCH = DefaultNumber(0), DefaultNumber(1)
_REGULAR, _HANN = DefaultText("regular"), DefaultText("hann")


def predict(
    volume: Any,
    model: Any,
    output: str | os.PathLike[str],
    *,
    patch_size: int | Sequence[int] | Mapping[str, int] | str | None = None,
    patch_overlap: int | Sequence[int] | Mapping[str, int] = _NO_OVERLAP,
    patch_starts: str = _REGULAR,
    overlap_mode: str | Mapping[str, str] = _HANN,
    num_classes: int | None = None,
    match: float = 0.5,
    padding_mode: str | None = None,
    fill: float = 0.0,
    batch_size: int | str = _ONE_PATCH,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    context_level: int | str | None = None,
    spacing: float | str | Sequence[float | str] | Mapping[str, float | str] | None = None,
    orientation: str | None = None,
    mask: Any = None,
    box: Any = None,
    skip_empty: bool = False,
    weights: str | Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    model_id: str | None = None,
    eval_mode: bool = True,
    preprocess: str | Mapping[str, Any] | Callable[..., Any] | Sequence[Any] | None = None,
    augment: str | Sequence[str] | Mapping[str, Any] | None = None,
    postprocess: str | Callable[..., Any] | Sequence[Any] | Mapping[str, Any] | None = None,
    device: str = "auto",
    autocast: bool = False,
    channels_last: bool = False,
    compile: bool | str = False,  # noqa: A002 - as torch calls it
    output_dtype: Any = None,
    output_chunks: int | Sequence[int] | Mapping[str, int] | None = None,
    output_shards: int | str | Sequence[int] | Mapping[str, int] | None = None,
    output_fill: float = 0,
    output_format: str = "auto",
    output_grid: str = "volume",
    allow_nonfinite: bool = False,
    export: str | os.PathLike[str] | None = None,
    max_memory: int | float | str = "auto",
    max_disk: int | float | str | None = None,
    block_shape: int | Sequence[int] | Mapping[str, int] | None = None,
    work: float | str | None = None,
    workspace: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    processes: bool = False,
    client: Any = None,
    part: Sequence[int] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    update: bool = False,
    check_input: bool = True,
    progress: str | bool | OnProgress = "auto",
) -> Result:
    """Run a model over a volume that does not fit in memory, patch by patch, and blend its outputs.

    The same call again continues where a killed one stopped, and gives the same bytes; a complete output is opened at
    once. Sizes are in voxels: an int for all spatial axes, or one per axis, in order or as a dict by their names. The
    parameters stand in groups: patches, data, model, output, limits, execution.

    Args:
        volume: path or URL of a Zarr array or group or OME-Zarr, `zarr.Array`, `xarray.DataArray`, dask or numpy array;
            or path of a TIFF, slide, NIfTI, HDF5, CZI, ND2, LIF, IMS, N5 or precomputed file or a directory of DICOM,
            see `docs/files.md`.
            A list of volumes of one grid: as channels of one. A dict: as tensors that the model is called with, by
            their names.
        model: `torch.nn.Module`, or callable from `(B, C, *patch)` to `(B, C', *patch)`, or a model spec such as
            `"model.pt"` or `"package.module:name"`. Called in evaluation mode, by one thread at a time unless it is a
            module without state. A list: the mean of all. A model package sets parameters that are not given, see
            `docs/models.md`.
        output: path of the Zarr group to write, or its URL in an object store, `s3://bucket/out.zarr`.

        patch_size: size of the patches that the model takes; `"auto"`: chosen, and with it an overlap where none is
            given. It may be left out where the model is a package.
        patch_overlap: voxels shared by adjacent patches, in total, per axis.
        patch_starts: `"regular"`: a patch starts at every stride, `patch_size - patch_overlap`, and the last is moved
            back to end at the border; `"even"`: as many patches are spaced evenly, and a volume smaller than a patch
            lies in the middle of it.
        overlap_mode: `"crop"` moves values without arithmetic; `"average"`, `"hann"`, `"gaussian"`, `"nnunet"` (a
            gaussian about voxel `n // 2` of a patch of `n`) and `"monai"` (one with a floor of 0.001) blend; `"max"`
            keeps the largest value; `"vote"` the most frequent label; `"instances"` joins objects of models that number
            them anew in every patch, from 1. A dict gives each output its own.
        num_classes: number of labels that are voted on.
        match: for `"instances"`, the least intersection over union of objects of two patches that are one, over the
            voxels that both patches saw.
        padding_mode: `"constant"` (with `fill`), `"edge"` or `"replicate"`, `"reflect"`, `"symmetric"`, `"wrap"` or
            `"circular"`, or the `"mean"`, `"median"` or `"minimum"` of the whole volume: patches also cover
            `patch_overlap // 2` voxels beyond the border. None: the first patch starts at the border.
        fill: value of the padding for `"constant"`.
        batch_size: most patches of a call of the model; calls at a time share them, with one each at least. `"auto"`:
            chosen.

        axes: names of the volume's axes, e.g. `"zyx"`, `"yxc"`, `"tczyx"`.
        level: level of an OME-Zarr's pyramid to read, by its number (0: the finest) or its path in the group.
        context_level: coarser level of the pyramid; the model is called with a patch of it around the same centre, of
            as many voxels, as its argument `context`.
        spacing: distance of the voxels that the model takes, `"0.5um"`, or by axis in its unit, `{"z": 1.0, "y": 0.5,
            "x": 0.5}`: the nearest finer level is read and resampled linearly.
        orientation: ends of the body that the axes of the patches point to, such as `"RAS"`, of a volume with an affine
            (NIfTI, DICOM); the output lies as the volume does. None: as the volume is stored.
        mask: array of any resolution over the same extent, all spatial axes; patches with no nonzero voxel in it are
            skipped.
        box: a pair `(start, stop)` or slice per spatial axis: only patches that meet it are computed. Within it the
            result is that of the whole volume; without, it ends where the last of these patches does.
        skip_empty: skip patches that contain only the fill value.

        weights: file with the weights of a model spec, a state dict or safetensors; a list: one per model.
        model_args: arguments of the factory that a model spec names.
        trust_pickle: let model and weights files run code while they are unpickled.
        model_id: text that identifies the model instead of its fingerprint: two calls with the same text run the same
            model.
        eval_mode: call networks in evaluation mode, wherever they are in the model; False: in the mode that each layer
            is in, as for dropout that samples.
        preprocess: normalization of patches: `"zscore"`, `"percentile"`, `"scale"`, `"clip"`, `"binarize"`,
            `"sigmoid"`, a dict of one of these and its arguments, a function of `(B, C, *patch)`, or a sequence of such
            steps. Here, in `augment` and in `postprocess`, `"none"` leaves out what a model package asks for.
        augment: flips and rotations over which predictions are averaged: `"flips"`, `"rotations"`, `"all"`, names of
            axes to flip, or a dict of a name and the axes it may use.
        postprocess: `"argmax"`, `"softmax"`, `"sigmoid"`, `"threshold"` (at 0.5; else `"threshold:0.3"`), `"label"`
            (connected voxels of a class, or of scores above 0.5 or another `"label:0.3"`, get an id), `"clip:0:1"`,
            `"linear:2:1"` (`2 x + 1`), or a function of blended scores `(C, *box)` that works voxel by voxel; or a list
            of these. A dict gives each output its own.
        device: device of the model; `"auto"`: `"cuda"`, else `"mps"`, else `"cpu"`, whichever there is first.
        autocast: run the model under `torch.autocast`.
        channels_last: store patches and weights in torch's memory format with the channels last.
        compile: compile with `torch.compile` in mode `"default"` (True), `"reduce-overhead"` or `"max-autotune"`.

        output_dtype: dtype of the output; integers are rounded half to even and saturate. A dict gives each output its
            own.
        output_chunks: chunks of the output, spatial; default: those of the volume, if reasonable.
        output_shards: shards of the output, spatial; multiples of its chunks; `"none"`: none. Default: those of the
            input, or the largest whole fraction that blocks can hold; for more than 100,000 chunks up to 256 MiB.
        output_fill: value of voxels that no patch covers.
        output_format: `"zarr"`; `"ome-zarr"` (NGFF 0.5) with a pyramid; `"auto"`: an OME-Zarr where the volume is one.
        output_grid: with `spacing` or `orientation`, `"volume"` resamples scores to the volume's grid before they are
            postprocessed, or at the step `"resample"` of `postprocess`; `"model"` leaves them on the model's.
        allow_nonfinite: keep NaN and infinities that the model gives, and count them, instead of failing their block.
        export: NIfTI, OME-TIFF or HDF5 to write when the output is complete, as `oocpatch.export` does, unless it is
            there.

        max_memory: bytes that the run may add to this process, e.g. `"2GiB"`; `"auto"`: a quarter of the machine's. On
            a device with memory of its own it uses what is free there.
        max_disk: bytes that the workspace may take.
        block_shape: spatial shape of a unit of work; fixes the bytes of the result across machines.
        work: the model's work for one patch, which decides how many patches a unit of work has, and so what a crash
            costs: `"light"`, `"heavy"`, or a number of operations. None: they are counted; what cannot be counted, such
            as a plain function, ONNX or TorchScript, is heavy.

        workspace: path or URL of unfinished work, deleted when the run is done; default: beside the output, in the same
            object store where that is in one. A local disk is faster than a bucket, but then only this machine can
            resume the run.
        workers: blocks to work on at a time; with a client, worker processes to use at most.
        processes: compute in `workers` processes of this machine instead of threads, each within `max_memory`. A script
            that asks for them runs below `if __name__ == "__main__":`, since they import it.
        client: a `dask.distributed.Client`, whose worker processes run the tasks, each within `max_memory`. They must
            see volume, output and workspace under the same paths.
        part: `(i, n)`: compute only the i-th of n parts of the run, counted from 1. Other calls, in any order or at the
            same time, on any machine that sees the same files, compute the others; the last one completes the output.
            Until then, voxels that are not computed hold `output_fill`, and the result's attribute `complete` is False.
        resume: continue an incomplete output; else it is refused.
        overwrite: start afresh; replaces only what oocpatch wrote.
        update: where chunks of the volume or the mask have changed since they were read, compute again the blocks that
            read them and those that share patches with these; the bytes are those of a fresh run.
        check_input: compare the input with what a complete output was computed from, by size and time of its chunks,
            and where these differ by its values. False: return the output without looking.
        progress: `"auto"` shows a bar on a terminal, else a line now and then; `"bar"` or True, `"plain"` lines or
            `"json"` always; `"none"` or False nothing. A function receives the events instead, `TaskDone(block,
            patches, bytes)`, from any thread.

    Returns:
        The output, lazy and backed by the Zarr at `output`: a `DataArray` `([C',] *axes)`; of a model that gives a
        dict, a `Dataset`, or where scales differ a `DataTree` with a node per head. Its attributes `uncovered_voxels`
        and `nonfinite_voxels` are the numbers of voxels that no patch covered, and that are NaN or infinite, if any.

    Raises:
        ValueError, TypeError: for bad arguments.
        PlanTooLarge: when the run would need more memory or disk than allowed; nothing is read or written.
        RunMismatch: when the output belongs to a run with other parameters, or chunks of its input have changed.
        OutputExists: when the output holds other data.
        OutputBusy: when another run is at work on it.
        BlockFailed: when blocks failed; the others are done, and the same call retries only those.
        ClusterLost: when the scheduler or all workers are gone; the same call continues.

    >>> import tempfile, numpy as np, torch
    >>> volume = np.random.default_rng(0).random((40, 50), dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = predict(volume, torch.nn.Identity(), f"{folder}/out.zarr", patch_size=16, patch_overlap=8)
    ...     print(result.dims, bool(np.allclose(result, volume)))
    ('y', 'x') True
    """
    config = RunConfig.of(
        volume,
        model,
        output,
        patch_size=patch_size,
        patch_overlap=patch_overlap,
        patch_starts=patch_starts,
        overlap_mode=overlap_mode,
        num_classes=num_classes,
        match=match,
        padding_mode=padding_mode,
        fill=fill,
        batch_size=batch_size,
        axes=axes,
        level=level,
        context_level=context_level,
        spacing=spacing,
        orientation=orientation,
        output_grid=output_grid,
        mask=mask,
        box=box,
        skip_empty=skip_empty,
        weights=weights,
        model_args=model_args,
        trust_pickle=trust_pickle,
        model_id=model_id,
        eval_mode=eval_mode,
        preprocess=preprocess,
        augment=augment,
        postprocess=postprocess,
        device=device,
        autocast=autocast,
        channels_last=channels_last,
        compile=compile,
        output_dtype=output_dtype,
        output_chunks=output_chunks,
        output_shards=output_shards,
        output_fill=output_fill,
        output_format=output_format,
        allow_nonfinite=allow_nonfinite,
        export=export,
        max_memory=max_memory,
        max_disk=max_disk,
        block_shape=block_shape,
        work=work,
        workspace=workspace,
        workers=workers,
        processes=processes,
        client=client,
        part=part,
        resume=resume,
        overwrite=overwrite,
        update=update,
        check_input=check_input,
        progress=progress,
    )
    result: Result = run(config)
    return result


@dataclass(frozen=True)
class PlannedRun:
    """A plan with the configuration that it was made of. It prints as the plan, and has the plan's attributes.

    Attributes:
        plan: the plan.
        config: the checked arguments.
        occupancy: the expected use of a cluster's workers, of processes, or of parts; None for threads.
        to_run: the plan that is carried out, where that is another one: of an output that scores are resampled to.
    """

    plan: Plan
    config: RunConfig
    occupancy: Occupancy | None = None
    to_run: Plan | None = None

    def run(self, blocks: Iterable[int] | None = None) -> Result:
        """Carry the plan out: the same as `predict` with the arguments that the plan was made with.

        Args:
            blocks: compute only these blocks, by their index in C order, to look at them. Voxels of other blocks hold
                `output_fill`, and the result's attribute `complete` is False until a call without `blocks` has
                computed the rest.

        Raises:
            As `predict`.
        """
        result: Result = run(self.config, self.to_run or self.plan, blocks)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for these before there is a plan
            raise AttributeError(name)
        return getattr(self.plan, name)

    def to_json(self) -> str:
        """Return the plan as JSON, with the use of workers, advice if some are idle, and a package's settings."""
        more: dict[str, Any] = {} if self.occupancy is None else {"occupancy": self.occupancy.to_json()}
        if warning := idle_workers(self.config, self.plan, self.occupancy):
            more["warning"] = warning
        if self.config.package is not None:
            more["package"] = run_settings(self.config.of_package)
        text = self.plan.to_json()
        return json.dumps({**json.loads(text), **more}, indent=1) if more else text

    @property
    def rows(self) -> dict[str, str]:
        """Return the rows that it prints: a text for each name."""
        more: dict[str, str] = {}
        if self.config.chooses_overlap:
            more["chosen"] = "patch_size and patch_overlap, by patch_size='auto'"
        if settings := run_settings(self.config.of_package):
            more["package"] = ", ".join(f"{n}={json.dumps(value)}" for n, value in settings.items())
        return {**self.plan.rows, **more, **describe_occupancy(self.config, self.plan, self.occupancy)}

    def __str__(self) -> str:
        return lines_of(self.rows)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.plan.to_html(self.rows)


@torch.inference_mode(mode=False)
def plan(volume: Any, model: Any, output: str | os.PathLike[str], **options: Any) -> PlannedRun:
    """Plan what `predict` with the same arguments would do, and stop.

    Reads metadata only, and calls the model once, with an empty batch or a patch of zeros. `print` it, look at its
    numbers, `run()` it.

    Args:
        volume: as for `predict`.
        model: as for `predict`.
        output: as for `predict`.
        options: all other arguments of `predict`; with `part`, the plan is that of the whole run.

    Raises:
        As `predict`, before its first block.

    >>> import numpy as np, torch
    >>> planned = plan(np.zeros((64, 64), np.float32), torch.nn.Identity(), "out.zarr", patch_size=32, patch_overlap=16)
    >>> planned.patches, planned.blocks, planned.block_shape
    (9, 1, (64, 64))
    """
    config = on_all_devices(RunConfig.of(volume, model, output, **options))
    stored, record = stored_run(config)
    to_run = _to_run(config, stored, None)[1]
    chosen = shown_plan(to_run)
    check_export(config, record, chosen)
    return PlannedRun(chosen, config, expected_occupancy(config, chosen), to_run)


@torch.inference_mode(mode=False)
def run(config: RunConfig, planned: Plan | None = None, blocks: Iterable[int] | None = None) -> Any:
    """Run a configuration: resume what its output has, or begin.

    Args:
        config: the checked arguments.
        planned: the plan to begin with; default: it is made.
        blocks: the only blocks to compute; default: all.

    Raises:
        ValueError: for a block that the plan does not have. Nothing is written then.
    """
    config = on_all_devices(config)
    result = _run(config, planned, blocks)
    export_result(config)
    return result


def _run(config: RunConfig, planned: Plan | None, blocks: Iterable[int] | None) -> Any:
    """Run a configuration without the export of its output."""
    asked = config
    stored, record = stored_run(config)
    changes = compare_input(config, stored, record)
    if changes.concern_all:  # a fresh run
        config = replace(config, execution=replace(config.execution, overwrite=True))
        stored, changes = None, InputChanges()
    if record is not None and record.complete and not config.execution.overwrite and not changes:
        check_export(config, record)
        discard_workspace(config, record)  # a crash after success may have left it, and its lock
        for lock in locks(config.output):
            clear_dead(lock)
        register_label(config.output)  # a crash after success may have come before this
        return _result(config)
    if changes and record is not None and record.complete and (stored := plan_of(record)) is not None:
        stored = resumed_plan(stored, config)
    config, plan = _to_run(config, stored, planned)
    check_export(config, record, plan)
    chosen = None if blocks is None else _checked_blocks(plan, blocks)
    if chosen is None and (warning := idle_workers(config, plan, expected_occupancy(config, plan))):
        logger.warning("%s: %s", config.output, warning)
    config.output.parent.make_folder()
    if config.execution.part is not None:
        part = ArrayJobPart(*config.execution.part)
        has_scores = config.scores is not None
        return _run_part_of_scores(config, asked, plan, part) if has_scores else _run_part(config, plan, part)
    with locked(beside(config.output, ".lock"), str(config.output)):
        process = next(filter(None, map(holder, locks(config.output)[1:])), None)
        if process is not None:  # a part that began meanwhile
            raise OutputBusy(busy(config, process))
        if inspect_output(config.output) == record:
            if changes and record is not None:
                plan = counted(plan, config.selection)  # it may be the mask that has changed
                reopen_changed(config, plan, record, changes)
            return _locked_run(config, plan, chosen, resuming=stored is not None)
    return _run(asked, planned, chosen)  # another call was at work since this one looked


def _to_run(config: RunConfig, stored: Plan | None, planned: Plan | None) -> tuple[RunConfig, Plan]:
    """Return the configuration and the plan of the run: of the output, where it is made of scores."""
    if config.is_made_of_scores:
        return on_output_grid(config, stored or planned)
    plan = stored or planned or make_plan(config)
    return config.with_sizes(plan.patch_size[config.looped :], plan.batch_size), plan


def _locked_run(config: RunConfig, plan: Plan, blocks: Sequence[int] | None, *, resuming: bool) -> Any:
    """Run a plan, with the output's lock."""
    workspace = set_up(config, plan, resuming=resuming)
    workspace.join()
    verb = "resumes" if resuming else "starts"
    logger.info("%s %s: %d patches in %d blocks", config.output, verb, plan.patches, plan.blocks)
    config = with_computed_scores(config, workspace, _run)
    try:
        details = _run_stages(config, workspace, blocks)
    except TooManyObjects as error:
        config = with_larger_ids(config, error)
        return _locked_run(config, replace(make_plan(config), scores=plan.scores), blocks, resuming=False)
    if details is None:
        return _result(config, complete=False)
    complete(config, workspace, {**details, **keep_scores_record(config, workspace)})
    logger.info("%s is complete after %s s", config.output, details["seconds"])
    return _result(config)


def _result(config: RunConfig, *, complete: bool = True) -> Any:
    """Return the output, opened; of a table its path, and None while it is not complete."""
    if config.table is not None:
        return config.output if complete else None
    result = open_result(config.output)
    if not complete:
        result.attrs["complete"] = False
    return result


def _run_stages(config: RunConfig, workspace: Workspace, blocks: Sequence[int] | None) -> dict[str, Any] | None:
    """Run the stages over what is not done yet; return facts about the run, or None when blocks are left."""
    started, plan = time.monotonic(), workspace.plan
    progress = workspace.progress()
    workspace.sweep(progress)
    to_normalize: Sequence[int] = range(plan.blocks) if blocks is None else blocks
    to_predict = to_normalize
    if blocks is not None:  # a block is complete with the seams that enter it
        neighbours = plan.neighbours
        to_predict = sorted({*to_predict, *(s for block in to_predict for s in neighbours.sources(block))})
    with (
        open_ledger(workspace.root, WHOLE) as ledger,
        open_executor(config, workspace, to_predict, progress) as executor,
    ):
        stages = functools.partial(
            run_of(plan), plan.block_grid, progress, ledger, workspace.delete, delete_outputs=workspace.delete_outputs
        )
        first = stages(to_predict=to_predict, to_normalize=to_normalize, order=plan.in_order(to_predict))
        first.execute(executor.executor)
        if config.execution.is_distributed:
            executor.flush()  # workers on other hosts; what this one wrote is flushed when the output is completed
        if not all_done(plan, progress):
            if blocks is None:
                raise RuntimeError("the stages ended with blocks left to do: a fault of oocpatch, please report it")
            return None
        complete_rows(config, workspace, stages, executor.executor)
        return run_details(config, plan, progress, time.monotonic() - started, executor.halved())


def _checked_blocks(plan: Plan, blocks: Iterable[int]) -> list[int]:
    if plan.scores:
        raise ValueError("blocks must be None where scores are resampled or labelled; look at blocks of the scores")
    chosen = sorted({int(block) for block in blocks})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < plan.blocks:
        raise ValueError(f"blocks must be indices from 0 to {plan.blocks - 1}, got {chosen}")
    return chosen


def _run_part_of_scores(config: RunConfig, asked: RunConfig, plan: Plan, part: ArrayJobPart) -> Any:
    """Run one part of the scores of an output, and the output itself, if it is the last one."""
    result = run_part(config, asked, plan, part, _run)
    return _result(config, complete=False) if result is None else result


def _run_part(config: RunConfig, plan: Plan, part: ArrayJobPart) -> Any:
    """Run one part, and complete the output if it is the last one."""
    started, output, name = time.monotonic(), config.output, str(config.output)
    turn = functools.partial(locked_in_turn, beside(output, ".lock"), name, str(part))
    with contextlib.ExitStack() as stack:
        with turn():
            own_lock = stack.enter_context(contextlib.ExitStack())
            own_lock.enter_context(locked(part.lock(output), name, str(part)))
            record = inspect_output(output)  # once more, now that no other part sets it up
            stored = None if record is None else stored_plan(config, record)
            if record is not None and record.complete:
                return _result(config)
            if record is not None and stored is None:
                warn_of_lost_workspace(config, record)
            workspace = set_up(config, stored or plan, resuming=stored is not None)
            plan = workspace.plan
            own, progress = part.blocks_of(plan.block_patches), workspace.progress()
            own_ledger = stack.enter_context(contextlib.ExitStack())
            ledger = own_ledger.enter_context(open_ledger(workspace.root, part.segment))
            executor = stack.enter_context(open_executor(config, workspace, own, progress))
        tail = LedgerTail(workspace.root, part.segment)
        stages = functools.partial(
            run_of(plan),
            plan.block_grid,
            progress,
            ledger,
            workspace.delete,
            delete_outputs=workspace.delete_outputs,
            ledger_tail=tail,
        )
        to_normalize = () if plan.merges else own  # all blocks are merged first, by the part that ends last
        stages(to_predict=own, to_normalize=to_normalize, order=plan.in_order(own)).execute(executor.executor)
        executor.flush()  # the part that completes the output may run on another host
        with turn():
            record = inspect_output(output)
            completed = record is not None and record.complete  # by another part, which finished this one's blocks
            if not completed:
                unattended = part.unattended_blocks(output, plan.block_patches)
                stages(to_predict=range(0), to_normalize=unattended).execute(executor.executor)
                executor.flush()
                completed = all_done(plan, progress)
                if completed:
                    complete_rows(config, workspace, stages, executor.executor)
                    own_ledger.close()  # Windows deletes no file that is open
                    workspace.join()
                    seconds = time.monotonic() - started
                    complete(config, workspace, run_details(config, plan, progress, seconds, executor.halved()))
            own_lock.close()  # within the turn: the next one sees that this part is gone, and leaves nothing to it
    return _result(config, complete=completed)
