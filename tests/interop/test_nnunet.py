"""Folders of nnU-Net's results give nnU-Net's labels, and what cannot be honoured is refused by its name."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import oocpatch
from oocpatch.models.packages.nnunet import NnunetPlan
from tests.support.nnunet_cases import CASES, REFERENCE, Case

LABELS = np.load(REFERENCE)


def scan_of(case: Case, axes: str = "czyx") -> xr.DataArray:
    """The volume of a case, with its axes in some order."""
    coords = {name: np.arange(n) * step for name, n, step in zip("zyx", case.shape, case.spacing, strict=True)}
    scan = xr.DataArray(case.volume, coords, tuple("czyx"))
    return (scan if "c" in axes else scan.isel(c=0)).transpose(*axes)


@pytest.fixture
def predicted(tmp_path: Path) -> Callable[..., xr.DataArray]:
    """A function that writes the folder of a case, and predicts its volume."""

    def predict(case: Case, axes: str = "czyx", options: str = "", **more: Any) -> xr.DataArray:
        folder = tmp_path / "folder"
        if not folder.exists():
            case.write(folder)
        arguments = {"trust_pickle": True, "progress": False, "workers": 1, **more}
        return oocpatch.predict(scan_of(case, axes), f"nnunet:{folder}{options}", tmp_path / "out", **arguments)

    return predict


@pytest.mark.parametrize("name", CASES)
def test_the_labels_are_those_of_nnunet(name: str, predicted: Callable[..., xr.DataArray]) -> None:
    case = CASES[name]
    # ties fall as floats are rounded: a few voxels may differ on another processor
    assert (predicted(case).values.reshape(case.shape) == LABELS[name]).mean() > 0.9995


def test_axes_are_known_by_their_names(predicted: Callable[..., xr.DataArray]) -> None:
    case = CASES["transposed, larger patch"]
    labels = predicted(case, "xzyc").isel(c=0).transpose("z", "y", "x")
    assert (labels.values == LABELS["transposed, larger patch"]).mean() > 0.9995


def test_folds_and_checkpoints_are_chosen_in_the_spec(predicted: Callable[..., xr.DataArray], tmp_path: Path) -> None:
    case = CASES["mirrored, two folds"]
    both = functools.partial(predicted, case, postprocess=torch.clone, overwrite=True)
    together, first, second = (np.asarray(both(options=o)) for o in ("", ",folds=0", ",folds=1"))
    np.testing.assert_allclose(together, (first + second) / 2, atol=1e-5)
    folder = tmp_path / "folder" / "fold_1"
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_best.pth")
    np.testing.assert_array_equal(both(options=""), first)
    np.testing.assert_array_equal(both(options=",checkpoint=checkpoint_best.pth"), second)


def test_what_the_caller_gives_wins(predicted: Callable[..., xr.DataArray], tmp_path: Path) -> None:
    case = CASES["mirrored, two folds"]
    case.write(tmp_path / "folder")
    spec, scan = f"nnunet:{tmp_path}/folder", scan_of(case)
    plan = oocpatch.plan(scan, spec, tmp_path / "out", trust_pickle=True, patch_overlap=2, augment="none")
    assert (plan.patch_size, plan.patch_overlap) == ((12, 14, 12), (2, 2, 2))
    assert (plan.patch_starts, plan.heads[0].mode) == ("even", "nnunet")
    assert plan.heads[0].out_dtype == "uint8"


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "cascade": ("plans", lambda p: p["configurations"]["base"].update(previous_stage="3d_lowres"), "previous_stage"),
    "normalization": (
        "plans", lambda p: p["configurations"]["base"].update(normalization_schemes=["Own"]), "scheme of channel 0",
    ),
    "resampling": (
        "plans", lambda p: p["configurations"]["base"].update(resampling_fn_data="torch"), "resampling_fn_data",
    ),
    "configuration": ("plans", lambda p: p["configurations"].pop("3d_fullres"), "the configuration '3d_fullres'"),
    "reader": ("plans", lambda p: p.update(image_reader_writer="OwnIO"), "image_reader_writer"),
    "architecture": (
        "plans", lambda p: p["configurations"]["base"]["architecture"]["arch_kwargs"].update(features=7), "do not fit",
    ),
    "spacing": ("plans", lambda p: p["configurations"]["base"].pop("spacing"), "3d_fullres .* entry 'spacing'"),
    "labels": ("dataset", lambda d: d.pop("labels"), "dataset.json: must have an entry 'labels', got channel_names"),
    "numbers": (
        "plans", lambda p: p["foreground_intensity_properties_per_channel"]["0"].pop("std"), "json: .* entry 'std'",
    ),
    "type": ("plans", lambda p: p.update(transpose_forward=None), "of another type: TypeError"),
    "class": (
        "plans", lambda p: p["configurations"]["base"]["architecture"].update(network_class_name="torch.Gone"), "Gone",
    ),
    "channels": ("dataset", lambda d: d["channel_names"].update({"1": "t2"}), "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    name: str, predicted: Callable[..., xr.DataArray], tmp_path: Path
) -> None:
    file, edit, message = EDITS[name]
    CASES["ct"].write(tmp_path / "folder")
    path = tmp_path / "folder" / f"{file}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        predicted(CASES["ct"])


def test_plans_of_the_first_versions_describe_their_network_by_numbers(tmp_path: Path) -> None:
    CASES["ct"].write(tmp_path / "folder")
    path = tmp_path / "folder" / "plans.json"
    plans = json.loads(path.read_text())
    older = plans["configurations"]["base"]
    del older["architecture"]
    older |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 8, "unet_max_num_features": 20}
    older |= {"n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}
    older |= {"conv_kernel_sizes": [[3, 3, 3]] * 3, "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [1, 2, 2]]}
    checkpoint = {"init_args": {"configuration": "3d_fullres"}}
    dataset = json.loads((tmp_path / "folder" / "dataset.json").read_text())
    architecture = NnunetPlan.of(plans, dataset, checkpoint).architecture
    assert architecture["network_class_name"] == "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    assert architecture["arch_kwargs"]["features_per_stage"] == [8, 16, 20]
    assert architecture["arch_kwargs"]["conv_op"] == "torch.nn.Conv3d"
    assert architecture["arch_kwargs"]["strides"] == older["pool_op_kernel_sizes"]


def test_a_folder_that_is_none_and_missing_folds_are_named(
    predicted: Callable[..., xr.DataArray], tmp_path: Path
) -> None:
    CASES["ct"].write(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"the checkpoint of a fold does not exist: .*fold_3"):
        predicted(CASES["ct"], options=",folds=0+3")
    with pytest.raises(ValueError, match=r"no fold in .* has a best.pth, got fold_0/checkpoint_final.pth"):
        predicted(CASES["ct"], options=",checkpoint=best.pth")
    with pytest.raises(ValueError, match=r"classes of torch or dynamic_network_architectures, .* pass --trust-pickle"):
        predicted(CASES["ct"], trust_pickle=False)
    shutil.rmtree(tmp_path / "folder" / "fold_0")
    with pytest.raises(ValueError, match="got no checkpoint"):
        predicted(CASES["ct"])
    (tmp_path / "folder" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"dataset\.json is missing; pass the folder named TRAINER__PLANS"):
        predicted(CASES["ct"])


def test_a_volume_with_other_channels_or_axes_is_refused(tmp_path: Path) -> None:
    CASES["ct"].write(tmp_path / "folder")
    predict = functools.partial(oocpatch.predict, trust_pickle=True, progress=False)
    spec, scan = f"nnunet:{tmp_path}/folder", scan_of(CASES["ct"], "zyx")
    with pytest.raises(ValueError, match=r"takes 1 channel\(s\), and the volume has 2"):
        predict(xr.concat([scan, scan], "c"), spec, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"of 3 spatial axes \(z, y, x\), and the volume has 2 \(y, x\); name its axes"
    ):
        predict(scan[0], spec, tmp_path / "out")
    with pytest.raises(ValueError, match=r"spatial axes of the volume \(z, q, x\)|must name spatial axes|z, q, x"):
        predict(scan.rename({"y": "q"}), spec, tmp_path / "out")
    CASES["two channels, regions"].write(tmp_path / "two")
    with pytest.raises(ValueError, match=r"takes 2 channel\(s\), and the volume has 1"):
        predict(scan, f"nnunet:{tmp_path}/two", tmp_path / "out")
