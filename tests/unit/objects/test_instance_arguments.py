"""Arguments of `predict` for models of objects: what is refused before the first block, and what identifies a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oocpatch


def bright(batch: torch.Tensor) -> torch.Tensor:
    return (batch[:, :1] > 0).to(torch.int32)


def scores(batch: torch.Tensor) -> torch.Tensor:
    return batch[:, :1]


def is_bright(batch: torch.Tensor) -> torch.Tensor:
    return batch[:, :1] > 0


def two_channels(batch: torch.Tensor) -> torch.Tensor:
    return bright(batch).repeat(1, 2, 1, 1)


def halved(batch: torch.Tensor) -> torch.Tensor:
    return bright(batch)[..., 4:-4, 4:-4]


def planned(tmp_path: Path, model: Any = bright, **options: Any) -> oocpatch.PlannedRun:
    arguments = {"patch_size": 16, "patch_overlap": 8, "overlap_mode": "instances", **options}
    return oocpatch.plan(np.zeros((40, 40), np.float32), model, tmp_path / "out.zarr", **arguments)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (bright, {"match": 0}, "match must be above 0 and at most 1, got 0"),
        (bright, {"match": 1.5}, "match must be above 0 and at most 1, got 1.5"),
        (scores, {}, "needs integer labels of objects, got float32"),
        (is_bright, {}, "needs integer labels of objects, got bool"),
        (two_channels, {}, "needs labels in one channel, got 2"),
        (bright, {"patch_overlap": 0}, "patch_overlap must not be 0"),
        (bright, {"patch_overlap": (0, 8)}, "along y these do not"),
        (halved, {}, "along y, x these do not"),
        (bright, {"output_dtype": "float32"}, "output_dtype must be of integers for overlap_mode 'instances'"),
        (bright, {"output_dtype": "bool"}, "output_dtype must be of integers for overlap_mode 'instances'"),
        (bright, {"postprocess": "argmax"}, "postprocess must be None where overlap_mode is 'instances'"),
        (bright, {"augment": "flips"}, "augment must be None for overlap_mode 'instances'"),
        ([bright, bright], {}, "model must be one model for overlap_mode 'instances'"),
    ],
)
def test_what_makes_no_sense_for_objects_is_refused(
    tmp_path: Path, model: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        planned(tmp_path, model, **options)
    assert not (tmp_path / "out.zarr").exists()


def test_slices_of_a_volume_need_no_overlap(tmp_path: Path) -> None:
    def flat(batch: torch.Tensor) -> torch.Tensor:
        return (batch > 0).to(torch.int64)

    plan = oocpatch.plan(
        np.zeros((3, 40, 40), np.uint8),
        flat,
        tmp_path / "out.zarr",
        patch_size=(1, 16, 16),
        patch_overlap=(0, 8, 8),
        overlap_mode="instances",
    )
    assert plan.heads[0].out_dtype == "uint32"


def test_a_small_volume_needs_little_memory(tmp_path: Path) -> None:
    assert planned(tmp_path, max_memory="3MiB", output_chunks=8).projected_memory < 3 << 20
    with pytest.raises(oocpatch.PlanTooLarge, match=r"max_memory is 1\.0 MiB"):
        planned(tmp_path, max_memory="1MiB", output_chunks=8)


def test_match_identifies_runs_with_objects_only(tmp_path: Path) -> None:
    assert planned(tmp_path, match=0.3).parameters["match"] == 0.3
    assert "match" not in planned(tmp_path, overlap_mode="crop").parameters


def test_patch_aggregator_has_no_instances() -> None:
    with pytest.raises(ValueError, match="overlap_mode must be one of crop, average, hann, gaussian"):
        oocpatch.PatchAggregator((8, 8), overlap_mode="instances")
