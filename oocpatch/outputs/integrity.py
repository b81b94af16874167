"""Integrity of an output: the plan, the ledger and the CRCs of its files, which a complete output stores.

```text
<output>/
    zarr.json                    in the attribute `oocpatch`: the plan, the CRC of each file except the write units,
                                 and a CRC of all of it
    <array>/oocpatch.ledger      the latest records, with the CRC of each write unit; Zarr ignores this file
```

A chain of CRCs leads from the group's metadata to every byte that oocpatch wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from oocpatch.errors import CorruptData
from oocpatch.storage.checksums import bytes_checksum, file_checksum, text_checksum
from oocpatch.storage.journal import encode_record, local_copy
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.ledger import latest_records

LEDGER = "oocpatch.ledger"
DESCRIBED = "described"
"""Detail of an incomplete output: CRCs of metadata files that are about to be rewritten; `files` has the old ones."""
METADATA_CRC = "metadata_crc"


def copy_ledger(source: StoragePath, target: StoragePath, blocks: int, *, stamps: bool = True) -> int:
    """Write the latest record of each stage of each block in a ledger to a file, atomically, and return its CRC.

    Without `stamps`, those of the input are left out.
    """
    crc = 0

    def lines() -> Iterator[bytes]:
        nonlocal crc
        for line in latest_lines(source, blocks, stamps=stamps):
            crc = bytes_checksum(line, crc)
            yield line

    target.write_atomic(lines())
    return crc


def latest_lines(
    source: StoragePath,
    blocks: int,
    *,
    without: frozenset[tuple[str, int]] = frozenset(),
    plain: bool = True,
    stamps: bool = True,
) -> Iterator[bytes]:
    """Yield the latest record of each stage of each block in a ledger as lines of a journal.

    Args:
        source: the ledger.
        blocks: number of blocks.
        without: stages and blocks whose records are left out.
        plain: whether to leave out times and notes, so that equal runs have equal files.
        stamps: whether to keep the stamps of the input.
    """
    with local_copy(source) as ledger:
        for record in latest_records(ledger, blocks):
            if (record.kind, record.block) not in without:
                kept = replace(record, note="", at=0.0) if plain else record
                yield encode_record((kept if stamps else replace(kept, stamps="")).values())


def other_files(path: StoragePath, members: Sequence[str], arrays: Sequence[str]) -> Iterator[str]:
    """Yield the paths in the output of files that are neither write units nor the metadata of its group.

    `members` are the names of arrays and groups that the run wrote, `arrays` the paths of those with write units.
    """
    units = {f"{array}/c" for array in arrays}
    for member in members:
        skipped = {unit.removeprefix(f"{member}/") for unit in units}
        for name in (path / member).list_files(skip=skipped.__contains__):
            yield f"{member}/{name}"


def verify_files(path: StoragePath, details: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Compare files with their CRCs in the record of an incomplete output; by default all that have one.

    Raises:
        CorruptData: if one differs.
    """
    if "files" not in details:
        raise CorruptData(f"{path}/zarr.json is not what was written; start afresh with overwrite=True")
    for name in details["files"] if names is None else names:
        if file_checksum(path / name) not in {details["files"][name], details.get(DESCRIBED, {}).get(name)}:
            raise CorruptData(f"{path / name} is not what was written; start afresh with overwrite=True")


def metadata_checksum(metadata: Mapping[str, Any], attribute: str) -> int:
    """Return the CRC of a group's metadata, without attributes of other programs."""
    record = metadata["attributes"][attribute]
    details = {name: value for name, value in record["details"].items() if name != METADATA_CRC}
    rest = {name: value for name, value in metadata.items() if name != "attributes"}
    return text_checksum(json.dumps([rest, {**record, "details": details}], sort_keys=True))


def is_metadata_damaged(path: StoragePath, attribute: str) -> bool:
    """Return whether the metadata of an output's group were changed after they were written.

    False if they have no CRC: in incomplete outputs and in outputs of Zarr 2.
    """
    try:
        metadata = json.loads((path / "zarr.json").read_text())
        expected = metadata["attributes"][attribute]["details"].get(METADATA_CRC)
        return expected is not None and metadata_checksum(metadata, attribute) != expected
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return (path / "zarr.json").exists()
