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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from oocpatch.decide import make_plan, resumed
from oocpatch.errors import OutputBusy, OutputExists
from oocpatch.inference.buffers import lean_heap
from oocpatch.inference.finish import Finisher
from oocpatch.inference.scheduler import Run, Stopped, dask_threads
from oocpatch.inference.stages import Job, normalize_block, predict_block, window
from oocpatch.layout import postprocess_of
from oocpatch.planning.memory import TILE, reading
from oocpatch.planning.plan import Plan
from oocpatch.progress import bar_of, hidden, root_of
from oocpatch.request import Request, beside, make_request
from oocpatch.storage.ledger import Record
from oocpatch.storage.lock import clear_dead, holder, locked
from oocpatch.storage.output import Output, OutputRecord, Result, create_output, inspect_output, open_result
from oocpatch.storage.workspace import Workspace, remove_workspace

logger = logging.getLogger("oocpatch")


def predict(
    volume: Any,
    model: Any,
    output: str | os.PathLike[str],
    *,
    patch_size: int | Sequence[int] | str,
    patch_overlap: int | Sequence[int] = 0,
    overlap_mode: str | Mapping[str, str] = "hann",
    num_classes: int | None = None,
    padding_mode: str | None = None,
    fill: float = 0.0,
    axes: str | Sequence[str] | None = None,
    preprocess: str | Mapping[str, Any] | Callable[..., Any] | None = None,
    augment: str | Sequence[str] | Mapping[str, Any] | None = None,
    weights: str | Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    batch_size: int | str = 1,
    device: str = "auto",
    autocast: bool = False,
    postprocess: str | Callable[..., Any] | Mapping[str, Any] | None = None,
    output_dtype: Any = None,
    output_chunks: int | Sequence[int] | None = None,
    output_shards: int | Sequence[int] | None = None,
    output_fill: float = 0,
    max_memory: int | float | str = "auto",
    max_disk: int | float | str | None = None,
    block_shape: int | Sequence[int] | None = None,
    workspace: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    mask: Any = None,
    skip_empty: bool = False,
    client: None = None,
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
        volume: path or URL of a Zarr array or group or OME-Zarr, `zarr.Array`, `xarray.DataArray`, dask or numpy array.
        model: `torch.nn.Module`, or callable from `(B, C, *patch)` to `(B, C', *patch)`, or a model spec such as
            `"model.pt"` or `"package.module:name"`. Called by one thread at a time, in evaluation mode. A list: the
            mean of all.
        output: path of the Zarr group to write.
        patch_size: size of a patch in voxels; an int, or one per spatial axis; `"auto"`: chosen.
        patch_overlap: voxels shared by adjacent patches, in total, per axis.
        overlap_mode: `"crop"` moves values without arithmetic; `"average"`, `"hann"` and `"gaussian"` blend; `"max"`
            keeps the largest value; `"vote"` the most frequent label. A dict gives each of the model's outputs its own.
        num_classes: number of labels that are voted on.
        padding_mode: `"constant"` (with `fill`), `"edge"`, `"reflect"`, `"symmetric"` or `"wrap"`: patches also cover
            `patch_overlap // 2` voxels beyond the border. None: the first patch starts at the border.
        fill: value of the padding for `"constant"`.
        axes: names of the volume's axes, e.g. `"zyx"`, `"yxc"`, `"tczyx"`.
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
        postprocess: `"argmax"`, `"softmax"`, `"sigmoid"` or a function of blended scores `(C, *box)` that works voxel
            by voxel. A dict gives each of the model's outputs its own.
        output_dtype: dtype of the output; integers are rounded half to even and saturate. As a dict, of each.
        output_chunks: chunks of the output, in voxels, spatial; default: those of the volume, if reasonable.
        output_shards: shards of the output, in voxels, spatial; multiples of its chunks.
        output_fill: value of voxels that no patch covers.
        max_memory: bytes that the run may add to this process, e.g. `"2GiB"`; `"auto"`: a quarter of the machine's.
        max_disk: bytes that the workspace may take.
        block_shape: spatial shape of a unit of work, in voxels; fixes the bytes of the result across machines.
        workspace: directory for what is kept until the run is done; default: beside the output.
        workers: blocks to work on at a time.
        mask: array of any resolution over the same extent, all spatial axes; patches with no nonzero voxel in it are
            skipped.
        skip_empty: skip patches that hold nothing but what voxels hold that were never written.
        client: not offered in this version; None.
        output_format: `"auto"` or `"zarr"`; other formats are not offered in this version.
        resume: go on with an incomplete output; else it is refused.
        overwrite: start afresh; replaces only what oocpatch wrote.
        allow_nonfinite: keep NaN and infinities that the model gives, instead of failing their block.
        progress: `"auto"` shows a bar on a terminal; `"bar"` or True always; `"none"` or False never.

    Returns:
        The output, lazy and backed by the Zarr at `output`: a `DataArray` `([C',] *axes)`; of a model that gives a
        dict, a `Dataset`, or where scales differ a `DataTree` with a node per head. Its attribute `uncovered_voxels` is
        the number of voxels that no patch covered, if there are any.

    Raises:
        ValueError, TypeError: for bad arguments.
        PlanTooLarge: when the run would need more memory or disk than allowed; nothing is read or written.
        RunMismatch: when the output belongs to a run with other parameters.
        OutputExists: when the output holds other data. OutputBusy: when another run is at work on it.
        BlockFailed: when blocks failed; the others are done, and the same call retries only those.

    >>> import tempfile, numpy as np
    >>> volume = np.random.default_rng(0).random((40, 50), dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = predict(volume, torch.nn.Identity(), f"{folder}/out.zarr", patch_size=16, patch_overlap=8)
    ...     print(result.dims, bool(np.allclose(result, volume)))
    ('y', 'x') True
    """
    arguments = _arguments(locals())
    return _predict(make_request(**arguments), resume=resume, overwrite=overwrite, progress=progress)


def plan(
    volume: Any,
    model: Any,
    output: str | os.PathLike[str],
    *,
    resume: bool = True,
    overwrite: bool = False,
    progress: str | bool = "auto",
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
        arguments: all other arguments of `predict`.

    Raises:
        As `predict`, before its first block.

    >>> import numpy as np
    >>> made = plan(np.zeros((64, 64), np.float32), torch.nn.Identity(), "out.zarr", patch_size=32, patch_overlap=16)
    >>> made.patches, made.blocks, made.block_shape
    (9, 1, (64, 64))
    """
    unknown = arguments.keys() - _DEFAULTS.keys() - {"patch_size"}
    if unknown:
        raise TypeError(f"plan() got unexpected arguments: {', '.join(sorted(unknown))}")
    if "patch_size" not in arguments:
        raise TypeError("plan() needs patch_size")
    request = make_request(volume, model, output, **{**_DEFAULTS, **arguments})
    made, _ = _decide(request, resume=resume, overwrite=overwrite)

    def run(planned: Plan) -> Result:
        return _predict(request, resume=resume, overwrite=overwrite, progress=progress, planned=planned)

    return (made or make_plan(request)).bound(run)


_CONTROL = {"resume", "overwrite", "progress"}
_DEFAULTS: dict[str, Any] = {
    name: value for name, value in (predict.__kwdefaults__ or {}).items() if name not in _CONTROL
}


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _CONTROL}


def _decide(request: Request, *, resume: bool, overwrite: bool) -> tuple[Plan | None, OutputRecord | None]:
    """The stored plan to go on with, if any, and what lies at the output's place.

    Raises:
        OutputExists, OutputBusy, RunMismatch: when this call must not touch it.
    """
    who = holder(beside(request.output, ".lock"))
    if who is not None:
        raise OutputBusy(f"another run is at work on {request.output} ({who}); wait for it, or stop it first")
    found = inspect_output(request.output)
    if found is None or overwrite:
        return None, found
    if not resume:
        state = "complete" if found.complete else "incomplete"
        raise OutputExists(f"{request.output} is there ({state}) and resume is off; pass overwrite=True to replace it")
    workspace = Workspace.find(root_of(found))
    stored = workspace.plan if workspace is not None else None
    request.refuse_other_run(found)
    return (resumed(stored, request) if stored is not None and not found.complete else None), found


def _predict(
    request: Request, *, resume: bool, overwrite: bool, progress: str | bool, planned: Plan | None = None
) -> Result:
    stored, found = _decide(request, resume=resume, overwrite=overwrite)
    if found is not None and found.complete and not overwrite:
        remove_workspace(root_of(found))  # a crash after success may have left it, and its lock
        clear_dead(beside(request.output, ".lock"))
        return open_result(request.output)
    made = stored or planned or make_plan(request)
    request = request.settled(made.patch_size[request.looped :], made.batch_size)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with locked(beside(request.output, ".lock"), str(request.output)):
        found = inspect_output(request.output)
        if stored is not None and found is not None:
            workspace = Workspace(root_of(found), made)
        else:
            if found is not None:
                remove_workspace(root_of(found))
            made = made.knowing(request.statistics(hidden=hidden(progress)))
            create_output(request.output, made, request.volume, request.workspace, found)
            workspace = Workspace.create(request.workspace / made.run_id, made)
        Output(request.output, made).complete(_run(request, made, workspace, progress), workspace.root / "ledger")
        remove_workspace(workspace.root)
    return open_result(request.output)


def _details(made: Plan, seconds: float, uncovered: int, halved: int) -> dict[str, Any]:
    """Facts about a finished run, for the output's attributes."""
    return {
        **({"statistics": made.statistics} if made.statistics else {}),
        **({"halved_batches": halved} if halved else {}),
        "patches": made.patches,
        "blocks": made.blocks,
        "open_blocks": made.block_grid.num_open,
        "uncovered_voxels": uncovered,
        "seconds": round(seconds, 3),
        "torch_threads": made.torch_threads,
    }


def _run(request: Request, made: Plan, workspace: Workspace, progress: str | bool) -> dict[str, Any]:
    """Run the stages of a plan over what is not done yet; facts about the run."""
    started = time.monotonic()
    lean_heap()
    workspace.write_weights()
    done = workspace.progress()
    stop = threading.Event()
    predictor = request.predictor(
        copies_input=made.copies_input, torch_threads=made.torch_threads, statistics=made.statistics
    )
    ledger = workspace.ledger()
    ledger.append(Record("begun", 0))
    with contextlib.ExitStack() as stack:
        stack.callback(ledger.close)
        bar = stack.enter_context(bar_of(made, progress, made.patches_in(done.predicted)))
        stack.enter_context(predictor.ready())
        threads = made.way.io_threads
        reads = stack.enter_context(ThreadPoolExecutor(reading(threads), thread_name_prefix="oocpatch-read"))
        writes = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="oocpatch-write"))

        def on_patches(count: int) -> None:
            if stop.is_set():
                raise Stopped
            bar(count)

        output = Output(request.output, made)
        stack.enter_context(output.native(threads))
        job = Job(
            plan=made,
            volume=request.volume.native(reading(threads)),
            mask=request.mask,
            predictor=predictor,
            workspace=workspace,
            windows=tuple(window(made, head, request.options["device"]) for head in made.heads),
            output=output,
            finishers=tuple(_finisher(request, made, workspace, number) for number in range(len(made.heads))),
            reads=reads,
            writes=writes,
            allow_nonfinite=request.options["allow_nonfinite"],
            skip_value=request.options["skip_value"],
            on_patches=on_patches,
        )
        run = Run(
            blocks=made.block_grid,
            progress=done,
            ledger=ledger,
            predict=functools.partial(predict_block, job),
            normalize=functools.partial(normalize_block, job),
            delete=workspace.delete,
            stop=stop,
        )
        with dask_threads(made.concurrency) as submit:
            run.execute(submit, made.concurrency)
    return _details(made, time.monotonic() - started, done.uncovered, predictor.halving.count)


def _finisher(request: Request, made: Plan, workspace: Workspace, number: int) -> Finisher:
    head, weights = made.heads[number], None
    if head.blended and not head.dense:
        weights = tuple(torch.from_numpy(w).to(torch.float32) for w in workspace.weights(number))
    return Finisher(
        weights,
        postprocess_of(request.options, head.name, head.mode),
        request.looped,
        max(1, TILE // max(head.stored, head.out_channels)),
        dense=head.dense,
        divide=head.blended,
        fill=request.options["output_fill"],
    )
