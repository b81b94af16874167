"""`oocpatch.label` as a whole: what it writes, refuses and resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli.main import main
from oocpatch.configuration import label_plan
from oocpatch.planning.labelling import Labelling
from tests.support.children import file_digests
from tests.support.objects import oracle, shapes_of_objects

Array = np.ndarray[Any, Any]
QUIET: dict[str, Any] = {"progress": False, "block_shape": 8, "output_chunks": 4}


def rule(connectivity: int = 1, *, threshold: float | None = None, per_class: bool = False, size: int = 0) -> Labelling:
    return Labelling(threshold, connectivity, per_class=per_class, min_size=size)


@pytest.fixture
def blobs() -> Array:
    return shapes_of_objects("blobs", (20, 19, 22), 5, 0.3)


@pytest.mark.parametrize(
    ("shape", "kind", "wanted"),
    [
        ((90,), "noise", rule()),
        ((40, 33), "classes", rule(2, per_class=True)),
        ((17, 18, 19), "noise", rule(2, size=3)),
        ((17, 18, 19), "spiral", rule(3)),
        ((9, 10, 9, 10), "blobs", rule(4)),
    ],
)
def test_labels_are_those_of_scipy_on_the_whole(shape: Any, kind: str, wanted: Labelling, tmp_path: Path) -> None:
    values = shapes_of_objects(kind, shape, 3, 0.4)
    labels = oocpatch.label(
        values,
        tmp_path / "labels.zarr",
        axes="wzyx"[-len(shape) :],
        connectivity=wanted.connectivity,
        per_class=wanted.per_class,
        min_size=wanted.min_size,
        workers=2,
        **QUIET,
    )
    expected, count = oracle(values, wanted)
    assert (labels.attrs["objects"], labels.dtype) == (count, np.uint32)
    np.testing.assert_array_equal(labels.values, expected)
    assert oocpatch.verify(tmp_path / "labels.zarr").passed


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int16", "bool"])
def test_foreground_is_above_the_threshold_and_nan_is_background(dtype: str, tmp_path: Path) -> None:
    scores = (np.random.default_rng(0).random((20, 20)) * 4).astype(dtype)
    if np.dtype(dtype).kind == "f":
        scores[3] = np.nan
    labels = oocpatch.label(scores, tmp_path / "labels.zarr", threshold=0.5, **QUIET)
    expected, _ = oracle(scores, rule(threshold=0.5))
    np.testing.assert_array_equal(labels.values, expected)


def test_each_index_of_time_and_channel_is_labelled_by_itself(tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((3, 2, 18, 15)) < 0.4
    source = xr.DataArray(values, dims=("t", "c", "y", "x"), coords={"t": [5, 6, 9]})
    labels = oocpatch.label(source, tmp_path / "labels.zarr", **QUIET)
    assert labels.dims == ("t", "c", "y", "x")
    assert labels.t.values.tolist() == [5, 6, 9]
    counts = []
    for t in range(3):
        for c in range(2):
            expected, count = oracle(values[t, c], rule())
            np.testing.assert_array_equal(labels.values[t, c], expected)
            counts.append(count)
    assert labels.attrs["objects"] == counts


def test_a_channel_that_stands_last_comes_before_the_spatial_axes(tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((18, 15, 3)) < 0.4
    labels = oocpatch.label(values, tmp_path / "labels.zarr", axes="yxc", **QUIET)
    assert labels.dims == ("c", "y", "x")
    for c in range(3):
        np.testing.assert_array_equal(labels.values[c], oracle(values[..., c], rule())[0])


def test_bytes_do_not_depend_on_workers_or_parts(blobs: Array, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "volume.zarr", data=blobs, chunks=(8, 8, 8))
    digests = []
    for name, options in {"one": {"workers": 1}, "two": {"workers": 2}}.items():
        oocpatch.label(tmp_path / "volume.zarr", tmp_path / name, **QUIET, **options)
        digests.append(file_digests(tmp_path / name / "labels"))
    for i in (3, 1, 2, 2):
        result = oocpatch.label(tmp_path / "volume.zarr", tmp_path / "parts", part=(i, 3), **QUIET)
    assert result.attrs["objects"] == oracle(blobs, rule())[1]
    digests.append(file_digests(tmp_path / "parts" / "labels"))
    assert digests[0] == digests[1] == digests[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "parts", "two", "volume.zarr"]


def test_the_same_call_opens_a_complete_output_and_another_one_is_refused(blobs: Array, tmp_path: Path) -> None:
    oocpatch.label(blobs, tmp_path / "labels.zarr", **QUIET)
    before = file_digests(tmp_path / "labels.zarr")
    assert oocpatch.label(blobs, tmp_path / "labels.zarr", **QUIET).attrs["objects"] > 1
    assert file_digests(tmp_path / "labels.zarr") == before
    with pytest.raises(oocpatch.RunMismatch, match="connectivity: 1 before, 2 now"):
        oocpatch.label(blobs, tmp_path / "labels.zarr", connectivity=2, **QUIET)
    with pytest.raises(oocpatch.OutputExists, match="resume is off"):
        oocpatch.label(blobs, tmp_path / "labels.zarr", resume=False, **QUIET)
    again = oocpatch.label(blobs, tmp_path / "labels.zarr", connectivity=2, overwrite=True, **QUIET)
    np.testing.assert_array_equal(again.values, oracle(blobs, rule(2))[0])


def test_a_changed_volume_is_refused_and_labelled_anew_with_update(blobs: Array, tmp_path: Path) -> None:
    volume = zarr.create_array(tmp_path / "volume.zarr", data=blobs, chunks=(8, 8, 8))
    oocpatch.label(tmp_path / "volume.zarr", tmp_path / "labels.zarr", **QUIET)
    volume[0:3, 0:3, 0:3] = True
    with pytest.raises(oocpatch.RunMismatch, match="volume: 1 of 27 chunks changed"):
        oocpatch.label(tmp_path / "volume.zarr", tmp_path / "labels.zarr", **QUIET)
    labels = oocpatch.label(tmp_path / "volume.zarr", tmp_path / "labels.zarr", update=True, **QUIET)
    expected, count = oracle(volume[:], rule())
    assert labels.attrs["objects"] == count
    np.testing.assert_array_equal(labels.values, expected)
    oocpatch.label(tmp_path / "volume.zarr", tmp_path / "fresh.zarr", **QUIET)
    assert file_digests(tmp_path / "labels.zarr" / "labels") == file_digests(tmp_path / "fresh.zarr" / "labels")


def test_damage_of_the_output_is_found_and_repaired(blobs: Array, tmp_path: Path) -> None:
    oocpatch.label(blobs, tmp_path / "labels.zarr", **QUIET)
    before = file_digests(tmp_path / "labels.zarr" / "labels")
    chunk = next(path for path in sorted((tmp_path / "labels.zarr" / "labels" / "c").rglob("*")) if path.is_file())
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not oocpatch.verify(tmp_path / "labels.zarr", repair=True).passed
    oocpatch.label(blobs, tmp_path / "labels.zarr", **QUIET)
    assert file_digests(tmp_path / "labels.zarr" / "labels") == before


def test_ids_that_do_not_fit_are_refused_with_their_number_and_the_default_dtype_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.zeros((40, 40), bool)
    values[::2, ::2] = True
    with pytest.raises(ValueError, match="must hold the number of objects, 400, got uint8"):
        oocpatch.label(values, tmp_path / "small.zarr", output_dtype="uint8", **QUIET)
    assert oocpatch.label(values, tmp_path / "int16.zarr", output_dtype="int16", **QUIET).dtype == np.int16
    monkeypatch.setattr(label_plan, "DTYPES", ("uint8", "uint64"))
    labels = oocpatch.label(values, tmp_path / "large.zarr", **QUIET)
    assert (labels.dtype, labels.attrs["objects"]) == (np.uint64, 400)
    assert oocpatch.label(values, tmp_path / "large.zarr", **QUIET).dtype == np.uint64  # the same call
    np.testing.assert_array_equal(labels.values, oracle(values, rule())[0])


def test_an_ome_zarr_becomes_labels_with_a_pyramid_of_labels(tmp_path: Path) -> None:
    values = shapes_of_objects("blobs", (64, 64), 2, 0.3).astype(np.float32)
    oocpatch.predict(
        xr.DataArray(values, dims=("y", "x"), coords={"y": np.arange(64) * 0.5, "x": np.arange(64) * 0.5}),
        "identity",
        tmp_path / "image.zarr",
        patch_size=32,
        overlap_mode="crop",
        output_format="ome-zarr",
        output_chunks=16,
        progress=False,
    )
    labels = oocpatch.label(tmp_path / "image.zarr", tmp_path / "labels.zarr", threshold=0.5, **QUIET)
    expected, count = oracle(values, rule(threshold=0.5))
    np.testing.assert_array_equal(labels.values, expected)
    assert labels.y.values.tolist() == (np.arange(64) * 0.5).tolist()
    coarse = oocpatch.Volume(tmp_path / "labels.zarr", level=1)
    assert set(np.unique(coarse.read(oocpatch.volumes.volume.Box((0, 0), coarse.shape)))) <= set(range(count + 1))
    assert oocpatch.verify(tmp_path / "labels.zarr").passed


def refusals() -> Iterator[Any]:
    labels, scores = np.ones((8, 8), np.int32), np.ones((8, 8), np.float32)
    yield pytest.param(scores, {}, ValueError, "threshold must be given where the volume holds floats", id="floats")
    yield pytest.param(scores, {"per_class": True}, ValueError, "must be integers where the volume", id="float classes")
    yield pytest.param(labels, {"threshold": 1, "per_class": True}, ValueError, "threshold must be None", id="both")
    yield pytest.param(labels - 2, {}, ValueError, "labels must be 0 or more, got -1", id="negative")
    yield pytest.param(scores, {"threshold": np.nan}, ValueError, "threshold must be a number, got NaN", id="nan")
    yield pytest.param(scores, {"threshold": "high"}, TypeError, "threshold must be a number", id="text")
    yield pytest.param(labels, {"connectivity": 0}, ValueError, "connectivity must be at least 1", id="none")
    yield pytest.param(labels, {"connectivity": 3}, ValueError, "number of spatial axes", id="three of two")
    yield pytest.param(labels, {"min_size": -1}, ValueError, "min_size must be at least 1, got -1", id="min_size")
    yield pytest.param(labels, {"per_class": "no"}, TypeError, "per_class must be True or False", id="per_class")
    yield pytest.param(
        labels, {"output_dtype": "float32"}, ValueError, "output_dtype must be a dtype of integers", id="f4"
    )
    yield pytest.param(labels, {"max_memory": 1000}, oocpatch.PlanTooLarge, "but max_memory is 1000 B", id="memory")


@pytest.mark.parametrize(("volume", "options", "error", "message"), list(refusals()))
def test_bad_input_is_refused_before_anything_is_written(
    volume: Array, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        oocpatch.label(volume, tmp_path / "labels.zarr", progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_labels_below_zero_on_disk_stop_the_run(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "volume.zarr", data=np.full((8, 8), -3, np.int8), chunks=(4, 4))
    with pytest.raises(ValueError, match=r"labels must be 0 or more, got -3; pass threshold="):
        oocpatch.label(tmp_path / "volume.zarr", tmp_path / "labels.zarr", progress=False)
    labels = oocpatch.label(tmp_path / "volume.zarr", tmp_path / "other.zarr", threshold=0, progress=False)
    assert labels.attrs["objects"] == 0


def test_the_command_labels_and_says_how_many(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "volume.zarr", data=np.eye(8, dtype=np.float32), chunks=(4, 4))
    command = ["label", str(tmp_path / "volume.zarr"), str(tmp_path / "labels.zarr"), "--threshold", "0.5", "--json"]
    run = CliRunner().invoke(main, [*command, "--connectivity", "2", "--block-shape", "4"])
    assert (run.exit_code, json.loads(run.stdout)["objects"]) == (0, 1)
    run = CliRunner().invoke(main, command)
    assert run.exit_code == 3
    assert "connectivity: 2 before, 1 now" in run.stderr
