"""The record of an output, read, and replaced atomically: the attribute `oocpatch` of its group.

A table, which is a file of another format, has its record beside it:

```text
 cells.csv.oocpatch.record    a journal: the record, and when the table is complete the latest records of its blocks
 cells.csv                    there once it is complete
```

A file without a record, or another one than the record describes, is someone else's, and never replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

from oocpatch.errors import CorruptData, OutputExists
from oocpatch.outputs.integrity import METADATA_CRC, metadata_checksum
from oocpatch.storage.checksums import measured
from oocpatch.storage.journal import encode_record, read_journal, replace_journal
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import LocalPath, StoragePath, storage_path
from oocpatch.system import is_url
from oocpatch.workspace.ledger import Record
from oocpatch.workspace.workspace import PLAN

ATTRIBUTE = "oocpatch"
METADATA = "zarr.json"
TABLE_RECORD = ".record"
"""Ending of the name of a table's record."""


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
        workspace = self.workspace.removeprefix(f"{path.parent}{os.sep if path.is_local else '/'}")
        return {**asdict(self), "workspace": workspace, "arrays": list(self.arrays)}

    @classmethod
    def of(cls, path: StoragePath, values: Any) -> OutputRecord:
        """Return the record that `to_dict` gave.

        Raises:
            KeyError, TypeError: when it is none.
        """
        workspace = values["workspace"]
        if not is_url(workspace) and not PurePath(workspace).is_absolute():
            workspace = str(path.parent / workspace)
        return cls(**{**values, "workspace": workspace, "arrays": tuple(values["arrays"])})


def inspect_output(path: StoragePath) -> OutputRecord | None:
    """Return the record of the output at a path; None if there is nothing.

    Raises:
        OutputExists: if there is something that oocpatch did not write.
    """
    if table_record(path).is_file():
        return _inspect_table(path)
    if not path.exists():
        return None
    if not path.is_dir():
        raise OutputExists(f"output must be a new path or an output of oocpatch, but {path} is a file with other data")
    if isinstance(path, LocalPath) and all(p.name.endswith(".partial") for p in path.iterdir()):
        return None  # an empty directory, or a crash before its first file was renamed
    foreign = f"output must be a new path or an output of oocpatch, but {path} holds other data; choose another path"
    try:
        return OutputRecord.of(path, json.loads((path / METADATA).read_text())["attributes"][ATTRIBUTE])
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
        names = _outputs_in(path)
        held = (
            f"is a folder of {len(names)} others, such as {path / names[0]}: name one" if names else "holds other data"
        )
        raise OutputExists(f"output must be one that oocpatch wrote, but {path} {held}") from error


def _outputs_in(path: StoragePath) -> list[str]:
    """Return the names of the outputs in a local folder."""
    names = []
    for inner in sorted(path.iterdir()) if isinstance(path, LocalPath) and path.is_dir() else ():
        with contextlib.suppress(OutputExists, OSError):
            if (inner.is_dir() or table_record(inner).is_file()) and inspect_output(inner) is not None:
                names.append(inner.name)
    return names


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
    if table_record(path).is_file():
        write_table_record(path, record)
        return
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
    file.write_atomic(json.dumps(metadata))  # compact: indenting takes Python, and ten times as long


def table_record(path: StoragePath) -> StoragePath:
    """Return the path of the record of a table."""
    return beside(path, TABLE_RECORD)


def read_table_record(path: StoragePath) -> OutputRecord | None:
    """Return the record beside a table, whatever is at its path; None if there is none."""
    try:
        return OutputRecord.of(path, json.loads(Record(*next(read_journal(table_record(path)))).note))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def is_what_was_written(path: StoragePath, details: Mapping[str, Any]) -> bool:
    """Return whether a file is the table of a record; where only its time differs, it is read."""
    if not isinstance(path, LocalPath) or not path.is_file() or path.stat().st_size != details["size"]:
        return False
    return path.stat().st_mtime_ns == int(details["modified"]) or measured(path)[1] == int(details["crc"])


def _inspect_table(path: StoragePath) -> OutputRecord | None:
    """Return the record of a table; None if the table was deleted.

    Raises:
        OutputExists: if there is something that oocpatch did not write.
    """
    record, is_there = read_table_record(path), path.exists()
    if record is not None and not is_there and record.complete:  # deleted, or never renamed by a run that was killed
        is_begun = (storage_path(record.workspace) / record.run_id / PLAN).is_file()
        return replace(record, complete=False) if is_begun else None
    if is_there and not (record is not None and record.complete and is_what_was_written(path, record.details)):
        raise OutputExists(
            f"output must be a new path or a table that oocpatch wrote, but {path} holds other data, or was changed "
            "since; choose another path, or delete it"
        )
    return record


def write_table_record(path: StoragePath, record: OutputRecord, lines: Iterable[bytes] = ()) -> None:
    """Replace the record of a table, atomically, with lines of its ledger after it; only with the output's lock."""
    text, place = json.dumps(record.to_dict(path)), table_record(path)
    for left in place.list_siblings(f"{place.name}."):  # of a crash before the record was renamed
        left.unlink(missing_ok=True)
    replace_journal(place, (encode_record(Record("begun", 0, note=text).values()), *lines))


def publish_table(path: LocalPath, file: LocalPath, details: Mapping[str, Any], lines: Iterable[bytes]) -> None:
    """Complete a table: its record first, then the file under its name.

    Args:
        path: where it belongs.
        file: where it is.
        details: facts about the run.
        lines: the latest records of its ledger.

    Raises:
        OutputExists: if something appeared at the path meanwhile.
        CorruptData: if the file is not the one of the details' CRC.
    """
    record, staged = require_output(path), path.with_name(f"{path.name}.partial")
    shutil.move(file, staged)  # the workspace may be on another disk
    staged.flush()  # the marker comes last
    size, crc = measured(staged)
    if crc != details["crc"]:
        raise CorruptData(f"{staged} is not what was written; the same call writes it anew")
    written = {"size": size, "modified": staged.stat().st_mtime_ns}
    write_table_record(path, replace(record, complete=True, details={**record.details, **details, **written}), lines)
    staged.replace(path)
    path.parent.flush()
