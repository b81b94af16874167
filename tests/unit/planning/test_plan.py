"""Promises on the stored plan: a run is resumed by the version that began it, and by no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import oocpatch
from oocpatch.planning.plan import FORMAT
from oocpatch.storage.checksums import text_checksum


class Failing(torch.nn.Module):
    """The identity, which fails at the last patch while a file is there."""

    def __init__(self, switch: Path) -> None:
        super().__init__()
        self.switch = str(switch)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if patches.max() == 255 and Path(self.switch).exists():
            raise RuntimeError("stop here")
        return patches


def run(output: Path, **options: object) -> oocpatch.Result:
    """A run of four blocks; the last one fails while the file beside the output is there."""
    volume = np.arange(256, dtype=np.uint8).reshape(16, 16)
    sizes = {"patch_size": 8, "patch_overlap": 0, "block_shape": 8, "output_chunks": 8, "workers": 1}
    return oocpatch.predict(volume, Failing(output.parent / "fail"), output, **sizes, **options)


def test_a_run_that_another_version_began_is_refused_in_one_sentence(tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    (tmp_path / "fail").touch()
    with pytest.raises(oocpatch.BlockFailed):
        run(output)
    (tmp_path / "fail").unlink()
    (path,) = tmp_path.rglob("plan.json")
    plan = json.loads(json.loads(path.read_text())["plan"])
    text = json.dumps(plan | {"format": FORMAT - 1})
    path.write_text(json.dumps({"crc": text_checksum(text), "plan": text}))
    rule = f"must have format {FORMAT}, got {FORMAT - 1} of another version .* with that version, or .* overwrite=True"
    with pytest.raises(oocpatch.RunMismatch, match=rule) as refused:
        run(output)
    assert "\n" not in str(refused.value)
    with pytest.raises(oocpatch.RunMismatch, match=rule):
        oocpatch.status(output)
    run(output, overwrite=True)
    assert oocpatch.status(output).state == "complete"


def test_a_plan_is_what_its_json_says(tmp_path: Path) -> None:
    plan = oocpatch.plan(np.zeros((16, 16), np.uint8), torch.nn.Identity(), tmp_path / "out", patch_size=8)
    assert oocpatch.Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    with pytest.raises(ValueError, match="must have a 'format'"):
        oocpatch.Plan.from_json("{}")
