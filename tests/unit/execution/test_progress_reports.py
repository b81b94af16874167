"""The progress of a cluster: every patch counts once, whoever computes it, and moves the display at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from oocpatch.execution import worker
from oocpatch.execution.worker import ProgressReports
from oocpatch.progress import TaskDone

SETTINGS: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "block_shape": 16, "output_chunks": 8}
PLAN = oocpatch.plan(np.zeros((32, 32), np.uint8), "identity", "none.zarr", **SETTINGS).plan


@given(events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20) | st.none()), max_size=30))
def test_each_patch_is_counted_once_whatever_is_reported(events: list[tuple[int, int | None]]) -> None:
    """A report may be late, of a second attempt, or of more patches than there are; None: the block is done."""
    seen: list[TaskDone] = []
    reports = ProgressReports(PLAN, seen.append)
    for block, patches in events:
        if patches is None:
            reports.finish(block)
        else:
            reports.report(block, patches)
    for block in range(PLAN.blocks):
        reports.finish(block)
        assert sum(e.patches for e in seen if e.block == block) == PLAN.patches_in([block])
    assert all(event.patches > 0 for event in seen)


def test_progress_moves_within_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(worker, "LOOK_SECONDS", 0.0)
    events: list[TaskDone] = []
    with (
        dask.config.set({"distributed.worker.memory.terminate": False}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        volume = np.ones((32, 32), np.float32)
        oocpatch.predict(volume, "identity", tmp_path / "out", client=client, progress=events.append, **SETTINGS)
    assert sum(event.patches for event in events) == 49
    assert len(events) > 4, "of four blocks"
