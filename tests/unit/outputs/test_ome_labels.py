"""Promises on labels written beside an image of somebody: they are listed, others' stay, and readers find them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from numpy.testing import assert_array_equal

import oocpatch
from tests.support.ome_checks import ome_faults, ome_image_paths
from tests.support.ome_runs import RUNS

SETTINGS = {"patch_size": 8, "output_chunks": 8, "postprocess": "threshold:2.5", "progress": False}


def listed(image: Path) -> Any:
    return json.loads((image / "labels/zarr.json").read_text())["attributes"]["ome"]["labels"]


def label(image: Path, name: str, **more: Any) -> Any:
    return oocpatch.predict(image, torch.nn.Identity(), image / "labels" / name, **{**SETTINGS, **more})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    RUNS["2-D"].predict(tmp_path / "in.zarr")
    return tmp_path / "in.zarr"


def test_labels_of_an_image_are_listed_and_found(image: Path) -> None:
    first = label(image, "nuclei")
    label(image, "cells", postprocess="threshold:4")
    assert listed(image) == ["nuclei", "cells"]
    assert ome_faults(image) == []  # as many levels, the same places, the right source, consolidated
    assert len(ome_image_paths(image)) == 3
    values = RUNS["2-D"].volume().values > 2.5
    assert_array_equal(first, values)
    tree = xarray.open_datatree(image, engine="zarr")  # by consolidated metadata
    assert_array_equal(tree["labels/nuclei/scale0/image"], values)
    assert_array_equal(zarr.open_group(image, mode="r")["labels/nuclei/scale0/image"], values)
    assert oocpatch.verify(image).passed
    assert oocpatch.verify(image / "labels/nuclei").passed
    assert sorted(p.name for p in image.rglob("*oocpatch.lock*")) == []


def test_what_others_wrote_stays(image: Path) -> None:
    attributes = {"ome": {"version": "0.5", "labels": ["theirs"], "note": 5}, "own": 1}
    group = zarr.create_group(image / "labels", zarr_format=3, attributes=attributes)
    group.create_array("theirs", data=np.arange(5))
    before = (image / "zarr.json").read_bytes()
    label(image, "nuclei")
    assert listed(image) == ["theirs", "nuclei"]
    found = dict(zarr.open_group(image / "labels", mode="r", use_consolidated=False).attrs)
    assert found["own"] == 1
    assert found["ome"]["note"] == 5
    assert zarr.open_array(image / "labels/theirs", mode="r")[...].tolist() == [0, 1, 2, 3, 4]
    label(image, "nuclei", postprocess="threshold:2", overwrite=True)
    assert listed(image) == ["theirs", "nuclei"]
    documents = [json.loads(text) for text in (before, (image / "zarr.json").read_bytes())]
    for one in documents:
        one.pop("consolidated_metadata", None)
        one["attributes"]["oocpatch"]["details"].pop("metadata_crc", None)
    assert documents[0] == documents[1]


def test_the_same_call_again_lists_labels_that_a_crash_left_out(image: Path) -> None:
    label(image, "nuclei")
    shutil.copytree(image, image.with_name("whole.zarr"))
    lists = image / "labels/zarr.json"
    lists.unlink()
    label(image, "nuclei")
    assert listed(image) == ["nuclei"]
    assert ome_faults(image) == []
    written = lists.stat().st_mtime_ns
    label(image, "nuclei")
    assert lists.stat().st_mtime_ns == written


def test_an_image_that_is_replaced_still_lists_the_labels_beside_it(image: Path) -> None:
    label(image, "nuclei")
    RUNS["2-D"].predict(image, overwrite=True)
    still_listed(image)


def test_an_image_that_is_repaired_still_lists_the_labels_beside_it(tmp_path: Path) -> None:
    RUNS["2-D"].predict(tmp_path / "in.zarr")
    label(tmp_path / "in.zarr", "nuclei")
    (tmp_path / "in.zarr/scale0/image/c/0/0").unlink()
    assert not oocpatch.verify(tmp_path / "in.zarr", repair=True).passed
    RUNS["2-D"].predict(tmp_path / "in.zarr")
    still_listed(tmp_path / "in.zarr")
    assert oocpatch.verify(tmp_path / "in.zarr").passed


def still_listed(image: Path) -> None:
    values = RUNS["2-D"].volume().values > 2.5
    assert ome_faults(image) == []
    assert_array_equal(zarr.open_group(image, mode="r", use_consolidated=True)["labels/nuclei/scale0/image"], values)
    assert listed(image) == ["nuclei"]


def test_labels_beside_heads_that_a_run_wrote_keep_its_checksums_right(tmp_path: Path) -> None:
    RUNS["labels beside an image"].predict(tmp_path / "in.zarr")
    label(tmp_path / "in.zarr", "bright")
    assert listed(tmp_path / "in.zarr") == ["nuclei", "cells", "bright"]
    assert oocpatch.verify(tmp_path / "in.zarr").passed
    assert ome_faults(tmp_path / "in.zarr") == []


def test_scores_among_labels_are_not_listed(image: Path) -> None:
    label(image, "scores", postprocess=None)
    assert not (image / "labels/zarr.json").exists()


@pytest.mark.parametrize("output_format", ["auto", "ome-zarr"])
def test_labels_of_an_image_in_0_4_are_refused(output_format: str, tmp_path: Path) -> None:
    image = tmp_path / "image.zarr"
    axes = [{"name": name, "type": "space"} for name in "yx"]
    levels = {"axes": axes, "datasets": [{"path": "0"}], "version": "0.4"}
    group = zarr.create_group(image, zarr_format=2, attributes={"multiscales": [levels]})
    group.create_array("0", data=np.ones((16, 16), np.float32))
    with pytest.raises(ValueError, match=r"labels must have the format of their image, .* is an OME-Zarr 0\.4, got"):
        label(image, "nuclei", output_format=output_format)
    assert not (image / "labels").exists()
