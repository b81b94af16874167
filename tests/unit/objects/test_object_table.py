"""`objects`: tables in every format, the same bytes however they are made, and one clear error before any block."""

from __future__ import annotations

import importlib
import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli.main import main
from oocpatch.objects import block_measurement, table_files
from oocpatch.run import table_tasks
from tests.support.children import unchanged
from tests.support.measured_objects import expected_columns, filled

SHAPE, CHUNKS = (20, 24, 28), (8, 8, 8)


def small_labels(shape=SHAPE, dtype=np.uint32):
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 12, tuple(-(-n // 3) for n in shape))
    fine = coarse
    for axis in range(len(shape)):
        fine = fine.repeat(3, axis)
    return fine[tuple(slice(n) for n in shape)].astype(dtype)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Labels and an intensity of two channels, on disk."""
    folder = tmp_path_factory.mktemp("volumes")
    labels = small_labels()
    intensity = np.random.default_rng(8).integers(0, 60000, (2, *SHAPE)).astype(np.uint16)
    zarr.create_array(folder / "labels.zarr", data=labels, chunks=CHUNKS, dimension_names=list("zyx"))
    zarr.create_array(folder / "image.zarr", data=intensity, chunks=(1, 5, 24, 28), dimension_names=list("czyx"))
    return folder, labels, intensity


def make(volumes, output, **options):
    return oocpatch.objects(
        volumes[0] / "labels.zarr", output, intensity=volumes[0] / "image.zarr", progress=False, **options
    )


def check(frame, labels, intensity):
    for name, values in expected_columns(labels, intensity).items():
        np.testing.assert_allclose(frame[name], values, rtol=1e-12, err_msg=name)


def test_a_frame_has_a_row_per_object(volumes):
    frame = make(volumes, None)
    assert list(frame)[:4] == ["label", "area", "bbox_z_start", "bbox_z_stop"]
    assert list(frame)[-8:] == [f"{name}_{c}" for c in (0, 1) for name in ("mean", "min", "max", "std")]
    assert frame["label"].is_monotonic_increasing
    assert (str(frame["label"].dtype), str(frame["area"].dtype)) == ("int64", "int64")
    check(frame, *volumes[1:])


def test_csv_and_parquet_hold_the_frame(volumes, tmp_path):
    frame = make(volumes, None)
    assert make(volumes, tmp_path / "cells.csv") == tmp_path / "cells.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "cells.csv"), frame, check_dtype=False)
    make(volumes, tmp_path / "cells.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "cells.parquet"), frame)


def test_anndata_has_positions_as_x_y_z(volumes, tmp_path):
    make(volumes, tmp_path / "cells.h5ad", properties=("area",))
    frame = make(volumes, None)
    with h5py.File(tmp_path / "cells.h5ad") as file:
        assert dict(file.attrs) == {"encoding-type": "anndata", "encoding-version": "0.1.0"}
        np.testing.assert_array_equal(file["obsm/spatial"], frame[["centroid_x", "centroid_y", "centroid_z"]])
        np.testing.assert_array_equal(file["X"], frame[["mean_0", "mean_1"]])
        np.testing.assert_array_equal(file["obs/area"], frame["area"])
        assert file["obs/_index"].asstr()[:].tolist() == frame["label"].astype(str).tolist()
        assert list(file["obs"].attrs["column-order"])[:2] == ["label", "area"]
        assert file["var/_index"].asstr()[:].tolist() == ["0", "1"]


def test_geojson_has_a_feature_per_object(tmp_path):
    labels = small_labels((40, 30))
    zarr.create_array(tmp_path / "labels.zarr", data=labels, chunks=(16, 16))
    oocpatch.objects(tmp_path / "labels.zarr", tmp_path / "cells.geojson", progress=False)
    collection = json.loads((tmp_path / "cells.geojson").read_text())
    assert collection["type"] == "FeatureCollection"
    expected = expected_columns(labels)
    assert [f["properties"]["label"] for f in collection["features"]] == expected["label"].tolist()
    for feature, area in zip(collection["features"], expected["area"].tolist(), strict=True):
        assert feature["properties"]["objectType"] == "detection"
        assert feature["properties"]["measurements"]["area"] == area
        geometry = feature["geometry"]
        polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        assert all(ring[0] == ring[-1] for polygon in polygons for ring in polygon)
        opened = [[[tuple(point) for point in ring[:-1]] for ring in polygon] for polygon in polygons]
        np.testing.assert_array_equal(filled(opened, labels.shape), labels == feature["properties"]["label"])


def test_geojson_names_classes_as_qupath_does(tmp_path):
    labels = np.zeros((12, 12), np.uint8)
    labels[1:4, 1:4], labels[6:9, 1:4], labels[1:4, 6:9] = 1, 2, 3
    classes = {1: "Tumor", 2: ("Stroma", "#96c896"), 7: ("Immune cells", (160, 90, 160))}

    def classifications(name, **options):
        oocpatch.objects(labels, tmp_path / name, progress=False, **options)
        features = json.loads((tmp_path / name).read_text())["features"]
        return [feature["properties"].get("classification") for feature in features]

    stroma = {"name": "Stroma", "color": [150, 200, 150]}
    assert classifications("own.geojson", classes=classes) == [{"name": "Tumor"}, stroma, None]
    of_cells = np.array([0, 2, 7, 1], np.uint8)[labels]
    of_cells[1, 6] = 2  # an object of two classes has none
    named = classifications("cells.geojson", classes=classes, intensity=of_cells, properties=("area",))
    assert named == [stroma, {"name": "Immune cells", "color": [160, 90, 160]}, None]
    with pytest.raises(oocpatch.RunMismatch, match="classes"):
        classifications("own.geojson", classes={1: "Tumor"})
    zarr.create_array(tmp_path / "labels.zarr", data=labels, attributes={"classes": ["background", "Tumor", "Stroma"]})
    oocpatch.objects(tmp_path / "labels.zarr", tmp_path / "given.geojson", progress=False)
    features = json.loads((tmp_path / "given.geojson").read_text())["features"]
    assert [f["properties"].get("classification", {}).get("name") for f in features] == ["Tumor", "Stroma", None]
    words = ["objects", str(tmp_path / "labels.zarr"), str(tmp_path / "typed.geojson"), "--progress", "none"]
    typed = CliRunner().invoke(main, [*words, "--classes", "1=Tumor,2=Stroma:#96c896"])
    assert typed.exit_code == 0, typed.output
    features = json.loads((tmp_path / "typed.geojson").read_text())["features"]
    assert features[1]["properties"]["classification"] == stroma


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".h5ad", ".geojson"])
def test_the_bytes_do_not_depend_on_blocks_workers_or_parts(ending, volumes, tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH", 4)
    if ending == ".geojson":
        volumes = (tmp_path, small_labels((40, 30)), None)
        zarr.create_array(tmp_path / "labels.zarr", data=volumes[1], chunks=(8, 8))
        zarr.create_array(tmp_path / "image.zarr", data=volumes[1], chunks=(8, 8))
    first = make(volumes, tmp_path / f"first{ending}", properties=("area", "centroid", "principal_axes")).read_bytes()
    options = [{"block_shape": 8, "workers": 2}, {"block_shape": 16, "workers": 1, "max_memory": "8MiB"}]
    for number, option in enumerate(options):
        path = tmp_path / f"{number}{ending}"
        assert make(volumes, path, properties=("area", "centroid", "principal_axes"), **option).read_bytes() == first
    path = tmp_path / f"parts{ending}"
    parts = [
        make(volumes, path, properties=("area", "centroid", "principal_axes"), block_shape=8, part=(i, 3))
        for i in (3, 1, 2)
    ]
    assert parts == [None, None, path]
    assert path.read_bytes() == first


def test_many_merge_steps_give_the_same_table(volumes, tmp_path, monkeypatch):
    expected = make(volumes, tmp_path / "a.csv").read_bytes()
    merge = importlib.import_module("oocpatch.objects.table_merge")
    ranges = []

    def few_bytes(runs, sizes, _limit, check):
        for tables in merge_ranges(runs, sizes, 2000, check):
            ranges.append(sum(map(len, tables["rows"])))
            yield tables

    merge_ranges = merge.read_ranges
    monkeypatch.setattr(merge, "read_ranges", few_bytes)
    assert make(volumes, tmp_path / "b.csv", block_shape=8).read_bytes() == expected
    assert len([n for n in ranges if n]) > 5


def test_rows_that_do_not_fit_are_spilled(volumes, tmp_path, monkeypatch):
    expected = make(volumes, tmp_path / "a.csv").read_bytes()
    runs = []
    write = block_measurement.PartWriter.write
    monkeypatch.setattr(block_measurement.PartWriter, "write", lambda *a: (runs.append(1), write(*a)))
    plan = importlib.import_module("oocpatch.configuration.table_plan")
    monkeypatch.setattr(plan, "SMALLEST_SCRATCH", 4096)
    monkeypatch.setattr(plan, "LARGEST_SCRATCH", 4096)
    assert make(volumes, tmp_path / "b.csv", block_shape=64, workers=1).read_bytes() == expected
    assert len(runs) > 1


def test_a_stopped_call_is_continued(volumes, tmp_path, monkeypatch):
    expected = make(volumes, tmp_path / "whole.csv").read_bytes()
    measured, output = [], tmp_path / "cells.csv"
    real = table_tasks.measure_block

    def stop_at_the_fifth(context, block):
        measured.append(block)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return real(context, block)

    monkeypatch.setattr(table_tasks, "measure_block", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        make(volumes, output, block_shape=8, workers=1)
    assert not output.exists()
    with pytest.raises(oocpatch.RunMismatch) as refusal:
        make(volumes, output, properties=("area",))
    assert refusal.value.fields == ("properties",)
    with pytest.raises(oocpatch.OutputExists, match="resume is off"):
        make(volumes, output, resume=False)
    make(volumes, output, workers=1)  # the stored blocks
    assert sorted(measured) == sorted([*range(36), 4])
    assert output.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        name for table in ("cells.csv", "whole.csv") for name in (table, f"{table}.oocpatch.record")
    ]
    make(volumes, output, workers=1)
    assert len(measured) == 37


def test_damage_in_the_workspace_is_measured_again(volumes, tmp_path, monkeypatch):
    expected = make(volumes, tmp_path / "whole.csv").read_bytes()
    output, real = tmp_path / "cells.csv", table_tasks.measure_block
    for number, damage in enumerate((lambda p: p.write_bytes(p.read_bytes()[:-1]), Path.unlink)):
        for name in ("rows", "manifest.json"):
            struck = []

            def spoil(context, block, damage=damage, name=name, struck=struck):
                result = real(context, block)
                if block == 3 and not struck:
                    struck.append(block)
                    damage(next((Path(context.workspace.root) / "blocks" / "3").glob(f"*/{name}")))
                return result

            monkeypatch.setattr(table_tasks, "measure_block", spoil)
            make(volumes, output, block_shape=8, overwrite=True, workers=1 + number)
            assert struck
            assert output.read_bytes() == expected


def test_a_foreign_or_edited_file_is_never_replaced(volumes, tmp_path):
    output = tmp_path / "cells.csv"
    output.write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(oocpatch.OutputExists, match="holds other data"):
            make(volumes, output, **options)
    assert output.read_text() == "mine"
    output.unlink()
    made = make(volumes, output).read_bytes()
    os.utime(output)
    make(volumes, output)  # its bytes are the same
    output.write_bytes(made + b"1,2\n")
    with pytest.raises(oocpatch.OutputExists, match="was changed"):
        make(volumes, output, overwrite=True)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(oocpatch.OutputExists):
        make(volumes, tmp_path / "folder.csv")


def test_other_arguments_are_refused_by_name_unless_overwritten(volumes, tmp_path):
    output = tmp_path / "cells.csv"
    make(volumes, output)
    with pytest.raises(oocpatch.RunMismatch) as refusal:
        make(volumes, output, spacing=2, properties=("area",))
    assert refusal.value.fields == ("spacing", "properties")
    make(volumes, output, properties=("area",), overwrite=True)
    assert list(pd.read_csv(output))[:3] == ["label", "area", "mean_0"]


def test_changed_labels_are_noticed_and_measured_again(tmp_path):
    labels = small_labels()
    array = zarr.create_array(tmp_path / "labels.zarr", data=labels, chunks=CHUNKS)
    output = tmp_path / "cells.csv"
    oocpatch.objects(tmp_path / "labels.zarr", output, progress=False)
    array[0, 0, :4] = 99
    labels[0, 0, :4] = 99
    with pytest.raises(oocpatch.RunMismatch, match="labels: 1 of 36 chunks changed") as refusal:
        oocpatch.objects(tmp_path / "labels.zarr", output, progress=False)
    assert refusal.value.fields == ("labels",)
    oocpatch.objects(tmp_path / "labels.zarr", output, progress=False, check_input=False)
    oocpatch.objects(tmp_path / "labels.zarr", output, progress=False, update=True)
    np.testing.assert_array_equal(pd.read_csv(output)["area"], expected_columns(labels)["area"])


def test_an_unfinished_call_does_not_mix_old_and_new_labels(tmp_path, monkeypatch):
    labels = small_labels()
    array = zarr.create_array(tmp_path / "labels.zarr", data=labels, chunks=CHUNKS)
    output, real, measured = tmp_path / "cells.csv", table_tasks.measure_block, []

    def stop_at_the_tenth(context, block):
        measured.append(block)
        if len(measured) == 10:
            raise KeyboardInterrupt
        return real(context, block)

    monkeypatch.setattr(table_tasks, "measure_block", stop_at_the_tenth)
    call = {"labels": tmp_path / "labels.zarr", "output": output, "progress": False, "workers": 1, "block_shape": 8}
    with pytest.raises(KeyboardInterrupt):
        oocpatch.objects(**call)
    array[0, 0, :4] = 99
    labels[0, 0, :4] = 99
    with pytest.raises(oocpatch.RunMismatch):
        oocpatch.objects(**call)
    oocpatch.objects(**call, update=True)
    assert measured.count(0) == 2
    assert len(measured) == 36 + 2 - 9 + 9  # all, the one that was stopped, and the one that changed
    np.testing.assert_array_equal(pd.read_csv(output)["area"], expected_columns(labels)["area"])


def test_coordinates_and_units_come_from_the_labels(tmp_path):
    labels = small_labels((12, 10), np.uint8)
    coords = {
        "y": ("y", 100 + 0.5 * np.arange(12), {"units": "um"}),
        "x": ("x", 9 - 0.25 * np.arange(10), {"units": "um"}),
    }
    frame = oocpatch.objects(xarray.DataArray(labels, coords, ("y", "x")), properties=("area", "centroid", "bbox"))
    plain = expected_columns(labels)
    np.testing.assert_allclose(frame["area"], plain["area"] * 0.125)
    np.testing.assert_allclose(frame["centroid_y"], 100 + 0.5 * plain["centroid_y"])
    np.testing.assert_allclose(frame["centroid_x"], 9 - 0.25 * plain["centroid_x"])
    np.testing.assert_array_equal(frame["bbox_y_stop"], plain["bbox_y_stop"])
    assert frame.attrs["units"] == {
        "area": "micrometer^2",
        "centroid_y": "micrometer",
        "centroid_x": "micrometer",
    }
    spaced = oocpatch.objects(labels, spacing={"y": 2, "x": 3}, properties=("area", "centroid", "equivalent_diameter"))
    np.testing.assert_allclose(spaced["area"], plain["area"] * 6)
    np.testing.assert_allclose(spaced["centroid_x"], plain["centroid_x"] * 3)
    np.testing.assert_allclose(spaced["equivalent_diameter"], np.sqrt(4 * plain["area"] * 6 / np.pi))


def test_indices_of_time_and_channel_have_objects_of_their_own(tmp_path):
    labels = np.stack([small_labels((9, 11)), np.zeros((9, 11), np.uint32), small_labels((9, 11))[::-1]])
    frame = oocpatch.objects(xarray.DataArray(labels, dims=("time", "y", "x")), intensity=labels * 2, block_shape=4)
    assert list(frame)[:2] == ["label", "time"]
    places = list(zip(frame["label"], frame["time"], strict=True))
    assert places == sorted(places)
    for index in range(3):
        part = frame[frame["time"] == index]
        for name, values in expected_columns(labels[index], labels[index][None] * 2).items():
            np.testing.assert_allclose(part[name], values, err_msg=name)
    both = oocpatch.objects(labels[:, None].repeat(2, 1), axes="tcyx")
    assert list(both)[:3] == ["label", "t", "c"]
    assert len(both) == 2 * len(frame)
    single = oocpatch.objects(labels[:1, None], axes="tcyx")
    assert list(single)[:2] == ["label", "area"]
    oocpatch.objects(xarray.DataArray(labels, dims=("t", "y", "x")), tmp_path / "cells.geojson", progress=False)
    features = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    assert [(f["properties"]["label"], f["properties"]["t"]) for f in features] == places
    assert all(f["geometry"]["plane"]["t"] == f["properties"]["t"] for f in features)


def test_an_intensity_meets_the_labels_by_the_names_of_axes():
    labels = small_labels()
    image = np.random.default_rng(9).random((2, *SHAPE)).astype(np.float32)
    turned = xarray.DataArray(
        image.transpose(3, 0, 2, 1), dims=("x", "channel", "y", "z"), coords={"channel": ["DAPI", "GFP"]}
    )
    named = xarray.DataArray(labels, dims=("z", "y", "x"))
    frame = oocpatch.objects(named, intensity=turned, block_shape=8)
    expected = expected_columns(labels, image)
    for channel, number in (("DAPI", 0), ("GFP", 1)):
        for name in ("mean", "min", "max", "std"):
            np.testing.assert_allclose(frame[f"{name}_{channel}"], expected[f"{name}_{number}"], rtol=1e-6)
    one = oocpatch.objects(named, intensity=turned[:, :1], properties=("area", "max"))
    assert list(one) == ["label", "area", "max"]


def test_labels_of_a_view_of_any_dtype_are_measured():
    labels = small_labels((20, 30))
    for dtype in (bool, np.uint8, np.int64, np.uint64):
        typed = labels.astype(dtype)
        frame = oocpatch.objects(typed)
        np.testing.assert_array_equal(frame["area"], expected_columns(typed)["area"])
    assert str(oocpatch.objects(labels.astype(np.uint64))["label"].dtype) == "uint64"
    assert oocpatch.objects(np.zeros((3, 3), np.uint8)).shape == (0, 8)


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".h5ad", ".geojson"])
def test_no_objects_make_an_empty_table(ending, tmp_path):
    path = oocpatch.objects(np.zeros((9, 9), np.uint8), tmp_path / f"none{ending}", progress=False)
    if ending == ".csv":
        assert path.read_text().count("\n") == 1
    elif ending == ".parquet":
        assert list(pd.read_parquet(path))[:2] == ["label", "area"]
    elif ending == ".geojson":
        assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": []}


def test_a_frame_that_does_not_fit_is_refused(monkeypatch):
    labels = np.arange(1, 40001, dtype=np.uint32).reshape(200, 200)
    monkeypatch.setattr(table_files, "BATCH", 1000)
    with pytest.raises(oocpatch.PlanTooLarge, match="write it to a file"):
        oocpatch.objects(labels, max_memory="4500KiB", workers=1)
    assert len(oocpatch.objects(labels)) == 40000


def test_negative_labels_are_named_with_their_place(tmp_path):
    labels = np.zeros((8, 9), np.int16)
    labels[3, 4] = -5
    with pytest.raises(oocpatch.InvalidVolume, match="got -5 at y=3, x=4"):
        oocpatch.objects(labels, tmp_path / "cells.csv", progress=False)
    assert not (tmp_path / "cells.csv").exists()


LABELS = np.ones((8, 9), np.uint8)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS.astype(np.float32), {}, "labels must be integers, .* got float32"),
        (np.full((3, 3), np.nan), {}, "labels must be integers"),
        (LABELS.astype(complex), {}, "labels: the volume must hold"),
        ("missing.zarr", {}, "labels: volume not found"),
        (LABELS, {"output": "cells.xlsx"}, "output must end in .parquet, .csv, .geojson, .h5ad"),
        (LABELS, {"output": "s3://bucket/cells.csv"}, "output must be a path on a local"),
        (np.ones((4, 5, 6), np.uint8), {"output": "cells.geojson"}, "polygons in the plane"),
        (LABELS, {"intensity": np.ones((8, 8))}, "intensity must have as many voxels"),
        (LABELS, {"intensity": np.ones((4, 9))}, "intensity must have as many voxels"),
        (
            xarray.DataArray(LABELS, dims=("y", "x")),
            {"intensity": xarray.DataArray(LABELS, dims=("y", "z"))},
            "intensity must have the spatial axes",
        ),
        (LABELS, {"properties": ("area", "volume")}, "properties must be among .* got 'volume'"),
        (LABELS, {"properties": "area"}, "properties must be names"),
        (LABELS, {"properties": ("mean",)}, "without an intensity"),
        (np.ones((4, 5, 6), np.uint8), {"properties": ("orientation",)}, "one angle is not enough"),
        (LABELS, {"spacing": (1, 2, 3)}, "spacing must have one value per spatial axis"),
        (LABELS, {"spacing": 0}, "spacing must be positive"),
        (LABELS, {"spacing": {"y": 1}}, "spacing must name each spatial axis"),
        (LABELS, {"classes": {1: "Tumor"}}, "classes must be None but for .geojson"),
        (LABELS, {"classes": ["Tumor"], "output": "cells.geojson"}, "classes must be a dict of names by whole numbers"),
        (LABELS, {"classes": {1: ("a", "#zz")}, "output": "cells.geojson"}, "a class must be a name, or a pair"),
        (LABELS, {"max_memory": 1000}, "max_memory"),
        (LABELS, {"part": (1, 2)}, "output must be a file for a part"),
        (LABELS, {"processes": True}, "processes=True needs their number"),
        (xarray.DataArray(LABELS, {"x": np.arange(9.0) ** 2}, ("y", "x")), {}, "at even distances along x"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(labels, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with unchanged(tmp_path), pytest.raises((ValueError, TypeError), match=message):
        oocpatch.objects(labels, **options)


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as Python does for what must not be imported
    with pytest.raises(ValueError, match=r"needs pyarrow, which is not installed; pip install 'oocpatch\[objects\]'"):
        oocpatch.objects(LABELS, tmp_path / "cells.parquet")


def test_the_function_stays_one_when_its_folder_is_imported():
    assert importlib.import_module("oocpatch.objects.moments").__name__ == "oocpatch.objects.moments"
    assert callable(oocpatch.objects)
    assert oocpatch.objects.__module__ == "oocpatch.run.object_table"


def test_progress_counts_voxels():
    events = []
    oocpatch.objects(small_labels(), block_shape=8, progress=events.append)
    assert sum(event.patches for event in events) == np.prod(SHAPE)
    assert all(a is not b for a, b in pairwise(events))


def test_status_and_check_know_a_table_and_what_is_left_of_one(volumes, tmp_path, monkeypatch):
    output, real, measured = tmp_path / "cells.csv", table_tasks.measure_block, []

    def stop_at_the_fifth(context, block):
        measured.append(block)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return real(context, block)

    assert oocpatch.status(output).state == "absent"
    with pytest.raises(ValueError, match="output not found"):
        oocpatch.verify(output)
    monkeypatch.setattr(table_tasks, "measure_block", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        make(volumes, output, block_shape=8, workers=1)
    status = oocpatch.status(output)
    assert (status.state, status.verb, status.predict_done, status.predict_total) == ("incomplete", "objects", 4, 36)
    assert "measure    4 of 36 blocks\nvoxels     1,792 of 13,440" in str(status)
    begun = oocpatch.verify(output)
    assert (begun.passed, begun.complete, begun.units) == (True, False, 4)
    rows = next(tmp_path.glob("cells.csv.oocpatch/*/blocks/2/*/rows"))
    rows.write_bytes(rows.read_bytes()[:-1])
    assert [damage.block for damage in oocpatch.verify(output).damaged] == [2]
    make(volumes, output, workers=1)
    assert measured.count(2) == 2
    status = oocpatch.status(output)
    assert (status.state, status.predict_done) == ("complete", 36)
    done = oocpatch.verify(output)
    assert (done.passed, done.complete, done.bytes) == (True, True, output.stat().st_size)
    output.write_bytes(output.read_bytes().replace(b"1", b"2", 1))
    edited = oocpatch.verify(output)
    assert str(edited).splitlines()[1:] == ["damaged    cells.csv is not what was written", "FAIL: 1 damaged"]
    with pytest.raises(oocpatch.CorruptData, match="delete it, and the same call makes it anew"):
        oocpatch.verify(output, repair=True)
    output.unlink()
    assert oocpatch.status(output).state == "absent"
    make(volumes, output, properties=("area",), workers=1)  # another call, since the table is gone
