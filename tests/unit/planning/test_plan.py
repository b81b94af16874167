"""Promises on the stored plan: a run is resumed by the version that began it, and by no other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import oocpatch
from oocpatch.planning.plan import FORMAT, Plan
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


def test_what_is_left_of_the_memory_is_for_the_heap_and_taken_back_first(tmp_path: Path) -> None:
    """With less than the tensors of a call are, it is of no use."""
    net = torch.nn.Sequential(torch.nn.Conv3d(1, 64, 3, padding=1), torch.nn.Conv3d(64, 1, 3, padding=1))
    settings = {"axes": "zyx", "patch_size": 64, "block_shape": 64, "progress": False, "workers": 1}
    volume = np.zeros((64, 64, 128), np.float32)

    def planned(max_memory: int) -> Plan:
        return oocpatch.plan(volume, net, tmp_path / "out.zarr", **settings, max_memory=max_memory)

    plenty = planned(4 << 30)
    parts = dict(plenty.memory_parts)
    least, tensors = plenty.projected_memory - plenty.retained_memory, parts["model"]
    assert tensors > 64 << 20
    assert plenty.retained_memory == parts["heap"] == 3 * tensors
    assert planned(least + tensors - 1).retained_memory == 0
    for more in (tensors, 2 * tensors + 1):
        plan = planned(least + more)
        assert (plan.retained_memory, plan.projected_memory) == (more, least + more)
        assert plan.run_id == plenty.run_id
    plenty.run(blocks=[0])
    resumed = planned(least)
    assert (resumed.retained_memory, resumed.projected_memory) == (0, least)
    assert "heap" not in dict(resumed.memory_parts)
    assert planned(least + 2 * tensors).retained_memory == 2 * tensors
