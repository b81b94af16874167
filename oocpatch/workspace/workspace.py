"""The workspace: partials, weights, plan and ledger of one run, in a directory of its own, or below one address.

```text
<workspace>/<run_id>/
    plan.json            written last when a run is set up: without it the rest is rubbish
    ledger
    ledger.<i>-of-<n>    of a part of an array job
    weights/<head>/<axis>    the weights of a full grid, one 1-D array per axis
    blocks/<index>/          one directory per block
        <attempt>/           one per attempt at it, of a name of its own; the ledger says which counts
    outputs/<index>/         the model's outputs for the batches of a block that is not recorded, where blocks are large
    merged/<attempt>/        ids of objects, from the merge of all blocks
```

No attempt touches what another one left: a worker that was frozen and comes back late writes to a directory that nobody
reads. `workspace/partials.py` has the layout of an attempt.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from oocpatch.errors import CorruptData, RunMismatch
from oocpatch.planning.plan import Plan
from oocpatch.planning.windows import axis_weights
from oocpatch.storage.checksums import text_checksum
from oocpatch.storage.paths import LocalPath, StoragePath, remove_trees
from oocpatch.workspace.ledger import WHOLE, Ledger, PartialsRef, join_segments, segments, table_key
from oocpatch.workspace.partials import PartialReader, PartialWriter, write_metadata
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.stored_outputs import StoredOutputs

PLAN = "plan.json"
"""Name of the file that makes a directory a workspace; workers check it to learn whether their run is still there."""


class Workspace:
    """The workspace of one run, at `<workspace>/<run_id>`."""

    def __init__(self, root: StoragePath, plan: Plan) -> None:
        self.root = root
        self.plan = plan
        self.output, self.way = "", ""  # see `find`

    @classmethod
    def create(cls, root: StoragePath, plan: Plan, output: StoragePath) -> Workspace:
        """Set a run up: rubbish is swept, and `plan.json` comes last, atomically."""
        (root / PLAN).unlink(missing_ok=True)
        root.remove_tree()
        root.make_folder()
        workspace = cls(root, plan)
        workspace.write_weights()
        workspace.belong_to(output)
        return workspace

    def belong_to(self, output: StoragePath) -> None:
        """Store the plan, with the address of the output that this is the workspace of."""
        self.output, self.way = str(output), way(self.root, output)
        text = self.plan.to_json()
        stored = {"crc": text_checksum(text), "plan": text, "output": self.output, "way": self.way}
        (self.root / PLAN).write_atomic(json.dumps(stored))

    @classmethod
    def find(cls, root: StoragePath) -> Workspace | None:
        """Return the workspace that was set up at `root`, with its stored plan; None when there is none.

        Its attribute `output` is the address of its output, and `way` the way there from `root`: where both were moved,
        the way is the same.

        Raises:
            OSError: when an object store does not answer, which says nothing about what is there.
            RunMismatch: when another version of oocpatch set it up.
        """
        try:
            stored = json.loads((root / PLAN).read_text())
            is_whole = text_checksum(stored["plan"]) == stored["crc"]
            workspace = cls(root, Plan.from_json(stored["plan"]))
            workspace.output, workspace.way = str(stored["output"]), str(stored["way"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if root.is_outage(error) or isinstance(error, RunMismatch):
                raise
            return None
        return workspace if is_whole else None

    def ledger(self, segment: str = WHOLE) -> Ledger:
        """Open the ledger, or a segment of it, for its one writer."""
        return Ledger(self.root / segment)

    def progress(self) -> RunProgress:
        """Sum up all segments of the ledger."""
        return RunProgress.read(segments(self.root), self.plan.blocks)

    def join(self) -> None:
        """Move the records of all segments into the ledger; only when nobody writes to any of them."""
        join_segments(self.root)

    def write_weights(self) -> None:
        """Write the weights of the full grid anew; the same bytes whenever it is called."""
        (self.root / "weights").remove_tree()
        for number, (head, frame) in enumerate(zip(self.plan.heads, self.plan.frames, strict=True)):
            if head.needs_weights:
                for name, axis in zip(self.plan.axes, frame.grid.axes, strict=True):
                    values = axis_weights(head.window, axis)
                    place = self.root / "weights" / str(number) / name
                    write_metadata(place, values.shape, values.shape, "float64")
                    (place / "c.0").write_plain(values.astype("<f8").tobytes())

    def weights(self, head: int) -> list[npt.NDArray[np.float64]]:
        """Read the weights of the full grid, `(length,)` per axis; their outer product is the sum of all windows.

        Raises:
            CorruptData: when they cannot be read.
        """
        place = self.root / "weights" / str(head)
        weights = []
        for name, axis in zip(self.plan.axes, self.plan.frames[head].grid.axes, strict=True):
            try:
                values = (place / name / "c.0").read_array("float64", (axis.length,))
            except FileNotFoundError:
                values = None
            if values is None:
                raise CorruptData(f"the weights in {place} are not what was written; the same call writes them anew")
            weights.append(values)
        return weights

    def writer(self, block: int) -> PartialWriter:
        """Return a writer of the partials of one attempt at a block."""
        return PartialWriter(self.folder(block), self.plan.frames)

    def reader(self, block: int, ref: PartialsRef) -> PartialReader:
        """Return a reader of the partials that the ledger records of a block; `CorruptPartial` if they are others."""
        return PartialReader(self.folder(block), self.plan.frames, block, ref)

    def table_reader(self, block: int, ref: PartialsRef) -> PartialReader:
        """Return a reader of what assembling the objects of a block left."""
        return PartialReader(self.folder(block), self.plan.frames, table_key(block), ref)

    def outputs(self, block: int) -> StoredOutputs:
        """Return what is stored of the model's outputs for the batches of a block."""
        return StoredOutputs(self.root / "outputs" / str(block))

    def delete_outputs(self, blocks: Iterable[int]) -> None:
        """Delete the stored outputs of blocks."""
        if self.plan.stores_outputs:
            remove_trees([self.root / "outputs" / str(block) for block in blocks])

    def delete(self, blocks: Iterable[int]) -> None:
        """Delete the partials of blocks; vectors of patches stay until the run is complete."""
        folders = [self.folder(block) for block in blocks]
        if self.plan.vectors:
            numbers = range(len(self.plan.heads))
            folders = [f / attempt / str(number) for f in folders for attempt in f.list_folders() for number in numbers]
        remove_trees(folders)

    def sweep(self, progress: RunProgress) -> None:
        """Delete the partials that no record names, of dead and late attempts; only where no other process records."""
        blocks = self.root / "blocks"
        gone = set()
        for block, attempt in (name.split("/") for name in blocks.list_folders(depth=2)):
            refs = [index.get(int(block)) for index in (progress.partials, progress.tables)] if block.isdigit() else []
            recorded = {ref.attempt for ref in refs if ref is not None and ref.attempt}
            if attempt not in recorded:
                gone.add(f"{block}/{attempt}" if recorded else block)
        remove_trees([blocks / name for name in sorted(gone)])
        if self.plan.merges:
            merged = self.root / "merged"
            remove_trees([merged / name for name in merged.list_folders() if name != progress.merged.attempt])

    def folder(self, block: int) -> StoragePath:
        """Return the directory of all attempts at a block."""
        return self.root / "blocks" / str(block)

    def merged_folder(self, attempt: str) -> StoragePath:
        """Return the directory of an attempt at the merge of objects."""
        return self.root / "merged" / attempt


def way(root: StoragePath, output: StoragePath) -> str:
    """Return the way from a workspace to an output."""
    is_local = isinstance(root, LocalPath) and isinstance(output, LocalPath)
    return os.path.relpath(str(output), str(root)) if is_local else str(output)


def remove_workspace(root: StoragePath) -> None:
    """Delete a workspace, its plan first, and the directory above it if that is empty then."""
    (root / PLAN).unlink(missing_ok=True)
    root.remove_tree()
    root.parent.remove_if_empty()
