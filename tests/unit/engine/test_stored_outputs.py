"""A crash of a process costs no more than the plan says, also where one block is the whole volume."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import oocpatch
from tests.support.children import file_digests

VOLUME = np.random.default_rng(0).random((40, 40), dtype=np.float32)
SETTINGS: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "block_shape": 40, "output_chunks": 40}
PATCHES = 81


class Slow:
    """A model that takes some milliseconds, has two outputs, and is interrupted at a call."""

    def __init__(self, interrupted_at: int = 0) -> None:
        self.calls = 0
        self.interrupted_at = interrupted_at

    def __call__(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == self.interrupted_at:
            raise KeyboardInterrupt
        time.sleep(0.0015)
        return {"double": patches * 2, "mean": patches.double().mean(dim=(2, 3), keepdim=True).expand(patches.shape)}


def interrupted(output: Path, call: int, **options: Any) -> oocpatch.PlannedRun:
    """Interrupt a run at this call of the model, the probe not counted; return its plan."""
    model = Slow()
    planned = oocpatch.plan(VOLUME, model, output, model_id="slow", progress=False, **{**SETTINGS, **options})
    model.interrupted_at = model.calls + call
    with pytest.raises(KeyboardInterrupt):
        planned.run()
    return planned


def resumed(output: Path, **options: Any) -> int:
    """Resume the run; return how often the model was called, without a probe."""
    model = Slow()
    oocpatch.predict(VOLUME, model, output, model_id="slow", progress=False, **{**SETTINGS, **options})
    assert not list(output.parent.glob(f"{output.name}.oocpatch*"))
    return model.calls


def test_an_interrupted_block_goes_on_where_its_model_was(tmp_path: Path) -> None:
    oocpatch.predict(VOLUME, Slow(), tmp_path / "whole", model_id="slow", progress=False, **SETTINGS)
    expected = file_digests(tmp_path / "whole")
    assert interrupted(tmp_path / "out", 71).crash_patches == 1
    assert resumed(tmp_path / "out") == PATCHES - 70
    results = file_digests(tmp_path / "out")
    assert {n: d for n, d in results.items() if "/c/" in n} == {n: d for n, d in expected.items() if "/c/" in n}


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="there is one core")
def test_a_crash_costs_the_calls_that_are_made_at_a_time(tmp_path: Path) -> None:
    plan = oocpatch.plan(VOLUME, torch.nn.Conv2d(1, 1, 3, padding=1), tmp_path / "out", **SETTINGS, work="heavy")
    assert plan.stores_outputs
    assert plan.crash_patches == plan.calls > 1


def test_a_plan_that_stores_outputs_says_so_and_counts_their_disk(tmp_path: Path) -> None:
    arguments = {"model_id": "slow", **SETTINGS}
    planned = oocpatch.plan(VOLUME, Slow(), tmp_path / "out", **arguments)
    record = json.loads(planned.to_json())
    assert (record["stores_outputs"], record["crash_patches"], record["patches_per_block"]) == (True, 1, PATCHES)
    assert "a crash costs at most 1 patches per process, as the model's outputs are stored" in str(planned)
    without = oocpatch.plan(VOLUME, Slow(), tmp_path / "out", max_disk=planned.projected_disk - 1, **arguments)
    assert (without.stores_outputs, without.crash_patches) == (False, PATCHES)
    assert planned.projected_disk - without.projected_disk >= PATCHES * 64 * (4 + 8)
    light = oocpatch.plan(VOLUME, Slow(), tmp_path / "out", work="light", **arguments)
    assert not light.stores_outputs
    assert planned.run_id == light.run_id, "what is stored does not change the run"


def test_what_is_not_as_it_was_written_or_of_other_input_is_computed_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupted(output, 41)
    stored = sorted(Path(f"{output}.oocpatch").glob("*/outputs/0/*"))
    assert len(stored) == 40 * 3
    stored[0].write_bytes(b"{")
    stored[4].write_bytes(bytes(stored[4].stat().st_size))
    stored[8].unlink()
    assert resumed(output) == PATCHES - 40 + 3
    np.testing.assert_allclose(xr.open_zarr(output)["double"], VOLUME * 2, rtol=1e-5)


def test_a_block_that_failed_is_computed_from_its_start(tmp_path: Path) -> None:
    """The output that it failed for may be among the stored ones."""
    bad = True

    class Poisoned(Slow):
        def __call__(self, patches: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = super().__call__(patches)
            if bad and self.calls == 50:
                outputs["double"] = outputs["double"] * torch.nan
            return outputs

    arguments = {"model_id": "slow", "progress": False, **SETTINGS}
    with pytest.raises(oocpatch.BlockFailed):
        oocpatch.predict(VOLUME, Poisoned(), tmp_path / "out", **arguments)
    bad = False
    assert resumed(tmp_path / "out") == PATCHES
