"""The ids of objects in the workspace: pieces per block and index, each with a CRC-32C of its name and content.

```text
 merged/<attempt>/<block>.<section>.<piece>      ids of the next objects of a block at one index, in their order
```

The number of objects, which a block knows, says how many pieces there are. The name is part of the CRC, so that a piece
in another one's place is detected, too.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd  # type: ignore[import-untyped]  # it has no types of its own

from oocpatch.errors import CorruptPartial
from oocpatch.storage.checksums import bytes_checksum
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.ledger import MERGED

Ids = npt.NDArray[np.uint64]
_CODEC = Zstd(level=1)
_CRC_BYTES = 4


class IdWriter:
    """Writes the ids of one merge.

    Idempotent: writes only below an address of its own.

    Attributes:
        digest: CRC-32C of all that is written.
    """

    def __init__(self, folder: StoragePath) -> None:
        folder.make_folder()
        self._folder = folder
        self.digest = 1

    def write(self, block: int, section: int, piece: int, ids: Ids) -> None:
        """Write a piece."""
        name = f"{block}.{section}.{piece}"
        data = bytes(_CODEC.encode(np.ascontiguousarray(ids, "<u8")))
        crc = bytes_checksum(data, bytes_checksum(name.encode()))
        (self._folder / name).write_plain(crc.to_bytes(_CRC_BYTES, "little") + data)
        self.digest = bytes_checksum(data, self.digest) or 1


def read_ids(folder: StoragePath, block: int, section: int, count: int) -> Ids:
    """Read the ids of a block's labels at one index: of label 0, which is 0, and of its objects.

    Raises:
        CorruptPartial: when a piece is missing, or not what was written.
        OSError: when an object store does not answer.
    """
    ids, length = [np.zeros(1, np.uint64)], 0
    for piece in itertools.count():
        if length == count:
            break
        name = f"{block}.{section}.{piece}"
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            if folder.is_outage(error):
                raise
            raise CorruptPartial(MERGED, f"{name} cannot be read ({type(error).__name__})") from error
        crc, data = content[:_CRC_BYTES], content[_CRC_BYTES:]
        if bytes_checksum(data, bytes_checksum(name.encode())).to_bytes(_CRC_BYTES, "little") != crc:
            raise CorruptPartial(MERGED, f"{name} is not what was written")
        ids.append(np.frombuffer(_CODEC.decode(data), "<u8"))
        length += len(ids[-1])
        if length > count:
            raise CorruptPartial(MERGED, f"there are more ids of block {block} than objects")
    return np.concatenate(ids)
