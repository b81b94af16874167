"""OME-Zarr as a source: axes, levels, scales, translations and units, as 0.4 and 0.5 write them."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

import oocpatch
from oocpatch.planning.box import Box

AXES = [
    {"name": "t", "type": "time", "unit": "second"},
    {"name": "stain", "type": "channel"},
    {"name": "y", "type": "space", "unit": "micrometer"},
    {"name": "x", "type": "space", "unit": "um"},
]
FULL = np.arange(2 * 3 * 8 * 6, dtype="uint16").reshape(2, 3, 8, 6)
LEVELS = [FULL, FULL[..., ::2, ::2], FULL[..., ::4, ::4]]


def multiscales(paths=("0", "1", "2"), **more):
    datasets = [
        {
            "path": path,
            "coordinateTransformations": [
                {"type": "scale", "scale": [10.0, 1.0, 0.5 * 2**k, 0.25 * 2**k]},
                {"type": "translation", "translation": [0.0, 0.0, 7.0 + 0.25 * (2**k - 1), 0.0]},
            ],
        }
        for k, path in enumerate(paths)
    ]
    return [{"axes": AXES, "datasets": datasets, "name": "cells", **more}]


def write_image(path: Path, version: str, **more) -> Path:
    old = version == "0.4"
    found = multiscales(**more)
    if old:
        attributes = {"multiscales": [{**found[0], "version": "0.4"}]}
    else:
        attributes = {"ome": {"version": "0.5", "multiscales": found}}
    group = zarr.create_group(path, zarr_format=2 if old else 3, attributes=attributes)
    for name, values in zip(("0", "1", "2"), LEVELS, strict=True):
        group.create_array(name, data=values, chunks=(1, 1, 4, 4))
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("level", [0, 1, 2, -1, "1"], ids=["first", "second", "third", "last", "path"])
def test_a_level_of_a_pyramid_is_read_with_its_axes_coordinates_and_units(version, level, tmp_path):
    volume = oocpatch.Volume(write_image(tmp_path / "image.zarr", version), level=level)
    number = int(level) % 3
    assert volume.names == ("t", "y", "x")  # channels by the axis' type, whatever its name
    assert volume.channel_axis == "stain"
    assert_array_equal(volume.read(Box.of_shape(volume.shape)), np.moveaxis(LEVELS[number], 1, 0))
    coords = volume.source.coords
    assert_array_equal(coords["t"], [0.0, 10.0])
    n = volume.shape[1]
    assert_array_equal(coords["y"], 7 + 0.25 * (2**number - 1) + np.arange(n) * 0.5 * 2**number)
    assert [coords[name].attrs["units"] for name in "tyx"] == ["second", "micrometer", "micrometer"]
    assert "stain" not in coords


def test_transformations_of_the_image_apply_after_those_of_the_level(tmp_path):
    common = [{"type": "scale", "scale": [1.0, 1.0, 2.0, 10.0]}, {"type": "translation", "translation": [0, 0, 1, 0]}]
    path = write_image(tmp_path / "image.zarr", "0.5", coordinateTransformations=common)
    coords = oocpatch.Volume(path, level=1).source.coords
    assert coords["y"].values[:2].tolist() == [1 + 2 * 7.25, 1 + 2 * 8.25]
    assert coords["x"].values[:2].tolist() == [0.0, 5.0]


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (3, r"level must be one of those of .*image.zarr, 0 \(0: 2 x 3 x 8 x 6\), 1 \(1: 2 x 3 x 4 x 3\), .*; got 3"),
        ("scale7", r"level must be one of .*got 'scale7'"),
        (True, r"level must be an int"),
    ],
)
def test_a_level_that_is_not_there_is_refused_with_those_that_are(level, message, tmp_path):
    path = write_image(tmp_path / "image.zarr", "0.4")
    with pytest.raises((ValueError, TypeError), match=message):
        oocpatch.Volume(path, level=level)


def test_a_level_of_a_plain_array_is_refused(tmp_path):
    zarr.create_array(tmp_path / "a.zarr", data=FULL[0, 0])
    for volume in (tmp_path / "a.zarr", FULL[0, 0]):
        with pytest.raises(ValueError, match="level must be 0 unless the volume is an OME-Zarr or a file with levels"):
            oocpatch.Volume(volume, level=1)


def test_predict_reads_the_level_and_another_level_is_another_run(tmp_path):
    path = write_image(tmp_path / "image.zarr", "0.5")
    settings = {"patch_size": 3, "overlap_mode": "crop", "output_format": "zarr"}
    result = oocpatch.predict(path, "identity", tmp_path / "out.zarr", level=1, **settings)
    assert_array_equal(result, LEVELS[1])
    assert result.dims == ("t", "stain", "y", "x")
    assert result["x"].attrs == {"units": "micrometer"}
    with pytest.raises(oocpatch.RunMismatch, match="volume"):
        oocpatch.predict(path, "identity", tmp_path / "out.zarr", level=0, **settings)


def test_groups_of_several_images_name_those_inside(tmp_path):
    plate = {"plate": {"wells": [{"path": "A/1"}, {"path": "B/2"}], "columns": [], "rows": []}, "version": "0.5"}
    group = zarr.create_group(tmp_path / "plate.zarr", attributes={"ome": plate})
    for well in ("A/1", "B/2"):
        found = {"version": "0.5", "well": {"images": [{"path": "0"}, {"path": "1"}]}}
        group.create_group(well, attributes={"ome": found})
    with pytest.raises(ValueError, match=r"holds 4; pass the path of one of them, such as .*A/1/0: A/1/0, A/1/1, B/2"):
        oocpatch.Volume(tmp_path / "plate.zarr")

    series = zarr.create_group(tmp_path / "series.zarr", zarr_format=2, attributes={"bioformats2raw.layout": 3})
    for name in ("0", "1"):
        series.create_group(name)
    with pytest.raises(ValueError, match=r"holds 2; pass the path of one of them, such as .*series.zarr/0: 0, 1"):
        oocpatch.Volume(tmp_path / "series.zarr")
    series.create_group("OME", attributes={"series": ["1", "0"]})
    with pytest.raises(ValueError, match=r"such as .*series.zarr/1: 1, 0"):
        oocpatch.Volume(tmp_path / "series.zarr")

    zarr.create_group(tmp_path / "labels", attributes={"ome": {"version": "0.5", "labels": ["nuclei"]}})
    with pytest.raises(ValueError, match=r"holds 1; .* such as .*labels/nuclei"):
        oocpatch.Volume(tmp_path / "labels")


@pytest.mark.parametrize(
    "change",
    [
        {"axes": AXES[:3]},
        {"datasets": []},
        {"datasets": [{"path": "absent"}]},
        {"datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1.0]}]}]},
    ],
    ids=["fewer axes", "no levels", "no array", "short scale"],
)
def test_metadata_that_cannot_be_understood_are_one_message(change, tmp_path):
    path = write_image(tmp_path / "image.zarr", "0.5", **change)
    with pytest.raises(ValueError, match=r"OME-Zarr metadata of .*image.zarr"):
        oocpatch.Volume(path)
