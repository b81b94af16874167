"""The output: an ordinary Zarr v3 group with one array per head and its coordinates, or an OME-Zarr with pyramids.

xarray opens both; for the second see `ome_zarr`. In the first, heads of the same scale are arrays of the group; heads
of different scales have a group each, `<head>/<head>`, as nodes of a tree. The group's attribute `oocpatch` is the
record of the run that wrote it: its parameters, and whether it is complete. Only the listed members are ever replaced.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from zarr.abc.store import Store

from oocpatch.errors import CorruptData
from oocpatch.outputs.coordinates import head_attributes, scaled_coords, write_coords
from oocpatch.outputs.integrity import LEDGER, copy_ledger, latest_lines, other_files, verify_files
from oocpatch.outputs.ome_labels import parent_image
from oocpatch.outputs.ome_zarr import ARRAY, create_images, image_groups, images_of, is_ome_zarr, root_attributes
from oocpatch.outputs.omero import channel_settings, write_channel_settings
from oocpatch.outputs.record import (
    ATTRIBUTE,
    METADATA,
    OutputRecord,
    publish_table,
    require_output,
    table_record,
    write_record,
    write_table_record,
)
from oocpatch.outputs.row_arrays import create_rows, row_files, row_members
from oocpatch.outputs.write_units import COMPRESSOR, ChecksumStore, WriteChecksums, units_of
from oocpatch.planning.box import Box, Ints, unit_positions, worthwhile
from oocpatch.planning.heads import Head, distinct_channel_axes
from oocpatch.planning.plan import Plan
from oocpatch.storage.checksums import file_checksum
from oocpatch.storage.paths import LocalPath, StoragePath, consolidate
from oocpatch.storage.zarrs_codec import StagedArray, sweep_staging
from oocpatch.volumes.volume import Volume


def create_output(
    path: StoragePath, plan: Plan, volume: Volume, root: StoragePath, previous: OutputRecord | None
) -> None:
    """Create the groups, arrays and coordinates of an output; only what a previous run wrote is replaced.

    `root` is the workspace of the run. A table begins with its record alone.
    """
    parameters = json.loads(json.dumps(plan.parameters, default=list))
    sizes = {"block_shape": plan.block_shape, "context": plan.context, "snap": plan.snap, "unit": plan.unit}
    details: dict[str, Any] = {name: list(values) for name, values in sizes.items()}
    if plan.table is not None:
        if previous is not None:
            path.unlink(missing_ok=True)
        write_table_record(path, OutputRecord(root.name, False, parameters, str(root.parent), (), details))
        return
    coords = [scaled_coords(volume, plan, head) for head in plan.heads]
    split, parent = is_tree(plan.heads), parent_image(path)
    images = images_of(plan, volume, parent.levels if parent else None) if is_ome_zarr(plan) else ()
    heads, rows = tuple(h.name for h in plan.heads), row_members(plan)
    common = {} if split else {name: variable for of_head in coords[::-1] for name, variable in of_head.items()}
    members = (*heads, *map(str, common))
    if images:
        members = tuple(dict.fromkeys(p.split("/")[0] for image in images for p in image.paths))
        members = (*members, "OME") if all(image.group for image in images) else members
    details |= {
        "heads": list(heads),
        **({"rows": list(rows)} if rows else {}),
        "tree": split,
        "arrays": array_paths(plan),
        "display": {h.name: volume.source.display for h in plan.heads if _shows_channels(h, volume)},
        "channel_axes": list(distinct_channel_axes(plan.heads, plan.in_channels)),
        "pyramids": [{"levels": list(image.paths), "method": image.method} for image in images],
    }
    record = OutputRecord(root.name, False, parameters, str(root.parent), (*members, *rows), details)
    store = path.store()
    # xarray replaces the attributes of a group: without the record, a crash would leave an output nobody may replace
    attributes = {ATTRIBUTE: record.to_dict(path), **root_attributes(images, in_parent=parent is not None)}
    if previous is not None:
        _replace(path, previous, attributes)
    else:
        zarr.create_group(store, attributes=attributes, overwrite=False, zarr_format=3)
    if images:
        create_images(path, plan, volume, images)
    else:
        if not split:
            write_coords(path, common, attributes)
        for number, head in enumerate(plan.heads):
            if split:
                zarr.create_group(store, path=head.name, zarr_format=3)
                write_coords(path / head.name, coords[number], {})
            _create_array(store, number, plan, volume)
    create_rows(path, plan, volume)
    files = {name: file_checksum(path / name) for name in other_files(path, members, array_paths(plan))}
    write_record(path, replace(record, details={**details, "files": files}))


def _shows_channels(head: Head, volume: Volume) -> bool:
    """Return whether a head may have the channels of the volume, which has display settings for them."""
    display = volume.source.display or {}
    return not head.labels and head.out_channels == volume.channels == len(display)


def _replace(path: StoragePath, previous: OutputRecord, attributes: Mapping[str, Any]) -> None:
    """Delete what a previous run wrote, and replace its attributes."""
    group = zarr.open_group(path.store(), mode="r+", zarr_format=3, use_consolidated=False)
    for name in previous.arrays:
        with contextlib.suppress(KeyError):
            del group[name]
    merged = {**{k: v for k, v in dict(group.attrs).items() if k not in {ATTRIBUTE, "ome"}}, **attributes}
    (path / METADATA).write_atomic(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": merged}))


def is_tree(heads: Sequence[Head]) -> bool:
    """Return whether each head has a group of its own, since heads of different scales cannot share coordinates."""
    return len({h.scale for h in heads}) > 1


def stored_ledger(path: StoragePath, plan: Plan) -> StoragePath:
    """Return where a complete output has the records of its run."""
    return table_record(path) if plan.table is not None else path / ledger_path(plan)


def array_paths(plan: Plan) -> list[str]:
    """Return the paths of the heads' arrays in the output."""
    if is_ome_zarr(plan):
        groups = image_groups(plan.heads)
        return [f"{groups[head.name]}/scale0/{ARRAY}".strip("/") for head in plan.heads]
    return [f"{head.name}/{head.name}" if is_tree(plan.heads) else head.name for head in plan.heads]


def ledger_path(plan: Plan) -> str:
    """Return the path of the ledger in a complete output: in its first array."""
    first, *_ = *array_paths(plan), *row_members(plan)
    return f"{first}/{LEDGER}"


def channel_position(plan: Plan) -> int:
    """Return the position of the channel axis in the arrays that have one: in an OME-Zarr after time."""
    if is_ome_zarr(plan):
        return len(plan.axes) - plan.spatial
    return plan.heads[0].channel_position if plan.heads else 0


def _create_array(store: Store, number: int, plan: Plan, volume: Volume) -> None:
    head = plan.heads[number]
    position, has_channels = channel_position(plan), head.channel_axis is not None

    def insert(value: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        return (*values[:position], value, *values[position:]) if has_channels else tuple(values)

    zarr.create_array(
        store,
        name=array_paths(plan)[number],
        shape=insert(head.out_channels, plan.frames[number].grid.shape),
        chunks=insert(1, head.chunks),
        shards=insert(1, head.unit) if head.unit != head.chunks else None,
        dtype=head.out_dtype,
        compressors=COMPRESSOR,
        zarr_format=3,
        fill_value=plan.output_fill,
        dimension_names=insert(head.channel_axis, plan.axes),
        attributes=head_attributes(volume, plan, head),
    )


WRITE_BYTES = 1 << 19
"""Bytes of one write at least: several smaller write units are written together."""


class Output:
    """The arrays of an output, for tasks to write to. Heads are addressed by their numbers.

    Args:
        path: group of the output.
        plan: plan that the output was created with.
    """

    def __init__(self, path: StoragePath, plan: Plan) -> None:
        self.path = path
        self._plan, self._heads = plan, plan.heads
        self._paths = array_paths(plan)
        self._channel = channel_position(plan)
        self._store = ChecksumStore(path.store())
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
        """Write with threads of zarrs, if it is installed. A process with such threads must not fork."""
        arrays = [zarr.open_array(self.path.store(), path=p, mode="r+") for p in self._paths]
        self._staged = [StagedArray.open(array, threads) for array in arrays]
        try:
            yield
        finally:
            for staged in self._staged:
                if staged is not None:
                    staged.close()
            self._staged = [None] * len(self._arrays)

    def flush(self) -> None:
        """Wait until what was written to the output's file system is on the disk."""
        (self.path if self._plan.table is None else self.path.parent).flush()

    def split_writes(self, head: int, box: Box) -> Iterator[Box]:
        """Cut a box of whole write units into writes large enough for their overhead; they cover it exactly once."""
        settings = self._heads[head]
        if (staged := self._staged[head]) is not None and not staged.by_unit:
            # With time before channels, one index of time is contiguous in memory, and need not be copied.
            yield from box.split((*settings.unit[: self._channel], *box.stop[self._channel :]))
            return
        voxel = settings.out_channels * np.dtype(settings.out_dtype).itemsize
        yield from box.split(worthwhile(settings.unit, box.shape, WRITE_BYTES // (2 * voxel)))

    def write(self, head: int, box: Box, values: npt.NDArray[Any], written: WriteChecksums) -> None:
        """Write `(C, *box.shape)`, a box of whole write units, and add their CRCs to `written`."""
        spatial = box.slices()
        channels = () if self._heads[head].channel_axis is None else (slice(0, len(values)),)
        selection = (*spatial[: self._channel], *channels, *spatial[self._channel :])
        values = np.moveaxis(values, 0, self._channel) if channels else values[0]
        staged = self._staged[head]
        if staged is None:
            array = self._arrays[head]
            array[selection] = values
            keys = map(array.metadata.encode_chunk_key, unit_positions(array.shards or array.chunks, selection))
            crcs = [self._store.pop(f"{self._paths[head]}/{key}") for key in keys]
        else:
            crcs = staged.write(selection, values)
        units = units_of(box, self._heads[head].unit).shape
        grid = np.array(crcs, np.uint32).reshape(*units[: self._channel], -1, *units[self._channel :])
        written.add(head, box, np.moveaxis(grid, self._channel, 0))

    def unit_name(self, head: int, position: Ints) -> str:
        """Return the name of the file of a unit from its position, channel first."""
        channel = () if self._heads[head].channel_axis is None else position[:1]
        before, after = position[1 : 1 + self._channel], position[1 + self._channel :]
        return f"{self._paths[head]}/{self._arrays[head].metadata.encode_chunk_key((*before, *channel, *after))}"

    def remove_empty(self, written: WriteChecksums) -> None:
        """Delete files of units that now have none: an earlier attempt, over other input, may have written them."""
        for head, position in written.empty_units():
            name = self.unit_name(head, position)
            if isinstance(self.path, LocalPath) or hash(name) in self._objects_before:
                (self.path / name).unlink(missing_ok=True)

    @functools.cached_property
    def _objects_before(self) -> frozenset[int]:
        """Hashes of the names of the objects that were there at first: one listing instead of many requests."""
        return frozenset(map(hash, self.path.list_files()))

    def complete(self, details: Mapping[str, Any], ledger: StoragePath, table: StoragePath | None = None) -> None:
        """Flush the output to disk, consolidate its metadata, and mark it complete in its record.

        The output stores what `oocpatch check` needs: the plan, the records of the ledger, and the CRCs of other files.

        Args:
            details: facts about the run.
            ledger: its ledger.
            table: the file of a table.

        Raises:
            CorruptData: if a file was changed after it was written.
        """
        details = {**details, "plan": json.loads(self._plan.to_json())}
        if isinstance(self.path, LocalPath) and isinstance(table, LocalPath):
            publish_table(self.path, table, details, latest_lines(ledger, self._plan.blocks))
            return
        incomplete = require_output(self.path)
        self._sweep(incomplete)
        settings = channel_settings(self.path, incomplete.details, incomplete.parameters)
        recorded = write_channel_settings(
            self.path, settings, incomplete.details, lambda d: write_record(self.path, replace(incomplete, details=d))
        )
        record = replace(incomplete, details=recorded)
        verify_files(self.path, record.details)
        copy = ledger_path(self._plan)
        files = {**record.details["files"], **row_files(self.path, self._plan)}
        has_scores = bool(self._plan.scores)  # whose files are gone
        files[copy] = copy_ledger(ledger, self.path / copy, self._plan.blocks, stamps=not has_scores)
        details = {**record.details, **details, "files": files}
        self.path.flush()
        consolidate(self.path)
        done = replace(record, complete=True, details=details)
        write_record(self.path, done, consolidated=True, omero=settings.get(""))
        self.path.flush()  # before anything deletes what a resume would need

    def _sweep(self, record: OutputRecord) -> None:
        """Delete the temporary files of a crash in the middle of a chunk."""
        levels = [path for pyramid in record.details.get("pyramids", ()) for path in pyramid["levels"]]
        arrays = {*self._paths, *levels, *row_members(self._plan)}
        folders = [self.path / path for path in arrays if isinstance(self.path, LocalPath)]
        for left in [left for folder in folders for left in folder.rglob("*.partial")]:
            if left.is_dir():
                sweep_staging(left)
            else:
                left.unlink(missing_ok=True)


Result = xarray.DataArray | xarray.Dataset | xarray.DataTree


def open_result(path: StoragePath) -> Result:
    """Open an output lazily: as an array, a dataset of several heads, or a tree of heads of different scales.

    Vectors of patches are arrays of the dataset along `patch`, or of the root of the tree.
    """
    record = require_output(path)
    heads = record.details["heads"]
    consolidated = None if record.complete else False  # metadata is consolidated at the end of the run
    rows = list(record.details.get("rows", ()))
    result: Result
    if record.details.get("pyramids"):
        arrays = {}
        axes = record.details.get("channel_axes", [None] * len(heads))
        for head, path_of_array, axis in zip(heads, record.details["arrays"], axes, strict=True):
            group, _, name = path_of_array.rpartition("/")
            array = xarray.open_zarr((path / group).xarray_source(), consolidated=False)[name].rename(head)
            own = str(axis).removesuffix(f"_{head}")
            is_renamed = axis not in {None, *array.dims} and len(heads) > 1 and not record.details["tree"]
            arrays[head] = array.rename({own: axis}) if is_renamed else array
        if record.details["tree"]:
            result = xarray.DataTree.from_dict({n: array.to_dataset() for n, array in arrays.items()})
        else:
            result = arrays[heads[0]] if len(heads) == 1 and not rows else xarray.Dataset(arrays)
        if rows and not isinstance(result, xarray.DataArray):
            of_rows = xarray.open_zarr(path.xarray_source(), consolidated=False)[rows]
            result = result.assign(of_rows.variables)
    elif record.details["tree"]:
        result = xarray.open_datatree(path.xarray_source(), engine="zarr", consolidated=consolidated)
    else:
        dataset = xarray.open_zarr(path.xarray_source(), consolidated=consolidated)
        result = dataset[heads[0]] if len(heads) == 1 and not rows else dataset[[*heads, *rows]]
    if counts := record.details.get("objects"):  # of several heads by name
        for name, numbers in (counts if isinstance(counts, dict) else {heads[0]: counts}).items():
            array = (
                result
                if isinstance(result, xarray.DataArray)
                else result[f"{name}/{name}" if record.details["tree"] else name]
            )
            array.attrs["objects"] = numbers[0] if len(numbers) == 1 else numbers
    for head, path_of_array in zip(heads, record.details["arrays"], strict=True):
        member = f"{head}/{head}" if record.details["tree"] else head
        array = result if isinstance(result, xarray.DataArray) else result[member]
        array.encoding["source"] = str(path / path_of_array)  # as xarray does for other files
    for name in ("uncovered_voxels", "nonfinite_voxels"):
        if count := record.details.get(name, 0):
            result.attrs[name] = count
    return result
