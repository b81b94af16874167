"""Promises on latecomers: who was frozen and wakes up after its replacement, or after the run, changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oocpatch
from oocpatch.execution.scheduler import Stopped
from oocpatch.execution.worker import GuardedOutput, RunGuard
from oocpatch.outputs.output import Output, create_output
from oocpatch.outputs.write_units import WriteChecksums
from oocpatch.planning.box import Box
from oocpatch.planning.plan import Plan
from oocpatch.storage.paths import LocalPath
from oocpatch.volumes.volume import Volume
from oocpatch.workspace.ledger import Record
from oocpatch.workspace.run_progress import RunProgress
from oocpatch.workspace.workspace import Workspace
from tests.support.children import file_digests

OPTIONS: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 8}
VOLUME = np.arange(1, 32 * 8 + 1, dtype=np.float32).reshape(32, 8)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return oocpatch.plan(VOLUME, torch.nn.Identity(), tmp_path / "out", **OPTIONS)


@pytest.fixture
def workspace(plan: Plan, tmp_path: Path) -> Workspace:
    create_output(LocalPath(tmp_path / "out"), plan, Volume(VOLUME), LocalPath(tmp_path / "work"), None)
    return Workspace.create(LocalPath(tmp_path / "work" / plan.run_id), plan, LocalPath(tmp_path / "out"))


def one_piece(plan: Plan) -> tuple[int, str, Box, Box, np.ndarray[Any, Any]]:
    """Arguments of a write of one step of a seam of block 0."""
    seam = next(b for _, b in ((0, plan.frames[0][0].seam(o)) for o in [(1, 0)]) if not b.empty)
    part = next(iter(plan.frames[0].steps(seam))) & seam
    return 0, "seam-1,0", seam, part, np.ones((1, *part.shape), np.float32)


def test_an_attempt_that_comes_late_does_not_touch_what_another_one_left(plan: Plan, workspace: Workspace) -> None:
    arguments = one_piece(plan)
    late = workspace.writer(0)
    late.write(*arguments)  # and freezes
    other = workspace.writer(0)
    other.write(*arguments)
    promise = other.close()
    before = file_digests(workspace.root / "blocks" / "0" / promise.attempt)
    late.write(*arguments[:-1], arguments[-1] * 7)
    assert late.close().attempt != promise.attempt
    third = workspace.writer(0)
    third.write(*arguments)
    third.discard()
    assert file_digests(workspace.root / "blocks" / "0" / promise.attempt) == before
    np.testing.assert_array_equal(workspace.reader(0, promise).read(*arguments[:-1]), arguments[-1])


def test_what_nobody_promised_is_swept_and_what_was_promised_stays(plan: Plan, workspace: Workspace) -> None:
    attempts = []
    for _ in range(3):
        writer = workspace.writer(0)
        writer.write(*one_piece(plan))
        attempts.append(writer.close())
    orphan = workspace.writer(1)
    orphan.write(*one_piece(plan))
    progress = RunProgress(plan.blocks)
    progress.add(Record("predict", 0, attempts[1].digest, note=attempts[1].attempt))
    workspace.sweep(progress)
    left = [path.relative_to(workspace.root).as_posix() for path in workspace.root.glob("blocks/*/*")]
    assert left == [f"blocks/0/{attempts[1].attempt}"]
    assert workspace.reader(0, attempts[1]).read(*one_piece(plan)[:-1]) is not None


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)], ids=str)
def test_a_promise_that_was_taken_back_never_counts_whatever_is_read_first(order: tuple[int, ...]) -> None:
    records = [
        Record("predict", 5, 77, note="first"),
        Record("undone", 5, note="first"),
        Record("predict", 5, 77, note="second"),
    ]
    progress = RunProgress(9)
    for place in order:
        progress.add(records[place])
    assert progress.partials[5].attempt == "second"


def values(factor: float) -> np.ndarray[Any, Any]:
    return np.full((1, 8, 8), factor, np.float32)


@pytest.mark.parametrize("coder", ["zarrs", "ours"])
@pytest.mark.parametrize("value", [3.0, 0.0], ids=["value", "fill value"])
def test_a_write_that_comes_after_the_run_does_not_reach_the_output(  # noqa: PLR0917
    value: float, coder: str, plan: Plan, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write unit of nothing but the fill value is deleted: late, it would delete what is there."""
    if coder == "zarrs":
        pytest.importorskip("zarrs", reason="needs the extra `fast`")
    else:
        monkeypatch.setattr("oocpatch.storage.zarrs_codec.ZarrsArray.open", lambda *_: None)
    box = Box((8, 0), (16, 8))
    out = LocalPath(tmp_path / "out")
    frozen, other = Output(out, plan), Output(out, plan)
    with frozen.with_chunk_writers(2):
        with other.with_chunk_writers(2):
            other.write(0, box, values(2.0), WriteChecksums(plan, "predict", 0))
        other.complete({"uncovered_voxels": 0}, workspace.root / "ledger")  # sweeps what was not closed
        before = file_digests(tmp_path / "out")
        with pytest.raises(OSError, match=r"over|os error"):
            frozen.write(0, box, values(value), WriteChecksums(plan, "predict", 0))
        left = file_digests(tmp_path / "out")
    assert {name: digest for name, digest in left.items() if ".partial" not in name} == before
    assert np.all(oocpatch.outputs.output.open_result(out).values[8:16] == 2)


def test_a_worker_writes_only_while_its_run_is_there(plan: Plan, workspace: Workspace, tmp_path: Path) -> None:
    box = Box((8, 0), (16, 8))
    output = GuardedOutput(LocalPath(tmp_path / "out"), plan, RunGuard(workspace.root / "plan.json"))
    output.write(0, box, values(2.0), WriteChecksums(plan, "predict", 0))
    before = file_digests(tmp_path / "out")
    (workspace.root / "plan.json").unlink()
    with pytest.raises(Stopped):
        output.write(0, box, values(3.0), WriteChecksums(plan, "predict", 0))
    assert file_digests(tmp_path / "out") == before


def test_records_of_all_segments_count_and_are_joined(plan: Plan, workspace: Workspace) -> None:
    for segment, block in (("ledger.1-of-2", 0), ("ledger.2-of-2", 3), ("ledger", 1)):
        ledger = workspace.ledger(segment)
        ledger.append(Record("predict", block, uncovered=block))
        ledger.close()
    before = dataclasses.asdict(workspace.progress())
    assert sorted(before["partials"]) == [0, 1, 3]
    workspace.join()
    assert [path.name for path in workspace.root.glob("ledger*")] == ["ledger"]
    assert dataclasses.asdict(workspace.progress()) == before
