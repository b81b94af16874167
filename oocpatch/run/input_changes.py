"""Changes of the input since the blocks of an output were computed, and the stages that these make void."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from oocpatch.configuration.run_config import RunConfig
from oocpatch.errors import CorruptData
from oocpatch.models.preprocessing import preprocess_statistics
from oocpatch.outputs.integrity import LEDGER
from oocpatch.outputs.output import array_paths
from oocpatch.planning.blocks import Neighbours
from oocpatch.planning.box import Box
from oocpatch.planning.plan import Plan
from oocpatch.storage.journal import local_copy
from oocpatch.storage.paths import StoragePath
from oocpatch.storage.unit_tags import UnitRecords
from oocpatch.volumes.content import MASK, VOLUME, PartStamp, changed_units, changed_units_of_part, unpack_stamps
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


@dataclass
class InputChanges:
    """Changes of the input.

    Attributes:
        blocks: the blocks that read something that has changed.
        units: of each input in several stored units, a flag per unit: 1 where it changed.
        parts: of each other input, the parts that changed.
        totals: of each other input, the number of parts that were read.
        other_statistics: whether the statistics of the volume changed, on which every block depends.
    """

    blocks: set[int] = field(default_factory=set)
    units: dict[str, bytearray] = field(default_factory=dict)
    parts: dict[str, set[Box]] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    other_statistics: bool = False

    def __bool__(self) -> bool:
        return bool(self.blocks) or self.other_statistics

    def add(self, block: int, name: str, box: Box | None, units: Iterable[int]) -> None:
        """Add something that a block has read and that has changed: a part, and the stored units in it that changed."""
        self.blocks.add(block)
        if name in self.units:
            for unit in units:
                self.units[name][unit] = 1
        elif box is not None:
            self.parts[name].add(box)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs that changed."""
        changed = [n for n, flags in self.units.items() if any(flags)] + [n for n, boxes in self.parts.items() if boxes]
        return tuple(changed) or (VOLUME,)

    def __str__(self) -> str:
        counts = {name: (sum(flags), len(flags)) for name, flags in self.units.items()}
        counts |= {name: (len(boxes), self.totals[name]) for name, boxes in self.parts.items()}
        texts = [f"{name}: {count} of {total} chunks changed" for name, (count, total) in counts.items() if count]
        return "; ".join(texts or [f"{VOLUME}: its statistics changed"])


def changes_of_complete(config: RunConfig, plan: Plan) -> InputChanges:
    """Compare the input with the stamps of a complete output."""
    ledger = config.output / array_paths(plan)[0] / LEDGER
    return _compare(config, plan, [ledger], lambda _block, _attempt: True)


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
    neighbours, stages = Neighbours(plan.block_grid), Stages()
    for block in changes.blocks:
        stages |= {("predict", block), *(("normalize", reader) for reader in neighbours.readers(block))}

    def is_deleted(block: int) -> bool:
        return normalized is None or all(reader in normalized for reader in neighbours.readers(block))

    for stage, block in list(stages):
        if stage == "normalize":
            stages |= {("predict", i) for i in (block, *neighbours.sources(block)) if is_deleted(i)}
    return stages


def _compare(
    config: RunConfig, plan: Plan, ledgers: list[StoragePath], counts: Callable[[int, str], bool]
) -> InputChanges:
    """Compare the parts of all records of predict stages that count, in parallel."""
    mask = config.data.mask
    inputs = {VOLUME: config.volume.for_run(1)} | ({} if mask is None else {MASK: mask.volume.for_run()})
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
            if (count := math.prod(volume.unit_counts)) > 1:
                changes.units[name] = bytearray(count)
            else:
                changes.parts[name] = set()
        for block, changed in run_pass(
            functools.partial(_changed, inputs, plan),
            batches(),
            threads=THREADS,
            name="compare the input",
            unit="parts",
            size=lambda batch: _size(batch[1]),
            total=sum(changes.totals.values()),
            progress=config.execution.progress,
        ):
            for name, box, units in changed:
                changes.add(block, name, box, units)
    changes.other_statistics = _other_statistics(config, plan, inputs[VOLUME])
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


def _changed(
    inputs: Mapping[str, Volume], plan: Plan, batch: Batch
) -> tuple[int, list[tuple[str, Box | None, list[int]]]]:
    """Return name, box and stored units of what has changed in a batch; reads only."""
    block, stamps = batch
    if isinstance(stamps, UnitRecords):
        units = changed_units(stamps, inputs[VOLUME])
        return block, [(VOLUME, None, units)] if units else []
    changed: list[tuple[str, Box | None, list[int]]] = []
    for part in stamps:
        padding = ("edge", 0.0) if part.name == MASK else (plan.padding_mode or "edge", plan.fill)
        found = changed_units_of_part(part, inputs[part.name], *padding)
        if found is not None:
            changed.append((part.name, part.box, found))
    return block, changed


def _other_statistics(config: RunConfig, plan: Plan, volume: Volume) -> bool:
    """Return whether the volume has other statistics; they are computed if any of its stored units changed."""
    if not plan.statistics or volume.fingerprint == plan.statistics_of:
        return False
    limit, progress = config.limits.max_memory, config.execution.progress
    return preprocess_statistics(config.model.preprocess, volume, limit, progress=progress) != plan.statistics
