"""Promises on status: from the workspace alone, what is done, failed and left, and how fast it goes."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

import oocpatch
from oocpatch.planning.blocks import BlockGrid
from oocpatch.planning.grid import PatchGrid
from oocpatch.storage.journal import COMMIT_RECORDS
from oocpatch.storage.paths import LocalPath
from oocpatch.workspace.ledger import Ledger, Record, latest_records, read_ledger
from oocpatch.workspace.run_progress import RunProgress
from tests.support.children import Children
from tests.support.small_run import MIDDLE, fresh, patch_calls, small_run


def test_a_status_says_what_is_done_failed_and_left_and_at_what_speed(children: Children, tmp_path: Path) -> None:
    job = small_run(tmp_path)
    began = time.time()
    assert children.run(dataclasses.replace(job, fail_on=(MIDDLE,), delay=0.01)) == 1
    ended = time.time()
    found = oocpatch.status(job.output)
    assert (found.state, found.predict_done, found.predict_total) == ("incomplete", 15, 16)
    (failed,) = found.failed.values()
    assert "the model fails" in failed
    # The block of 4 patches that failed is left.
    assert (found.patches_done, found.patches_total) == (45, 49)
    assert 45 / (ended - began) <= found.patches_per_second <= 45 / (44 * 0.01)
    assert found.blocks_per_second == pytest.approx(found.patches_per_second * 15 / 45)
    assert found.seconds_left == pytest.approx(4 / found.patches_per_second)
    assert "45 of 49" in str(found)
    assert "left for the call that resumes" in str(found)
    assert repr(found) == str(found)  # what a console and a notebook show
    assert json.loads(found.to_json())["seconds_left"] == found.seconds_left
    assert children.run(job) == 0
    done = oocpatch.status(job.output)
    assert (done.state, done.patches_done, done.patches_total, done.seconds_left) == ("complete", 49, 49, None)


def test_the_status_of_a_run_at_work_counts_only_what_that_call_did(children: Children, tmp_path: Path) -> None:
    """Time in which nobody worked is not counted, and a resumed run is as fast as it is now."""
    job = small_run(tmp_path)
    assert children.run(dataclasses.replace(job, fail_on=(MIDDLE,), delay=0.0)) == 1
    (ledger,) = Path(job.watch).rglob("ledger")
    lines = ledger.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"normalize"' not in line and b'"failed"' not in line][: 1 + 4]
    ledger.write_bytes(b"".join(kept))
    fresh_log = Path(job.log)
    fresh_log.unlink()
    pid = children.start(dataclasses.replace(job, delay=0.1))
    while len(patch_calls(job)) < 15:
        time.sleep(0.01)
    found = oocpatch.status(job.output)
    assert found.state == "running"
    assert 0 < found.patches_per_second < 10, "each call of the model takes a tenth of a second"
    assert found.seconds_left is not None
    assert found.seconds_left >= (49 - found.patches_done) * 0.1
    assert "for the call" not in str(found)
    children.kill(pid)
    fresh(job)


def test_patches_of_many_blocks_are_counted_as_one_by_one(tmp_path: Path) -> None:
    plan = oocpatch.plan(
        np.zeros((40, 30), np.float32), lambda x: x, tmp_path / "o", axes="yx", patch_size=8, patch_overlap=3,
        block_shape=(10, 8), output_chunks=2,
    )  # fmt: skip
    blocks = range(1, plan.blocks, 2)
    one_by_one = [plan.block_grid.patches(plan.block_grid[i]) for i in blocks]
    assert plan.patches_in(list(blocks)) == sum(len(y) * len(x) for y, x in one_by_one)
    assert plan.patches_in(range(plan.blocks)) == plan.patches
    assert plan.patches_in([]) == 0


def test_a_record_takes_a_few_dozen_bytes_and_what_stands_is_the_last_of_each(tmp_path: Path) -> None:
    """What a million blocks cost on disk, told by a thousand."""
    ledger = Ledger(LocalPath(tmp_path / "ledger"))
    for block in range(1000):
        ledger.append(Record("predict", block, 2**32 - 1 - block, note=f"{block:08x}", units="AAAAAA=="))
        ledger.append(Record("normalize", block, units="AAAAAA=="))
    ledger.append(Record("undone", 7, note=f"{7:08x}"))
    ledger.append(Record("undone", 8, note=f"{8:08x}"))
    ledger.append(Record("predict", 8, digest=5, note="again"))
    ledger.append(Record("failed", 9, note="again"))
    ledger.append(Record("begun", 0))
    ledger.close()
    assert (tmp_path / "ledger").stat().st_size <= 2005 * 100
    found = list(latest_records(tmp_path / "ledger", 1000))
    assert [(r.block, r.kind) for r in found] == [
        (block, kind) for block in range(1000) for kind in ("predict", "normalize") if (block, kind) != (7, "predict")
    ]
    assert [r.digest for r in found if r.block == 8] == [5, 0]
    assert len(list(read_ledger(LocalPath(tmp_path / "ledger")))) == 2005
    progress = RunProgress.read([LocalPath(tmp_path / "ledger")], 1000)
    assert (len(progress.partials), progress.partials[8].digest, progress.failed) == (999, 5, {9: "again"})
    assert COMMIT_RECORDS <= 1000


def test_a_grid_of_a_million_blocks_is_arithmetic() -> None:
    grid = BlockGrid.of(PatchGrid.of((1600,) * 3, (16,) * 3, (8,) * 3), (16,) * 3, (16,) * 3, 0, crop=False)
    assert grid.num_blocks == 10**6
    assert grid.num_open == 10**6 - 1
    assert grid[10**6 - 1].core.stop == (1600,) * 3
    assert len(grid.sources(grid[10**6 - 1])) == 7
