"""The output of an aggregator: a Zarr v3 group with one array `(C, *spatial)` per head, and the workspace beside it.

The record in the group's attributes is that of any output. One aggregator holds an output at a time: a later one of the
same process takes over at once. Until the output is complete, the workspace has what is not final:

```text
<output>.oocpatch/<run_id>/
    journal                    one line per commit: which tiles are final, and how many patches the others have
    tiles/<head>.<position>    the sums of one tile, and the patches in them; replaced as a whole
    tiles/spare                memory of the disk for the next one
```

A tile's file lists the patches in its sums, so files need not be of one moment: after a crash one may be ahead of the
journal, and patches that it has already are left out when they are added again. A file begins with a CRC of its name
and its patches and one of its sums, and must have the patches that the journal counts. So a file that is lost, torn,
flipped, swapped or stale is found before it is used, and files need no fsync.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
import uuid
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore

from oocpatch.aggregation.placement import HeadSpec, Patch
from oocpatch.errors import CorruptData, OutputBusy, RunMismatch
from oocpatch.outputs.record import ATTRIBUTE, OutputRecord, inspect_output, write_record
from oocpatch.outputs.write_units import COMPRESSOR
from oocpatch.planning.box import Ints
from oocpatch.planning.plan import differences
from oocpatch.storage.checksums import checksum, text_checksum
from oocpatch.storage.journal import Journal, read_journal
from oocpatch.storage.locks import beside, locked
from oocpatch.storage.paths import LocalPath

Array = npt.NDArray[Any]
HEADER = struct.Struct("<IIIi")
"""CRC of the name and the patches, CRC of the sums, number of patches and of axes."""


class AggregatedOutput:
    """The output of an aggregator on disk; `record` is None while there is none.

    Raises OutputExists for something that oocpatch did not write, and RunMismatch for other parameters.
    """

    def __init__(self, path: LocalPath, parameters: Mapping[str, Any]) -> None:
        self.path = path
        self.record = inspect_output(path)
        self._parameters = {"made_by": "PatchAggregator", **parameters}
        self._store = LocalStore(path)
        self.arrays: dict[str, zarr.Array[Any]] = {}
        self._commits = 0
        self._lock = contextlib.ExitStack()
        self._taken_over = self._temporary = False
        if self.record and (changes := differences(self._parameters, self.record.parameters)):
            text = "; ".join(f"{name}: {old!r} before, {new!r} now" for name, (new, old) in changes.items())
            raise RunMismatch(
                f"{path} belongs to a loop with other parameters ({text}); repeat them, or choose another store",
                tuple(changes),
            )

    @classmethod
    def temporary(cls) -> Self:
        """Return an output that is deleted when neither it nor an array of it is in use any more, and at exit."""
        folder = LocalPath(tempfile.mkdtemp(prefix="oocpatch-"))
        output = cls(folder / "output.zarr", {})
        output._temporary = True
        weakref.finalize(output._store, shutil.rmtree, folder, ignore_errors=True)
        return output

    # Lock

    def hold(self) -> None:
        """Take the output for this aggregator; raise OutputBusy when another process holds it."""
        before = _HELD.get(self.path)
        if before is not None and before is not self:
            before.release()
            before._taken_over = True  # noqa: SLF001 - of this class
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(beside(self.path, ".lock"), str(self.path)))
        # Also at exit, and before threads are frozen there: the lock's own would never be joined after that.
        weakref.finalize(self, _close, self._lock, os.getpid())
        _HELD[self.path] = self

    def release(self) -> None:
        """Let others take the output."""
        self._lock.close()
        if _HELD.get(self.path) is self:
            del _HELD[self.path]

    def check_held(self) -> None:
        """Raise OutputBusy once a later aggregator took the output."""
        if self._taken_over:
            raise OutputBusy(f"a later PatchAggregator of this process has taken over {self.path}; add patches to that")

    # Group and arrays

    def create(self, specs: Sequence[HeadSpec], *, single: bool) -> None:
        """Create the group and the arrays."""
        workspace = beside(self.path, "")
        shutil.rmtree(str(workspace), ignore_errors=True)  # of an output that somebody deleted
        details = {"heads": [asdict(spec) for spec in specs], "single": single}
        names = tuple(spec.name for spec in specs)
        record = OutputRecord(uuid.uuid4().hex, False, self._parameters, str(workspace), names, details)
        zarr.create_group(self._store, attributes={ATTRIBUTE: record.to_dict(self.path)}, zarr_format=3)
        self.record = inspect_output(self.path)
        self.open_arrays(specs)

    def open_arrays(self, specs: Sequence[HeadSpec]) -> bool:
        """Open the arrays, or create those that are missing; return whether none was."""
        missing = [spec for spec in specs if not (self.path / spec.name / "zarr.json").exists()]
        for spec in missing:
            shape, chunks = (spec.channels, *spec.shape), (1, *spec.chunks)
            zarr.create_array(
                self._store,
                name=spec.name,
                shape=shape,
                chunks=chunks,
                dtype=spec.dtype,
                compressors=COMPRESSOR,
                zarr_format=3,
                fill_value=0,
            )
        self.arrays = {s.name: zarr.open_array(self._store, path=s.name, mode="r+") for s in specs}
        return not missing

    def array(self, name: str) -> zarr.Array[Any]:
        """Return an array for the user, read-only; one of a temporary output keeps it from being deleted."""
        return zarr.open_array(self._store, path=name, mode="r+" if self._temporary else "r")

    def update(self, *, complete: bool, **details: Any) -> None:
        """Record whether anything is missing; when nothing is, delete the workspace after that."""
        assert self.record is not None
        record = replace(self.record, complete=complete, details={**self.record.details, **details})
        if record != self.record:
            for left in self.path.rglob("*.partial") if complete else ():
                left.unlink(missing_ok=True)  # of a crash in the middle of a chunk
            write_record(self.path, record)
            self.record = inspect_output(self.path)
        if complete:
            self.clear()

    @property
    def is_complete(self) -> bool:
        """True when nothing is missing."""
        return self.record is not None and self.record.complete

    # Workspace

    @property
    def workspace(self) -> LocalPath:
        """Directory of the run."""
        assert self.record is not None
        return LocalPath(self.record.workspace) / self.record.run_id

    def commits(self) -> list[Any]:
        """Return all commits, but for one that a crash tore; raise CorruptData when one is damaged or missing."""
        commits = list(read_journal(self.workspace / "journal", strict=True))
        numbers = sorted({commit["number"] for commit in commits})  # an interrupted commit is made again
        if numbers != list(range(len(numbers))):
            raise CorruptData(f"a commit in {self.workspace / 'journal'} is missing")
        self._commits = len(numbers)
        return commits

    def commit(self, body: dict[str, Any]) -> None:
        """Add a commit, when the files of its tiles are written."""
        self.workspace.make_folder()
        with Journal(self.workspace / "journal") as journal:
            journal.append({"number": self._commits, **body})
        self._commits += 1

    def clear(self) -> None:
        """Delete the workspace, the journal first."""
        (self.workspace / "journal").unlink(missing_ok=True)
        self.workspace.remove_tree()
        self.workspace.parent.remove_if_empty()
        self._commits = 0

    def _tile_paths(self, head: int, position: Ints) -> tuple[LocalPath, LocalPath]:
        """Return the path of a tile's file, and of the one before while it is replaced."""
        path = self.workspace / "tiles" / ".".join(map(str, (head, *position)))
        return path, path.with_name(f"{path.name}.before")

    def remove_tile(self, head: int, position: Ints) -> None:
        """Delete the file of a tile."""
        for path in self._tile_paths(head, position):
            path.unlink(missing_ok=True)

    def write_tile(self, head: int, position: Ints, patches: Collection[Patch], sums: Array) -> None:
        """Write the file of a tile, whole or not at all.

        It changes places with a spare file that is written over. A new file took ten times as long: new pages, and a
        file that replaces another one is sent to the disk at once.
        """
        (path, before), table = self._tile_paths(head, position), np.array(list(patches), np.int64)
        spare = path.with_name("spare")
        path.parent.make_folder()
        spare.touch()
        with spare.open("r+b") as file:
            crc = checksum(table, text_checksum(path.name))
            file.write(HEADER.pack(crc, checksum(sums), len(table), table.shape[-1]) + table.tobytes())
            file.write(sums.reshape(-1).view(np.uint8).data)
            file.truncate()
        replaces = path.exists()
        if replaces:
            path.replace(before)
        spare.replace(path)
        if replaces:
            before.replace(spare)

    def read_tile(self, head: int, position: Ints, count: int, sums: Array | None) -> list[Patch]:
        """Return the patches in a tile, at least `count`, and read its sums `(C, *spatial)` into an array, if any."""
        path, before = self._tile_paths(head, position)
        try:
            if not path.exists():  # a crash came while it was replaced
                before.rename(path)
            with path.open("rb") as file:
                crc, sums_crc, length, axes = HEADER.unpack(file.read(HEADER.size))
                table = np.frombuffer(file.read(16 * length * axes), np.int64).reshape(length, 2, axes)
                is_whole = length >= count and checksum(table, text_checksum(path.name)) == crc
                if is_whole and sums is not None:
                    is_whole = file.readinto(sums.reshape(-1).view(np.uint8).data) == sums.nbytes
                    is_whole = is_whole and checksum(sums) == sums_crc
        except (OSError, ValueError, struct.error) as error:
            raise CorruptData(f"sums in {path} cannot be read ({type(error).__name__})") from error
        if not is_whole:
            raise CorruptData(f"sums in {path} are not what was written")
        return table_patches(table)


def table_patches(table: Array) -> list[Patch]:
    """Return the patches in a table `(n, 2, axes)` of their starts and sizes."""
    return [(tuple(start), tuple(size)) for start, size in table.tolist()]


def _close(lock: contextlib.ExitStack, process: int) -> None:
    if os.getpid() == process:
        lock.close()
    else:
        _OF_PARENT.append(lock)  # a forked worker of a loader must not unlock what its parent holds


_OF_PARENT: list[contextlib.ExitStack] = []
_HELD: weakref.WeakValueDictionary[LocalPath, AggregatedOutput] = weakref.WeakValueDictionary()
