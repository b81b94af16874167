"""The record of an output: the attribute `oocpatch` of its group, read, and replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import zarr

from oocpatch.errors import CorruptData, OutputExists
from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.storage.paths import LocalPath, StoragePath

ATTRIBUTE = "oocpatch"
METADATA = "zarr.json"


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """The record of an output.

    Attributes:
        run_id: id of the run that wrote it.
        complete: whether that run is complete.
        parameters: parameters of the run, which are its fingerprint.
        workspace: address of the run's workspace.
        arrays: names of the arrays and groups that the run wrote.
        details: other facts: number of patches, uncovered voxels, versions.
    """

    run_id: str
    complete: bool
    parameters: Mapping[str, Any]
    workspace: str
    arrays: tuple[str, ...]
    details: Mapping[str, Any]

    def to_dict(self, path: StoragePath) -> dict[str, Any]:
        """Return the record of the output at a path as JSON stores it.

        The address of a workspace beside the output is relative, so that both may move.
        """
        workspace = self.workspace.removeprefix(f"{path.parent}/")
        return {**asdict(self), "workspace": workspace, "arrays": list(self.arrays)}


def inspect_output(path: StoragePath) -> OutputRecord | None:
    """Return the record of the output at a path; None if there is nothing.

    Raises:
        OutputExists: if there is something that oocpatch did not write.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise OutputExists(f"output must be a new path or an output of oocpatch, but {path} is a file")
    if isinstance(path, LocalPath) and all(p.name.endswith(".partial") for p in path.iterdir()):
        return None  # an empty directory, or a crash before its first file was renamed
    foreign = f"output must be a new path or an output of oocpatch, but {path} holds other data; choose another path"
    try:
        group = zarr.open_group(path.store(), mode="r", zarr_format=3, use_consolidated=False)
        record: Any = group.attrs[ATTRIBUTE]
        workspace = record["workspace"]
        if "://" not in workspace and not PurePath(workspace).is_absolute():
            workspace = str(path.parent / workspace)
        return OutputRecord(**{**record, "workspace": workspace, "arrays": tuple(record["arrays"])})
    except Exception as error:
        if path.is_outage(error):
            raise
        raise OutputExists(foreign) from error


def find_output(path: StoragePath) -> OutputRecord | None:
    """Return the record of an output that is only read; None if there is nothing.

    Raises:
        OutputExists: if there is something that oocpatch did not write.
    """
    try:
        return inspect_output(path)
    except OutputExists as error:
        raise OutputExists(f"output must be one that oocpatch wrote, but {path} holds other data") from error


def require_output(path: StoragePath) -> OutputRecord:
    """Return the record of an output that must be there.

    Raises:
        CorruptData: if there is none.
    """
    record = inspect_output(path)
    if record is None:
        raise CorruptData(f"the output {path} was deleted while it was in use; run the same call again")
    return record


def array_path(record: OutputRecord, head: str) -> str:
    """Return the path of a head's array in the output."""
    details = record.details
    return str(dict(zip(details["heads"], details["arrays"], strict=True))[head])


def write_record(path: StoragePath, record: OutputRecord, *, consolidated: bool = False, omero: Any = None) -> None:
    """Replace the record in the group's metadata, atomically.

    Args:
        path: the output.
        record: its new record.
        consolidated: whether to keep consolidated metadata, of the members that the record lists.
        omero: display settings of the group's image, if it has any.

    Raises:
        CorruptData: if the metadata were changed after they were written.
    """
    try:
        file = path / METADATA
        metadata = json.loads(file.read_text())
        metadata.setdefault("attributes", {})[ATTRIBUTE] = record.to_dict(path)
        if omero:
            metadata["attributes"]["ome"]["omero"] = omero
        members = metadata.pop("consolidated_metadata")["metadata"] if consolidated else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(
            f"the metadata of {path} is not what was written ({type(error).__name__}); delete {path}, and the same "
            "call starts afresh"
        ) from error
    metadata.pop("consolidated_metadata", None)
    if consolidated:
        # labels of an image may have been written by other programs
        listed = {*record.arrays, *(("labels",) if record.details.get("pyramids") else ())}
        members = {name: member for name, member in members.items() if name.split("/")[0] in listed}
        metadata["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
        metadata["attributes"][ATTRIBUTE]["details"][METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    file.write_atomic(json.dumps(metadata, indent=2))
