"""`check` passes where predict and the plain computation agree, and fails where they do not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from oocpatch.verification.compare import check
from oocpatch.verification.reference import reference_scores


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("check") / "volume.zarr"
    voxels = np.random.default_rng(1).integers(0, 1000, (40, 37, 33)).astype(np.float32)
    zarr.create_array(path, data=voxels, chunks=(16, 16, 16), dimension_names=("z", "y", "x"))
    return str(path)


def network(channels: int = 1, ndim: int = 3, features: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layer = {2: nn.Conv2d, 3: nn.Conv3d}[ndim]
    return nn.Sequential(layer(channels, 4, 3, padding=1), nn.ReLU(), layer(4, features, 3, padding=1))


def ramp(patch: torch.Tensor) -> torch.Tensor:
    """Depends on the place within the patch, so that a wrong window or a shifted patch shows."""
    steps = torch.arange(patch[0, 0].numel(), dtype=torch.float32).reshape(patch.shape[2:])
    return patch + steps


@pytest.mark.parametrize(
    ("overlap_mode", "padding_mode"),
    [
        ("crop", None),
        ("crop", "reflect"),
        ("average", "constant"),
        ("hann", None),
        ("hann", "constant"),
        ("gaussian", "reflect"),
        ("nnunet", "constant"),
        ("monai", None),
    ],
)
def test_a_model_that_depends_on_the_place_in_the_patch_passes(
    volume: str, overlap_mode: str, padding_mode: str | None
) -> None:
    report = check(
        volume, ramp, boxes=2, patch_size=(8, 9, 10), patch_overlap=(4, 3, 0), overlap_mode=overlap_mode,
        padding_mode=padding_mode, fill=7.0,
    )  # fmt: skip
    assert report.passed, str(report)
    assert all((box.tolerance == 0) == (overlap_mode == "crop") for box in report.boxes)


def test_evenly_spaced_patches_pass_in_volumes_larger_and_smaller_than_a_patch(volume: str) -> None:
    options = {"patch_overlap": (3, 4, 2), "patch_starts": "even", "padding_mode": "constant", "fill": 7.0}
    report = check(volume, ramp, boxes=2, patch_size=(8, 64, 9), **options)
    assert report.passed, str(report)


def test_boxes_hold_several_blocks_and_lie_in_the_volume(volume: str) -> None:
    report = check(volume, "identity", boxes=6, patch_size=8, patch_overlap=4)
    assert report.passed, str(report)
    for box in report.boxes:
        assert box.blocks >= 2
        assert box.patches >= 27 // 3
        assert all(a >= 0 and a + n <= size for a, n, size in zip(box.start, box.shape, (40, 37, 33), strict=True))
    assert len({box.start for box in report.boxes}) > 1


def test_the_same_seed_draws_the_same_boxes(volume: str) -> None:
    one, again, other = (check(volume, "identity", boxes=2, seed=s, patch_size=8) for s in (5, 5, 6))
    assert one == again
    assert [box.start for box in one.boxes] != [box.start for box in other.boxes]


CASES: dict[str, dict[str, Any]] = {
    "argmax": {"postprocess": "argmax"},
    "softmax": {"postprocess": "softmax"},
    "sigmoid": {"postprocess": "sigmoid"},
    "threshold": {"postprocess": "threshold:0.1"},
    "callable": {"postprocess": lambda scores: scores[:2] * 2},
    "rounded": {"output_dtype": "uint8"},
    "half": {"output_dtype": "float16"},
    "crop": {"overlap_mode": "crop"},
    "crop-batched": {"overlap_mode": "crop", "batch_size": 4},
    "batched": {"batch_size": 3},
    "blocks": {"block_shape": (16, 16, 16), "output_chunks": 8},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_network_passes_whatever_becomes_of_its_output(volume: str, options: dict[str, Any]) -> None:
    report = check(volume, network(), boxes=1, patch_size=8, patch_overlap=4, **options)
    assert report.passed, str(report)


@pytest.mark.parametrize(("axes", "shape"), [("tcyx", (3, 2, 40, 30)), ("yxc", (40, 30, 2)), ("cyx", (2, 40, 30))])
def test_channels_and_looped_axes_take_part(tmp_path: Path, axes: str, shape: tuple[int, ...]) -> None:
    voxels = np.random.default_rng(2).random(shape, dtype=np.float32)
    zarr.create_array(tmp_path / "volume", data=voxels, chunks=tuple(min(n, 16) for n in shape))
    report = check(tmp_path / "volume", network(2, 2), axes=axes, boxes=2, patch_size=8, patch_overlap=2)
    assert report.passed, str(report)


def test_a_volume_smaller_than_a_patch_passes(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "volume", data=np.arange(35.0, dtype=np.float32).reshape(5, 7))
    assert check(tmp_path / "volume", ramp, boxes=1, patch_size=8, patch_overlap=4).passed


def drifting() -> Callable[[torch.Tensor], torch.Tensor]:
    calls = itertools.count()
    return lambda x: x + next(calls)


def test_a_model_that_answers_differently_each_time_fails_with_the_difference(volume: str) -> None:
    report = check(volume, drifting(), boxes=1, patch_size=8, patch_overlap=4)
    assert not report.passed
    assert report.boxes[0].largest_absolute >= 1
    assert str(report).splitlines()[-1] == "FAIL"


@pytest.mark.parametrize(
    "options", [{}, {"overlap_mode": "crop"}, {"output_dtype": "int16"}, {"postprocess": "argmax"}]
)
def test_one_wrong_voxel_fails_the_check(volume: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> Any:
        scores = reference_scores(*arguments, **keywords)
        scores[0].flat[17] = scores.max() + 100
        return scores

    # By name: `oocpatch.check` may be the function or the module.
    monkeypatch.setattr(sys.modules[check.__module__], "reference_scores", wrong)
    report = check(volume, network(), boxes=1, patch_size=8, patch_overlap=4, **options)
    assert not report.passed
    assert report.boxes[0].largest_absolute > 50


def test_a_report_is_json_with_the_verdict(volume: str) -> None:
    report = check(volume, "identity", boxes=2, patch_size=8)
    record = json.loads(report.to_json())
    assert record["passed"] is True
    assert [box["shape"] for box in record["boxes"]] == [list(box.shape) for box in report.boxes]
    failed = dataclasses.replace(report, boxes=(dataclasses.replace(report.boxes[0], largest_absolute=1e6),))
    assert json.loads(failed.to_json())["passed"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "patch_size"),
        ({"patch_size": (8, 8)}, "patch_size must have one value per spatial axis"),
        ({"patch_size": 8, "patch_overlap": 8}, "patch_overlap must be smaller than patch_size"),
    ],
)
def test_bad_sizes_are_refused(volume: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        check(volume, "identity", **options)


# The reference itself, against sums that can be done by hand.


@pytest.mark.parametrize("mode", ["crop", "average", "hann", "gaussian"])
@pytest.mark.parametrize("padding_mode", [None, "edge", "wrap"])
def test_reference_gives_the_identity_back(mode: str, padding_mode: str | None) -> None:
    voxels = np.random.default_rng(3).random((2, 11, 7)).astype(np.float32)
    found = reference_scores(
        voxels, nn.Identity(), patch_size=(4, 8), patch_overlap=(3, 2), overlap_mode=mode, padding_mode=padding_mode
    )
    np.testing.assert_allclose(found, voxels, rtol=1e-12)


def test_reference_averages_what_two_patches_say() -> None:
    # Patches [0, 4) and [2, 6): the first says 0, the second its start.
    found = reference_scores(
        np.arange(6.0, dtype=np.float32)[None],
        lambda x: x[..., :1].expand_as(x),
        patch_size=(4,),
        patch_overlap=(2,),
        overlap_mode="average",
    )
    assert found.tolist() == [[0, 0, 1, 1, 2, 2]]


def test_reference_crop_lets_the_later_patch_win() -> None:
    # Starts 0, 2, 3; one voxel is trimmed from each inner side.
    found = reference_scores(
        np.arange(7.0, dtype=np.float32)[None],
        lambda x: x[..., :1].expand_as(x),
        patch_size=(4,),
        patch_overlap=(2,),
        overlap_mode="crop",
    )
    assert found.tolist() == [[0, 0, 0, 2, 3, 3, 3]]
