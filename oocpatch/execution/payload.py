"""What travels to the workers of a cluster: a recipe for their jobs.

Paths, the plan, the model's spec or the pickled module; never an open array, a session or a device. It lies in the
workspace, which every worker must see under the same address; a task carries its address and SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from oocpatch.configuration.run_config import Request
from oocpatch.errors import PlanTooLarge
from oocpatch.execution.dask_clients import check_versions, versions_here
from oocpatch.execution.dask_cluster import pickled
from oocpatch.planning.box import Box
from oocpatch.planning.plan import Plan, human
from oocpatch.storage.files import make_folder, remove_folder, remove_tree
from oocpatch.storage.paths import Address, store_at
from oocpatch.volumes.sources import Source, open_source
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.workspace import Workspace

COPIED = 1 << 18
"""Bytes of a chunk of a volume in memory that is stored for workers."""


@dataclass(frozen=True, slots=True)
class RunHandle:
    """What every task of one call of `predict` carries.

    Attributes:
        token: name of the call.
        root: where the run's workspace is.
        digest: SHA-256 of the recipe.
        versions: of the client; a worker with other ones refuses.
        path: directories where the client finds modules, besides what is installed.
    """

    token: str
    root: Address
    digest: str
    versions: dict[str, str | None]
    path: tuple[str, ...]

    @property
    def folder(self) -> Address:
        """Where the call keeps what its workers read."""
        return self.root / "calls" / self.token


@dataclass(frozen=True, slots=True)
class VolumeRef:
    """Where a worker finds a volume.

    Attributes:
        source: a directory or a URL; or what was given, if it travels.
        names: of its axes.
        roles: of its axes, where its metadata tell them.
    """

    source: Address | Source
    names: tuple[str, ...]
    roles: tuple[str, ...] | None

    def open(self) -> Volume:
        """The volume."""
        source = self.source if isinstance(self.source, Source) else open_source(str(self.source))
        return Volume(replace(source, roles=self.roles), self.names)


@dataclass(frozen=True, slots=True)
class WorkerPayload:
    """What a job is made of.

    Attributes:
        plan: as JSON.
        volume: where it is.
        mask: where it is, if there is one.
        box: where patches are computed; None: everywhere.
        model: model, weights and their arguments, as they were given to `predict`, with absolute paths.
        rest: all other fields of the request.
    """

    plan: str
    volume: VolumeRef
    mask: VolumeRef | None
    box: Box | None
    model: Mapping[str, Any]
    rest: Mapping[str, Any]


def check_cluster(request: Request) -> None:
    """Refuse a model, or a function around it, that cannot be sent to other processes; and workers of other versions.

    Raises:
        ValueError: in that case, with what to do.
    """
    check_versions(request.client, versions_here())
    for name, value in (("model", _model(request)), *request.options.items()):
        try:
            pickled(value)
        except Exception as error:
            what = (
                "a model spec, such as 'file.py:name' or 'model.pt2'" if name == "model" else "an importable function"
            )
            raise ValueError(
                f"{name} must be {what}, to run on a cluster: what was given cannot be sent to other processes "
                f"({type(error).__name__}: {str(error)[:200]}); pass {what}"
            ) from error


def _model(request: Request) -> dict[str, Any]:
    """Model and weights as given, files by absolute paths: workers run in other directories."""
    given = dict(request.given)
    for name, absolute in (("model", absolute_spec), ("weights", _absolute)):
        value = given[name]
        given[name] = [absolute(v) for v in value] if isinstance(value, (list, tuple)) else absolute(value)
    return given


def absolute_spec(spec: Any) -> Any:
    """A model spec with the absolute path of its file; what names no file as it is.

    >>> absolute_spec("torch.nn:ReLU"), Path(absolute_spec("net.py:net")).is_absolute()
    ('torch.nn:ReLU', True)
    """
    if not isinstance(spec, str):
        return spec
    head, colon, name = spec.rpartition(":")
    kind = "numpy:" if head.startswith("numpy:") else ""
    if colon and head.endswith(".py"):
        return f"{kind}{Path(head.removeprefix(kind)).absolute()}:{name}"
    return _absolute(spec)


def _absolute(path: Any) -> Any:
    return str(Path(path).absolute()) if isinstance(path, (str, os.PathLike)) and Path(path).is_file() else path


@contextlib.contextmanager
def published_payload(request: Request, made: Plan, workspace: Workspace) -> Iterator[RunHandle]:
    """Put a recipe where workers find it, as long as the `with` block lasts.

    Raises:
        PlanTooLarge: when a volume in memory, which must be stored for them, takes more disk than allowed.
    """
    token = secrets.token_hex(8)
    folder = workspace.root / "calls" / token
    remove_tree(folder.parent)  # of calls that were killed
    make_folder(folder)
    try:
        mask = request.selection.mask
        recipe = WorkerPayload(
            plan=made.to_json(),
            volume=_place(request.volume, folder, "volume", request, made),
            mask=None if mask is None else _place(mask.volume, folder, "mask", request, made),
            box=request.selection.box,
            model=_model(request),
            rest={f.name: getattr(request, f.name) for f in fields(request) if f.name not in _BUILT},
        )
        data = pickled(recipe)
        (folder / "recipe").write_bytes(data)
        path = (str(Path.cwd()), *sys.path[:1])
        yield RunHandle(token, workspace.root, hashlib.sha256(data).hexdigest(), versions_here(), path)
    finally:
        remove_folder(folder)


_BUILT = ("volume", "models", "selection", "given", "client")
"""Fields of a request that do not travel as they are."""


def _place(volume: Volume, folder: Address, name: str, request: Request, made: Plan) -> VolumeRef:
    """Where workers find a volume; one in memory is stored for them."""
    source, names = volume.source, volume.axes.names
    in_memory = not source.chunked or (source.array is not None and isinstance(source.array.store, MemoryStore))
    if not in_memory:
        return VolumeRef(
            source.location if source.array is not None and source.location else source, names, source.roles
        )
    size = int(np.prod(source.shape, dtype=object)) * volume.dtype.itemsize
    if request.max_disk is not None and made.projected_disk + size > request.max_disk:
        raise PlanTooLarge(
            f"workers need the {name} on disk, and it is in memory: the workspace would need "
            f"{human(made.projected_disk + size, up=True)} but max_disk is {human(request.max_disk)}; raise max_disk, "
            "or store it as Zarr and pass its path"
        )
    side = max(1, int((COPIED / volume.dtype.itemsize) ** (1 / len(source.shape))))
    array = zarr.create_array(
        store_at(folder),
        name=name,
        shape=source.shape,
        chunks=tuple(min(side, n) for n in source.shape),
        dtype=volume.dtype,
        compressors=None,
        filters=None,
    )
    for start in range(0, source.shape[0], side):
        part = (slice(start, start + side), *(slice(None) for _ in source.shape[1:]))
        array[part] = source.load(part)
    return VolumeRef(folder / name, names, source.roles)
