"""Partials on disk: what one attempt at a block leaves for the blocks that need it.

```text
<attempt>/
    <head>/open-<axis>       sums over the open part of the core      (C, *box), one chunk per step of the sweep
    <head>/seam-<offset>     sums over the halo, for one neighbour
        zarr.json, c.0.<step>.0
    <head>/<name>            files of other kinds, as a head of objects has them
    manifest.json            dtype, channels and the CRC of each chunk of these pieces, written after them
```

Heads go by their numbers; a step of a piece that no patch came near is not there. Every piece is a Zarr array at its
true width, written by one task, whole chunks at a time, uncompressed, as partial sums hardly compress. So a chunk is
the bytes that lie in memory, and is written and read here, without zarr in between.

The CRCs of all chunks go into the manifest, and the manifest's own CRC into the ledger. So partials need no fsync or
renaming: bytes that are lost, torn, flipped, swapped or stale are found before they are used.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from oocpatch.errors import CorruptPartial
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.box import Box, Ints
from oocpatch.storage.checksums import bytes_checksum, checksum, text_checksum
from oocpatch.storage.paths import StoragePath
from oocpatch.workspace.ledger import NO_PARTIALS, PartialsRef

Array = npt.NDArray[Any]
MANIFEST = "manifest.json"


def write_metadata(folder: StoragePath, shape: Ints, chunks: Ints, dtype: str) -> None:
    """Write the metadata of an uncompressed Zarr array whose chunks are written by the caller.

    By hand: zarr looks for groups and arrays above before it creates one, which takes as long as computing a small
    block.
    """
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},  # no directories
        # NaN: a chunk that was never written must not look like a zero sum.
        "fill_value": "NaN" if np.dtype(dtype).kind == "f" else np.zeros((), dtype).item(),
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
    }
    folder.make_folder()
    (folder / "zarr.json").write_plain(json.dumps(metadata).encode())


class PartialWriter:
    """Writes the partials of one attempt at a block, from any number of threads.

    Idempotent: writes only below an address of its own, whole chunks. `frames` are the block grids of the heads.
    """

    def __init__(self, block: StoragePath, frames: Sequence[BlockGrid]) -> None:
        # Digits, and enough of them that no two attempts on any machine ever have the same.
        self._attempt = f"{secrets.randbelow(10**15):015d}"
        self._folder = block / self._attempt
        self._frames = frames
        self._manifest: dict[str, dict[str, Any]] = {}
        self._closed = False
        self._lock = threading.Lock()

    def write(self, head: int, piece: str, box: Box, part: Box, data: Array) -> None:
        """Write `part` of the `box` of a head's piece: one step, a whole chunk, with its sums `(C, *part.shape)`."""
        name, chunk = f"{head}/{piece}", _chunk(self._frames[head], box, len(data))
        with self._lock:
            if name not in self._manifest:
                shape = (len(data), *box.shape)
                write_metadata(self._folder / name, shape, chunk, str(data.dtype))
                self._manifest[name] = {"dtype": str(data.dtype), "channels": len(data), "steps": {}}
        whole = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
        crc = checksum(whole)
        if whole.shape != chunk:  # the last step
            whole = np.zeros(chunk, whole.dtype)
            whole[tuple(slice(n) for n in data.shape)] = data
        place = self._folder / name / _chunk_key(box, part, chunk)
        place.write_plain(whole.reshape(-1).view(np.uint8).data)
        with self._lock:
            self._manifest[name]["steps"][step_key(box, part)] = crc

    def write_file(self, head: int, name: str, content: bytes) -> None:
        """Write a file of a head, whole."""
        (self._folder / str(head)).make_folder()
        (self._folder / str(head) / name).write_plain(content)
        with self._lock:
            self._manifest[f"{head}/{name}"] = {"crc": bytes_checksum(content), "steps": {}}

    def close(self) -> PartialsRef:
        """Write the manifest, and return the reference for the ledger."""
        if not self._manifest:
            return NO_PARTIALS
        manifest = json.dumps(self._manifest, sort_keys=True)
        (self._folder / MANIFEST).write_atomic(manifest)
        self._closed = True
        return PartialsRef(text_checksum(manifest), self._attempt)

    def discard(self) -> None:
        """Delete what was written by an attempt that failed."""
        if not self._closed:
            self._folder.remove_tree()


class PartialReader:
    """Reads the partials of one block that the ledger records, each verified against its CRC."""

    def __init__(self, folder: StoragePath, frames: Sequence[BlockGrid], block: int, ref: PartialsRef) -> None:
        self._folder = folder / ref.attempt
        self._frames = frames
        self.block = block
        self._pieces: Mapping[str, Mapping[str, Any]] = {}
        if not ref.digest:  # the block left nothing
            return
        try:
            manifest = (self._folder / MANIFEST).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(MANIFEST, error) from error
        if text_checksum(manifest) != ref.digest:
            raise CorruptPartial(block, f"{MANIFEST} is not the one in the ledger")
        self._pieces = json.loads(manifest)
        if not all("steps" in piece for piece in self._pieces.values()):
            raise CorruptPartial(block, f"{MANIFEST} is that of another version of oocpatch")

    def read(self, head: int, piece: str, box: Box, part: Box) -> Array | None:
        """Read one step of a piece, `(C, *part.shape)`; None where no patch came near it.

        Raises:
            CorruptPartial: when it is missing, or its CRC is not the one in the manifest.
            OSError: when an object store does not answer.
        """
        name, key = f"{head}/{piece}", step_key(box, part)
        entry = self._pieces.get(name)
        if entry is None or key not in entry["steps"]:
            return None
        chunk = _chunk(self._frames[head], box, entry["channels"])
        try:
            values = (self._folder / name / _chunk_key(box, part, chunk)).read_array(entry["dtype"], chunk)
        except OSError as error:
            raise self._unreadable(f"{name} step {key}", error) from error
        values = None if values is None else values[(slice(None), *(slice(n) for n in part.shape))]
        if values is None or checksum(values) != entry["steps"][key]:
            raise CorruptPartial(self.block, f"{name} step {key} is not what was written")
        return values

    def read_file(self, head: int, name: str) -> bytes | None:
        """Read a file of a head; None where the block has none.

        Raises:
            CorruptPartial: when it is missing, or its CRC is not the one in the manifest.
            OSError: when an object store does not answer.
        """
        entry = self._pieces.get(f"{head}/{name}")
        if entry is None:
            return None
        try:
            content = (self._folder / str(head) / name).read_bytes()
        except OSError as error:
            raise self._unreadable(f"{head}/{name}", error) from error
        if bytes_checksum(content) != entry["crc"]:
            raise CorruptPartial(self.block, f"{head}/{name} is not what was written")
        return content

    def missing(self, name: str) -> CorruptPartial:
        """Return the error for a file that should be there."""
        return CorruptPartial(self.block, f"{name} is not in {MANIFEST}")

    def _unreadable(self, what: str, error: Exception) -> Exception:
        """Return the error for a file that cannot be read: damage, or the outage of an object store."""
        if self._folder.is_outage(error):
            return error
        return CorruptPartial(self.block, f"{what} cannot be read ({type(error).__name__})")


def step_key(box: Box, part: Box) -> str:
    """Return the name of a step within its piece, from where it starts."""
    return ",".join(str(a - b) for a, b in zip(part.start, box.start, strict=True))


def _chunk(frame: BlockGrid, box: Box, channels: int) -> Ints:
    """Return the shape of the chunks of a piece."""
    return (channels, *next(iter(frame.steps(box))).shape)


def _chunk_key(box: Box, part: Box, chunk: Ints) -> str:
    """Return the name of the chunk of a step."""
    return ".".join(["c", "0", *(str((a - b) // n) for a, b, n in zip(part.start, box.start, chunk[1:], strict=True))])
