"""The output: an ordinary Zarr v3 group with one array per head and its coordinates, or an OME-Zarr with pyramids.

xarray opens both; for the second see `ome_output`. In the first, heads of one scale are arrays of the group; heads of
different scales have a group each, `<head>/<head>`, as nodes of a tree. The group's attribute `oocpatch` says which run
wrote it, with which parameters, and whether it is complete. Only what it lists is ever replaced.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import LocalStore

from oocpatch.errors import OutputExists
from oocpatch.planning.box import Box, Ints, worthwhile
from oocpatch.planning.head import Head
from oocpatch.planning.plan import Plan
from oocpatch.storage.coordinates import plain_attributes, scaled_coords, write_coords
from oocpatch.storage.files import write_atomically
from oocpatch.storage.native import StagedArray, sweep_aside
from oocpatch.storage.ome_output import ARRAY, create_images, image_groups, images_of, ome_version, root_attributes
from oocpatch.storage.volume import Volume

ATTRIBUTE = "oocpatch"
METADATA = "zarr.json"
OME_ATTRIBUTES = frozenset({"ome", "multiscales", "image-label", "bioformats2raw.layout"})


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
        group = zarr.open_group(LocalStore(path), mode="r", zarr_format=_format(path), use_consolidated=False)
        record = group.attrs[ATTRIBUTE]
        assert isinstance(record, dict)
        return OutputRecord(**{**record, "arrays": tuple(record["arrays"])})
    except Exception as error:
        raise OutputExists(foreign) from error


def create_output(path: Path, plan: Plan, volume: Volume, workspace: Path, previous: OutputRecord | None) -> None:
    """Make the output's groups, arrays and coordinates; what a previous run wrote is replaced, nothing else."""
    coords = [scaled_coords(volume, plan, head) for head in plan.heads]
    version, split = ome_version(plan), is_tree(plan.heads)
    images = images_of(plan, volume) if version else ()
    heads = tuple(h.name for h in plan.heads)
    members = heads if split else (*heads, *(str(n) for n in coords[0]))
    if images:
        members = tuple(dict.fromkeys(p.split("/")[0] for image in images for p in image.paths))
        members = (*members, "OME") if all(image.group for image in images) else members
    details = {
        "block_shape": list(plan.block_shape),
        "context": list(plan.context),
        "snap": list(plan.snap),
        "unit": list(plan.unit),
        "heads": list(heads),
        "tree": split,
        "arrays": array_paths(plan),
        "pyramids": [{"levels": list(image.paths), "method": image.method} for image in images],
    }
    parameters = json.loads(json.dumps(plan.parameters, default=list))
    record = OutputRecord(plan.run_id, False, parameters, str(workspace), members, details)
    store, zarr_format = LocalStore(path), 2 if version == "0.4" else 3
    # xarray puts a group's attributes anew: without ours a crash would leave an output nobody may touch
    attributes = {ATTRIBUTE: _plain(record), **(root_attributes(images, version) if version else {})}
    if previous is not None:
        _replace(path, previous, attributes, zarr_format)
    else:
        zarr.create_group(store, attributes=attributes, overwrite=False, zarr_format=3 if zarr_format == 3 else 2)
    if version:
        create_images(store, plan, volume, images, version)
        return
    if not split:
        write_coords(path, coords[0], attributes)
    for head, found in zip(plan.heads, coords, strict=True):
        if split:
            zarr.create_group(store, path=head.name)
            write_coords(path / head.name, found, {})
        _create_array(store, head, plan, volume)


def _replace(path: Path, previous: OutputRecord, attributes: Mapping[str, Any], zarr_format: int) -> None:
    """Delete what a previous run wrote, and put other attributes in place of its own."""
    old = _format(path)
    store = LocalStore(path)
    group = zarr.open_group(store, mode="r+", zarr_format=3 if old == 3 else 2, use_consolidated=False)
    for name in previous.arrays:
        with contextlib.suppress(KeyError):
            del group[name]
    foreign = {k: v for k, v in dict(group.attrs).items() if k not in {ATTRIBUTE, *OME_ATTRIBUTES}}
    given = {**foreign, **attributes}
    if zarr_format == 3:
        write_atomically(path / METADATA, json.dumps({"zarr_format": 3, "node_type": "group", "attributes": given}))
    else:
        write_atomically(path / ".zattrs", json.dumps(given))
        write_atomically(path / ".zgroup", json.dumps({"zarr_format": 2}))
    stale = (".zgroup", ".zattrs", ".zmetadata") if zarr_format == 3 else (METADATA, ".zmetadata")
    for name in stale:
        (path / name).unlink(missing_ok=True)


def _format(path: Path) -> Literal[2, 3]:
    """Zarr's format of a group; where a crash left both, the newer."""
    return 2 if (path / ".zgroup").exists() and not (path / METADATA).exists() else 3


def is_tree(heads: Sequence[Head]) -> bool:
    """Whether heads have a group each: those of different scales cannot share coordinates."""
    return len({h.scale for h in heads}) > 1


def array_place(record: OutputRecord, head: str) -> str:
    """Where a head's array lies, by what the output says of itself."""
    details = record.details
    return str(dict(zip(details["heads"], details["arrays"], strict=True))[head])


def array_paths(plan: Plan) -> list[str]:
    """Where the heads' arrays lie in the output."""
    if ome_version(plan):
        groups = image_groups(plan.heads)
        return [f"{groups[head.name]}/scale0/{ARRAY}".strip("/") for head in plan.heads]
    return [f"{head.name}/{head.name}" if is_tree(plan.heads) else head.name for head in plan.heads]


def _create_array(store: LocalStore, head: Head, plan: Plan, volume: Volume) -> None:
    channel = () if head.channel_axis is None else (head.channel_axis,)
    channels = () if head.channel_axis is None else (head.out_channels,)
    ones = tuple(1 for _ in channels)
    shape = tuple(-(-n * times // per) for n, (times, per) in zip(plan.shape, head.scale, strict=True))
    zarr.create_array(
        store,
        name=array_paths(plan)[plan.heads.index(head)],
        shape=(*channels, *shape),
        chunks=(*ones, *head.chunks),
        shards=(*ones, *head.unit) if head.unit != head.chunks else None,
        dtype=head.out_dtype,
        fill_value=plan.parameters["output_fill"],
        dimension_names=(*channel, *plan.axes),
        attributes=plain_attributes(volume),
    )


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
        self._heads = plan.heads
        self._paths = array_paths(plan)
        # Channels come first, but in an OME-Zarr: there after time.
        self._channel = len(plan.axes) - plan.spatial if ome_version(plan) else 0
        self._arrays = [zarr.open_array(LocalStore(path), path=p, mode="r+") for p in self._paths]
        self._staged: list[StagedArray | None] = [None] * len(self._arrays)

    @contextlib.contextmanager
    def native(self, threads: int) -> Iterator[None]:
        """Let threads of zarrs write, where it is installed; not for processes that fork later."""
        self._staged = [StagedArray.open(array, threads) for array in self._arrays]
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
            # With time before channels, one index of time at a time is as it lies in memory, and need not be copied.
            step = (*found.unit[: self._channel], *box.stop[self._channel :])
            yield from box.split(found.unit if staged.by_unit else step)
            return
        voxel = found.out_channels * np.dtype(found.out_dtype).itemsize
        yield from box.split(worthwhile(found.unit, box.shape, REQUEST // (2 * voxel)))

    def write(self, head: int, box: Box, values: npt.NDArray[Any]) -> None:
        """Write `(C, *box.shape)`, a box of whole write units."""
        found = box.slices()
        channels = () if self._heads[head].channel_axis is None else (slice(0, len(values)),)
        selection = (*found[: self._channel], *channels, *found[self._channel :])
        values = np.moveaxis(values, 0, self._channel) if channels else values[0]
        staged = self._staged[head]
        if staged is None:
            self._arrays[head][selection] = values
        else:
            staged.write(selection, values)

    def complete(self, details: Mapping[str, Any]) -> None:
        """Record success in the group's attributes, and consolidate its metadata for xarray."""
        record = inspect_output(self.path)
        assert record is not None
        self._sweep(record)
        with warnings.catch_warnings():
            # Zarr v3 has no specification of consolidated metadata yet; xarray warns when there is none.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", UnstableSpecificationWarning)
            zarr.consolidate_metadata(LocalStore(self.path))
        _rewrite(self.path, replace(record, complete=True, details={**record.details, **details}))

    def _sweep(self, record: OutputRecord) -> None:
        """Delete what a crash in the middle of a chunk left: files that never got their names."""
        levels = [path for pyramid in record.details.get("pyramids", ()) for path in pyramid["levels"]]
        for left in [left for path in {*self._paths, *levels} for left in (self.path / path).rglob("*.partial")]:
            if left.is_dir():
                sweep_aside(left)
            else:
                left.unlink(missing_ok=True)


def _rewrite(path: Path, record: OutputRecord) -> None:
    """Put a record into the group's metadata, in one atomic step, and let consolidated ones list only what it lists."""
    if _format(path) == 2:
        consolidated = json.loads((path / ".zmetadata").read_text())
        _keep(consolidated["metadata"], record, {".zattrs", ".zgroup"})
        consolidated["metadata"][".zattrs"][ATTRIBUTE] = _plain(record)
        write_atomically(path / ".zmetadata", json.dumps(consolidated, indent=2))
        attributes = json.loads((path / ".zattrs").read_text())
        write_atomically(path / ".zattrs", json.dumps({**attributes, ATTRIBUTE: _plain(record)}, indent=2))
        return
    file = path / METADATA
    metadata = json.loads(file.read_text())
    metadata.setdefault("attributes", {})[ATTRIBUTE] = _plain(record)
    _keep(metadata["consolidated_metadata"]["metadata"], record)
    write_atomically(file, json.dumps(metadata, indent=2))


def _keep(members: dict[str, Any], record: OutputRecord, others: AbstractSet[str] = frozenset()) -> None:
    """Drop what the record does not list."""
    for name in [n for n in members if n.split("/")[0] not in {*record.arrays, *others}]:
        del members[name]


def _plain(record: OutputRecord) -> dict[str, Any]:
    names = ("run_id", "complete", "parameters", "workspace", "arrays", "details")
    return {n: list(v) if isinstance(v := getattr(record, n), tuple) else v for n in names}


Result = xarray.DataArray | xarray.Dataset | xarray.DataTree


def open_result(path: Path) -> Result:
    """The output, lazy and backed by the Zarr at `path`: an array, a dataset of several heads, or a tree of heads."""
    record = inspect_output(path)
    assert record is not None
    heads = record.details["heads"]
    consolidated = None if record.complete else False  # metadata is consolidated at the end of the run
    result: Result
    if record.details.get("pyramids"):
        found = {n: _finest(path, p).rename(n) for n, p in zip(heads, record.details["arrays"], strict=True)}
        if record.details["tree"]:
            result = xarray.DataTree.from_dict({n: array.to_dataset() for n, array in found.items()})
        else:
            result = found[heads[0]] if len(heads) == 1 else xarray.Dataset(found)
    elif record.details["tree"]:
        result = xarray.open_datatree(path, engine="zarr", consolidated=consolidated)
    else:
        dataset = xarray.open_zarr(path, consolidated=consolidated)
        result = dataset[heads[0]] if len(heads) == 1 else dataset[heads]
    for name in ("uncovered_voxels", "nonfinite_voxels"):
        if count := record.details.get(name, 0):
            result.attrs[name] = count
    return result


def _finest(path: Path, array: str) -> xarray.DataArray:
    """The finest level of an image."""
    parent, _, name = array.rpartition("/")
    # Of Zarr 2, xarray takes the fill value for missing data.
    opened = xarray.open_zarr(path / parent, consolidated=False, mask_and_scale=_format(path) == 3)
    found: xarray.DataArray = opened[name]
    return found


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
