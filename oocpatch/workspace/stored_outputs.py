"""Outputs of the model for the batches of a block, on disk until the block is recorded.

A crash costs the blocks that its process was at. Where these are more patches than it may cost, each batch is stored
once it is computed, and the next attempt at the block reads it instead of calling the model.

```text
outputs/<block>/
    <first patch>.<head>    the values of a head, as they lie in memory
    <first patch>           the CRC of the batch that the model got, and dtype, shape and CRC of each head; comes last
```

Nothing here is relied on: what is not exactly what was written for exactly this batch is computed again. So the ledger
does not know of these files, an input that has changed needs no attention, and any attempt may read what another left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.planning.box import Ints
from oocpatch.storage.checksums import checksum
from oocpatch.storage.paths import StoragePath

Array = npt.NDArray[Any]


class StoredOutputs:
    """The stored outputs of one block.

    Idempotent: whoever writes a batch of the block writes the same bytes.
    """

    def __init__(self, folder: StoragePath) -> None:
        self._folder = folder

    def write(self, first: Ints, batch: int, outputs: Mapping[str, Array]) -> None:
        """Store the outputs for the batch that begins with a patch and has so much as its CRC."""
        name, heads = _name(first), {}
        self._folder.make_folder()
        for number, (head, values) in enumerate(outputs.items()):
            whole = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
            (self._folder / f"{name}.{number}").write_plain(whole.reshape(-1).view(np.uint8).data)
            heads[head] = [str(values.dtype), list(values.shape), checksum(whole)]
        (self._folder / name).write_plain(json.dumps({"batch": batch, "heads": heads}).encode())

    def read(self, first: Ints, batch: int) -> dict[str, Array] | None:
        """Return the outputs that were stored for a batch; None if they are not all there as they were written."""
        name, outputs = _name(first), {}
        try:
            record = json.loads((self._folder / name).read_bytes())
            if record["batch"] != batch:
                return None
            for number, (head, (dtype, shape, crc)) in enumerate(record["heads"].items()):
                values = (self._folder / f"{name}.{number}").read_array(dtype, tuple(shape))
                if values is None or checksum(values) != crc:
                    return None
                outputs[head] = values
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return outputs


def _name(first: Ints) -> str:
    """Return the name of the batch that begins with a patch."""
    return "-".join(map(str, first))
