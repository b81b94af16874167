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
from oocpatch.storage.checksum import bytes_checksum, file_checksum, text_checksum
from oocpatch.storage.ledger import standing

LEDGER = "oocpatch.ledger"
DESCRIBED = "described"
"""Detail of an incomplete output: CRCs of metadata that are about to be written anew, beside those in `files`."""
METADATA_CRC = "metadata_crc"


def keep_ledger(
    source: Path, target: Path, blocks: int, *, without: frozenset[tuple[str, int]] = frozenset(), plain: bool = True
) -> int:
    """Write the records that stand into a new file, in one order; its CRC.

    Args:
        source: a ledger.
        target: the file; there whole or not at all.
        blocks: number of blocks.
        without: stages and blocks whose records are left out.
        plain: leave out times, and the attempts whose partials are gone.
    """
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    crc = 0
    with aside.open("wb") as file:
        for record in standing(source, blocks):
            if (record.kind, record.block) not in without:
                line = (replace(record, note="", at=0.0) if plain else record).line()
                crc = bytes_checksum(line, crc)
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(target)
    return crc


def other_files(path: Path, members: Sequence[str], arrays: Sequence[str]) -> Iterator[str]:
    """Files that a run wrote besides write units, by their names within the output, without the group's metadata.

    Args:
        path: the output.
        members: names of what it wrote.
        arrays: where the arrays with the write units lie.
    """
    units = {path / array / "c" for array in arrays}
    for member in members:
        for folder, folders, files in os.walk(path / member):
            folders[:] = sorted(name for name in folders if Path(folder, name) not in units)
            yield from (Path(folder, name).relative_to(path).as_posix() for name in sorted(files))


def refuse_changes(path: Path, details: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
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
