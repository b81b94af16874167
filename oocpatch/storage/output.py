"""The output: an ordinary Zarr v3 group with one array per head and its coordinates, that xarray opens.

Heads of one scale are arrays of the group; heads of different scales have a group each, `<head>/<head>`, as nodes of a
tree. The group's attribute `oocpatch` says which run wrote it, with which parameters, and whether it is complete. Only
what it lists is ever replaced.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch.errors import CorruptData, OutputExists
from oocpatch.planning.box import Box, Ints, worthwhile
from oocpatch.planning.grid import Scale
from oocpatch.planning.head import Head
from oocpatch.planning.plan import Plan
from oocpatch.storage.checksum import file_checksum
from oocpatch.storage.files import write_atomically
from oocpatch.storage.kept import LEDGER, METADATA_CRC, keep_ledger, metadata_checksum, other_files
from oocpatch.storage.native import StagedArray
from oocpatch.storage.units import NotingStore, Written, unit_positions, units_of
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
    """Make the output's groups, arrays and coordinates; what a previous run wrote is replaced, nothing else."""
    coords = [scaled_coords(volume, plan, head) for head in plan.heads]
    split = is_tree(plan.heads)
    heads = tuple(h.name for h in plan.heads)
    members = heads if split else (*heads, *(str(n) for n in coords[0]))
    details = {
        "block_shape": list(plan.block_shape),
        "context": list(plan.context),
        "snap": list(plan.snap),
        "unit": list(plan.unit),
        "heads": list(heads),
        "tree": split,
    }
    parameters = json.loads(json.dumps(plan.parameters, default=list))
    record = OutputRecord(plan.run_id, False, parameters, str(workspace), members, details)
    store = LocalStore(path)
    if previous is not None:
        group = zarr.open_group(store, mode="r+", use_consolidated=False)
        for name in previous.arrays:
            with contextlib.suppress(KeyError):
                del group[name]
        rewrite(path, record)
    else:
        zarr.create_group(store, attributes={ATTRIBUTE: _plain(record)}, overwrite=False)
    # xarray puts a group's attributes anew: without ours a crash would leave an output nobody may touch
    attributes = {ATTRIBUTE: _plain(record)}
    if not split:
        _write_coords(path, coords[0], attributes)
    for head, found in zip(plan.heads, coords, strict=True):
        if split:
            zarr.create_group(store, path=head.name)
            _write_coords(path / head.name, found, {})
        _create_array(store, head, plan, volume)
    arrays = [array_path(head, plan.heads) for head in plan.heads]
    files = {name: file_checksum(path / name) for name in other_files(path, members, arrays)}
    rewrite(path, replace(record, details={**details, "files": files}))


def is_tree(heads: Sequence[Head]) -> bool:
    """Whether heads have a group each: those of different scales cannot share coordinates."""
    return len({h.scale for h in heads}) > 1


def array_path(head: Head, heads: Sequence[Head]) -> str:
    """Where a head's array lies in the output."""
    return f"{head.name}/{head.name}" if is_tree(heads) else head.name


def _write_coords(path: Path, coords: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
    if not coords:
        return
    with warnings.catch_warnings():
        # Texts as coordinates: Zarr v3 has no final specification of their dtype, and no other way to store them.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        dataset = xarray.Dataset(coords=coords, attrs=attributes)
        dataset.to_zarr(path, mode="a", consolidated=False, zarr_format=3)


def _create_array(store: LocalStore, head: Head, plan: Plan, volume: Volume) -> None:
    channel = () if head.channel_axis is None else (head.channel_axis,)
    channels = () if head.channel_axis is None else (head.out_channels,)
    ones = tuple(1 for _ in channels)
    shape = tuple(-(-n * times // per) for n, (times, per) in zip(plan.shape, head.scale, strict=True))
    zarr.create_array(
        store,
        name=array_path(head, plan.heads),
        shape=(*channels, *shape),
        chunks=(*ones, *head.chunks),
        shards=(*ones, *head.unit) if head.unit != head.chunks else None,
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


def scaled_coords(volume: Volume, plan: Plan, head: Head) -> dict[str, Any]:
    """The coordinates of an output: those of the volume that still fit, and those of scaled axes at the new centres."""
    scales = dict(zip(plan.axes, head.scale, strict=True))
    sizes = dict(zip(plan.axes, plan.shape, strict=True))
    if head.channel_axis is not None:
        sizes[head.channel_axis] = head.out_channels
    found = {}
    for name, variable in volume.source.coords.items():
        if name == head.name or any(sizes.get(str(d)) != n for d, n in variable.sizes.items()):
            continue
        if any(scales.get(str(d), (1, 1)) != (1, 1) for d in variable.dims):
            if variable.ndim != 1 or variable.dtype.kind not in "iuf":
                continue
            axis = str(variable.dims[0])
            values = _at_centres(np.asarray(variable.values, np.float64), scales[axis])
            found[name] = xarray.Variable((axis,), values, variable.attrs)
            continue
        plain = variable.copy(deep=False)
        plain.encoding = {}
        found[name] = plain
    for axis, scale in scales.items():
        if scale != (1, 1) and axis not in found:  # voxels of the volume, so that heads can be laid over it
            found[axis] = xarray.Variable((axis,), _at_centres(np.arange(sizes[axis], dtype=np.float64), scale))
    return found


def _at_centres(values: npt.NDArray[np.float64], scale: Scale) -> npt.NDArray[np.float64]:
    """Coordinates of the centres of an output's voxels, given those of the volume's.

    Voxel `j` covers `[j, j + 1) / scale` in voxel edges, so that its centre lies at `(j + 1/2) / scale - 1/2`.

    >>> _at_centres(np.array([0.0, 10.0, 20.0, 30.0]), (1, 2)).tolist()
    [5.0, 25.0]
    """
    times, per = scale
    n = len(values)
    centres = (np.arange(-(-n * times // per)) + 0.5) * per / times - 0.5
    if n == 1:
        return np.full(len(centres), values[0])
    low = np.clip(np.floor(centres).astype(int), 0, n - 2)  # beyond the ends the last step goes on
    return np.asarray(values[low] + (centres - low) * (values[low + 1] - values[low]))


REQUEST = 1 << 19
"""Bytes that one write should have at least: smaller write units are written several at a time."""


class Output:
    """The output's arrays, for tasks to write to. Heads go by their numbers.

    Args:
        path: the group.
        plan: the plan it was created with.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self._plan = plan
        self._heads = plan.heads
        self._paths = [array_path(h, plan.heads) for h in plan.heads]
        self._store = NotingStore(LocalStore(path))
        try:
            self._arrays = [zarr.open_array(self._store, path=p, mode="r+") for p in self._paths]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(
                f"the arrays of {path} are not what was written ({type(error).__name__}); "
                "start afresh with overwrite=True"
            ) from error
        self._staged: list[StagedArray | None] = [None] * len(self._arrays)

    @contextlib.contextmanager
    def native(self, threads: int) -> Iterator[None]:
        """Let threads of zarrs write, where it is installed; not for processes that fork later."""
        plain = [zarr.open_array(LocalStore(self.path), path=p, mode="r+") for p in self._paths]
        self._staged = [StagedArray.open(array, threads) for array in plain]
        try:
            yield
        finally:
            for staged in self._staged:
                if staged is not None:
                    staged.close()
            self._staged = [None] * len(self._arrays)

    def requests(self, head: int, box: Box) -> Iterator[Box]:
        """Cut a box of whole write units into writes that are worth their overhead; they cover it exactly once."""
        found = self._heads[head]
        if (staged := self._staged[head]) is not None:
            yield from box.split(found.unit) if staged.by_unit else [box]
            return
        voxel = found.out_channels * np.dtype(found.out_dtype).itemsize
        yield from box.split(worthwhile(found.unit, box.shape, REQUEST // (2 * voxel)))

    def write(self, head: int, box: Box, values: npt.NDArray[Any], written: Written) -> None:
        """Write `(C, *box.shape)`, a box of whole write units; their CRCs are told to `written`."""
        channels = () if self._heads[head].channel_axis is None else (slice(0, len(values)),)
        selection = (*channels, *box.slices())
        values = values if channels else values[0]
        staged = self._staged[head]
        if staged is None:
            self._arrays[head][selection] = values
            crcs = [self._store.pop(key) for key in self._keys(head, selection)]
        else:
            crcs = staged.write(selection, values)
        units = units_of(box, self._heads[head].unit).shape
        written.add(head, box, np.array(crcs, np.uint32).reshape(-1, *units))

    def _keys(self, head: int, selection: tuple[slice, ...]) -> Iterator[str]:
        """Keys of the write units of a selection, in C order."""
        array = self._arrays[head]
        for position in unit_positions(array, selection):
            yield f"{self._paths[head]}/{array.metadata.encode_chunk_key(position)}"

    def complete(self, details: Mapping[str, Any], ledger: Path) -> None:
        """Record success in the group's attributes, and consolidate its metadata for xarray.

        What `oocpatch check` needs later is kept: the plan, the records of the ledger, and the CRCs of all other files.

        Raises:
            CorruptData: when one of these is not as it was made.
        """
        record = inspect_output(self.path)
        assert record is not None
        self._sweep()
        if "files" not in record.details:
            raise CorruptData(f"{self.path}/zarr.json is not what was written; start afresh with overwrite=True")
        files = dict(record.details["files"])
        for name, crc in files.items():
            if file_checksum(self.path / name) != crc:
                raise CorruptData(f"{self.path / name} is not what was written; start afresh with overwrite=True")
        kept = f"{self._paths[0]}/{LEDGER}"
        files[kept] = keep_ledger(ledger, self.path / kept, self._plan.blocks)
        details = {**details, "plan": json.loads(self._plan.to_json()), "files": files}
        with warnings.catch_warnings():
            # Zarr v3 has no specification of consolidated metadata yet; xarray warns when there is none.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            zarr.consolidate_metadata(LocalStore(self.path))
        rewrite(self.path, replace(record, complete=True, details={**record.details, **details}), consolidated=True)

    def _sweep(self) -> None:
        """Delete what a crash in the middle of a chunk left: files that never got their names."""
        for left in [left for path in self._paths for left in (self.path / path).rglob("*.partial")]:
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def rewrite(path: Path, record: OutputRecord, *, consolidated: bool = False) -> None:
    """Put a record into the group's metadata, in one atomic step.

    Raises:
        CorruptData: when the metadata is not what was written.
    """
    file = path / "zarr.json"
    try:
        metadata = json.loads(file.read_text())
        metadata.setdefault("attributes", {})[ATTRIBUTE] = _plain(record)
        members = metadata.pop("consolidated_metadata")["metadata"] if consolidated else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(
            f"{file} is not what was written ({type(error).__name__}); delete {path}, and the same call starts afresh"
        ) from error
    metadata.pop("consolidated_metadata", None)
    if consolidated:
        own = {n: m for n, m in members.items() if n.split("/")[0] in record.arrays}
        metadata["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": own}
        metadata["attributes"][ATTRIBUTE]["details"][METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    write_atomically(file, json.dumps(metadata, indent=2))


def _plain(record: OutputRecord) -> dict[str, Any]:
    names = ("run_id", "complete", "parameters", "workspace", "arrays", "details")
    return {n: list(v) if isinstance(v := getattr(record, n), tuple) else v for n in names}


Result = xarray.DataArray | xarray.Dataset | xarray.DataTree


def open_result(path: Path) -> Result:
    """The output, lazy and backed by the Zarr at `path`: an array, a dataset of several heads, or a tree of heads."""
    record = inspect_output(path)
    assert record is not None
    heads = record.details["heads"]
    uncovered = record.details.get("uncovered_voxels", 0)
    result: Result
    if record.details["tree"]:
        result = xarray.open_datatree(path, engine="zarr")
    else:
        dataset = xarray.open_zarr(path)
        result = dataset[heads[0]] if len(heads) == 1 else dataset[heads]
    if uncovered:
        result.attrs["uncovered_voxels"] = uncovered
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
