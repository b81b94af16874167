"""Promises on images as users pass them: names and colours of channels are kept, and an image gives an image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr

import oocpatch
import oocpatch.xarray
from tests.support.ome_checks import ome_faults

CHANNELS = [
    {"label": "DAPI", "color": "0000FF", "active": True, "window": {"min": 0, "max": 9, "start": 0, "end": 9}},
    {"label": "GFP", "color": "#00ff00", "active": False},
]
SETTINGS: dict[str, Any] = {"patch_size": 8, "overlap_mode": "crop", "progress": False}


def an_image(folder: Path, channels: list[Any] = CHANNELS, axes: str = "cyx") -> Path:
    kinds = {"c": "channel", "t": "time"}
    shape = [{"c": max(1, len(channels)), "t": 2}.get(a, 16) for a in axes]
    data = np.random.default_rng(0).random(shape, dtype=np.float32)
    listed = [{"name": a, "type": kinds.get(a, "space")} for a in axes]
    datasets = [
        {
            "path": str(k),
            "coordinateTransformations": [{"type": "scale", "scale": [2.0**k if a in "yx" else 1.0 for a in axes]}],
        }
        for k in range(2)
    ]
    ome = {"version": "0.5", "multiscales": [{"axes": listed, "datasets": datasets}], "omero": {"channels": channels}}
    group = zarr.create_group(folder / "in.zarr", attributes={"ome": ome})
    for k in range(2):
        group.create_array(str(k), data=data[..., :: 2**k, :: 2**k], chunks=tuple(min(n, 8) for n in shape))
    return folder / "in.zarr"


def shown(output: Path) -> list[tuple[Any, ...]]:
    ome = json.loads((output / "zarr.json").read_text())["attributes"]["ome"]
    return [(c["label"], c["color"], c["active"]) for c in ome["omero"]["channels"]]


def tree_of(path: Path) -> Any:
    return xarray.open_datatree(path, engine="oocpatch")


KEPT = [("DAPI", "0000FF", True), ("GFP", "00FF00", False)]
INPUTS: dict[str, Callable[[Path], Any]] = {
    "path": lambda p: p,
    "group": lambda p: zarr.open_group(p, mode="r"),
    "tree": tree_of,
    "dataset": lambda p: tree_of(p)["scale0"].to_dataset(),
    "array": lambda p: tree_of(p)["scale0/image"],
    "dask array": lambda p: xarray.open_dataset(p, engine="oocpatch", chunks={})["image"],
    "part": lambda p: tree_of(p)["scale0/image"].isel(y=slice(2, 14)),
}


@pytest.mark.parametrize("source", INPUTS.values(), ids=INPUTS)
def test_an_image_gives_an_image_with_its_channels(source: Any, tmp_path: Path) -> None:
    given = source(an_image(tmp_path))
    result = oocpatch.predict(given, torch.nn.Identity(), tmp_path / "out.zarr", **SETTINGS)
    assert shown(tmp_path / "out.zarr") == KEPT
    assert result["c"].values.tolist() == ["DAPI", "GFP"]
    assert ome_faults(tmp_path / "out.zarr") == []
    plain = oocpatch.predict(given, torch.nn.Identity(), tmp_path / "plain.zarr", output_format="zarr", **SETTINGS)
    assert plain["c"].values.tolist() == ["DAPI", "GFP"]
    assert np.array_equal(plain, result)
    again = oocpatch.predict(tmp_path / "out.zarr", torch.nn.Identity(), tmp_path / "again.zarr", **SETTINGS)
    assert shown(tmp_path / "again.zarr") == KEPT
    assert np.array_equal(again, result)


def test_the_accessor_and_levels_of_trees(tmp_path: Path) -> None:
    tree = tree_of(an_image(tmp_path))
    tree["scale0/image"].oocpatch.predict(torch.nn.Identity(), tmp_path / "out.zarr", **SETTINGS)
    assert shown(tmp_path / "out.zarr") == KEPT
    for number, level in enumerate((1, "scale1", -1)):
        coarse = oocpatch.predict(tree, torch.nn.Identity(), tmp_path / f"{number}.zarr", level=level, **SETTINGS)
        assert np.array_equal(coarse, tree["scale1/image"])
    with pytest.raises(ValueError, match="level must be one of scale0, scale1"):
        oocpatch.Volume(tree, level=2)
    opened = xarray.open_datatree(tmp_path / "out.zarr", engine="zarr")
    oocpatch.predict(opened, torch.nn.Identity(), tmp_path / "again.zarr", **SETTINGS)
    assert shown(tmp_path / "again.zarr") == KEPT


def test_parts_that_are_no_image_give_a_plain_zarr(tmp_path: Path) -> None:
    image = tree_of(an_image(tmp_path))["scale0/image"]
    for number, part in enumerate((image[:, 3], image[:, ::-1] * 1)):
        result = oocpatch.predict(part, torch.nn.Identity(), tmp_path / f"{number}.zarr", **SETTINGS)
        assert np.array_equal(result, part)
        assert "ome" not in zarr.open_group(tmp_path / f"{number}.zarr").attrs


def test_channels_of_other_results_are_their_own(tmp_path: Path) -> None:
    image = an_image(tmp_path)
    oocpatch.predict(image, lambda p: torch.cat([p, p], 1), tmp_path / "four.zarr", **SETTINGS)
    assert [c[0] for c in shown(tmp_path / "four.zarr")] == [f"channel {n}" for n in range(4)]
    oocpatch.predict(image, torch.nn.Identity(), tmp_path / "shares.zarr", postprocess="softmax", **SETTINGS)
    assert [c[1] for c in shown(tmp_path / "shares.zarr")] == ["00FF00", "FF00FF"]


OMERO: dict[str, tuple[list[Any], list[tuple[Any, ...]]]] = {
    "the same name twice": ([{"label": "a"}, {"label": "a"}], [("a", "00FF00", True), ("a (1)", "FF00FF", True)]),
    "no names": ([{"color": "FF0000"}, {}], [("channel 0", "FF0000", True), ("channel 1", "FF00FF", True)]),
    "no colours": (
        [{"label": "a", "color": "red"}, {"label": "b", "color": 7}],
        [("a", "00FF00", True), ("b", "FF00FF", True)],
    ),
    "one": ([{"label": "a", "color": "FF8000"}], [("a", "FF8000", True)]),
    "nonsense": ([None, "x"], [("channel 0", "00FF00", True), ("channel 1", "FF00FF", True)]),
}


@pytest.mark.parametrize(("channels", "expected"), OMERO.values(), ids=OMERO)
def test_settings_that_are_incomplete(channels: list[Any], expected: Any, tmp_path: Path) -> None:
    oocpatch.predict(an_image(tmp_path, channels), torch.nn.Identity(), tmp_path / "out.zarr", **SETTINGS)
    assert shown(tmp_path / "out.zarr") == expected


def test_an_image_without_channel_axis_keeps_its_name_and_colour(tmp_path: Path) -> None:
    oocpatch.predict(an_image(tmp_path, CHANNELS[:1], "tyx"), torch.nn.Identity(), tmp_path / "out.zarr", **SETTINGS)
    assert shown(tmp_path / "out.zarr") == KEPT[:1]
