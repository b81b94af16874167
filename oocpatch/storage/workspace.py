"""The workspace: partials, weights, plan and ledger of one run, in a directory of its own.

```text
<workspace>/<run_id>/
    plan.json            written last when a run is set up: without it the directory is rubbish
    ledger
    ledger.<i>-of-<n>    of a part of an array job
    weights/<head>/<axis>    the weights of a full grid, one 1-D array per axis
    blocks/<index>/          one directory per block
        <attempt>/           one per attempt at it, of a name of its own; the ledger says which counts
            manifest.json        the CRC of each chunk of its pieces, written after them
            <head>/own-<axis>    sums over the open part of the core      (C, *box), one chunk per step of the sweep
            <head>/seam-<offset> sums over the halo, for one neighbour
```

Heads go by their numbers. A step of a piece that no patch came near is not there. No attempt touches what another one
left: a worker that was frozen and comes back late writes to a directory that nobody reads.

Every piece is stored at its true width and written by one task, whole chunks at a time, uncompressed: partial sums
hardly compress. The CRCs of all chunks go into the block's manifest, and the manifest's own CRC into the ledger. So the
workspace needs no fsync: a lost, torn, flipped, swapped or stale partial is found before it is used.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from oocpatch.errors import CorruptData, CorruptPartial
from oocpatch.planning.box import Box
from oocpatch.planning.plan import Plan
from oocpatch.planning.window import axis_weights
from oocpatch.storage.checksum import checksum, text_checksum
from oocpatch.storage.files import write_atomically
from oocpatch.storage.ledger import NO_PARTIALS, Ledger, Promise, read_ledger, segments
from oocpatch.storage.tally import Progress

Array = npt.NDArray[Any]

WRITE_ALL: Any = {"write_empty_chunks": True}
"""Looking whether a chunk is all NaN takes zarr three copies of it."""


class Workspace:
    """The workspace of one run.

    Args:
        root: directory of the run, `<workspace>/<run_id>`.
        plan: the run's plan.
    """

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self.plan = plan

    @classmethod
    def create(cls, root: Path, plan: Plan) -> Workspace:
        """Set a run up: rubbish is swept, and `plan.json` comes last, atomically."""
        if root.exists():
            shutil.rmtree(root)
        root.mkdir(parents=True)
        workspace = cls(root, plan)
        workspace.write_weights()
        text = plan.to_json()
        write_atomically(root / "plan.json", json.dumps({"crc": text_checksum(text), "plan": text}))
        return workspace

    @classmethod
    def find(cls, root: Path) -> Workspace | None:
        """The workspace that was set up at `root`, with its stored plan; None when there is none."""
        try:
            stored = json.loads((root / "plan.json").read_text())
            if text_checksum(stored["plan"]) != stored["crc"]:
                return None
            return cls(root, Plan.from_json(stored["plan"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def ledger(self, segment: str = "ledger") -> Ledger:
        """The ledger, or a segment of it, for its one writer."""
        return Ledger(self.root / segment)

    def progress(self) -> Progress:
        """What the ledger says is done, all segments together."""
        return Progress.read(segments(self.root), self.plan.blocks)

    def join(self) -> None:
        """Move the records of all segments into the ledger; only when nobody writes to any of them."""
        parts = [path for path in segments(self.root) if path.name != "ledger"]
        if parts:
            ledger = self.ledger()
            for path in parts:
                for record in read_ledger(path):
                    ledger.append(record)
            ledger.close()
            for path in parts:
                path.unlink()

    def write_weights(self) -> None:
        """Write the weights of the full grid anew; the same bytes whenever it is called."""
        shutil.rmtree(self.root / "weights", ignore_errors=True)
        for number, (head, frame) in enumerate(zip(self.plan.heads, self.plan.frames, strict=True)):
            if head.blended and not head.dense:
                for name, axis in zip(self.plan.axes, frame.grid.axes, strict=True):
                    values = axis_weights(head.window, axis)
                    array = self.array(f"weights/{number}", name, values.shape, values.shape, "float64")
                    array[:] = values

    def weights(self, head: int) -> list[npt.NDArray[np.float64]]:
        """The weights of the full grid, `(length,)` per axis; their outer product is the sum of all windows.

        Raises:
            CorruptData: when they cannot be read.
        """
        store = LocalStore(self.root / "weights" / str(head))
        try:
            arrays = [zarr.open_array(store, path=name, mode="r") for name in self.plan.axes]
            return [np.asarray(array[:], dtype=np.float64) for array in arrays]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptData(
                f"the weights in {store.root} are not what was written ({type(error).__name__}); "
                "the same call writes them anew"
            ) from error

    def writer(self, block: int) -> PartialWriter:
        """Write the partials of a block."""
        return PartialWriter(self, block)

    def reader(self, block: int, promise: Promise) -> PartialReader:
        """Read the partials of a block, as the ledger promised them.

        Raises:
            CorruptPartial: when they are not there, or are others.
        """
        return PartialReader(self, block, promise)

    def delete(self, block: int) -> None:
        """Delete the partials of a block."""
        shutil.rmtree(self.root / "blocks" / str(block), ignore_errors=True)

    def sweep(self, progress: Progress) -> None:
        """Delete the partials that nobody promised: those of attempts that died, or came too late.

        Only where no other process may have promised them since.
        """
        for block in (self.root / "blocks").glob("*"):
            kept = progress.predicted.get(int(block.name), NO_PARTIALS).attempt if block.name.isdigit() else ""
            for attempt in block.glob("*"):
                if attempt.name != kept:
                    shutil.rmtree(attempt, ignore_errors=True)
            if not kept:
                with contextlib.suppress(OSError):
                    block.rmdir()

    def array(
        self, folder: str, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
    ) -> zarr.Array[Any]:
        """An uncompressed array; one of the same name was made by the same plan, and is taken as it is."""
        store = LocalStore(self.root / folder)
        # NaN fill: a chunk that was never written must not look like a zero sum.
        fill = np.nan if np.dtype(dtype).kind == "f" else 0
        try:
            return zarr.create_array(
                store,
                name=name,
                shape=shape,
                chunks=chunks,
                dtype=dtype,
                fill_value=fill,
                compressors=None,
                filters=None,
                config=WRITE_ALL,
            )
        except zarr.errors.ContainsArrayError:
            return zarr.open_array(store, path=name, mode="r+", config=WRITE_ALL)


def remove_workspace(root: Path) -> None:
    """Delete a run's directory, plan first, and its parent when nothing else is in it."""
    (root / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(root, ignore_errors=True)
    with contextlib.suppress(OSError):
        root.parent.rmdir()


class PartialWriter:
    """Writes the partials of one attempt at a block, and says what it wrote.

    Idempotent: writes only `blocks/<index>/<attempt>`, whole chunks; safe to call from several threads.
    """

    def __init__(self, workspace: Workspace, block: int) -> None:
        self._workspace = workspace
        # Digits, and enough of them that no two attempts on any machine ever have the same.
        self._attempt = f"{secrets.randbelow(10**15):015d}"
        self._folder = f"blocks/{block}/{self._attempt}"
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._crcs: dict[str, dict[str, int]] = {}
        self._closed = False
        self._lock = threading.Lock()

    def write(self, head: int, piece: str, box: Box, part: Box, data: Array) -> None:
        """Write one step of a piece.

        Args:
            head: number of the head.
            piece: name of the piece.
            box: the whole piece.
            part: the step, a whole chunk of the piece.
            data: sums over `part`, `(C, *part.shape)`.
        """
        name = f"{head}/{piece}"
        with self._lock:
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._open(head, piece, box, data)
        array[(slice(None), *part.slices(box.start))] = data
        crc = checksum(data)
        with self._lock:
            self._crcs.setdefault(name, {})[step_key(box, part)] = crc

    def _open(self, head: int, piece: str, box: Box, data: Array) -> zarr.Array[Any]:
        first = next(iter(self._workspace.plan.frames[head].steps(box)))
        shapes = (len(data), *box.shape), (len(data), *first.shape)
        return self._workspace.array(f"{self._folder}/{head}", piece, *shapes, str(data.dtype))

    def close(self) -> Promise:
        """Write the manifest; what the ledger may promise now."""
        if not self._crcs:
            return NO_PARTIALS
        manifest = json.dumps(self._crcs, sort_keys=True)
        write_atomically(self._workspace.root / self._folder / "manifest.json", manifest)
        self._closed = True
        return Promise(text_checksum(manifest), self._attempt)

    def discard(self) -> None:
        """Delete what was written, if it is not whole: this attempt failed."""
        if not self._closed:
            shutil.rmtree(self._workspace.root / self._folder, ignore_errors=True)


class PartialReader:
    """Reads the partials of one block, each verified against its CRC before it is handed out."""

    def __init__(self, workspace: Workspace, block: int, promise: Promise) -> None:
        self._block = block
        self._group = workspace.root / "blocks" / str(block) / promise.attempt
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._crcs: Mapping[str, Mapping[str, int]] = {}
        if not promise.digest:  # the block left nothing
            return
        try:
            manifest = (self._group / "manifest.json").read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptPartial(block, f"manifest.json cannot be read ({type(error).__name__})") from error
        if text_checksum(manifest) != promise.digest:
            raise CorruptPartial(block, "manifest.json is not the one in the ledger")
        self._crcs = json.loads(manifest)

    def read(self, head: int, piece: str, box: Box, part: Box) -> Array | None:
        """Read one step of a piece, `(C, *part.shape)`; None where no patch came near it.

        Raises:
            CorruptPartial: when it is missing, or its CRC is not the one in the manifest.
        """
        key, piece = step_key(box, part), f"{head}/{piece}"
        if key not in self._crcs.get(piece, {}):
            return None
        try:
            array = self._arrays.get(piece)
            if array is None:
                array = self._arrays[piece] = zarr.open_array(LocalStore(self._group), path=piece, mode="r")
            data = np.asarray(array[(slice(None), *part.slices(box.start))])
        except Exception as error:
            raise CorruptPartial(self._block, f"{piece} step {key} cannot be read ({type(error).__name__})") from error
        if data.shape[1:] != part.shape or checksum(data) != self._crcs.get(piece, {}).get(key):
            raise CorruptPartial(self._block, f"{piece} step {key} is not what was written")
        return data


def step_key(box: Box, part: Box) -> str:
    """Name of a step within its piece: where it starts."""
    return ",".join(str(a - b) for a, b in zip(part.start, box.start, strict=True))
