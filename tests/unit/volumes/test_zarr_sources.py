"""Promises on Zarr arrays: they are read as they are now, and where they were opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import oocpatch
from oocpatch.planning.box import Box

SCAN = np.random.default_rng(0).random((32, 48), dtype=np.float32)
SETTINGS: dict[str, Any] = {"patch_size": 16, "overlap_mode": "crop", "progress": False}

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")


def read(source: Any) -> Any:
    volume = oocpatch.Volume(source)
    return volume.read(Box.of_shape(volume.shape))[0]


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("rows", [16, 48])
def test_consolidated_metadata_that_are_older_than_the_array_do_not_count(
    tmp_path: Path, zarr_format: Any, rows: int
) -> None:
    group = zarr.create_group(tmp_path / "a.zarr", zarr_format=zarr_format)
    group.create_array("v", data=np.resize(SCAN, (rows, 48)), chunks=(16, 16))
    zarr.consolidate_metadata(tmp_path / "a.zarr", zarr_format=zarr_format)
    array = zarr.open_array(tmp_path / "a.zarr/v", mode="r+")
    array.resize(SCAN.shape)
    array[:] = SCAN
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["v"].shape == (rows, 48)  # what they say
    np.testing.assert_array_equal(read(tmp_path / "a.zarr"), SCAN)
    np.testing.assert_array_equal(read(zarr.open_group(tmp_path / "a.zarr", mode="r")), SCAN)


def test_consolidated_metadata_of_an_ome_zarr_that_are_older_do_not_count(tmp_path: Path) -> None:
    axes = [{"name": n, "type": "space"} for n in "yx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1]}]}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    group = zarr.create_group(tmp_path / "a.zarr", attributes={"ome": ome})
    group.create_array("0", data=SCAN[:16], chunks=(16, 16))
    zarr.consolidate_metadata(tmp_path / "a.zarr")
    zarr.open_array(tmp_path / "a.zarr/0", mode="r+").append(SCAN[16:])
    np.testing.assert_array_equal(read(tmp_path / "a.zarr"), SCAN)


SOURCES: dict[str, Any] = {
    "a text": lambda: "plain.zarr",
    "a path": lambda: Path("plain.zarr"),
    "a path with dots": lambda: "../{here}/plain.zarr",
    "a sharded one": lambda: "sharded.zarr",
    "an array in a group": lambda: "group.zarr/v",
    "a group": lambda: "group.zarr",
    "an opened array": lambda: zarr.open_array("plain.zarr", mode="r"),
    "an array to write to": lambda: zarr.open_array("plain.zarr", mode="r+"),
    "an opened group": lambda: zarr.open_group("group.zarr", mode="r"),
    "an array of an opened group": lambda: zarr.open_group("group.zarr", mode="r")["v"],
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that moves to another directory; the present one has the volumes."""
    here = tmp_path / "here"
    (tmp_path / "there").mkdir()
    zarr.create_array(here / "plain.zarr", data=SCAN, chunks=(16, 16))
    zarr.create_array(here / "sharded.zarr", data=SCAN, chunks=(8, 8), shards=(16, 16))
    zarr.create_group(here / "group.zarr").create_array("v", data=SCAN, chunks=(16, 16))
    monkeypatch.chdir(here)
    return lambda: monkeypatch.chdir(tmp_path / "there")


@pytest.mark.parametrize("name", SOURCES)
def test_a_relative_path_means_the_directory_where_it_was_opened(name: str, elsewhere: Any) -> None:
    """In another one there are no chunks, and Zarr would give its fill value."""
    source = SOURCES[name]()
    source = source.format(here="here") if isinstance(source, str) else source
    volume = oocpatch.Volume(source)
    sampler = oocpatch.GridSampler(oocpatch.Subject(t1=volume), 16)
    elsewhere()
    np.testing.assert_array_equal(volume.read(Box.of_shape(volume.shape))[0], SCAN)
    np.testing.assert_array_equal(sampler[1].t1.data[0], SCAN[:16, 16:32])


def test_a_model_may_change_the_working_directory(elsewhere: Any) -> None:
    def model(patches: Any) -> Any:
        elsewhere()
        return patches

    options: dict[str, Any] = {**SETTINGS, "block_shape": 16, "output_chunks": 16}
    here = Path.cwd()
    result = oocpatch.predict("plain.zarr", model, "out.zarr", **options)
    assert Path.cwd() != here
    np.testing.assert_array_equal(result, SCAN)
    assert (here / "out.zarr/zarr.json").exists()
    assert not any(Path.cwd().iterdir())
