"""The output: an ordinary Zarr v3 group with one array per head and its coordinates, or an OME-Zarr with pyramids.

xarray opens both; for the second see `ome_output`. In the first, heads of one scale are arrays of the group; heads of
different scales have a group each, `<head>/<head>`, as nodes of a tree. The group's attribute `oocpatch` says which run
wrote it, with which parameters, and whether it is complete. Only what it lists is ever replaced.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from zarr.abc.store import Store

from oocpatch.errors import CorruptData
from oocpatch.outputs.coordinates import json_attributes, scaled_coords, write_coords
from oocpatch.outputs.integrity import LEDGER, copy_ledger, other_files, verify_files
from oocpatch.outputs.ome_labels import parent_image
from oocpatch.outputs.ome_zarr import ARRAY, create_images, image_groups, images_of, ome_version, root_attributes
from oocpatch.outputs.omero import channel_settings, write_channel_settings
from oocpatch.outputs.record import (
    ATTRIBUTE,
    METADATA,
    OutputRecord,
    group_format,
    inspect_output,
    write_record,
)
from oocpatch.outputs.write_units import ChecksumStore, WriteChecksums, units_of
from oocpatch.planning.box import Box, unit_positions, worthwhile
from oocpatch.planning.heads import Head
from oocpatch.planning.plan import Plan
from oocpatch.storage.checksums import file_checksum
from oocpatch.storage.files import flush, write_atomically
from oocpatch.storage.paths import Address, consolidate, readable, store_at
from oocpatch.storage.zarrs_codec import StagedArray, sweep_aside
from oocpatch.volumes.volume import Volume

OME_ATTRIBUTES = frozenset({"ome", "multiscales", "image-label", "omero", "bioformats2raw.layout"})


def create_output(path: Address, plan: Plan, volume: Volume, workspace: Address, previous: OutputRecord | None) -> None:
    """Make the output's groups, arrays and coordinates; what a previous run wrote is replaced, nothing else."""
    coords = [scaled_coords(volume, plan, head) for head in plan.heads]
    version, split, beside = ome_version(plan), is_tree(plan.heads), parent_image(path)
    images = images_of(plan, volume, beside.levels if beside else None) if version else ()
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
    store, zarr_format = store_at(path), 2 if version == "0.4" else 3
    # xarray puts a group's attributes anew: without ours a crash would leave an output nobody may touch
    attributes = {ATTRIBUTE: record.to_dict(), **root_attributes(images, version, beside=beside is not None)}
    if previous is not None:
        _replace(path, previous, attributes, zarr_format)
    else:
        zarr.create_group(store, attributes=attributes, overwrite=False, zarr_format=3 if zarr_format == 3 else 2)
    if version:
        create_images(path, plan, volume, images, version)
    else:
        if not split:
            write_coords(path, coords[0], attributes)
        for head, found in zip(plan.heads, coords, strict=True):
            if split:
                zarr.create_group(store, path=head.name)
                write_coords(path / head.name, found, {})
            _create_array(store, head, plan, volume)
    if zarr_format == 3:
        files = {name: file_checksum(path / name) for name in other_files(path, members, array_paths(plan))}
        write_record(path, replace(record, details={**details, "files": files}))


def _replace(path: Address, previous: OutputRecord, attributes: Mapping[str, Any], zarr_format: int) -> None:
    """Delete what a previous run wrote, and put other attributes in place of its own."""
    old = group_format(path)
    store = store_at(path)
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


def is_tree(heads: Sequence[Head]) -> bool:
    """Whether heads have a group each: those of different scales cannot share coordinates."""
    return len({h.scale for h in heads}) > 1


def array_paths(plan: Plan) -> list[str]:
    """Where the heads' arrays lie in the output."""
    if ome_version(plan):
        groups = image_groups(plan.heads)
        return [f"{groups[head.name]}/scale0/{ARRAY}".strip("/") for head in plan.heads]
    return [f"{head.name}/{head.name}" if is_tree(plan.heads) else head.name for head in plan.heads]


def channel_position(plan: Plan) -> int:
    """Where the channel axis stands in the arrays, if there is one: first, but in an OME-Zarr after time."""
    return len(plan.axes) - plan.spatial if ome_version(plan) else 0


def _create_array(store: Store, head: Head, plan: Plan, volume: Volume) -> None:
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
        attributes=json_attributes(volume),
    )


WRITE_BYTES = 1 << 19
"""Bytes that one write should have at least: smaller write units are written several at a time."""


class Output:
    """The output's arrays, for tasks to write to. Heads go by their numbers.

    Args:
        path: the group.
        plan: the plan it was created with.
    """

    def __init__(self, path: Address, plan: Plan) -> None:
        self.path = path
        self._plan, self._heads = plan, plan.heads
        self._paths = array_paths(plan)
        self._channel = channel_position(plan)
        self._store = ChecksumStore(store_at(path))
        try:
            self._arrays = [zarr.open_array(self._store, path=p, mode="r+") for p in self._paths]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(
                f"the arrays of {path} are not what was written ({type(error).__name__}); "
                "start afresh with overwrite=True"
            ) from error
        self._staged: list[StagedArray | None] = [None] * len(self._arrays)

    @contextlib.contextmanager
    def with_chunk_writers(self, threads: int) -> Iterator[None]:
        """Let threads of zarrs write, where it is installed; not for processes that fork later."""
        plain = [zarr.open_array(store_at(self.path), path=p, mode="r+") for p in self._paths]
        self._staged = [StagedArray.open(array, threads) for array in plain]
        try:
            yield
        finally:
            for staged in self._staged:
                if staged is not None:
                    staged.close()
            self._staged = [None] * len(self._arrays)

    def split_writes(self, head: int, box: Box) -> Iterator[Box]:
        """Cut a box of whole write units into writes that are worth their overhead; they cover it exactly once."""
        found = self._heads[head]
        if (staged := self._staged[head]) is not None and not staged.by_unit:
            # With time before channels, one index of time at a time is as it lies in memory, and need not be copied.
            yield from box.split((*found.unit[: self._channel], *box.stop[self._channel :]))
            return
        voxel = found.out_channels * np.dtype(found.out_dtype).itemsize
        yield from box.split(worthwhile(found.unit, box.shape, WRITE_BYTES // (2 * voxel)))

    def write(self, head: int, box: Box, values: npt.NDArray[Any], written: WriteChecksums) -> None:
        """Write `(C, *box.shape)`, a box of whole write units; their CRCs are told to `written`."""
        found = box.slices()
        channels = () if self._heads[head].channel_axis is None else (slice(0, len(values)),)
        selection = (*found[: self._channel], *channels, *found[self._channel :])
        values = np.moveaxis(values, 0, self._channel) if channels else values[0]
        staged = self._staged[head]
        if staged is None:
            self._arrays[head][selection] = values
            crcs = [self._store.pop(key) for key in self._keys(head, selection)]
        else:
            crcs = staged.write(selection, values)
        units = units_of(box, self._heads[head].unit).shape
        found_crcs = np.array(crcs, np.uint32).reshape(*units[: self._channel], -1, *units[self._channel :])
        written.add(head, box, np.moveaxis(found_crcs, self._channel, 0))

    def _keys(self, head: int, selection: tuple[slice, ...]) -> Iterator[str]:
        """Keys of the write units of a selection, in C order."""
        array = self._arrays[head]
        for position in unit_positions(array.shards or array.chunks, selection):
            yield f"{self._paths[head]}/{array.metadata.encode_chunk_key(position)}"

    def complete(self, details: Mapping[str, Any], ledger: Address) -> None:
        """Have the disk take what was written, and record success in the group's attributes, for xarray consolidated.

        What `oocpatch check` needs later is kept: the plan, the records of the ledger, and the CRCs of all other files.

        Raises:
            CorruptData: when one of these is not as it was made.
        """
        found = inspect_output(self.path)
        assert found is not None
        self._sweep(found)
        settings = channel_settings(self.path, found.details, found.parameters)
        noted = write_channel_settings(
            self.path, settings, found.details, lambda d: write_record(self.path, replace(found, details=d))
        )
        record = replace(found, details=noted)
        details = {**details, "plan": json.loads(self._plan.to_json())}
        if group_format(self.path) == 3:  # Zarr 2 has no place for what is kept
            details["files"] = self._files(record, ledger)
        flush(self.path)
        consolidate(self.path)
        done = replace(record, complete=True, details={**record.details, **details})
        write_record(self.path, done, consolidated=True, omero=settings.get(""))
        flush(self.path)  # before anything deletes what a resume would need

    def _files(self, record: OutputRecord, ledger: Address) -> dict[str, int]:
        """The CRCs of all files that hold no write units, the ledger that is kept among them."""
        verify_files(self.path, record.details)
        kept = f"{self._paths[0]}/{LEDGER}"
        crc = copy_ledger(ledger, self.path / kept, self._plan.blocks)
        return {**record.details["files"], kept: crc}

    def _sweep(self, record: OutputRecord) -> None:
        """Delete what a crash in the middle of a chunk left: files that never got their names."""
        levels = [path for pyramid in record.details.get("pyramids", ()) for path in pyramid["levels"]]
        folders = [self.path / path for path in {*self._paths, *levels} if isinstance(self.path, Path)]
        for left in [left for folder in folders for left in folder.rglob("*.partial")]:
            if left.is_dir():
                sweep_aside(left)
            else:
                left.unlink(missing_ok=True)


Result = xarray.DataArray | xarray.Dataset | xarray.DataTree


def open_result(path: Address) -> Result:
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
        result = xarray.open_datatree(readable(path), engine="zarr", consolidated=consolidated)
    else:
        dataset = xarray.open_zarr(readable(path), consolidated=consolidated)
        result = dataset[heads[0]] if len(heads) == 1 else dataset[heads]
    for name in ("uncovered_voxels", "nonfinite_voxels"):
        if count := record.details.get(name, 0):
            result.attrs[name] = count
    return result


def _finest(path: Address, array: str) -> xarray.DataArray:
    """The finest level of an image."""
    parent, _, name = array.rpartition("/")
    # Of Zarr 2, xarray takes the fill value for missing data.
    opened = xarray.open_zarr(readable(path / parent), consolidated=False, mask_and_scale=group_format(path) == 3)
    found: xarray.DataArray = opened[name]
    return found
