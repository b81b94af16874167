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
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from oocpatch.errors import CorruptData
from oocpatch.storage.checksums import bytes_checksum, file_checksum, text_checksum
from oocpatch.storage.files import write_atomically
from oocpatch.storage.paths import Address
from oocpatch.workspace.ledger import latest_records
from oocpatch.workspace.segments import at_hand

LEDGER = "oocpatch.ledger"
DESCRIBED = "described"
"""Detail of an incomplete output: CRCs of metadata files that are about to be rewritten; `files` has the old ones."""
METADATA_CRC = "metadata_crc"


def copy_ledger(
    source: Address,
    target: Address,
    blocks: int,
    *,
    without: frozenset[tuple[str, int]] = frozenset(),
    plain: bool = True,
) -> int:
    """Write the latest record of each stage of each block to a new file, atomically, and return its CRC.

    Args:
        source: a ledger.
        target: the new file.
        blocks: number of blocks.
        without: stages and blocks whose records are left out.
        plain: whether to leave out times and notes, so that equal runs have equal files.
    """
    with at_hand(source) as ledger:
        lines = (
            (replace(record, note="", at=0.0) if plain else record).line()
            for record in latest_records(ledger, blocks)
            if (record.kind, record.block) not in without
        )
        if isinstance(target, Path):
            return _write(target, lines)
        content = b"".join(lines)
        write_atomically(target, content)
        return bytes_checksum(content)


def _write(target: Path, lines: Iterable[bytes]) -> int:
    """Write a file line by line, atomically, and return its CRC."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    crc = 0
    with partial.open("wb") as file:
        for line in lines:
            crc = bytes_checksum(line, crc)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    return crc


def other_files(path: Address, members: Sequence[str], arrays: Sequence[str]) -> Iterator[str]:
    """Yield the paths in the output of files that are neither write units nor the metadata of its group.

    Args:
        path: the output.
        members: names of the arrays and groups that the run wrote.
        arrays: paths of the arrays with the write units.
    """
    units = {f"{array}/c" for array in arrays}
    for member in members:
        if not isinstance(path, Path):
            names = (f"{member}/{name}" for name in (path / member).files())
            yield from (name for name in names if not any(name.startswith(f"{unit}/") for unit in units))
            continue
        for folder, folders, files in os.walk(path / member):
            relative = Path(folder).relative_to(path)
            folders[:] = sorted(name for name in folders if (relative / name).as_posix() not in units)
            yield from ((relative / name).as_posix() for name in sorted(files))


def verify_files(path: Address, details: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
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


def is_metadata_damaged(path: Address, attribute: str) -> bool:
    """Return whether the metadata of an output's group were changed after they were written.

    False if they have no CRC: in incomplete outputs and in outputs of Zarr 2.
    """
    try:
        metadata = json.loads((path / "zarr.json").read_text())
        expected = metadata["attributes"][attribute]["details"].get(METADATA_CRC)
        return expected is not None and metadata_checksum(metadata, attribute) != expected
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return (path / "zarr.json").exists()
