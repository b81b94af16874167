"""One call: `predict` plans, refuses or runs, and resumes what a killed call left; `plan` stops after planning.

```text
 arguments -> Request -> (output there?) -> complete: open it | other parameters: refuse | begun: its stored plan
                                         -> nothing:  probe the model, plan, refuse what is too large
          -> lock -> output and workspace are made -> stages -> success recorded -> workspace deleted
```
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from oocpatch.configuration.make_plan import make_plan, refuse_other_run, resumed
from oocpatch.configuration.run_config import Request, make_request
from oocpatch.errors import OutputBusy, OutputExists
from oocpatch.execution.array_job import ArrayJobPart, busy_holder, checked_part
from oocpatch.execution.scheduler import Run
from oocpatch.outputs.ome_labels import register_label
from oocpatch.outputs.output import Result, open_result
from oocpatch.outputs.record import OutputRecord, inspect_output
from oocpatch.planning.arguments import switch
from oocpatch.planning.plan import Plan
from oocpatch.provenance import run_settings
from oocpatch.run.driver import all_done, conclude, details, open_executor, open_ledger, set_up
from oocpatch.run.status import root_of
from oocpatch.storage.files import make_folder
from oocpatch.storage.locks import beside, clear_dead, holder, locked, locked_in_turn, locks
from oocpatch.workspace.ledger import LedgerTail
from oocpatch.workspace.segments import WHOLE
from oocpatch.workspace.workspace import Workspace, remove_workspace

logger = logging.getLogger("oocpatch")


def predict(
    volume: Any,
    model: Any,
    output: str | os.PathLike[str],
    *,
    patch_size: int | Sequence[int] | Mapping[str, int] | str,
    patch_overlap: int | Sequence[int] | Mapping[str, int] = 0,
    overlap_mode: str | Mapping[str, str] = "hann",
    num_classes: int | None = None,
    padding_mode: str | None = None,
    fill: float = 0.0,
    axes: str | Sequence[str] | None = None,
    level: int | str = 0,
    preprocess: str | Mapping[str, Any] | Callable[..., Any] | None = None,
    augment: str | Sequence[str] | Mapping[str, Any] | None = None,
    weights: str | Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    batch_size: int | str = 1,
    device: str = "auto",
    autocast: bool = False,
    channels_last: bool = False,
    compile: bool | str = False,  # noqa: A002 - as torch calls it
    postprocess: str | Callable[..., Any] | Mapping[str, Any] | None = None,
    output_dtype: Any = None,
    output_chunks: int | Sequence[int] | Mapping[str, int] | None = None,
    output_shards: int | Sequence[int] | Mapping[str, int] | None = None,
    output_fill: float = 0,
    max_memory: int | float | str = "auto",
    max_disk: int | float | str | None = None,
    block_shape: int | Sequence[int] | Mapping[str, int] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    mask: Any = None,
    skip_empty: bool = False,
    box: Any = None,
    client: Any = None,
    part: Sequence[int] | None = None,
    output_format: str = "auto",
    resume: bool = True,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: str | bool = "auto",
) -> Result:
    """Run a model over a volume that does not fit in memory, patch by patch, and blend what it gives.

    The same call again goes on where a killed one stopped, and gives the same bytes; a complete output is opened at
    once.

    Args:
        volume: path or URL of a Zarr array or group or OME-Zarr, `zarr.Array`, `xarray.DataArray`, dask or numpy array;
            or path of a TIFF, slide, NIfTI, HDF5, N5 or precomputed file, see `docs/files.md`.
        model: `torch.nn.Module`, or callable from `(B, C, *patch)` to `(B, C', *patch)`, or a model spec such as
            `"model.pt"` or `"package.module:name"`. Called by one thread at a time, in evaluation mode. A list: the
            mean of all.
        output: path of the Zarr group to write, or its URL in an object store, `s3://bucket/out.zarr`.
        patch_size: size of a patch in voxels; an int, or one per spatial axis, in order or as a dict by their names, as
            all sizes; `"auto"`: chosen.
        patch_overlap: voxels shared by adjacent patches, in total, per axis.
        overlap_mode: `"crop"` moves values without arithmetic; `"average"`, `"hann"` and `"gaussian"` blend; `"max"`
            keeps the largest value; `"vote"` the most frequent label. A dict gives each of the model's outputs its own.
        num_classes: number of labels that are voted on.
        padding_mode: `"constant"` (with `fill`), `"edge"`, `"reflect"`, `"symmetric"` or `"wrap"`: patches also cover
            `patch_overlap // 2` voxels beyond the border. None: the first patch starts at the border.
        fill: value of the padding for `"constant"`.
        axes: names of the volume's axes, e.g. `"zyx"`, `"yxc"`, `"tczyx"`.
        level: which level of an OME-Zarr's pyramid to read, by its number (0: the finest) or its path in the group.
        preprocess: what is done to patches: `"zscore"`, `"percentile"`, `"scale"`, a dict of one of these and its
            arguments, or a function of `(B, C, *patch)`.
        augment: turns of a patch whose outputs are averaged: `"flips"`, `"rotations"`, `"all"`, names of axes to flip,
            or a dict of a name and the axes it may use.
        weights: file of a model spec's weights, a state dict or safetensors; a list: one per model.
        model_args: arguments of the factory that a model spec names.
        trust_pickle: let model and weights files run code while they are unpickled.
        batch_size: patches per call of the model; `"auto"`: chosen.
        device: where the model runs; `"auto"`: an accelerator when there is one.
        autocast: run the model under `torch.autocast`.
        channels_last: put patches and weights into torch's memory format with the channels last.
        compile: run the model by `torch.compile`; mode `"default"` (True), `"reduce-overhead"` or `"max-autotune"`.
        postprocess: `"argmax"`, `"softmax"`, `"sigmoid"`, `"threshold"` (at 0.5; else `"threshold:0.3"`), or a function
            of blended scores `(C, *box)` that works voxel by voxel. A dict gives each of the model's outputs its own.
        output_dtype: dtype of the output; integers are rounded half to even and saturate. As a dict, of each.
        output_chunks: chunks of the output, in voxels, spatial; default: those of the volume, if reasonable.
        output_shards: shards of the output, in voxels, spatial; multiples of its chunks.
        output_fill: value of voxels that no patch covers.
        max_memory: bytes that the run may add to this process, e.g. `"2GiB"`; `"auto"`: a quarter of the machine's.
        max_disk: bytes that the workspace may take.
        block_shape: spatial shape of a unit of work, in voxels; fixes the bytes of the result across machines.
        workspace: path or URL of what is kept until the run is done; default: beside the output, in the same object
            store where that is in one. Sums go there and are deleted again: a local disk is faster than a bucket, but
            only from this machine can the run be resumed then.
        workers: blocks to work on at a time; with a client, worker processes to use at most.
        mask: array of any resolution over the same extent, all spatial axes; patches with no nonzero voxel in it are
            skipped.
        box: a pair `(start, stop)` or slice per spatial axis, in voxels: only patches that meet it are computed. Within
            it the result is that of the whole volume; without, it ends where the last of these patches does.
        skip_empty: skip patches that hold nothing but what voxels hold that were never written.
        client: a `dask.distributed.Client`, whose worker processes do the work, each within `max_memory`. They must see
            volume, output and workspace under the same paths.
        part: `(i, n)`: compute only the i-th of n parts of the run, counted from 1. Other calls, in any order or at the
            same time, on any machine that sees the same files, compute the others; the last one completes the output.
            Until then, voxels that are not computed hold `output_fill`, and the result's attribute `complete` is False.
        output_format: `"zarr"`; `"ome-zarr"` with a pyramid, as NGFF 0.5, or `"ome-zarr-0.4"`; `"auto"`: an OME-Zarr
            where the volume is one.
        resume: go on with an incomplete output; else it is refused.
        overwrite: start afresh; replaces only what oocpatch wrote.
        allow_nonfinite: keep NaN and infinities that the model gives, and count them, instead of failing their block.
        progress: `"auto"` shows a bar on a terminal, else a line now and then; `"bar"` or True, `"plain"` lines or
            `"json"` always; `"none"` or False nothing.

    Returns:
        The output, lazy and backed by the Zarr at `output`: a `DataArray` `([C',] *axes)`; of a model that gives a
        dict, a `Dataset`, or where scales differ a `DataTree` with a node per head. Its attributes `uncovered_voxels`
        and `nonfinite_voxels` are the numbers of voxels that no patch covered, and that are NaN or infinite, if any.

    Raises:
        ValueError, TypeError: for bad arguments.
        PlanTooLarge: when the run would need more memory or disk than allowed; nothing is read or written.
        RunMismatch: when the output belongs to a run with other parameters.
        OutputExists: when the output holds other data.
        OutputBusy: when another run is at work on it.
        BlockFailed: when blocks failed; the others are done, and the same call retries only those.
        ClusterLost: when the scheduler or all workers are gone; the same call goes on.

    >>> import tempfile, numpy as np, torch
    >>> volume = np.random.default_rng(0).random((40, 50), dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = predict(volume, torch.nn.Identity(), f"{folder}/out.zarr", patch_size=16, patch_overlap=8)
    ...     print(result.dims, bool(np.allclose(result, volume)))
    ('y', 'x') True
    """
    arguments = _arguments(locals())
    one = _part(part, client, overwrite=overwrite)
    request = replace(make_request(**arguments), settings=run_settings(arguments))
    return _predict(request, resume=resume, overwrite=overwrite, progress=progress, part=one)


def plan(
    volume: Any,
    model: Any,
    output: str | os.PathLike[str],
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: str | bool = "auto",
    part: Sequence[int] | None = None,
    **arguments: Any,
) -> Plan:
    """Decide everything about a run and stop: what `predict` with the same arguments would do.

    Reads metadata only, and calls the model once with one patch of zeros. `print` it, look at its numbers, `run()` it.

    Args:
        volume: as for `predict`.
        model: as for `predict`.
        output: as for `predict`.
        resume: as for `predict`.
        overwrite: as for `predict`.
        progress: as for `predict`; of the plan's `run()`.
        part: as for `predict`; the plan is that of the whole run.
        arguments: all other arguments of `predict`.

    Raises:
        As `predict`, before its first block.

    >>> import numpy as np, torch
    >>> made = plan(np.zeros((64, 64), np.float32), torch.nn.Identity(), "out.zarr", patch_size=32, patch_overlap=16)
    >>> made.patches, made.blocks, made.block_shape
    (9, 1, (64, 64))
    """
    unknown = arguments.keys() - _DEFAULTS.keys() - {"patch_size"}
    if unknown:
        raise TypeError(f"plan() got unexpected arguments: {', '.join(sorted(unknown))}")
    if "patch_size" not in arguments:
        raise TypeError("plan() needs patch_size")
    one = _part(part, arguments.get("client"), overwrite=overwrite)
    given = {"volume": volume, "model": model, "output": output, **_DEFAULTS, **arguments}
    request = replace(make_request(**given), settings=run_settings(given))
    made, _ = _decide(request, resume=resume, overwrite=overwrite, part=one)

    def run(planned: Plan) -> Result:
        return _predict(request, resume=resume, overwrite=overwrite, progress=progress, part=one, planned=planned)

    return (made or make_plan(request)).bound(run)


_CONTROL = {"resume", "overwrite", "progress", "part"}
_DEFAULTS: dict[str, Any] = {
    name: value for name, value in (predict.__kwdefaults__ or {}).items() if name not in _CONTROL
}


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _CONTROL}


def _part(part: Sequence[int] | None, client: Any, *, overwrite: bool) -> ArrayJobPart | None:
    if client is not None:
        from oocpatch.execution.dask_clients import check_client  # noqa: PLC0415 - a second of imports, for clusters only

        check_client(client)
    if part is None:
        return None
    if client is not None:
        raise ValueError("part must be None with a client: parts are for jobs without a scheduler")
    if overwrite:
        raise ValueError(
            "overwrite must be False with part: each part would delete the others' work; delete the output"
        )
    return ArrayJobPart(*checked_part(part))


def _decide(
    request: Request, *, resume: bool, overwrite: bool, part: ArrayJobPart | None = None
) -> tuple[Plan | None, OutputRecord | None]:
    """The stored plan to go on with, if any, and what lies at the output's place.

    Raises:
        OutputExists, OutputBusy, RunMismatch: when this call must not touch it.
    """
    switch("resume", resume)
    switch("overwrite", overwrite)
    if request.client is not None:
        from oocpatch.execution.payload import check_cluster  # noqa: PLC0415 - a second of imports, for clusters only

        check_cluster(request)
    who = busy_holder(request.output, part)
    if who is not None:
        raise OutputBusy(f"another run is at work on {request.output} ({who}); wait for it, or stop it first")
    found = inspect_output(request.output)
    if found is None or overwrite:
        return None, found
    if not resume:
        state = "complete" if found.complete else "incomplete"
        raise OutputExists(f"{request.output} is there ({state}) and resume is off; pass overwrite=True to replace it")
    stored = _stored(request, found)
    if stored is None and not found.complete:
        logger.warning("%s is not to be seen from here: %s starts afresh", root_of(found), request.output)
    return stored, found


def _stored(request: Request, found: OutputRecord) -> Plan | None:
    """The stored plan to go on with; None where there is none, or nothing is left to do.

    Raises:
        RunMismatch: when it is of a run with other parameters. CorruptData: when it only seems so.
    """
    workspace = None if found.complete else Workspace.find(root_of(found))
    refuse_other_run(request, found, None if workspace is None else workspace.plan)
    return None if workspace is None else resumed(workspace.plan, request)


def _predict(
    request: Request,
    *,
    resume: bool,
    overwrite: bool,
    progress: str | bool,
    part: ArrayJobPart | None,
    planned: Plan | None = None,
) -> Result:
    stored, found = _decide(request, resume=resume, overwrite=overwrite, part=part)
    if found is not None and found.complete and not overwrite:
        remove_workspace(root_of(found))  # a crash after success may have left it, and its lock
        for lock in locks(request.output):
            clear_dead(lock)
        register_label(request.output)  # a crash after success may have kept it from that
        return open_result(request.output)
    made = stored or planned or make_plan(request)
    request = request.settled(made.patch_size[request.looped :], made.batch_size)
    make_folder(request.output.parent)
    if part is not None:
        return _predict_part(request, made, part, progress)
    with locked(beside(request.output, ".lock"), str(request.output)):
        who = next(filter(None, map(holder, locks(request.output)[1:])), None)
        if who is not None:  # a part that began meanwhile
            raise OutputBusy(f"another run is at work on {request.output} ({who}); wait for it, or stop it first")
        workspace = set_up(request, made, progress, resuming=stored is not None)
        workspace.join()
        state = "goes on" if stored is not None else "starts"
        logger.info("%s %s: %d patches in %d blocks", request.output, state, made.patches, made.blocks)
        done = _run(request, workspace, progress)
        conclude(request, workspace, done, progress)
        logger.info("%s is complete after %s s", request.output, done["seconds"])
        remove_workspace(workspace.root)
    return open_result(request.output)


def _run(request: Request, workspace: Workspace, progress: str | bool) -> dict[str, Any]:
    """Run the stages of a plan over what is not done yet; facts about the run."""
    started, made = time.monotonic(), workspace.plan
    done = workspace.progress()
    workspace.sweep(done)
    blocks = range(made.blocks)
    with (
        open_ledger(workspace, WHOLE) as ledger,
        open_executor(request, workspace, progress, blocks, done) as opened,
    ):
        executor, halved, flush = opened
        Run(made.block_grid, done, ledger, workspace.delete, to_predict=blocks, to_normalize=blocks).execute(executor)
        if request.client is not None:
            flush()  # workers on other hosts; what this one wrote is flushed when the output is completed
        assert all_done(made, done)
        return details(request, made, time.monotonic() - started, done, halved())


def _predict_part(request: Request, made: Plan, part: ArrayJobPart, progress: str | bool) -> Result:
    """Run one part, and complete the output if it is the last one."""
    started, output, told = time.monotonic(), request.output, str(request.output)
    turn = functools.partial(locked_in_turn, beside(output, ".lock"), told, str(part))
    with contextlib.ExitStack() as stack:
        with turn():
            own_lock = stack.enter_context(contextlib.ExitStack())
            own_lock.enter_context(locked(part.lock(output), told, str(part)))
            found = inspect_output(output)  # once more, now that no other part sets it up
            stored = None if found is None else _stored(request, found)
            if found is not None and found.complete:
                return open_result(output)
            workspace = set_up(request, stored or made, progress, resuming=stored is not None)
            made = workspace.plan
            own, done = part.own(made.blocks), workspace.progress()
            ledger = stack.enter_context(open_ledger(workspace, part.segment))
            executor, halved, flush = stack.enter_context(open_executor(request, workspace, progress, own, done))
        ledger_tail = LedgerTail(workspace.root, part.segment)
        run = functools.partial(Run, made.block_grid, done, ledger, workspace.delete, ledger_tail=ledger_tail)
        run(to_predict=own, to_normalize=own).execute(executor)
        flush()  # the part that completes the output may run on another host
        with turn():
            found = inspect_output(output)
            complete = found is not None and found.complete  # by another part, which finished this one's blocks
            if not complete:
                run(to_predict=range(0), to_normalize=part.left_to(output, made.blocks)).execute(executor)
                flush()
                complete = all_done(made, done)
                if complete:
                    workspace.join()
                    facts = details(request, made, time.monotonic() - started, done, halved())
                    conclude(request, workspace, facts, progress)
                    remove_workspace(workspace.root)
            own_lock.close()  # within the turn: the next one sees that this part is gone, and leaves nothing to it
    result = open_result(output)
    if not complete:
        result.attrs["complete"] = False
    return result
