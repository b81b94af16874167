"""`predict(postprocess="label")`: the objects of the result, as `label` finds them, and what does not go with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray
from scipy import ndimage

import oocpatch

SCORES = ndimage.gaussian_filter(np.random.default_rng(0).random((30, 26)), 1.2).astype(np.float32)
SCORES = (SCORES - SCORES.min()) / (SCORES.max() - SCORES.min())
CALL = {"patch_size": 10, "patch_overlap": 4, "output_chunks": 8, "block_shape": 16, "progress": False}


def classes(patches: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(patches, 0.55), patches, 1 - patches], 1)


@pytest.mark.parametrize(
    ("mode", "postprocess"), [("hann", "label:0.6"), ("crop", "label"), ("max", ("linear:1:-0.1", "label"))]
)
def test_objects_of_one_channel_are_those_of_scipy(mode, postprocess, tmp_path):
    volume = xarray.DataArray(SCORES, {"x": ("x", 2.0 * np.arange(26), {"units": "um"})}, ("y", "x"))
    call = {**CALL, "overlap_mode": mode, "postprocess": postprocess}
    result = oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out", **call)
    at = 0.5 if mode == "crop" else 0.6
    expected, count = ndimage.label(np.greater(SCORES, at))
    assert (result.attrs["objects"], str(result.dtype), result.dims) == (count, "uint32", ("y", "x"))
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result["x"], volume["x"])
    assert oocpatch.predict(volume, torch.nn.Identity(), tmp_path / "out", **call).identical(result)
    assert oocpatch.verify(tmp_path / "out").passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_objects_of_classes_are_those_of_label_and_follow_the_input(tmp_path):
    call = {**CALL, "postprocess": "label"}
    for number, volume in enumerate((SCORES, 1 - SCORES)):
        if number:
            with pytest.raises(oocpatch.RunMismatch, match="volume"):
                oocpatch.predict(volume, classes, tmp_path / "out", **call)
        result = oocpatch.predict(volume, classes, tmp_path / "out", **call, update=True)
        plain = oocpatch.predict(volume, classes, tmp_path / f"plain{number}", **{**call, "postprocess": "argmax"})
        labels = oocpatch.label(plain, tmp_path / f"labels{number}", per_class=True, progress=False)
        np.testing.assert_array_equal(result, labels)
        assert result.attrs["objects"] == labels.attrs["objects"] > 5
    with pytest.raises(oocpatch.RunMismatch) as refusal:
        oocpatch.predict(volume, classes, tmp_path / "out", **{**call, "postprocess": "label:0.4"})
    assert refusal.value.fields == ("postprocess",)


def test_votes_and_parts_are_labelled(tmp_path):
    volume = (SCORES > 0.5).astype(np.int32)
    call = {**CALL, "overlap_mode": "vote", "num_classes": 2, "postprocess": "label"}
    for part in (2, 1):
        result = oocpatch.predict(volume, lambda x: x, tmp_path / "out", **call, model_id="same", part=(part, 2))
    np.testing.assert_array_equal(result, ndimage.label(volume)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"postprocess": "label:0.3"}, "a threshold needs one channel, too: got 3 channels of float32"),
        ({"postprocess": "label:much"}, "postprocess must be one of .* label:NUMBER"),
        ({"postprocess": ["label", "threshold"]}, "'label' must be the last step, got .'label', 'threshold'"),
        ({"output_fill": 1}, "output_fill must be 0 for postprocess 'label', got 1"),
        ({"output_dtype": "float32"}, "output_dtype must be of integers for postprocess 'label'"),
        ({"model": lambda x: {"a": x, "b": x}}, "a model of one output per voxel, got a, b; label one of them"),
        ({"overlap_mode": "instances", "model": lambda x: x.int()}, "must be None where overlap_mode is 'instances'"),
        ({"max_disk": 1000}, "max_disk is 1000 B; raise max_disk"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(options, message, tmp_path):
    options = {"model": classes, **CALL, "postprocess": "label", **options}
    with pytest.raises(ValueError, match=message):
        oocpatch.predict(SCORES, options.pop("model"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
