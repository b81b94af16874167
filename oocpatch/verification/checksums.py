"""Verify an output: read every byte that a run wrote, and compare with the CRCs computed while it was written.

Files are read once, piece by piece, and nothing is decoded: memory does not grow with the output, and a damaged file
cannot crash a decoder. Of an incomplete output, the blocks in its ledger are verified. Coarser levels have no CRCs: if
the finest levels are undamaged, each level is computed again from the one above it, and its voxels are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from oocpatch.errors import CorruptData, CorruptPartial, OutputBusy, OutputExists
from oocpatch.execution.array_job import busy_holder
from oocpatch.objects.columns import TableSchema
from oocpatch.objects.table_merge import find_runs
from oocpatch.outputs.integrity import LEDGER, METADATA_CRC, metadata_checksum
from oocpatch.outputs.output import array_paths, channel_position, stored_ledger
from oocpatch.outputs.pyramid import compare_pyramids
from oocpatch.outputs.record import ATTRIBUTE, OutputRecord, find_output, read_table_record
from oocpatch.outputs.write_units import unpack
from oocpatch.planning.box import Box, Ints
from oocpatch.planning.plan import Plan, human
from oocpatch.run.driver import reopen, workspace_root
from oocpatch.storage.checksums import ABSENT, measured
from oocpatch.storage.journal import local_copy
from oocpatch.storage.locks import beside, locked
from oocpatch.storage.paths import StoragePath, output_path
from oocpatch.workspace.ledger import Record, latest_records, segments
from oocpatch.workspace.workspace import Workspace

THREADS, AT_A_TIME, SHOWN = 4, 256, 20
PYRAMID = "pyramid"
"""Name of the stage that writes coarser levels."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One file that is not what was written.

    Attributes:
        array: array that the file belongs to; empty for metadata of the group.
        key: name of the file within the array, such as `c/0/1`.
        problem: description of the damage.
        start: first voxel of the box that the file stores, channel first if there is one; empty for other files.
        shape: size of that box.
        block: block that wrote the file; None for other files, and for coarser levels.
        stage: stage of that block; `pyramid` for coarser levels.
    """

    array: str
    key: str
    problem: str
    start: Ints = ()
    shape: Ints = ()
    block: int | None = None
    stage: str | None = None

    def __str__(self) -> str:
        text = f"{self.array}/{self.key} {self.problem}".removeprefix("/")
        if not self.shape:
            return text
        stop = (a + n for a, n in zip(self.start, self.shape, strict=True))
        writer = self.stage if self.block is None else f"block {self.block}"
        return f"{text}: voxels {','.join(map(str, self.start))} to {','.join(map(str, stop))}, {writer}"

    __repr__ = __str__


Checked = tuple[int, int, Damage | None]
"""Number of write units of a file (0 or 1), bytes read, and its damage, if there is any."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of verifying an output. Prints as text.

    Attributes:
        output: path of the output.
        complete: whether the run is complete; otherwise the blocks in its ledger were verified.
        units: number of verified write units, including those that must not exist.
        bytes: number of bytes read.
        damaged: all damage.
    """

    output: str
    complete: bool
    units: int
    bytes: int
    damaged: tuple[Damage, ...]

    @property
    def passed(self) -> bool:
        """True if nothing is damaged."""
        return not self.damaged

    def to_json(self) -> str:
        """Return the verification as a JSON object."""
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=1)

    def __str__(self) -> str:
        state = "complete" if self.complete else "incomplete, what is done"
        lines = [f"{self.output}: {state}: {self.units:,} write units, {human(self.bytes)} read"]
        lines += [f"damaged    {damage}" for damage in self.damaged[:SHOWN]]
        if len(self.damaged) > SHOWN:
            lines.append(f"damaged    and {len(self.damaged) - SHOWN:,} more")
        return "\n".join([*lines, "PASS" if self.passed else f"FAIL: {len(self.damaged):,} damaged"])

    __repr__ = __str__


def verify(output: str | os.PathLike[str], *, repair: bool = False) -> Verification:
    """Read an output again, and compare it with the checksums of what was written.

    Args:
        output: path of the output.
        repair: mark the blocks that wrote damaged write units as not done, so that the same call of `predict` computes
            only these blocks again, to the same bytes.

    Raises:
        ValueError: if there is no output, or one without checksums.
        OutputExists: if oocpatch did not write the output.
        OutputBusy: if a run is writing the output.
        CorruptData: if `repair` is set and a file other than a write unit is damaged.

    >>> import tempfile, numpy as np, oocpatch, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = oocpatch.predict(np.ones((8, 8)), torch.nn.Identity(), f"{folder}/out", patch_size=8)
    ...     verify(f"{folder}/out").passed
    True
    """
    path = output_path("output", output)
    holder = busy_holder(path, None)
    if holder is not None:
        raise OutputBusy(f"a run is at work on {path} ({holder}); verify it when that is done")
    if (of_table := read_table_record(path)) is not None:
        return _verify_table(path, of_table, repair=repair)
    record, damage = _record(path)
    if record is None or damage:
        if repair:
            raise CorruptData(f"{path} cannot be repaired: {damage[0]}; delete it, and predict starts afresh")
        return Verification(str(path), complete=True, units=0, bytes=0, damaged=tuple(damage))
    stored = _stored(path, record)
    if stored is None:
        return Verification(str(path), complete=False, units=0, bytes=0, damaged=())
    plan, ledgers = stored
    units = size = 0

    def count(files: Iterable[Checked]) -> None:
        nonlocal units, size
        for number, read, damaged in files:
            units, size = units + number, size + read
            damage.extend([damaged] if damaged else [])

    if record.complete:
        count(_check_files(path, record))
    counts = {"predict": 0, "normalize": 0}
    count(_check_records(path, plan, ledgers, counts))
    if record.complete and not damage and counts != {"predict": plan.blocks, "normalize": plan.num_normalized}:
        damage.append(Damage("", LEDGER, f"must have a record of each stage of each block, has {counts}"))
    if record.complete and not damage:
        count(_check_levels(path))
    result = Verification(str(path), record.complete, units, size, tuple(damage))
    if repair and damage:
        _repair(path, record, plan, result)
    return result


def _verify_table(path: StoragePath, record: OutputRecord, *, repair: bool) -> Verification:
    """Compare the file of a table with its CRC; of one that is not complete, what its blocks left."""
    units = size = 0
    damage: list[Damage] = []
    if record.complete and path.exists():
        units, (_, size, damaged) = 1, _compare(path.parent, Damage("", path.name, ""), int(record.details["crc"]))
        damage += [damaged] if damaged else []
        if repair and damage:
            raise CorruptData(f"{path} cannot be repaired; delete it, and the same call makes it anew")
        return Verification(str(path), complete=True, units=units, bytes=size, damaged=tuple(damage))
    begun = find_output(path)
    if begun is None:
        raise ValueError(f"output not found: {path} does not exist")
    if (workspace := Workspace.find(workspace_root(begun))) is not None:
        schema = TableSchema.of(workspace.plan.table or {})
        for block, ref in workspace.progress().partials.items():
            try:  # what is damaged is measured again by the same call
                runs = list(itertools.chain.from_iterable(find_runs(workspace, schema, block, ref).values()))
                units, size = units + len(runs), size + sum(run.count * run.dtype.itemsize for run in runs)
            except CorruptPartial as error:
                damage.append(Damage("", f"blocks/{block}", str(error), block=block, stage="predict"))
    return Verification(str(path), complete=False, units=units, bytes=size, damaged=tuple(damage))


def _record(path: StoragePath) -> tuple[OutputRecord | None, list[Damage]]:
    """Return the record of an output, and the damage of its metadata; no record if they cannot be read."""
    if not path.exists():
        raise ValueError(f"output not found: {path} does not exist")
    try:
        record = find_output(path)
        if record is None:
            raise ValueError(f"there is no output at {path}: it is an empty directory")
        metadata: dict[str, Any] = json.loads((path / "zarr.json").read_text())
    except OutputExists:
        if not _keeps_ledger(path):
            raise
        return None, [Damage("", "zarr.json", "is missing or damaged; nothing else can be verified without it")]
    has_checksum = record.complete and (METADATA_CRC in record.details or _keeps_ledger(path))
    if has_checksum and metadata_checksum(metadata, ATTRIBUTE) != record.details.get(METADATA_CRC):
        return record, [Damage("", "zarr.json", "is not what was written; nothing else can be verified without it")]
    return record, []


def _keeps_ledger(path: StoragePath) -> bool:
    """Return whether a completed run stored its ledger here, whatever the metadata are."""
    names = path.list_files(skip=lambda folder: re.search(r"(^|/)(c|\d+)$", folder) is not None)  # of chunks
    return any(name.endswith(f"/{LEDGER}") for name in names)


def _stored(path: StoragePath, record: OutputRecord) -> tuple[Plan, Sequence[StoragePath]] | None:
    """Return the plan and the files of the ledger; None if nothing is done yet."""
    if not record.complete:
        workspace = Workspace.find(workspace_root(record))
        return None if workspace is None else (workspace.plan, segments(workspace.root))
    try:
        plan = Plan.from_json(json.dumps(record.details["plan"]), older=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} keeps no checksums that this version can read; only outputs of predict() do "
            f"({type(error).__name__})"
        ) from error
    return plan, [stored_ledger(path, plan)]


def _check_files(path: StoragePath, record: OutputRecord) -> Iterator[Checked]:
    """Verify the files that no block wrote: metadata, and rows of vectors, whose chunks are write units."""
    rows = record.details.get("rows", ())
    for name, crc in record.details["files"].items():
        array, _, key = name.partition("/")
        _, size, damage = _compare(path, Damage(array, key, ""), int(crc))
        yield int(array in rows and key != "zarr.json"), size, damage


def _check_records(
    path: StoragePath, plan: Plan, ledgers: Sequence[StoragePath], counts: dict[str, int]
) -> Iterator[Checked]:
    """Verify the units of all records, and count the records of each stage."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        copies = [stack.enter_context(local_copy(ledger)) for ledger in ledgers]
        records = itertools.chain.from_iterable(latest_records(copy, plan.blocks) for copy in copies)
        while batch := list(itertools.islice(records, AT_A_TIME)):
            for record in batch:
                counts[record.kind] += 1
            yield from itertools.chain.from_iterable(pool.map(functools.partial(_check_record, path, plan), batch))


def _check_record(path: StoragePath, plan: Plan, record: Record) -> list[Checked]:
    """Verify the units of one record."""
    files: list[Checked] = []
    try:
        for head, position, crc in unpack(plan, record.kind, record.block, record.units):
            key, box = _unit(plan, head, position)
            file = Damage(array_paths(plan)[head], key, "", box.start, box.shape, record.block, record.kind)
            files.append(_compare(path, file, crc, unit=True))
    except ValueError as error:
        damage = Damage("", LEDGER, f"cannot be used: {error}", block=record.block, stage=record.kind)
        files.append((0, 0, damage))
    return files


def _check_levels(path: StoragePath) -> Iterator[Checked]:
    """Verify the coarser levels."""
    for array, key, box, problem in compare_pyramids(path):
        damage = Damage(array, key, problem, box.start, box.shape, stage=PYRAMID)
        yield 1, (path / array / key).size(), damage if problem else None


def _unit(plan: Plan, number: int, position: Ints) -> tuple[str, Box]:
    """Return the key and the box of a unit from its position with the channel first."""
    unit, axis = plan.heads[number].unit, channel_position(plan)
    start = tuple(p * u for p, u in zip(position[1:], unit, strict=True))
    stop = tuple(min(a + u, n) for a, u, n in zip(start, unit, plan.frames[number].grid.shape, strict=True))

    def insert(channel: int, sizes: Ints) -> Ints:
        return sizes if plan.heads[number].channel_axis is None else (*sizes[:axis], channel, *sizes[axis:])

    channel = position[0]
    key = "/".join(["c", *map(str, insert(channel, position[1:]))])
    return key, Box(insert(channel, start), insert(channel + 1, stop))


def _compare(path: StoragePath, file: Damage, crc: int, *, unit: bool = False) -> Checked:
    """Compare a file with its CRC."""
    stored, size, problem = path / file.array / file.key, 0, ""
    try:
        if unit and crc == ABSENT:
            problem = "is there, though only the fill value was written" if stored.exists() else ""
        else:
            size, actual = measured(stored)
            problem = "" if crc == (actual or 1 if unit else actual) else "is not what was written"
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or type(error).__name__})"
    return int(unit), size, dataclasses.replace(file, problem=problem) if problem else None


def _repair(path: StoragePath, record: OutputRecord, plan: Plan, verification: Verification) -> None:
    """Remove the records of damaged units, so that the same call of `predict` computes these blocks again.

    Raises:
        CorruptData: if other files are damaged.
    """
    others = [d for d in verification.damaged if d.stage != PYRAMID and (d.block is None or d.stage is None)]
    if others:
        raise CorruptData(f"{path} cannot be repaired: {others[0]}; compute it anew with overwrite=True")
    undone = {(str(d.stage), int(d.block)) for d in verification.damaged if d.block is not None}
    with locked(beside(path, ".lock"), str(path)):
        if record.complete:
            # The partials are deleted, so those that the normalize stage of a block reads must be computed again, too.
            neighbours = plan.neighbours
            for stage, block in list(undone):
                if stage == "normalize":
                    undone |= {("predict", i) for i in neighbours.read_by(block)}
        for level in (d for d in verification.damaged if d.stage == PYRAMID):  # the whole pyramid is built again
            (path / level.array / level.key).unlink(missing_ok=True)
        reopen(path, record, plan, undone)
