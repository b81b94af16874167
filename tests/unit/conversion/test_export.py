"""Exporting: what nibabel, tifffile and SimpleITK read is what the volume held, at the same place in the world."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
import torch
import xarray
import zarr
from click.testing import CliRunner
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

import oocpatch
from oocpatch.cli import main as cli
from oocpatch.conversion import file_order
from oocpatch.volumes.volume import Volume

DTYPES = ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
OTHERS = {".nii": {"bool": "u1", "f2": "f4"}, ".ome.tif": {"bool": "u1", "f2": "f4", "u8": "u4", "i8": "i4"}}
OBLIQUE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([0.7, 0.8, 1.5]), [-40, 12.5, 7]
)


def export(volume: Any, path: Path, **options: Any) -> Path:
    return oocpatch.export(volume, path, progress=False, **options)


def values(*shape: int, dtype: Any = np.uint16) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 1000).astype(dtype)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".ome.tif"])
@pytest.mark.parametrize("name", DTYPES)
def test_values_are_kept_in_their_dtype_or_one_that_holds_them(name: str, suffix: str, tmp_path: Path) -> None:
    array = values(3, 20, 17).astype(name) if name != "bool" else values(3, 20, 17) > 500
    file = export(array, tmp_path / f"out{suffix}")
    stored = np.dtype(OTHERS[".nii" if "nii" in suffix else suffix].get(name, name))
    if "nii" in suffix:
        read = np.asarray(nibabel.load(file).dataobj)
        np.testing.assert_array_equal(read.transpose(2, 1, 0), array)
    else:
        read = tifffile.imread(file)
        np.testing.assert_array_equal(read, array)
    assert read.dtype == stored
    again = Volume(file)
    order = "zyx" if suffix == ".ome.tif" else "xyz"
    np.testing.assert_array_equal(again.source.load((slice(None),) * 3), array.transpose(*map("zyx".index, order)))
    assert again.names == tuple(order)


@pytest.mark.parametrize(
    ("axes", "nifti", "tiff"),
    [
        ("yx", "xy", "YX"),
        ("xzy", "xyz", "ZYX"),
        ("cyx", "xy1c", "CYX"),
        ("zcyx", "xyzc", "CZYX"),
        ("zyxc", "xyzc", "CZYX"),
        ("tyx", "xy1t", "TYX"),
        ("ctzyx", "xyztc", "TCZYX"),
    ],
)
def test_axes_are_in_the_order_of_the_file(axes: str, nifti: str, tiff: str, tmp_path: Path) -> None:
    sizes = {"x": 9, "y": 8, "z": 5, "t": 4, "c": 2}
    array = xarray.DataArray(values(*(sizes[a] for a in axes)), dims=tuple(axes))
    expected = array.transpose(*[a for a in nifti if a != "1"])
    file = export(array, tmp_path / "out.nii.gz")
    image = nibabel.load(file)
    assert image.shape == tuple(sizes.get(a, 1) for a in nifti)
    np.testing.assert_array_equal(np.asarray(image.dataobj).reshape(expected.shape), expected)
    read = Volume(file)
    assert set(axes) <= {*read.names, *(read.channel_axis or "")}
    file = export(array, tmp_path / "out.tif")
    with tifffile.TiffFile(file) as tif:
        assert tif.is_ome
        assert tif.series[0].axes == tiff
        np.testing.assert_array_equal(tif.series[0].asarray(), array.transpose(*tiff.lower()))
    read = Volume(file)
    assert set(read.axes.names) == set(axes)


AFFINES = {
    **{
        code: inv_ornt_aff(axcodes2ornt(code), (14, 15, 16)) @ np.diag([0.5, 0.75, 2, 1])
        for code in ("RAS", "LPS", "PIR")
    },
    "oblique": OBLIQUE,
    "sheared": OBLIQUE @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
}


@pytest.fixture(params=AFFINES)
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    image = nibabel.Nifti1Image(values(14, 15, 16, dtype=np.float32), AFFINES[request.param])
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))


def test_a_result_has_the_affine_of_its_scan_also_when_it_is_cropped_flipped_or_scaled(
    scan: Path, tmp_path: Path
) -> None:
    image = nibabel.load(scan)
    places, data = world(image.affine, image.shape), np.asarray(image.dataobj)
    result = oocpatch.predict(
        scan, torch.nn.Identity(), tmp_path / "out.zarr", patch_size=8, overlap_mode="crop", progress=False
    )
    whole = nibabel.load(export(tmp_path / "out.zarr", tmp_path / "whole.nii"))
    np.testing.assert_array_equal(whole.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(whole.dataobj), data)
    assert whole.header.get_xyzt_units()[0] == "mm"
    for number, part in enumerate([
        (slice(2, 9), slice(3, None), slice(1, 5)),
        (slice(None, None, -1), slice(10, 2, -1), slice(None)),
        (slice(None, None, 2), slice(1, None, 3), slice(None)),
    ]):  # fmt: skip
        read = nibabel.load(export(result[part], tmp_path / f"{number}.nii"))
        np.testing.assert_array_equal(np.asarray(read.dataobj), data[part])
        np.testing.assert_allclose(world(read.affine, read.shape), places[part], atol=1e-4)
    oocpatch.predict(
        scan, torch.nn.AvgPool3d((2, 2, 1)), tmp_path / "half.zarr", patch_size=8, overlap_mode="crop", progress=False
    )
    half = nibabel.load(export(tmp_path / "half.zarr", tmp_path / "half.nii"))
    means = places[:, :14].reshape(7, 2, 7, 2, 16, 3).mean((1, 3))
    np.testing.assert_allclose(world(half.affine, half.shape)[:, :7], means, atol=1e-4)


def test_simpleitk_sees_the_scan_where_it_was(scan: Path, tmp_path: Path) -> None:
    file = export(scan, tmp_path / "out.nii.gz")
    try:
        before = SimpleITK.ReadImage(scan)
    except RuntimeError:
        return  # it refuses shears
    after = SimpleITK.ReadImage(file)
    np.testing.assert_array_equal(SimpleITK.GetArrayViewFromImage(after), SimpleITK.GetArrayViewFromImage(before))
    for index in ((0, 0, 0), (13, 14, 15), (5, 0, 9)):
        np.testing.assert_allclose(
            after.TransformIndexToPhysicalPoint(index), before.TransformIndexToPhysicalPoint(index), atol=1e-4
        )


def test_without_an_affine_it_comes_from_the_coordinates(tmp_path: Path) -> None:
    array = xarray.DataArray(
        values(4, 5, 6),
        {
            "z": ("z", 3 + 0.5 * np.arange(4), {"units": "micrometer"}),
            "y": ("y", 10 - 2.0 * np.arange(5), {"units": "um"}),
            "x": ("x", 250.0 * np.arange(6), {"units": "nanometer"}),
        },
        ("z", "y", "x"),
    )
    image = nibabel.load(export(array, tmp_path / "out.nii"))
    np.testing.assert_allclose(image.affine, [[0.25, 0, 0, 0], [0, -2, 0, 10], [0, 0, 0.5, 3], [0, 0, 0, 1]], rtol=1e-6)
    assert image.header.get_xyzt_units()[0] == "micron"
    np.testing.assert_allclose(image.header.get_zooms(), (0.25, 2, 0.5))
    plain = nibabel.load(export(array.values, tmp_path / "plain.nii"))
    np.testing.assert_array_equal(plain.affine, np.eye(4))
    again = Volume(tmp_path / "out.nii").source.coords
    np.testing.assert_allclose(again["y"].values, array.y)
    assert again["x"].attrs == {"units": "micrometer"}


def test_uneven_coordinates_are_refused_in_space_and_said_in_time(tmp_path: Path) -> None:
    uneven = xarray.DataArray(values(3, 4), {"y": [0.0, 1.0, 5.0]}, ("y", "x"))
    for suffix in (".nii", ".tif"):
        with pytest.raises(ValueError, match="'y' must be evenly spaced"):
            export(uneven, tmp_path / f"out{suffix}")
    times = np.array(["2020-01-01", "2020-01-02", "2020-01-04"], "M8[ns]")
    with pytest.warns(UserWarning, match="times are not written"):
        export(xarray.DataArray(values(3, 4, 5), {"t": times}, ("t", "y", "x")), tmp_path / "out.nii")
    even = xarray.DataArray(values(3, 4, 5), {"t": ("t", [0.0, 2, 4], {"units": "min"})}, ("t", "y", "x"))
    header = nibabel.load(export(even, tmp_path / "even.nii")).header
    assert header["pixdim"][4] == 120
    assert header.get_xyzt_units()[1] == "sec"
    assert not (tmp_path / "out.tif").exists()


def mean_level(above: np.ndarray) -> np.ndarray:
    padded = np.pad(above, [(0, 0)] * (above.ndim - 2) + [(0, n % 2) for n in above.shape[-2:]], mode="edge")
    height, width = padded.shape[-2:]
    mean = padded.reshape(*padded.shape[:-2], height // 2, 2, width // 2, 2).astype(float).mean((-3, -1))
    return np.rint(mean).astype(above.dtype) if above.dtype.kind in "iu" else mean.astype(above.dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_levels_of_an_image_are_means(dtype: Any, tmp_path: Path) -> None:
    array = values(2, 601, 530).astype(dtype)
    with tifffile.TiffFile(export(array, tmp_path / "out.ome.tif")) as tif:
        levels = [level.asarray() for level in tif.series[0].levels]
        page = tif.pages[0]
        assert page.is_tiled
        assert (page.tilewidth, page.tilelength) == (256, 256)
        assert len(page.subifds) == 2  # so that QuPath and Bio-Formats find them
        assert len(tif.pages) == 2
    assert [level.shape for level in levels] == [(2, 601, 530), (2, 301, 265), (2, 151, 133)]
    np.testing.assert_array_equal(levels[0], array)
    for above, level in itertools.pairwise(levels):
        np.testing.assert_array_equal(level, mean_level(above))
    read = Volume(tmp_path / "out.ome.tif", level=1)
    np.testing.assert_array_equal(read.source.load((slice(None),) * 3), levels[1])


def test_the_levels_of_labels_have_only_labels_that_were_there(tmp_path: Path) -> None:
    labels = np.repeat(np.repeat(values(30, 40, dtype=np.uint32) // 250 * 250, 11, 0), 13, 1)
    few = (labels // 250).astype(np.uint8)
    run = oocpatch.predict(
        xarray.DataArray(few, dims=("y", "x")),
        lambda patches: torch.cat([(patches == n).float() for n in range(4)], 1),
        tmp_path / "run.zarr", patch_size=128, postprocess="argmax", progress=False,
    )  # fmt: skip
    assert run.dtype == np.uint8
    for number, source in enumerate([labels, few > 1, tmp_path / "run.zarr", run]):
        with tifffile.TiffFile(export(source, tmp_path / f"{number}.tif")) as tif:
            levels = [level.asarray() for level in tif.series[0].levels]
        assert len(levels) == 3
        for above, level in itertools.pairwise(levels):
            parts = [above[y::2, x::2][: level.shape[0], : level.shape[1]] for y in (0, 1) for x in (0, 1)]
            parts = [np.pad(p, [(0, n - m) for n, m in zip(level.shape, p.shape, strict=True)], "edge") for p in parts]
            assert np.any([part == level for part in parts], axis=0).all()
    with tifffile.TiffFile(export(few, tmp_path / "image.tif")) as tif:  # nothing says that these are labels
        np.testing.assert_array_equal(tif.series[0].levels[1].asarray(), mean_level(few))
    with tifffile.TiffFile(export(few, tmp_path / "said.tif", labels=True)) as tif:
        np.testing.assert_array_equal(tif.series[0].levels[1].asarray()[:5, :6], few[:10:2, :12:2])
    assert nibabel.load(export(run, tmp_path / "run.nii")).header.get_intent()[0] == "label"


def test_a_picture_is_rgb_and_other_channels_have_their_names(tmp_path: Path) -> None:
    picture = values(300, 280, 3).astype(np.uint8)
    for axes, array in (("yxc", picture), ("cyx", picture.transpose(2, 0, 1))):
        with tifffile.TiffFile(export(array, tmp_path / f"{axes}.ome.tif", axes=axes)) as tif:
            assert tif.pages[0].photometric == tifffile.PHOTOMETRIC.RGB
            assert tif.series[0].axes == "YXS"
            np.testing.assert_array_equal(tif.series[0].asarray(), picture)
            np.testing.assert_array_equal(
                tif.series[0].levels[1].asarray(), np.moveaxis(mean_level(np.moveaxis(picture, 2, 0)), 0, 2)
            )
    stains = xarray.DataArray(
        picture, {"c": ["DAPI", "Ki67 µ", "<CD3>"], "x": ("x", 0.25 * np.arange(280), {"units": "um"})}, ("y", "x", "c")
    )
    with tifffile.TiffFile(export(stains, tmp_path / "stains.tif")) as tif:
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
        assert tif.series[0].axes == "CYX"
    assert [channel["Name"] for channel in pixels["Channel"]] == ["DAPI", "Ki67 µ", "<CD3>"]
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"]) == (0.25, "µm")
    assert "PhysicalSizeY" not in pixels


@pytest.mark.parametrize("raster_type", [1, 2])
def test_the_tags_of_a_geotiff_are_kept_and_follow_crops_and_scales(raster_type: int, tmp_path: Path) -> None:
    directory = (1, 1, 0, 4, 1024, 0, 1, 1, 1025, 0, 1, raster_type, 1026, 34737, 8, 0, 3072, 0, 1, 32633)
    tags = [
        (33550, "d", 3, (10.0, 20.0, 0.0), True),
        (33922, "d", 6, (2.0, 3.0, 0.0, 400_000.0, 5_000_000.0, 0.0), True),
        (34735, "H", len(directory), directory, True),
        (34737, "s", 0, "UTM 33N|", True),
    ]
    tifffile.imwrite(tmp_path / "in.tif", values(30, 40, dtype=np.float32), extratags=tags)
    scan = Volume(tmp_path / "in.tif")
    half = 0.5 if raster_type == 1 else 0
    assert scan.source.coords["x"].values[:2].tolist() == [400_000 + 10 * (half - 2), 400_010 + 10 * (half - 2)]
    assert scan.source.coords["y"].values[:2].tolist() == [5_000_000 - 20 * (half - 3), 4_999_980 - 20 * (half - 3)]
    result = oocpatch.predict(
        tmp_path / "in.tif", torch.nn.AvgPool2d(2), tmp_path / "out.zarr",
        patch_size=8, overlap_mode="average", progress=False,
    )  # fmt: skip

    def place(file: Path, row: int, column: int) -> tuple[float, float]:
        """Return the place of the centre of a pixel."""
        with tifffile.TiffFile(file) as tif:
            geo = tif.geotiff_metadata
            assert geo["ProjectedCSTypeGeoKey"] == 32633
            assert geo["GTCitationGeoKey"] == "UTM 33N"
            if "ModelTransformation" in geo:
                return tuple((np.array(geo["ModelTransformation"]) @ [column + half, row + half, 0, 1])[:2].tolist())
            (i, j, _, x, y, _), (width, height, _) = geo["ModelTiepoint"], geo["ModelPixelScale"]
            return x + width * (column + half - i), y - height * (row + half - j)

    same = export(tmp_path / "in.tif", tmp_path / "same.tif")
    assert place(same, 7, 9) == place(tmp_path / "in.tif", 7, 9)
    part = export(result[3:, 5:], tmp_path / "part.tif")
    x, y = place(tmp_path / "in.tif", 6, 10)
    assert place(part, 0, 0) == (x + 5, y - 10)  # half a pixel further
    assert place(export(result[::-1], tmp_path / "flipped.tif"), 14, 0) == place(
        export(result, tmp_path / "up.tif"), 0, 0
    )
    level = oocpatch.Volume(part)
    assert level.source.coords["x"].values[0] == x + 5


def test_channels_of_a_geotiff_are_bands_of_one_page_and_keep_their_names(tmp_path: Path) -> None:
    keys = {"34735": [1, 1, 0, 1, 3072, 0, 1, 32633]}
    coords = {"c": ["water", "B & Bö"], "y": 50 + 10.0 * np.arange(300), "x": 5 + 10.0 * np.arange(40)}
    scores = xarray.DataArray(
        values(2, 300, 40, dtype=np.float32), coords, ("c", "y", "x"), attrs={"geotiff_keys": keys}
    )
    file = export(scores, tmp_path / "out.tif")
    with tifffile.TiffFile(file) as tif:
        assert tif.pages.first.samplesperpixel == 2
        np.testing.assert_array_equal(tif.pages.first.asarray(), scores.values)
        assert [level.shape for level in tif.series[0].levels] == [(2, 300, 40), (2, 150, 20)]
        text = tif.pages.first.tags[42112].value
    names = tifffile.xml2dict(text.decode() if isinstance(text, bytes) else text)["GDALMetadata"]["Item"]
    assert [(n["sample"], n["value"]) for n in names] == [(0, "water"), (1, "B &amp; Bö")]
    again = Volume(file)
    np.testing.assert_array_equal(again.source.coords["y"].values, coords["y"])  # upwards, so the place is a matrix
    np.testing.assert_array_equal(again.source.coords["x"].values, coords["x"])


def test_physical_sizes_come_back(tmp_path: Path) -> None:
    units = {"z": (2.0, "micrometer"), "y": (-500.0, "nanometer"), "x": (0.5, "millimeter"), "t": (3.0, "second")}
    coords = {name: (name, step * np.arange(4), {"units": unit}) for name, (step, unit) in units.items()}
    file = export(xarray.DataArray(values(4, 4, 4, 4), coords, ("t", "z", "y", "x")), tmp_path / "out.ome.tiff")
    for name, coordinate in Volume(file).source.coords.items():
        step, unit = units[name]
        np.testing.assert_allclose(coordinate.values, abs(step) * np.arange(4))
        assert coordinate.attrs == {"units": unit}
    with tifffile.TiffFile(file) as tif:
        x = tif.pages[0].tags["XResolution"].value
        assert x[0] / x[1] == pytest.approx(20)  # pixels of half a millimetre per centimetre


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".ome.tif"])
@pytest.mark.parametrize("chunks", [(8, 32, 32, 2), (1, 270, 40, 1), (12, 16, 16, 1)])
def test_the_bytes_do_not_depend_on_memory_and_threads(
    chunks: tuple[int, ...], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = values(12, 270, 40, 2)
    array = zarr.create_array(tmp_path / "in.zarr", shape=data.shape, chunks=chunks, dtype="u2")
    array[...] = data
    files, spooled = set(), set()
    plan = file_order.FileOrder.plan
    for number, (threads, enough, budget) in enumerate([(4, 1 << 25, 1 << 30), (1, 1 << 12, 1 << 30), (2, 1 << 25, 0)]):
        monkeypatch.setattr(file_order, "ENOUGH", enough)

        def planned(volume: Any, names: Any, inner: int, limit: int, *, rows: int = 1, coding: int = 0) -> Any:
            order = plan(volume, names, inner, limit, rows=rows, coding=coding)
            own, least = order.volume, max(rows, 100) * 40 * 2 * chunks[0]  # less than planes that share chunks
            memory = budget or least  # noqa: B023
            slab, strip = file_order._boxes(own.shape, own.chunks, inner, itemsize=2, budget=memory, rows=rows)
            spooled.add(strip != slab and slab[1] > 1)
            return dataclasses.replace(order, slab=slab, strip=strip, threads=threads)  # noqa: B023

        monkeypatch.setattr(file_order.FileOrder, "plan", planned)
        file = export(zarr.open(tmp_path / "in.zarr"), tmp_path / f"{number}{suffix}", axes="zyxc")
        files.add(file.read_bytes())
    assert len(files) == 1
    assert spooled == ({False} if chunks[0] == 1 else {False, True})
    read = tifffile.imread(file) if suffix == ".ome.tif" else np.asarray(nibabel.load(file).dataobj).T
    np.testing.assert_array_equal(read, data.transpose(3, 0, 1, 2))
    if suffix == ".nii.gz":
        assert gzip.decompress(file.read_bytes())[:4] == b"\x5c\x01\0\0"


def test_axes_longer_than_nifti_1_are_nifti_2(tmp_path: Path) -> None:
    image = nibabel.load(export(values(2, 40_000).astype(np.uint8), tmp_path / "long.nii.gz"))
    assert isinstance(image, nibabel.Nifti2Image)
    assert image.shape == (40_000, 2)


def test_the_same_call_returns_and_another_volume_is_refused(tmp_path: Path) -> None:
    first, other = values(4, 5), values(5, 4)
    for name in ("out.nii", "out.nii.gz", "out.tif"):
        file = export(first, tmp_path / name)
        written = file.stat().st_mtime_ns
        assert export(first, tmp_path / name) == file
        assert file.stat().st_mtime_ns == written
        with pytest.raises(oocpatch.RunMismatch, match="another volume"):
            export(other, file)
        export(other, file, overwrite=True)
        assert Volume(file).shape in {(4, 5), (5, 4)}
        assert file.stat().st_mtime_ns != written
        lazy = xarray.DataArray(first, dims=("y", "x")).chunk(2)
        with pytest.raises(oocpatch.OutputExists, match="only reading the whole"):
            export(lazy, file)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_foreign_file_is_never_replaced(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(values(3, 4, 5), np.eye(4)), tmp_path / "scan.nii")
    tifffile.imwrite(tmp_path / "scan.tif", values(3, 4))
    (tmp_path / "text.nii.gz").write_text("text")
    (tmp_path / "folder.nii").mkdir()
    export(values(3, 4), tmp_path / "own.nii")
    (tmp_path / "link.nii").symlink_to("own.nii")
    for name in ("scan.nii", "scan.tif", "text.nii.gz", "folder.nii", "link.nii"):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else None
        for overwrite in (False, True):
            with pytest.raises(oocpatch.OutputExists, match="is something else"):
                export(values(3, 4), tmp_path / name, overwrite=overwrite)
        assert before is None or (tmp_path / name).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    ("volume", "name", "options", "message"),
    [
        (values(3, 4), "out.png", {}, "path must end in one of .nii, .nii.gz, .ome.tif"),
        (values(3, 4), ".nii", {}, "path must end in one of"),
        (values(3, 4), "s3://bucket/out.nii", {}, "local or shared"),
        (values(3), "out.nii", {}, "two or three spatial axes"),
        (values(2, 3, 4, 5), "out.tif", {"axes": "wzyx"}, "two or three spatial axes"),
        (values(3, 4).astype(complex), "out.nii", {}, "complex128"),
        (values(3, 4).astype("M8[s]"), "out.nii", {}, "datetime64"),
        (np.array([[1, 1 << 40]]), "out.tif", {}, "int32 holds none from 1 to 1099511627776"),
        (values(8, 3000), "out.nii", {"max_memory": "2MiB"}, r"1 row\(s\) of 3000 voxels need .* max_memory"),
        (values(800, 3000), "out.tif", {"max_memory": "3MiB"}, r"256 row\(s\) of 3000 voxels need .* max_memory"),
        (values(2, 3, 4, 5, 6, 7), "out.nii", {}, "axes must be given"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    volume: Any, name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(volume, name if "://" in name else tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_the_input_and_unfinished_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export(values(40, 40), tmp_path / "in.nii")
    with pytest.raises(ValueError, match="path must not be the input volume"):
        export(file, file, overwrite=True)
    planned = oocpatch.plan(
        file, torch.nn.Identity(), tmp_path / "out.zarr", patch_size=8, block_shape=16, output_chunks=8, progress=False
    )
    part = planned.run(blocks=[0])
    for source in (part, tmp_path / "out.zarr"):
        with pytest.raises(ValueError, match="is not complete"):
            export(source, tmp_path / "out.nii")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ValueError, match=r"needs nibabel.*oocpatch\[nifti\]"):
        export(values(4, 4), tmp_path / "out.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".tif"])
def test_an_interrupt_leaves_no_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array(tmp_path / "in.zarr", data=values(64, 64, 64), chunks=(8, 64, 64))
    read_into, calls = Volume.read_into, []

    def interrupted(self: Volume, *arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        read_into(self, *arguments, **options)

    monkeypatch.setattr(file_order, "ENOUGH", 1 << 16)
    monkeypatch.setattr(Volume, "read_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(array, tmp_path / f"out{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["in.zarr"]
    (tmp_path / f"out{suffix}.partial").write_text("left by a process that was killed")
    export(array, tmp_path / f"out{suffix}")
    assert {path.name for path in tmp_path.iterdir()} == {"in.zarr", f"out{suffix}"}


def test_the_command_exports_and_refuses_by_its_exit_code(tmp_path: Path) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.main, ["export", *map(str, arguments)])
        return result.exit_code, result.stdout, result.stderr

    zarr.create_array(tmp_path / "in.zarr", data=values(6, 7), dimension_names=("y", "x"))
    code, out, _ = run(tmp_path / "in.zarr", tmp_path / "out.nii.gz", "--json")
    assert code == 0
    assert f'"file": "{tmp_path / "out.nii.gz"}"' in out
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj).T, values(6, 7))
    assert run(tmp_path / "in.zarr", tmp_path / "out.nii.gz")[0] == 0
    (tmp_path / "foreign.tif").write_text("text")
    assert run(tmp_path / "in.zarr", tmp_path / "foreign.tif")[0] == 3
    code, _, err = run(tmp_path / "in.zarr", tmp_path / "out.png")
    assert code == 2
    assert "path must end in one of" in err
