"""Changes of the input since the blocks of an output were computed, and the stages that these make void."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import CorruptData, RunMismatch
from oocpatch.models.preprocessing import preprocess_statistics
from oocpatch.outputs.output import ledger_path, stored_ledger
from oocpatch.outputs.record import OutputRecord
from oocpatch.planning.box import Box
from oocpatch.planning.choices import FOLDED_PADDING, STATISTIC_PADDING
from oocpatch.planning.plan import Plan
from oocpatch.run.driver import find_workspace, measured_volume, plan_of
from oocpatch.storage.journal import local_copy
from oocpatch.storage.paths import StoragePath
from oocpatch.storage.unit_tags import UnitRecords
from oocpatch.volumes.content import MASK, VOLUME, PartStamp, changed_units, changed_units_of_part, unpack_stamps
from oocpatch.volumes.padding import padding_value, reading_rule
from oocpatch.volumes.passes import run_pass
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import Record, latest_records, segments
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.workspace import Workspace

THREADS = 8
"""Threads that compare parts: file systems in a network answer late."""

AT_A_TIME = 1024
"""Parts or stored units that one thread compares at a time."""

Batch = tuple[int, UnitRecords | list[PartStamp]]
"""A block, and stamps of what it has read of one input."""

Stages = set[tuple[str, int]]
"""Stages of blocks: `predict` or `normalize`, and the block."""


class Change(NamedTuple):
    """A change of what a block has read.

    Attributes:
        name: the input.
        box: its bounding box in the volume's frame; None: not known.
        units: numbers of the stored units that changed; all of them where the volume is stored in other chunks.
        part: the part of the input that changed, where parts are stamped.
    """

    name: str
    box: Box | None
    units: Sequence[int]
    part: Box | None = None


@dataclass
class InputChanges:
    """Changes of the input.

    Attributes:
        blocks: the blocks that read something that has changed, each with the bounding box of that in the volume's
            frame; None: any of its patches may depend on it.
        units: of each input in several stored units, a flag per unit: 1 where it changed.
        parts: of each other input, the parts that changed.
        totals: of each other input, the number of parts that were read.
        other_statistics: whether the statistics of the volume changed, on which every block depends.
        other_plan: whether a fresh run would have another plan: the volume has other chunks, or another fill value that
            is skipped.
    """

    blocks: dict[int, Box | None] = field(default_factory=dict)
    units: dict[str, bytearray] = field(default_factory=dict)
    parts: dict[str, set[Box]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    other_statistics: bool = False
    other_plan: bool = False

    def __bool__(self) -> bool:
        return bool(self.blocks) or self.other_statistics

    @property
    def concern_all(self) -> bool:
        """Return whether only a run that starts afresh has the bytes of a fresh run."""
        return self.other_statistics or (bool(self.blocks) and self.other_plan)

    def add(self, block: int, change: Change) -> None:
        """Add something that a block has read and that has changed."""
        before = self.blocks.get(block, change.box)
        self.blocks[block] = None if before is None or change.box is None else _around(before, change.box)
        if change.name in self.units:
            flags = self.units[change.name]
            if len(change.units) == len(flags):
                flags[:] = b"\1" * len(flags)
            for unit in change.units if len(change.units) < len(flags) else ():
                flags[unit] = 1
        elif change.part is not None:
            self.parts[change.name].add(change.part)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs that changed."""
        changed = [n for n, flags in self.units.items() if any(flags)] + [n for n, boxes in self.parts.items() if boxes]
        return tuple(changed) or (VOLUME,)

    def __str__(self) -> str:
        counts = {name: (sum(flags), len(flags)) for name, flags in self.units.items()}
        counts |= {name: (len(boxes), self.totals[name]) for name, boxes in self.parts.items()}
        texts = [f"{name}: {count} of {total} chunks changed" for name, (count, total) in counts.items() if count]
        other = "it is stored in other chunks" if self.blocks else "its statistics changed"
        return "; ".join(texts or [f"{VOLUME}: {other}"])


def changes_of_complete(config: RunConfig, plan: Plan) -> InputChanges:
    """Compare the input with the stamps of a complete output, or of the scores that it was resampled from."""
    scores = Plan.from_json(plan.scores) if plan.scores else None
    ledger = stored_ledger(config.output, plan) if scores is None else config.output / scores_ledger(plan)
    changes = _compare(config, scores or plan, [ledger], lambda _block, _attempt: True)
    # what blocks of a table have was deleted, and so were scores: all are computed again
    changes.other_plan |= plan.table is not None or scores is not None
    return changes


def scores_ledger(plan: Plan) -> str:
    """Return the path in a complete output of the ledger of the scores that it was resampled from."""
    return f"{ledger_path(plan)}.scores"


def changes_of_unfinished(config: RunConfig, workspace: Workspace, progress: RunProgress) -> InputChanges:
    """Compare the input with the stamps of the blocks that a workspace has."""

    def counts(block: int, attempt: str) -> bool:
        return block in progress.partials and progress.partials[block].attempt == attempt

    return _compare(config, workspace.plan, segments(workspace.root), counts)


def stages_to_repeat(plan: Plan, changes: InputChanges, normalized: Collection[int] | None) -> Stages:
    """Return the stages that are void after changes of the input.

    Args:
        plan: the plan.
        changes: the changes.
        normalized: the blocks whose normalize stage is done; None: all, and all partials are deleted.
    """
    if plan.vectors and normalized is None:  # the rows of all blocks are put in order again
        return {(stage, block) for stage in ("predict", "normalize") for block in range(plan.blocks)}
    if plan.merges:  # ids depend on all blocks
        again = range(plan.blocks) if normalized is None else changes.blocks
        return {*(("predict", block) for block in again), *(("normalize", block) for block in range(plan.blocks))}
    neighbours, stages = plan.neighbours, Stages()
    for block, box in changes.blocks.items():
        readers = neighbours.readers(block)
        stages |= {("predict", block), *(("normalize", r) for r in readers if _reaches(plan, block, box, r))}

    def is_deleted(block: int) -> bool:
        return normalized is None or all(reader in normalized for reader in neighbours.readers(block))

    for stage, block in list(stages):
        if stage == "normalize":
            stages |= {("predict", i) for i in neighbours.read_by(block) if is_deleted(i)}
    return stages


def _reaches(plan: Plan, block: int, box: Box | None, reader: int) -> bool:
    """Return whether patches of a block that see a box give values to the open part of a reader's core."""
    if box is None:
        return True
    meeting = (axis.meeting(*span) for axis, *span in zip(plan.input_grid.axes, box.start, box.stop, strict=True))
    ranges = [
        range(max(r.start, m.start), min(r.stop, m.stop))
        for r, m in zip(plan.block_grid.patches(plan.block_grid[block]), meeting, strict=True)
    ]
    if not all(ranges):
        return False
    for frame in plan.frames:
        first, last = (frame.grid.box(tuple(r[end] for r in ranges)) for end in (0, -1))
        touched = Box(first.start, last.stop)
        if any(not (touched & part).empty for part in frame[reader].open_boxes):
            return True
    return False


def _around(first: Box, second: Box) -> Box:
    """Return the bounding box of two boxes."""
    return Box(tuple(map(min, first.start, second.start)), tuple(map(max, first.stop, second.stop)))


def _compare(
    config: RunConfig, plan: Plan, ledgers: list[StoragePath], counts: Callable[[int, str], bool]
) -> InputChanges:
    """Compare the parts of all records of predict stages that count, in parallel."""
    inputs = {name: volume.for_run(int(name != MASK)) for name, volume in config.inputs.items()}
    changes = InputChanges()
    with contextlib.ExitStack() as stack:
        copies = [stack.enter_context(local_copy(ledger)) for ledger in ledgers]

        def batches() -> Iterator[Batch]:
            for copy in copies:
                for record in latest_records(copy, plan.blocks):
                    if record.kind == "predict" and counts(record.block, record.note):
                        yield from _batches(record)

        for _, stamps in batches():
            name = VOLUME if isinstance(stamps, UnitRecords) else stamps[0].name
            if name not in inputs:
                raise CorruptData(f"the ledger has stamps of {name!r}, which is no input of this run")
            changes.totals[name] = changes.totals.get(name, 0) + _size(stamps)
        for name, volume in inputs.items():
            if volume.source.array is not None and volume.source.units is not None:
                changes.units[name] = bytearray(math.prod(volume.unit_counts))
            else:
                changes.parts[name] = set()
        for block, of_block in run_pass(
            functools.partial(_changed, inputs, plan),
            batches(),
            threads=THREADS,
            name="compare the input",
            unit="parts",
            size=lambda batch: _size(batch[1]),
            total=sum(changes.totals.values()),
            progress=config.execution.progress,
        ):
            for change in of_block:
                changes.add(block, change)
    changes.other_statistics = _other_statistics(config, plan, measured_volume(config, next(iter(inputs.values()))))
    skip_values = repr(plan.skip_value), repr(config.skip_value)  # which may be NaN
    changes.other_plan = plan.in_chunks != config.volume.chunks or len(set(skip_values)) > 1
    return changes


def _batches(record: Record) -> Iterator[Batch]:
    """Yield the stamps of a record, some at a time, those of one input together."""
    parts, units = unpack_stamps(record.stamps)
    for _, group in itertools.groupby(parts, key=lambda part: part.name):
        members = list(group)
        yield from ((record.block, members[i : i + AT_A_TIME]) for i in range(0, len(members), AT_A_TIME))
    if units is not None:
        for i in range(0, len(units.tags), AT_A_TIME):
            yield record.block, units.select(slice(i, i + AT_A_TIME))


def _size(stamps: UnitRecords | list[PartStamp]) -> int:
    return len(stamps.tags) if isinstance(stamps, UnitRecords) else len(stamps)


def _changed(inputs: Mapping[str, Volume], plan: Plan, batch: Batch) -> tuple[int, list[Change]]:
    """Return what has changed in a batch; reads only."""
    block, stamps = batch
    if isinstance(stamps, UnitRecords):
        volume = inputs[VOLUME]
        units = changed_units(stamps, volume)
        if units is None:
            return block, [Change(VOLUME, None, range(math.prod(volume.unit_counts)))]
        # a folded padding repeats voxels elsewhere
        is_folded = plan.padding_mode in FOLDED_PADDING and plan.padding_mode != "edge"
        box = None if is_folded or not units else functools.reduce(_around, map(volume.box_of_unit, units))
        return block, [Change(VOLUME, box, units)] if units else []
    changes = []
    for part in stamps:
        padding = ("edge", 0.0) if part.name == MASK else reading_rule(plan.padding_mode, plan.fill)
        units_of_part = changed_units_of_part(part, inputs[part.name], *padding)
        if units_of_part is not None:
            changes.append(Change(part.name, part.box if part.name == VOLUME else None, units_of_part, part.box))
    return block, changes


def _other_statistics(config: RunConfig, plan: Plan, volume: Volume) -> bool:
    """Return whether the volume has other statistics; they are computed if any of its stored units changed."""
    mode = plan.padding_mode if plan.padding_mode in STATISTIC_PADDING else None
    if not (plan.statistics or mode) or volume.fingerprint == plan.statistics_of:
        return False
    limit, progress = config.limits.max_memory, config.execution.progress
    if preprocess_statistics(config.model.preprocess, volume, limit, progress=progress) != plan.statistics:
        return True
    return mode is not None and padding_value(volume, mode, max_memory=limit, progress=progress) != plan.fill


def compare_input(config: RunConfig, stored: Plan | None, record: OutputRecord | None) -> InputChanges:
    """Compare the input with what the blocks that are done have read.

    Raises:
        RunMismatch: when it has changed, unless it is to be updated.
    """
    execution = config.execution
    if record is None or execution.overwrite:
        return InputChanges()
    if record.complete:
        plan = plan_of(record)
        if plan is None or not (execution.check_input or execution.update):
            return InputChanges()
        changes = changes_of_complete(config, plan)
    elif config.is_made_of_scores:
        return InputChanges()  # the run of the scores compares
    else:
        workspace = None if stored is None else find_workspace(config, record)
        if workspace is None:
            return InputChanges()
        changes = changes_of_unfinished(config, workspace, workspace.progress())
    if changes and not execution.update:
        raise RunMismatch(
            f"{config.output} was computed from other input ({changes} since); compute the blocks that depend on it "
            "again with update=True, choose another output, or start afresh with overwrite=True",
            changes.names,
        )
    return changes
