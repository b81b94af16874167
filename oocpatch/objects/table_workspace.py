"""Files beside a table: its workspace while it is made, and then the record of how it was made.

```text
 cells.csv.oocpatch/          the workspace, deleted in the end
     plan.json                written last when a run is set up: without it the rest is rubbish
     ledger, ledger.<i>-of-<n>
     blocks/<index>/<attempt>/
 cells.csv.partial            the file while it is written
 cells.csv.oocpatch.record    a journal: size, time and CRC of the file, its plan, and the stamps of the input
 cells.csv
```

A file without a record, or another one than the record describes, is someone else's, and never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from oocpatch.errors import OutputExists
from oocpatch.objects.table_plan import TablePlan
from oocpatch.storage.checksums import measured, text_checksum
from oocpatch.storage.journal import encode_record, read_journal, replace_journal
from oocpatch.storage.locks import beside
from oocpatch.storage.paths import LocalPath, remove_trees
from oocpatch.workspace.ledger import NO_PARTIALS, WHOLE, Ledger, Record, join_segments, latest_records, segments
from oocpatch.workspace.run_progress import RunProgress

PLAN = "plan.json"
RECORD = ".record"


@dataclass(frozen=True)
class TableWorkspace:
    """The workspace of a table.

    Attributes:
        root: its directory.
        plan: the plan.
    """

    root: LocalPath
    plan: TablePlan

    @classmethod
    def create(cls, root: LocalPath, plan: TablePlan) -> TableWorkspace:
        """Set a run up: rubbish is swept, and the plan comes last."""
        (root / PLAN).unlink(missing_ok=True)
        root.remove_tree()
        root.make_folder()
        text = plan.to_json()
        (root / PLAN).write_atomic(json.dumps({"crc": text_checksum(text), "plan": text}))
        return cls(root, plan)

    @classmethod
    def find(cls, root: LocalPath) -> TableWorkspace | None:
        """Return the workspace that was set up, with its stored plan; None where there is none."""
        try:
            stored = json.loads((root / PLAN).read_text())
            is_whole = text_checksum(stored["plan"]) == stored["crc"]
            return cls(root, TablePlan.from_json(stored["plan"])) if is_whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ledger(self, segment: str = WHOLE) -> Ledger:
        """Open the ledger, or a segment of it, for its one writer."""
        return Ledger(self.root / segment)

    def progress(self) -> RunProgress:
        """Sum up all segments of the ledger."""
        return RunProgress.read(segments(self.root), self.plan.blocks)

    def join(self) -> None:
        """Move the records of all segments into the ledger; only when nobody writes to any of them."""
        join_segments(self.root)

    def sweep(self, progress: RunProgress) -> None:
        """Delete the tables that no record names; only where no other process records."""
        gone = []
        for name in (self.root / "blocks").list_folders(depth=2):
            block, attempt = name.split("/")
            if attempt != (progress.partials.get(int(block), NO_PARTIALS).attempt if block.isdigit() else ""):
                gone.append(self.root / "blocks" / name)
        remove_trees(gone)


def remove_workspace(root: LocalPath) -> None:
    """Delete a workspace, its plan first."""
    (root / PLAN).unlink(missing_ok=True)
    root.remove_tree()


@dataclass(frozen=True, slots=True)
class TableRecord:
    """The record of a complete table.

    Attributes:
        plan: its plan.
        size, modified, crc: bytes, time in nanoseconds and CRC-32C of its file.
        details: other facts about the run: numbers, settings, versions.
    """

    plan: TablePlan
    size: int
    modified: int
    crc: int
    details: Mapping[str, Any]


def find_table(output: LocalPath) -> TableRecord | None:
    """Return the record of the table at a path; None if there is nothing.

    Raises:
        OutputExists: if there is something that oocpatch did not write.
    """
    if not output.exists():
        return None
    foreign = OutputExists(
        f"output must be a new path or a table that oocpatch wrote, but {output} holds other data, or was changed "
        "since; choose another path, or delete it"
    )
    if not output.is_file():
        raise foreign
    try:
        values = json.loads(Record(*next(read_journal(record_path(output)))).note)
        plan = TablePlan.from_json(values["plan"])
        record = TableRecord(plan, values["size"], values["modified"], values["crc"], values["details"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise foreign from error
    stat = output.stat()
    if stat.st_size != record.size or (
        stat.st_mtime_ns != record.modified and measured(output) != (record.size, record.crc)
    ):
        raise foreign
    return record


def record_path(output: LocalPath) -> LocalPath:
    """Return the path of the record of a table."""
    return output.with_name(beside(output, RECORD).name)


def staging_path(output: LocalPath) -> LocalPath:
    """Return the path of a table while it is written."""
    return output.with_name(f"{output.name}.partial")


def publish(output: LocalPath, workspace: TableWorkspace, details: Mapping[str, Any]) -> None:
    """Complete a table whose file is written: its record first, then the file under its name.

    Raises:
        OutputExists: if something appeared at the path meanwhile.
    """
    staged = staging_path(output)
    staged.flush()  # the marker comes last
    size, crc = measured(staged)
    values = {"size": size, "modified": staged.stat().st_mtime_ns, "crc": crc, "plan": workspace.plan.to_json()}

    def lines() -> Iterator[bytes]:
        yield encode_record(Record("begun", 0, note=json.dumps({**values, "details": dict(details)})).values())
        for record in latest_records(workspace.root / WHOLE, workspace.plan.blocks):
            yield encode_record(record.values())

    if output.exists():
        raise OutputExists(f"{output} appeared while its table was made; move it away, and the same call continues")
    replace_journal(record_path(output), lines())
    staged.replace(output)
    output.parent.flush()


def remove_table(output: LocalPath) -> None:
    """Delete a table that oocpatch wrote: its file first, since the record protects nothing but this."""
    output.unlink(missing_ok=True)
    record_path(output).unlink(missing_ok=True)
