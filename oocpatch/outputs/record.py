"""What an output says of itself: the attribute `oocpatch` of its group, found and put anew in one atomic step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zarr

from oocpatch.errors import CorruptData, OutputExists
from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.outputs.omero import with_omero
from oocpatch.storage.files import write_atomically
from oocpatch.storage.paths import Address, says_nothing, store_at

ATTRIBUTE = "oocpatch"
METADATA = "zarr.json"


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """What an output says of itself.

    Attributes:
        run_id: the run that wrote it.
        complete: whether that run is done.
        parameters: its fingerprint.
        workspace: address of its workspace.
        arrays: names of what it wrote.
        details: facts for people: number of patches, uncovered voxels, versions.
    """

    run_id: str
    complete: bool
    parameters: Mapping[str, Any]
    workspace: str
    arrays: tuple[str, ...]
    details: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON has it."""
        names = ("run_id", "complete", "parameters", "workspace", "arrays", "details")
        return {n: list(v) if isinstance(v := getattr(self, n), tuple) else v for n in names}


def inspect_output(path: Address) -> OutputRecord | None:
    """What lies at the output's place; None when nothing does.

    Raises:
        OutputExists: when it is something that oocpatch did not write.
    """
    if not path.exists():
        return None
    if not path.is_dir():
        raise OutputExists(f"output must be a new path or an output of oocpatch, but {path} is a file")
    if isinstance(path, Path) and all(p.name.endswith(".partial") for p in path.iterdir()):
        return None  # an empty directory, or one whose first file a crash kept from its name
    foreign = f"output must be a new path or an output of oocpatch, but {path} holds other data; choose another path"
    try:
        group = zarr.open_group(store_at(path), mode="r", zarr_format=group_format(path), use_consolidated=False)
        record = group.attrs[ATTRIBUTE]
        assert isinstance(record, dict)
        return OutputRecord(**{**record, "arrays": tuple(record["arrays"])})
    except Exception as error:
        if says_nothing(error, path):
            raise
        raise OutputExists(foreign) from error


def find_output(path: Address) -> OutputRecord | None:
    """What lies at a place that is only looked at; None when nothing does.

    Raises:
        OutputExists: when it is something that oocpatch did not write.
    """
    try:
        return inspect_output(path)
    except OutputExists as error:
        raise OutputExists(f"output must be one that oocpatch wrote, but {path} holds other data") from error


def group_format(path: Address) -> Literal[2, 3]:
    """Zarr's format of a group; where a crash left both, the newer."""
    return 2 if (path / ".zgroup").is_file() and not (path / METADATA).is_file() else 3


def array_path(record: OutputRecord, head: str) -> str:
    """Where a head's array lies, by what the output says of itself."""
    details = record.details
    return str(dict(zip(details["heads"], details["arrays"], strict=True))[head])


def write_record(path: Address, record: OutputRecord, *, consolidated: bool = False, omero: Any = None) -> None:
    """Put a record into the group's metadata, in one atomic step, and let consolidated ones list only what it lists.

    With `omero`, also how the channels of the group's image are shown.

    Raises:
        CorruptData: when the metadata is not what was written.
    """
    try:
        if group_format(path) == 2:
            _rewrite_old(path, record, omero)
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
        _keep(members, record)
        metadata["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": members}
        metadata["attributes"][ATTRIBUTE]["details"][METADATA_CRC] = metadata_checksum(metadata, ATTRIBUTE)
    write_atomically(file, json.dumps(metadata, indent=2))


def _rewrite_old(path: Address, record: OutputRecord, omero: Any) -> None:
    """The same for Zarr 2, whose consolidated metadata is a file of its own."""
    consolidated = json.loads((path / ".zmetadata").read_text())
    _keep(consolidated["metadata"], record, {".zattrs", ".zgroup"})
    attributes = {**json.loads((path / ".zattrs").read_text()), ATTRIBUTE: record.to_dict()}
    attributes = with_omero(attributes, omero) if omero else attributes
    consolidated["metadata"][".zattrs"] = attributes
    write_atomically(path / ".zmetadata", json.dumps(consolidated, indent=2))
    write_atomically(path / ".zattrs", json.dumps(attributes, indent=2))


def _keep(members: dict[str, Any], record: OutputRecord, others: AbstractSet[str] = frozenset()) -> None:
    """Drop what the record does not list; labels that lie beside an image are listed with it, whoever wrote them."""
    beside = {"labels"} if record.details.get("pyramids") else set()
    for name in [n for n in members if n.split("/")[0] not in {*record.arrays, *others, *beside}]:
        del members[name]
