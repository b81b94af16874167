"""Calls that meet on one output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oocpatch
from oocpatch.run import predict as run_predict

DATA = np.random.default_rng(0).random((24, 24), dtype=np.float32)
OPTIONS: dict[str, Any] = {"patch_size": 8, "patch_overlap": 4, "block_shape": 8, "output_chunks": 8, "model_id": "m"}


@pytest.mark.parametrize("state", ["nothing", "begun"])
def test_a_call_that_another_one_overtakes_returns_what_that_has_computed(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, output = 0, tmp_path / "out.zarr"

    def model(patches: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return patches * 2

    if state == "begun":
        oocpatch.plan(DATA, model, output, **OPTIONS, progress=False).run(blocks=[0])
    name = "make_plan" if state == "nothing" else "resumed_plan"
    original = getattr(run_predict, name)

    def overtaken(*arguments: Any) -> Any:
        plan = original(*arguments)
        monkeypatch.setattr(run_predict, name, original)
        oocpatch.predict(DATA, model, output, **OPTIONS, progress=False)
        return plan

    monkeypatch.setattr(run_predict, name, overtaken)
    result = oocpatch.predict(DATA, model, output, **OPTIONS, progress=False)
    np.testing.assert_allclose(result, 2 * DATA, rtol=1e-6)
    patches = 25 + 2 if state == "nothing" else 25 + 1  # each plan probes the model once
    assert calls <= patches + 8, "nothing was computed twice"
