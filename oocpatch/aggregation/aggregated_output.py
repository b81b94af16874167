"""The output of an aggregator: an ordinary Zarr v3 group with one array `(C, *spatial)` per head.

The record in the group's attributes is that of any output. Beside the group lie a lock and, until the output is
complete, a workspace. One aggregator holds an output at a time: a later one of the same process takes over at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Self

import zarr
from zarr.storage import LocalStore

from oocpatch.aggregation.batches import HeadSpec
from oocpatch.aggregation.tile_store import TileStore
from oocpatch.errors import OutputBusy, RunMismatch
from oocpatch.outputs.record import ATTRIBUTE, OutputRecord, inspect_output
from oocpatch.planning.plan import differences
from oocpatch.storage.locks import beside, locked
from oocpatch.storage.paths import LocalPath

MADE_BY = "PatchAggregator"


class AggregatedOutput:
    """The output of an aggregator on disk.

    Args:
        path: the group.
        parameters: what was asked for, by the names of the aggregator's parameters.

    Attributes:
        record: the output's record; None while there is no output.
        store: tiles and journal in the workspace; None while there is no output.

    Raises:
        OutputExists: when there is something that oocpatch did not write.
        RunMismatch: when it belongs to a loop with other parameters, which are named.
    """

    def __init__(self, path: LocalPath, parameters: Mapping[str, Any]) -> None:
        self.path = path
        self.record = inspect_output(path)
        self._parameters = {"made_by": MADE_BY, **parameters}
        self._zarr_store = LocalStore(path)
        self._lock = contextlib.ExitStack()
        self._taken_over = self._temporary = False
        if self.record is not None:
            changes = differences(self._parameters, self.record.parameters)
            if changes:
                text = "; ".join(f"{name}: {old!r} before, {new!r} now" for name, (new, old) in changes.items())
                raise RunMismatch(
                    f"{path} belongs to a loop with other parameters ({text}); repeat them, or choose another store",
                    tuple(changes),
                )
            self.store = TileStore(LocalPath(self.record.workspace) / self.record.run_id)

    @classmethod
    def temporary(cls) -> Self:
        """Return an output that is deleted when neither it nor an array of it is in use any more, and at exit."""
        folder = LocalPath(tempfile.mkdtemp(prefix="oocpatch-"))
        output = cls(folder / "output.zarr", {})
        output._temporary = True
        weakref.finalize(output._zarr_store, shutil.rmtree, folder, ignore_errors=True)
        return output

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

    def create(self, specs: Sequence[HeadSpec], *, single: bool) -> None:
        """Make the group; `arrays` makes the arrays."""
        workspace, run_id = self.path.with_name(f"{self.path.name}.oocpatch"), uuid.uuid4().hex
        shutil.rmtree(workspace, ignore_errors=True)  # of an output that somebody deleted
        details = {"heads": [asdict(spec) for spec in specs], "single": single}
        names = tuple(spec.name for spec in specs)
        self._write(OutputRecord(run_id, False, self._parameters, str(workspace), names, details))
        self.store = TileStore(workspace / run_id)

    def arrays(self, specs: Sequence[HeadSpec]) -> tuple[dict[str, zarr.Array[Any]], bool]:
        """Return the arrays by name, and whether all of them were there; those that were not are made."""
        arrays: dict[str, zarr.Array[Any]] = {}
        missing = []
        for spec in specs:
            try:
                arrays[spec.name] = zarr.open_array(self._zarr_store, path=spec.name, mode="r+")
            except FileNotFoundError:
                missing.append(spec)
        for spec in missing:
            shape, chunks = (spec.channels, *spec.placement.shape), (1, *spec.chunks)
            arrays[spec.name] = zarr.create_array(
                self._zarr_store, name=spec.name, shape=shape, chunks=chunks, dtype=spec.dtype, fill_value=0
            )
        return arrays, not missing

    def update(self, *, complete: bool, **details: Any) -> None:
        """Record whether anything is missing; when nothing is, delete the workspace after that."""
        assert self.record is not None
        record = replace(self.record, complete=complete, details={**self.record.details, **details})
        if record != self.record:
            for left in self.path.rglob("*.partial") if complete else ():
                left.unlink(missing_ok=True)  # of a crash in the middle of a chunk
            self._write(record)
        if complete:
            self.store.clear()

    def array(self, name: str) -> zarr.Array[Any]:
        """Return an array for the user, read-only; one of a temporary output keeps it from being deleted."""
        return zarr.open_array(self._zarr_store, path=name, mode="r+" if self._temporary else "r")

    def _write(self, record: OutputRecord) -> None:
        plain = json.loads(json.dumps(record.to_dict()))
        if self.record is None:
            zarr.create_group(self._zarr_store, attributes={ATTRIBUTE: plain}, overwrite=False)
        else:
            zarr.open_group(self._zarr_store, mode="r+", use_consolidated=False).attrs[ATTRIBUTE] = plain
        self.record = OutputRecord(**{**plain, "arrays": tuple(plain["arrays"])})


def _close(lock: contextlib.ExitStack, process: int) -> None:
    if os.getpid() == process:
        lock.close()
    else:
        _OF_PARENT.append(lock)  # a forked worker of a loader must not unlock what its parent holds


_OF_PARENT: list[contextlib.ExitStack] = []
_HELD: weakref.WeakValueDictionary[LocalPath, AggregatedOutput] = weakref.WeakValueDictionary()
