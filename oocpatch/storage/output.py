"""The output: an ordinary Zarr v3 group with one array per head and its coordinates, that xarray opens.

The group's attribute `oocpatch` says which run wrote it, with which parameters, and whether it is complete. Only what
it lists is ever replaced.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch.errors import OutputExists
from oocpatch.planning.box import Box, Ints, worthwhile
from oocpatch.planning.plan import Plan
from oocpatch.storage.files import write_atomically
from oocpatch.storage.native import StagedArray
from oocpatch.storage.volume import Volume

ATTRIBUTE = "oocpatch"


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """What an output says of itself.

    Attributes:
        run_id: the run that wrote it.
        complete: whether that run is done.
        parameters: its fingerprint.
        workspace: directory of its workspace.
        arrays: names of what it wrote.
        details: facts for people: number of patches, uncovered voxels, versions.
    """

    run_id: str
    complete: bool
    parameters: Mapping[str, Any]
    workspace: str
    arrays: tuple[str, ...]
    details: Mapping[str, Any]


def inspect_output(path: Path) -> OutputRecord | None:
    """What lies at the output's place; None when nothing does.

    Raises:
        OutputExists: when it is something that oocpatch did not write.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise OutputExists(f"output must be a new path or an output of oocpatch, but {path} is a file")
    if all(p.name.endswith(".partial") for p in path.iterdir()):
        return None  # an empty directory, or one whose first file a crash kept from its name
    foreign = f"output must be a new path or an output of oocpatch, but {path} holds other data; choose another path"
    try:
        group = zarr.open_group(LocalStore(path), mode="r", zarr_format=3, use_consolidated=False)
        record = group.attrs[ATTRIBUTE]
        assert isinstance(record, dict)
        return OutputRecord(**{**record, "arrays": tuple(record["arrays"])})
    except Exception as error:
        raise OutputExists(foreign) from error


def create_output(path: Path, plan: Plan, volume: Volume, workspace: Path, previous: OutputRecord | None) -> None:
    """Make the output's group, arrays and coordinates; what a previous run wrote is replaced, nothing else."""
    head = plan.head
    coords = _coords(plan, volume)
    arrays = (head.name, *coords)
    details = {"block_shape": list(plan.block_shape), "unit": list(plan.unit)}
    record = OutputRecord(
        plan.run_id, False, json.loads(json.dumps(plan.parameters, default=list)), str(workspace), arrays, details
    )
    store = LocalStore(path)
    if previous is not None:
        group = zarr.open_group(store, mode="r+", use_consolidated=False)
        for name in previous.arrays:
            with contextlib.suppress(KeyError):
                del group[name]
        _rewrite(path, record)
    else:
        zarr.create_group(store, attributes={ATTRIBUTE: _plain(record)}, overwrite=False)
    if coords:
        with warnings.catch_warnings():
            # Texts as coordinates: Zarr v3 has no final specification of their dtype, and no other way to store them.
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            # xarray puts the group's attributes anew: without ours a crash would leave an output nobody may touch
            dataset = xarray.Dataset(coords=coords, attrs={ATTRIBUTE: _plain(record)})
            dataset.to_zarr(path, mode="a", consolidated=False, zarr_format=3)
    channel = () if head.channel_axis is None else (head.channel_axis,)
    channels = () if head.channel_axis is None else (head.out_channels,)
    ones = tuple(1 for _ in channels)
    sharded = plan.unit != plan.chunks
    zarr.create_array(
        store,
        name=head.name,
        shape=(*channels, *plan.shape),
        chunks=(*ones, *plan.chunks),
        shards=(*ones, *plan.unit) if sharded else None,
        dtype=head.out_dtype,
        fill_value=plan.parameters["output_fill"],
        dimension_names=(*channel, *plan.axes),
        attributes=_attributes(volume),
    )


def _attributes(volume: Volume) -> dict[str, Any]:
    """The volume's attributes, as far as JSON can hold them."""
    found = {}
    for key, value in volume.source.attrs.items():
        with contextlib.suppress(TypeError):
            found[str(key)] = json.loads(json.dumps(value, default=_json))
    return found


def _json(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _coords(plan: Plan, volume: Volume) -> dict[str, Any]:
    """The coordinates of the volume that still fit the output."""
    sizes = dict(zip(plan.axes, plan.shape, strict=True))
    if plan.head.channel_axis is not None:
        sizes[plan.head.channel_axis] = plan.head.out_channels
    found = {}
    for name, variable in volume.source.coords.items():
        if name != plan.head.name and all(sizes.get(str(d)) == n for d, n in variable.sizes.items()):
            plain = variable.copy(deep=False)
            plain.encoding = {}
            found[name] = plain
    return found


REQUEST = 1 << 19
"""Bytes that one write should have at least: smaller write units are written several at a time."""


class Output:
    """The output's array, for tasks to write to.

    Args:
        path: the group.
        plan: the plan it was created with.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self._plan = plan
        self._array = zarr.open_array(LocalStore(path), path=plan.head.name, mode="r+")
        self._staged: StagedArray | None = None

    @contextlib.contextmanager
    def native(self, threads: int) -> Iterator[None]:
        """Let threads of zarrs write, where it is installed; not for processes that fork later."""
        self._staged = StagedArray.open(self._array, threads)
        try:
            yield
        finally:
            if self._staged is not None:
                self._staged.close()
            self._staged = None

    def requests(self, box: Box) -> Iterator[Box]:
        """Cut a box of whole write units into writes that are worth their overhead; they cover it exactly once."""
        if self._staged is not None:
            yield box
            return
        head = self._plan.head
        voxel = head.out_channels * np.dtype(head.out_dtype).itemsize
        yield from box.split(worthwhile(self._plan.unit, box.shape, REQUEST // (2 * voxel)))

    def write(self, box: Box, values: npt.NDArray[Any]) -> None:
        """Write `(C, *box.shape)`, a box of whole write units."""
        channels = () if self._plan.head.channel_axis is None else (slice(0, len(values)),)
        selection = (*channels, *box.slices())
        values = values if channels else values[0]
        if self._staged is None:
            self._array[selection] = values
        else:
            self._staged.write(selection, values)

    def complete(self, details: Mapping[str, Any]) -> None:
        """Record success in the group's attributes, and consolidate its metadata for xarray."""
        record = inspect_output(self.path)
        assert record is not None
        self._sweep()
        with warnings.catch_warnings():
            # Zarr v3 has no specification of consolidated metadata yet; xarray warns when there is none.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            zarr.consolidate_metadata(LocalStore(self.path))
        _rewrite(self.path, replace(record, complete=True, details={**record.details, **details}), consolidated=True)

    def _sweep(self) -> None:
        """Delete what a crash in the middle of a chunk left: files that never got their names."""
        for left in list((self.path / self._plan.head.name).rglob("*.partial")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def _rewrite(path: Path, record: OutputRecord, *, consolidated: bool = False) -> None:
    """Put a record into the group's metadata, in one atomic step."""
    file = path / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata.setdefault("attributes", {})[ATTRIBUTE] = _plain(record)
    if consolidated:
        members = metadata["consolidated_metadata"]["metadata"]
        metadata["consolidated_metadata"]["metadata"] = {n: m for n, m in members.items() if n in record.arrays}
    else:
        metadata.pop("consolidated_metadata", None)
    write_atomically(file, json.dumps(metadata, indent=2))


def _plain(record: OutputRecord) -> dict[str, Any]:
    names = ("run_id", "complete", "parameters", "workspace", "arrays", "details")
    return {n: list(v) if isinstance(v := getattr(record, n), tuple) else v for n in names}


def open_result(path: Path, name: str) -> xarray.DataArray:
    """The output as a lazy `xarray.DataArray`, backed by the Zarr at `path`."""
    result: xarray.DataArray = xarray.open_zarr(path)[name]
    return result


DEFAULT_CHUNKS = {1: 1 << 18, 2: 512, 3: 64, 4: 32}
CHUNK_BYTES = (1 << 12, 1 << 26)
"""Chunks of an input that are smaller or larger than this are not taken over for the output."""


def default_chunks(volume: Volume, out_itemsize: int) -> Ints:
    """Chunks for an output: the volume's when they are reasonable, else 64^3, 512^2 and the like."""
    chunks = tuple(min(c, n) for c, n in zip(volume.chunks, volume.shape, strict=True))
    size = out_itemsize * int(np.prod(chunks, dtype=object))
    if volume.source.chunked and (
        CHUNK_BYTES[0] <= size <= CHUNK_BYTES[1] or (chunks == volume.shape and size <= CHUNK_BYTES[1])
    ):
        return chunks
    looped = len(volume.shape) - volume.spatial_ndim
    side = DEFAULT_CHUNKS.get(volume.spatial_ndim, 16)
    return tuple(1 if a < looped else min(side, n) for a, n in enumerate(volume.shape))
