"""The output of an aggregator: an ordinary Zarr v3 group with one array `(C, *spatial)` per head.

Its record, in the group's attributes, is that of any output: see `storage.output`. Beside it lie a lock, and until the
output is complete a workspace. One aggregator holds it at a time: a later one of the same process takes over at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import zarr
from zarr.storage import LocalStore

from oocpatch.aggregation.commits import Commits
from oocpatch.errors import OutputBusy, RunMismatch
from oocpatch.outputs.record import ATTRIBUTE, OutputRecord, inspect_output
from oocpatch.planning.box import Ints
from oocpatch.planning.plan import differences
from oocpatch.storage.locks import locked
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.workspace import remove_workspace

MADE_BY = "PatchAggregator"


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of the output.

    Attributes:
        name: its name in the group.
        shape: `(C, *spatial)`.
        chunks: `(1, *spatial)`.
        dtype: its dtype.
    """

    name: str
    shape: Ints
    chunks: Ints
    dtype: str


class AggregatedOutput:
    """The output of an aggregator on disk.

    Args:
        path: the group.
        parameters: what was asked for, by the names of the aggregator's parameters.

    Attributes:
        record: what is there; None: nothing.

    Raises:
        OutputExists: when something is there that oocpatch did not write.
        RunMismatch: when it belongs to a loop with other parameters, which are named.
    """

    def __init__(self, path: LocalPath, parameters: Mapping[str, Any]) -> None:
        self.path = path
        self._parameters = {"made_by": MADE_BY, **parameters}
        self._store = LocalStore(path)
        self._lock = contextlib.ExitStack()
        self._taken_over = False
        self._temporary = False
        self.record = inspect_output(path)
        if self.record is not None:
            found = differences(self._parameters, self.record.parameters)
            if found:
                told = "; ".join(f"{name}: {old!r} before, {new!r} now" for name, (new, old) in found.items())
                raise RunMismatch(
                    f"{path} belongs to a loop with other parameters ({told}); repeat them, or choose another store",
                    tuple(found),
                )

    @classmethod
    def temporary(cls) -> Self:
        """An output that is deleted when neither it nor an array of it is in use any more, and at exit."""
        folder = LocalPath(tempfile.mkdtemp(prefix="oocpatch-"))
        output = cls(folder / "output.zarr", {})
        output._temporary = True
        weakref.finalize(output._store, shutil.rmtree, folder, ignore_errors=True)
        return output

    def hold(self) -> None:
        """Take the output for this aggregator.

        Raises:
            OutputBusy: when another process holds it.
        """
        before = _HELD.get(self.path)
        if before is not None and before is not self:
            before.give_up()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(self._beside(".lock"), str(self.path)))
        # Also at exit, and before threads are frozen there: the lock's own would never be joined after that.
        weakref.finalize(self, _close, self._lock, os.getpid())
        _HELD[self.path] = self

    def release(self) -> None:
        """Let others take the output."""
        self._lock.close()
        if _HELD.get(self.path) is self:
            del _HELD[self.path]

    def give_up(self) -> None:
        """Leave the output to a later aggregator."""
        self.release()
        self._taken_over = True

    def check_held(self) -> None:
        """Refuse to go on once a later aggregator took the output.

        Raises:
            OutputBusy: in that case.
        """
        if self._taken_over:
            raise OutputBusy(f"a later PatchAggregator of this process has taken over {self.path}; add patches to that")

    def create(self, details: Mapping[str, Any]) -> None:
        """Make the group; arrays come with `arrays`."""
        workspace = self._beside("")
        shutil.rmtree(workspace, ignore_errors=True)  # of an output that somebody deleted
        self._write(
            OutputRecord(uuid.uuid4().hex, False, self._parameters, str(workspace), tuple(details["arrays"]), details)
        )

    def arrays(self, specs: list[ArraySpec]) -> tuple[dict[str, zarr.Array[Any]], bool]:
        """The arrays by name, and whether all of them were there; those that were not are made."""
        found: dict[str, zarr.Array[Any]] = {}
        there = True
        for spec in specs:
            try:
                found[spec.name] = zarr.open_array(self._store, path=spec.name, mode="r+")
            except FileNotFoundError:
                there = False
                found[spec.name] = zarr.create_array(
                    self._store, name=spec.name, shape=spec.shape, chunks=spec.chunks, dtype=spec.dtype, fill_value=0
                )
        return found, there

    def commits(self) -> Commits:
        """The workspace."""
        assert self.record is not None
        return Commits(LocalPath(self.record.workspace) / self.record.run_id)

    def complete(self, details: Mapping[str, Any]) -> None:
        """Record that nothing is missing, and delete the workspace after that."""
        assert self.record is not None
        if not self.record.complete:
            for left in self.path.rglob("*.partial"):
                left.unlink(missing_ok=True)  # of a crash in the middle of a chunk
            self._write(replace(self.record, complete=True, details={**self.record.details, **details}))
        remove_workspace(self.commits().root)

    def incomplete(self) -> None:
        """Record that the workspace holds more than the output."""
        assert self.record is not None
        if self.record.complete:
            self._write(replace(self.record, complete=False))

    def array(self, name: str) -> zarr.Array[Any]:
        """An array for the user, read-only; one of a temporary output keeps it from being deleted."""
        return zarr.open_array(self._store, path=name, mode="r+" if self._temporary else "r")

    def _beside(self, suffix: str) -> LocalPath:
        return self.path.with_name(f"{self.path.name}.oocpatch{suffix}")

    def _write(self, record: OutputRecord) -> None:
        plain = json.loads(json.dumps(asdict(record)))
        if self.record is None:
            zarr.create_group(self._store, attributes={ATTRIBUTE: plain}, overwrite=False)
        else:
            zarr.open_group(self._store, mode="r+", use_consolidated=False).attrs[ATTRIBUTE] = plain
        self.record = OutputRecord(**{**plain, "arrays": tuple(plain["arrays"])})


def _close(lock: contextlib.ExitStack, process: int) -> None:
    if os.getpid() == process:
        lock.close()
    else:
        _OF_PARENT.append(lock)  # a forked worker of a loader must not unlock what its parent holds


_OF_PARENT: list[contextlib.ExitStack] = []
_HELD: weakref.WeakValueDictionary[LocalPath, AggregatedOutput] = weakref.WeakValueDictionary()
