"""The record of an output: the attribute `oocpatch` of its group, read, and replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal

import zarr

from oocpatch.errors import CorruptData, OutputExists
from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.outputs.omero import with_omero
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

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON stores it."""
        names = ("run_id", "complete", "parameters", "workspace", "arrays", "details")
        return {n: list(v) if isinstance(v := getattr(self, n), tuple) else v for n in names}


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
        group = zarr.open_group(path.store(), mode="r", zarr_format=group_format(path), use_consolidated=False)
        record: Any = group.attrs[ATTRIBUTE]
        return OutputRecord(**{**record, "arrays": tuple(record["arrays"])})
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


def group_format(path: StoragePath) -> Literal[2, 3]:
    """Return the Zarr format of a group; the newer one if a crash left metadata of both."""
    return 2 if (path / ".zgroup").is_file() and not (path / METADATA).is_file() else 3


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
        if group_format(path) == 2:
            _write_record_v2(path, record, omero)
            return
        file = path / METADATA
        metadata = json.loads(file.read_text())
        metadata.setdefault("attributes", {})[ATTRIBUTE] = record.to_dict()
        if omero:
            metadata["attributes"] = with_omero(metadata["attributes"], omero)
        members = metadata.pop("consolidated_metadata")["metadata"] if consolidated else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptData(
            f"the metadata of {path} is not what was written ({type(error).__name__}); delete {path}, and the same "
            "call starts afresh"
        ) from error
    metadata.pop("consolidated_metadata", None)
    if consolidated:
        _keep_listed(members, record)
        metadata["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
        metadata["attributes"][ATTRIBUTE]["details"][METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    file.write_atomic(json.dumps(metadata, indent=2))


def _write_record_v2(path: StoragePath, record: OutputRecord, omero: Any) -> None:
    """Replace the record of a group of Zarr 2, whose consolidated metadata are a file of their own."""
    consolidated = json.loads((path / ".zmetadata").read_text())
    _keep_listed(consolidated["metadata"], record, {".zattrs", ".zgroup"})
    attributes = {**json.loads((path / ".zattrs").read_text()), ATTRIBUTE: record.to_dict()}
    attributes = with_omero(attributes, omero) if omero else attributes
    consolidated["metadata"][".zattrs"] = attributes
    (path / ".zmetadata").write_atomic(json.dumps(consolidated, indent=2))
    (path / ".zattrs").write_atomic(json.dumps(attributes, indent=2))


def _keep_listed(members: dict[str, Any], record: OutputRecord, others: AbstractSet[str] = frozenset()) -> None:
    """Drop members that the record does not list, except labels of its image, which other programs may have written."""
    labels = {"labels"} if record.details.get("pyramids") else set()
    for name in [n for n in members if n.split("/")[0] not in {*record.arrays, *others, *labels}]:
        del members[name]
