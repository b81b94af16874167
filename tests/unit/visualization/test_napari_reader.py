"""Promises on what napari gets: layers by name and kind, at their places, with levels, windows and colours."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
import torch
import xarray
import yaml

import oocpatch
from oocpatch.visualization.napari_reader import get_reader, read
from tests.unit.visualization.test_picture import patient

ROOT = Path(__file__).parents[3]


def two_heads(x: torch.Tensor) -> dict[str, torch.Tensor]:
    score = x.float() / 255
    return {"scores": score, "labels": torch.cat([1 - score, score], 1)}


def test_a_result_is_its_input_scores_and_labels_at_their_places_with_levels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (12, 40, 48), dtype=np.uint8)
    places = {"z": np.arange(12.0), "y": np.arange(40) * 0.5 + 3, "x": np.arange(48) * 0.5 + 3}
    coords = {name: (name, place, {"units": "micrometer"}) for name, place in places.items()}
    data = xarray.DataArray(values, dims=tuple("zyx"), coords=coords)
    oocpatch.convert(data, tmp_path / "in.zarr", chunks=16, progress=False)
    oocpatch.predict(
        tmp_path / "in.zarr", two_heads, tmp_path / "out.zarr", patch_size=8, overlap_mode="crop",
        postprocess={"labels": "argmax"}, progress=False,
    )  # fmt: skip
    reader = get_reader(str(tmp_path / "out.zarr"))
    assert reader is not None
    layers = reader(str(tmp_path / "out.zarr"))
    assert [(settings["name"], kind) for _, settings, kind in layers] == [
        ("input", "image"),
        ("scores", "image"),
        ("labels", "labels"),
    ]
    for (levels, settings, _), expected in zip(layers, (values, np.float32(values) / 255, values > 127), strict=True):
        np.testing.assert_allclose(levels[0], expected, rtol=1e-6)
        assert settings["multiscale"]
        assert levels[1].shape == (12, 20, 24)  # voxels are longer along z
        assert settings["axis_labels"] == ["z", "y", "x"]
        assert settings["units"] == ["micrometer"] * 3
        assert (settings["scale"], settings["translate"]) == ([1, 0.5, 0.5], [0, 3, 3])
    assert layers[1][1]["contrast_limits"] == [0, 1]
    assert layers[1][1]["blending"] == "additive"
    assert layers[2][1]["colormap"][1] == [*(c / 255 for c in (63, 185, 130)), 1]  # as in pictures


def test_a_slide_is_a_picture_and_channels_have_names_and_colours(tmp_path: Path) -> None:
    slide = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", slide, photometric="rgb")
    ((picture, settings, kind),) = read(str(tmp_path / "a.tif"))
    assert (settings["rgb"], kind) == (True, "image")
    np.testing.assert_array_equal(picture, slide)
    stained = xarray.DataArray(slide.astype(np.uint16), dims=("y", "x", "c"), coords={"c": ["DAPI", "GFP", "RFP"]})
    oocpatch.convert(stained, tmp_path / "b.zarr", progress=False)
    ((channels, settings, _),) = read(str(tmp_path / "b.zarr"))
    assert settings["channel_axis"] == 0
    assert settings["name"] == ["b.zarr DAPI", "b.zarr GFP", "b.zarr RFP"]
    assert settings["colormap"] == ["#00FF00", "#FF00FF", "#00FFFF"]  # those that the image has
    np.testing.assert_array_equal(channels, slide.transpose(2, 0, 1))


def test_a_scan_is_shown_from_head_to_feet_front_to_back_right_to_left(tmp_path: Path) -> None:
    expected = np.asarray(patient().dataobj).transpose(2, 1, 0)[::-1, ::-1, ::-1]
    for codes in ("RAS", "PIR", "LSA"):
        axes = nibabel.orientations.axcodes2ornt(tuple(codes))
        stored = patient().as_reoriented(nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], axes))
        nibabel.save(stored, tmp_path / "a.nii")
        ((values, settings, _),) = read(str(tmp_path / "a.nii"))
        np.testing.assert_array_equal(values, expected)
        assert settings["scale"] == [4, 2, 2]
        assert settings["translate"] == [-16, -24, -16]  # of the voxel nearest to head, front and right
        assert settings["units"] == ["millimeter"] * 3


def test_what_is_no_volume_has_no_reader(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert get_reader(str(tmp_path / "notes.txt")) is None
    assert get_reader([str(tmp_path)]) is None


def test_the_manifest_that_napari_looks_for_names_the_reader() -> None:
    settings: Any = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package, _, name = settings["project"]["entry-points"]["napari.manifest"]["oocpatch"].partition(":")
    manifest = yaml.safe_load((ROOT / package / name).read_text())
    assert manifest["name"] == settings["project"]["name"]
    commands = {command["id"]: command["python_name"] for command in manifest["contributions"]["commands"]}
    for offered in manifest["contributions"]["readers"]:
        module, _, function = commands[offered["command"]].partition(":")
        assert getattr(importlib.import_module(module), function) is get_reader
        assert offered["accepts_directories"]
