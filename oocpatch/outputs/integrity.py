"""What a complete output keeps of its run, so that it can be verified: plan, ledger, and the CRCs of its files.

```text
<output>/
    zarr.json                    in the attribute `oocpatch`: the plan, and the CRC of each file but the write units;
                                 and a CRC of all that
    <array>/oocpatch.ledger      the records that stand, with the CRC of each write unit; Zarr does not look there
```

So a chain of CRCs leads from the group's metadata to every byte that oocpatch wrote.
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
"""Detail of an incomplete output: CRCs of metadata that are about to be written anew, beside those in `files`."""
METADATA_CRC = "metadata_crc"


def copy_ledger(
    source: Address,
    target: Address,
    blocks: int,
    *,
    without: frozenset[tuple[str, int]] = frozenset(),
    plain: bool = True,
) -> int:
    """Write the records that stand into a new file, in one order; its CRC.

    Args:
        source: a ledger.
        target: the file; there whole or not at all.
        blocks: number of blocks.
        without: stages and blocks whose records are left out.
        plain: leave out times, and the attempts whose partials are gone.
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
    """Write a file line by line; its CRC."""
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    crc = 0
    with aside.open("wb") as file:
        for line in lines:
            crc = bytes_checksum(line, crc)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(target)
    return crc


def other_files(path: Address, members: Sequence[str], arrays: Sequence[str]) -> Iterator[str]:
    """Files that a run wrote besides write units, by their names within the output, without the group's metadata.

    Args:
        path: the output.
        members: names of what it wrote.
        arrays: where the arrays with the write units lie.
    """
    units = {f"{array}/c" for array in arrays}
    for member in members:
        if not isinstance(path, Path):
            names = (f"{member}/{name}" for name in (path / member).files())
            yield from (name for name in names if not any(name.startswith(f"{unit}/") for unit in units))
            continue
        for folder, folders, files in os.walk(path / member):
            inside = Path(folder).relative_to(path)
            folders[:] = sorted(name for name in folders if (inside / name).as_posix() not in units)
            yield from ((inside / name).as_posix() for name in sorted(files))


def verify_files(path: Address, details: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """See that files, by default all whose CRCs an incomplete output notes, are as they were made.

    Raises:
        CorruptData: when one is not.
    """
    if "files" not in details:
        raise CorruptData(f"{path}/zarr.json is not what was written; start afresh with overwrite=True")
    for name in details["files"] if names is None else names:
        if file_checksum(path / name) not in {details["files"][name], details.get(DESCRIBED, {}).get(name)}:
            raise CorruptData(f"{path / name} is not what was written; start afresh with overwrite=True")


def metadata_checksum(metadata: Mapping[str, Any], attribute: str) -> int:
    """CRC of a group's metadata as oocpatch wrote it; attributes of others do not count."""
    record = metadata["attributes"][attribute]
    details = {name: value for name, value in record["details"].items() if name != METADATA_CRC}
    rest = {name: value for name, value in metadata.items() if name != "attributes"}
    return text_checksum(json.dumps([rest, {**record, "details": details}], sort_keys=True))


def is_metadata_damaged(path: Address, attribute: str) -> bool:
    """Whether the metadata of an output's group are not what was written.

    False where they have no CRC: in outputs that are not complete, and in those of Zarr 2.
    """
    try:
        metadata = json.loads((path / "zarr.json").read_text())
        wanted = metadata["attributes"][attribute]["details"].get(METADATA_CRC)
        return wanted is not None and metadata_checksum(metadata, attribute) != wanted
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return (path / "zarr.json").exists()
