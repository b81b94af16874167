"""The payload of a call on a cluster, from which workers make the context of their tasks.

It has addresses, the plan, the model's spec or the pickled module; never an open array, a session or a device. It lies
in the workspace, which every worker must see under the same address; a task carries its address and SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from zarr.storage import MemoryStore

from oocpatch.engine.patch_selection import Mask
from oocpatch.errors import PlanTooLarge
from oocpatch.execution.dask_clients import check_client, check_versions, device_of_rank, versions_here
from oocpatch.execution.dask_cluster import pickled
from oocpatch.execution.task_context import OpenTasks, RunInputs
from oocpatch.models.options import ModelOptions
from oocpatch.models.packages.package import PackageSpec
from oocpatch.models.pipeline import identity_of, load
from oocpatch.planning.plan import Plan, human
from oocpatch.storage.paths import StoragePath, expand_home
from oocpatch.volumes.alignment import Placement
from oocpatch.volumes.axes import Axes
from oocpatch.volumes.content import INTENSITY, LABELS, VOLUME
from oocpatch.volumes.sources import Source, open_source
from oocpatch.volumes.volume import Volume, chunks_in_memory
from oocpatch.workspace.workspace import Workspace

PAYLOAD = "payload"
"""Name of the file of a call's payload."""


@dataclass(frozen=True, slots=True)
class RunHandle:
    """The call of `predict` that a task belongs to.

    Attributes:
        token: name of the call.
        root: the run's workspace.
        digest: SHA-256 of the payload.
        versions: versions of the client; a worker with other ones refuses.
        path: directories where the client finds modules, besides what is installed.
        output: where the result is written.
    """

    token: str
    root: StoragePath
    digest: str
    versions: dict[str, str | None]
    path: tuple[str, ...]
    output: StoragePath

    @property
    def folder(self) -> StoragePath:
        """The directory of what the call's workers read."""
        return self.root / "calls" / self.token


@dataclass(frozen=True, slots=True)
class VolumeRef:
    """The address of a volume for workers.

    Attributes:
        source: a directory or a URL; or the source itself, if it can be pickled.
        axes: names, roles and order of its axes.
        copied: whether it is a copy of a volume in memory, whose files say nothing about it.
    """

    source: StoragePath | Source
    axes: Axes
    copied: bool = False

    def open(self) -> Volume:
        """Open the volume."""
        source = self.source if isinstance(self.source, Source) else open_source(str(self.source))
        return Volume(replace(source, units=None) if self.copied else source, self.axes)


@dataclass(frozen=True, slots=True)
class WorkerPayload:
    """The parts of a task's context.

    Attributes:
        plan: the plan as JSON.
        options: the model's options, with absolute paths.
        signature: the signature of the volume.
        fingerprint: the fingerprint of the model as a worker reads it.
        open_tasks: opens what the tasks share.
    """

    plan: str
    options: ModelOptions
    volume: VolumeRef
    mask: tuple[VolumeRef, Placement] | None
    signature: str
    fingerprint: Any
    open_tasks: OpenTasks
    intensity: VolumeRef | None

    @classmethod
    def of(cls, plan: Plan, inputs: RunInputs, refer: Callable[[Volume, str], VolumeRef]) -> WorkerPayload:
        """Return the payload of a run; `refer` says where other processes find a volume, by its name."""
        mask = inputs.mask
        return cls(
            plan=plan.to_json(),
            options=_with_absolute_paths(inputs.options),
            volume=refer(inputs.volume, "volume"),
            mask=None if mask is None else (refer(mask.volume, "mask"), mask.placement),
            signature=inputs.volume.signature,
            fingerprint=identity_of(inputs.options, inputs.models, sources=False).value,
            open_tasks=inputs.open_tasks,
            intensity=None if inputs.intensity is None else refer(inputs.intensity, "intensity"),
        )

    def open(self, rank: int) -> tuple[Plan, RunInputs]:
        """Load the model, for the device of a process's rank on its host, and open the arrays.

        Raises:
            ValueError: when arrays or model are not those of the client.
        """
        plan, volume = Plan.from_json(self.plan), self.volume.open()
        intensity = None if self.intensity is None else self.intensity.open()
        inputs_here = {VOLUME: volume} if plan.table is None else {LABELS: volume, INTENSITY: intensity}
        for name, opened in inputs_here.items():  # of an intensity with the names of channels
            expected = self.signature if name == VOLUME else plan.parameters[name]
            if opened is not None and opened.signature != (expected if isinstance(expected, str) else expected[0]):
                raise ValueError(f"the {name} at {opened.source.location} is not the one that the client reads")
        device = device_of_rank(rank, self.options.device, torch.cuda.device_count())
        options = replace(self.options, device=device)
        models = load(options, axes=volume.names[-volume.spatial_ndim :])
        if identity_of(options, models, sources=False).value != self.fingerprint:
            raise ValueError("the model that is loaded here is not the one that the client has")
        mask = None if self.mask is None else Mask(self.mask[0].open(), volume.shape, self.mask[1])
        return plan, RunInputs(options, volume, mask, models, self.open_tasks, intensity)


def check_cluster(options: ModelOptions, client: Any) -> None:
    """Refuse a model, or a function around it, that cannot be sent to other processes; and workers of other versions.

    Without a client, the workers are processes of this machine that will be started.

    Raises:
        ValueError: naming the parameter and what to pass instead.
    """
    if client is not None:
        check_client(client)
        check_versions(client, versions_here())
    options = _with_absolute_paths(options)
    for name in ("model", "preprocess", "postprocess"):
        try:
            pickled(getattr(options, name))
        except Exception as error:
            spec = "a model spec, such as 'file.py:name' or 'model.pt2'"
            kind = spec if name == "model" else "an importable function"
            raise ValueError(
                f"{name} must be {kind}, to run in other processes: what was given cannot be sent to other processes "
                f"({type(error).__name__}: {str(error)[:200]}); pass {kind}"
            ) from error


def _with_absolute_paths(options: ModelOptions) -> ModelOptions:
    """Return the options with the files of model and weights by absolute paths: workers run in other directories."""

    def each(value: Any, absolute: Callable[[Any], Any]) -> Any:
        return [absolute(v) for v in value] if isinstance(value, (list, tuple)) else absolute(value)

    return replace(options, model=each(options.model, absolute_spec), weights=each(options.weights, _absolute))


def absolute_spec(spec: Any) -> Any:
    """Return a model spec with the absolute path of its file; unchanged if it names none.

    >>> absolute_spec("torch.nn:ReLU"), Path(absolute_spec("net.py:net")).is_absolute()
    ('torch.nn:ReLU', True)
    """
    if not isinstance(spec, str):
        return spec
    if (package := PackageSpec.of(spec)) is not None:
        return package.absolute()
    head, colon, name = spec.rpartition(":")
    kind = "numpy:" if head.startswith("numpy:") else ""
    if colon and head.endswith(".py"):
        return f"{kind}{Path(expand_home(head.removeprefix(kind))).absolute()}:{name}"
    return _absolute(spec)


def _absolute(path: Any) -> Any:
    file = Path(expand_home(path)) if isinstance(path, (str, os.PathLike)) else None
    return str(file.absolute()) if file is not None and file.is_file() else path


@contextlib.contextmanager
def published_payload(
    plan: Plan, inputs: RunInputs, workspace: Workspace, output: StoragePath, max_disk: int | None
) -> Iterator[RunHandle]:
    """Put a payload where workers find it, as long as the `with` block lasts.

    Raises:
        PlanTooLarge: when a volume in memory, which must be stored for them, takes more disk than allowed.
    """
    token = secrets.token_hex(8)
    folder = workspace.root / "calls" / token
    folder.parent.remove_tree()  # of calls that were killed
    folder.make_folder()
    free_disk = None if max_disk is None else max_disk - plan.projected_disk
    try:
        payload = WorkerPayload.of(plan, inputs, lambda volume, name: volume_ref(volume, folder, name, free_disk))
        data = pickled(payload)
        (folder / PAYLOAD).write_plain(data)
        digest = hashlib.sha256(data).hexdigest()
        yield RunHandle(token, workspace.root, digest, versions_here(), import_folders(), output)
    finally:
        folder.remove_tree()
        folder.parent.remove_if_empty()


def import_folders() -> tuple[str, ...]:
    """Return where this process finds modules, besides what is installed."""
    return (str(Path.cwd()), *sys.path[:1])


@contextlib.contextmanager
def importable(folders: tuple[str, ...]) -> Iterator[None]:
    """Find the client's modules, too, after everything that is installed here."""
    before = list(sys.path)
    sys.path += folders
    try:
        yield
    finally:
        sys.path[:] = before


def as_given(volume: Volume) -> VolumeRef:
    """Return a volume by its address, or as it is where that alone does not open it: one in memory by its values."""
    source = volume.source
    # A packed array, or a level of an image in Zarr 2, may be decoded otherwise if its path alone is known.
    is_plain = not source.packing and source.image is None
    location = source.location if source.array is not None and source.location and is_plain else source
    return VolumeRef(location, volume.axes)


def volume_ref(volume: Volume, folder: StoragePath, name: str, free_disk: int | None) -> VolumeRef:
    """Return where workers find a volume; one in memory is stored for them."""
    source = volume.source
    in_memory = not source.chunked or (source.array is not None and isinstance(source.array.store, MemoryStore))
    if not in_memory:
        return as_given(volume)
    size = int(np.prod(source.shape, dtype=object)) * volume.dtype.itemsize
    if free_disk is not None and size > free_disk:
        raise PlanTooLarge(
            f"workers need the {name} on disk, and it is in memory: it takes {human(size, up=True)} of the workspace, "
            f"and max_disk leaves {human(max(0, free_disk))}; raise max_disk, or store the {name} as Zarr and pass its "
            "path"
        )
    chunks = chunks_in_memory(source)
    array = zarr.create_array(
        folder.store(),
        name=name,
        shape=source.shape,
        chunks=chunks,
        dtype=volume.dtype,
        zarr_format=3,
        compressors=None,
        filters=None,
    )
    for start in range(0, source.shape[0], chunks[0]):
        slab = (slice(start, start + chunks[0]), *(slice(None) for _ in source.shape[1:]))
        array[slab] = source.load(slab)
    return VolumeRef(folder / name, volume.axes, copied=True)
