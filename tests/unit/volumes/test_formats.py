"""Files of other formats: the values and names that the format's own library gives, opened where they are read."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tensorstore
import tifffile
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import oocpatch
from oocpatch.planning.box import Box
from oocpatch.volumes.formats.raw import read_box
from oocpatch.volumes.formats.spec import FileSpec, parse_address
from tests.support.children import Children
from tests.support.dicom import write_series, write_slide
from tests.support.microscopy import write_czi, write_ims, write_lif, write_nd2
from tests.support.web import web_server

Array = np.ndarray[Any, Any]

STACK = np.arange(12 * 40 * 50, dtype=np.uint16).reshape(12, 40, 50)
"""`(z, y, x)`: a misplaced voxel shows."""
SLIDE = np.random.default_rng(0).integers(0, 255, (300, 420, 3), dtype=np.uint8)
"""`(y, x, c)`."""


def ome_tiff(path: Path) -> Array:
    metadata = {
        "axes": "ZYX",
        "PhysicalSizeX": 0.5,
        "PhysicalSizeXUnit": "\u00b5m",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "\u00b5m",
        "PhysicalSizeZ": 2.0,
        "PhysicalSizeZUnit": "\u00b5m",
    }
    tifffile.imwrite(path, STACK, tile=(16, 16), compression="zlib", metadata=metadata)
    return STACK


def big_endian_tiff(path: Path) -> Array:
    tifffile.imwrite(path, STACK.astype(">u2"), byteorder=">", rowsperstrip=7, compression="lzw")
    return STACK


def pyramidal_tiff(path: Path, *, thumbnail: bool = False, **options: Any) -> Array:
    with tifffile.TiffWriter(path) as file:
        file.write(
            SLIDE, tile=(128, 128), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER", **options
        )
        if thumbnail:
            file.write(SLIDE[::8, ::8].copy(), photometric="rgb", rowsperstrip=16, metadata=None)
        reduced = 0 if thumbnail else 1  # what Aperio calls a level does not say that it is smaller
        file.write(SLIDE[::2, ::2].copy(), tile=(128, 128), photometric="rgb", subfiletype=reduced)
    return SLIDE


def svs(path: Path) -> Array:
    """As Aperio's scanners write it, as far as a reader looks."""
    description = "Aperio Image Library v12\r\n420x300 [0,0 420x300] (128x128)|AppMag = 20|MPP = 0.25"
    return pyramidal_tiff(path, thumbnail=True, description=description, metadata=None)


def nifti(path: Path) -> Array:
    data = np.asfortranarray(STACK.T)
    image = nibabel.Nifti1Image(data, np.diag([0.5, 0.5, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return data


def scaled_nifti(path: Path) -> Array:
    image = nibabel.Nifti1Image(STACK.T.astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, path)
    found = nibabel.load(path).get_fdata(dtype=np.float32)
    assert found.max() > 40
    return found


def mgh(path: Path) -> Array:
    data = np.asfortranarray(STACK.T.astype(np.float32))
    nibabel.save(nibabel.MGHImage(data, np.eye(4)), path)
    return data


def hdf5(path: Path) -> Array:
    with h5py.File(path, "w") as file:
        made = file.create_dataset("entry/data", data=STACK, chunks=(4, 16, 16), compression="gzip")
        for axis, name in enumerate("zyx"):
            made.dims[axis].label = name
        file["entry/depth"] = np.arange(12) * 2.0
        file["entry/depth"].attrs["units"] = "micrometer"
        file["entry/depth"].make_scale("z")
        made.dims[0].attach_scale(file["entry/depth"])
        made.attrs["stain"] = "DAPI"
    return STACK


def n5(path: Path) -> Array:
    metadata = {"dimensions": [50, 40, 12], "blockSize": [16, 16, 4], "dataType": "uint16"}
    named = {"axes": ["x", "y", "z"], "units": ["nm", "nm", "nm"], "resolution": [4, 4, 30]}
    description = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{path}/s0"}}
    made = tensorstore.open({**description, "metadata": {**metadata, **named}}, create=True).result()
    made.write(STACK.T).result()
    return STACK


def precomputed(path: Path) -> Array:
    scale = {"size": [50, 40, 12], "encoding": "raw", "chunk_size": [16, 16, 4], "resolution": [4, 4, 30]}
    description = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": str(path)},
        "multiscale_metadata": {"type": "image", "data_type": "uint16", "num_channels": 1},
        "scale_metadata": {**scale, "voxel_offset": [10, 20, 30]},
    }
    tensorstore.open(description, create=True).result().write(STACK.T[..., None]).result()
    return STACK


def dicom(path: Path) -> Array:
    write_series(path, STACK)
    return STACK


def dicom_slide(path: Path) -> Array:
    write_slide(path, [SLIDE[:100, :140]])
    return SLIDE[:100, :140]


CELLS = np.arange(2 * 5 * 20 * 30, dtype=np.uint16).reshape(2, 5, 20, 30)
"""`(c, z, y, x)`, as a microscope records it."""


def czi(path: Path) -> Array:
    write_czi(path, [CELLS])
    return CELLS


def colour_czi(path: Path) -> Array:
    write_czi(path, [SLIDE[:50, :60]], tile=32)
    return SLIDE[:50, :60]


def nd2(path: Path) -> Array:
    pytest.importorskip("nd2")
    write_nd2(path, [CELLS.swapaxes(0, 1)[None]])
    return CELLS.swapaxes(0, 1)


def lif(path: Path) -> Array:
    pytest.importorskip("liffile")
    write_lif(path, {"cells": CELLS.swapaxes(0, 1)})
    return CELLS.swapaxes(0, 1)


def ims(path: Path) -> Array:
    write_ims(path, [CELLS])
    return CELLS


Make = Callable[[Path], Array]
KINDS: dict[str, tuple[Make, str, str, tuple[str, ...], tuple[int, ...]]] = {
    "ome-tiff": (ome_tiff, "a.ome.tif", "", ("z", "y", "x"), (1, 16, 16)),
    "big-endian strips": (big_endian_tiff, "a.tif", "", ("z", "y", "x"), (1, 7, 50)),
    "svs": (svs, "a.svs", "", ("y", "x", "c"), (128, 128, 3)),
    "slide": (pyramidal_tiff, "a.scn", "", ("y", "x", "c"), (128, 128, 3)),
    "nifti": (nifti, "a.nii", "", ("x", "y", "z"), (50, 1, 1)),
    "nifti.gz": (nifti, "a.nii.gz", "", ("x", "y", "z"), (50, 1, 1)),
    "scaled nifti": (scaled_nifti, "a.nii.gz", "", ("x", "y", "z"), (50, 1, 1)),
    "nifti pair": (nifti, "a.img", "", ("x", "y", "z"), (50, 1, 1)),
    "mgh": (mgh, "a.mgz", "", ("x", "y", "z"), (50, 1, 1)),
    "hdf5": (hdf5, "a.h5", "", ("z", "y", "x"), (4, 16, 16)),
    "hdf5 by path": (hdf5, "a.h5", "::/entry/data", ("z", "y", "x"), (4, 16, 16)),
    "n5": (n5, "a.n5", "::s0", ("z", "y", "x"), (4, 16, 16)),
    "precomputed": (precomputed, "a", "", ("z", "y", "x"), (4, 16, 16)),
    "dicom": (dicom, "a", "", ("z", "y", "x"), (1, 40, 50)),
    "dicom slide": (dicom_slide, "a", "", ("y", "x", "c"), (64, 64, 3)),
    "czi": (czi, "a.czi", "", ("c", "z", "y", "x"), (1, 1, 16, 16)),
    "colour czi": (colour_czi, "a.czi", "", ("y", "x", "c"), (32, 32, 3)),
    "nd2": (nd2, "a.nd2", "", ("z", "c", "y", "x"), (1, 2, 20, 30)),
    "lif": (lif, "a.lif", "", ("z", "c", "y", "x"), (1, 1, 1, 30)),
    "ims": (ims, "a.ims", "", ("c", "z", "y", "x"), (1, 5, 16, 16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_the_values_that_its_library_gives_and_its_names_and_chunks(kind: str, tmp_path: Path) -> None:
    make, name, part, names, chunks = KINDS[kind]
    expected = make(tmp_path / name)
    source = oocpatch.Volume(f"{tmp_path / name}{part}").source
    assert source.names == names
    assert source.shape == expected.shape
    assert source.chunks == chunks
    assert np.dtype(source.dtype).newbyteorder("=") == expected.dtype
    everything = tuple(slice(0, n) for n in expected.shape)
    np.testing.assert_array_equal(source.load(everything), expected)
    inner = (*(slice(n // 3, n // 3 + 3) for n in expected.shape[:-1]), slice(1, 3))
    np.testing.assert_array_equal(source.load(inner), expected[inner])


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_travels_to_another_process_which_opens_the_file_itself(kind: str, tmp_path: Path) -> None:
    make, name, part, _, _ = KINDS[kind]
    expected = make(tmp_path / name)
    source = oocpatch.Volume(f"{tmp_path / name}{part}").source
    corner = tuple(slice(0, 2) for _ in expected.shape)
    source.load(corner)  # what is open now does not travel
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 (our own)
    np.testing.assert_array_equal(again.load(corner), expected[corner])
    assert again.fingerprint == source.fingerprint


def coords(path: Path | str) -> dict[str, tuple[list[float], str | None]]:
    found = oocpatch.Volume(path).source.coords
    return {
        n: ([float(v) for v in c.values[:3]], c.attrs.get("units")) for n, c in found.items() if c.dtype.kind in "iuf"
    }


HALF = {"z": (0.0, 2.0), "y": (0.0, 0.5), "x": (0.0, 0.5)}
QUARTER = {"y": (0.0, 0.25), "x": (0.0, 0.25)}
PLACES: dict[str, tuple[str, dict[str, tuple[float, float]]]] = {
    "ome-tiff": ("micrometer", HALF),
    "svs": ("micrometer", QUARTER),
    "slide": ("micrometer", {"y": (0.0, 0.5), "x": (0.0, 0.5)}),
    "nifti": ("millimeter", HALF),
    "nifti.gz": ("millimeter", HALF),
    "nifti pair": ("millimeter", HALF),
    "hdf5": ("micrometer", {"z": (0.0, 2.0)}),
    "hdf5 by path": ("micrometer", {"z": (0.0, 2.0)}),
    "n5": ("nanometer", {"z": (0.0, 30.0), "y": (0.0, 4.0), "x": (0.0, 4.0)}),
    "precomputed": ("nanometer", {"z": (900.0, 30.0), "y": (80.0, 4.0), "x": (40.0, 4.0)}),
    "dicom slide": ("micrometer", QUARTER),
    "czi": ("micrometer", HALF),
    "colour czi": ("micrometer", {"y": (0.0, 0.5), "x": (0.0, 0.5)}),
    "nd2": ("micrometer", HALF),
    "lif": ("micrometer", {"z": (0.0, -2.0), "y": (0.0, 0.5), "x": (100.0, 0.5)}),
    "ims": ("micrometer", {"z": (11.0, 2.0), "y": (10.25, 0.5), "x": (10.25, 0.5)}),
}
"""Unit, place of the first voxel, and distance of voxels, of the kinds that have them."""


@pytest.mark.parametrize("kind", PLACES)
def test_voxel_sizes_and_offsets_become_coordinates(kind: str, tmp_path: Path) -> None:
    make, name, part, _, _ = KINDS[kind]
    make(tmp_path / name)
    found = coords(f"{tmp_path / name}{part}")
    unit, places = PLACES[kind]
    for axis, (first, step) in places.items():
        assert found[axis][0] == pytest.approx([first, first + step, first + 2 * step])
        assert found[axis][1] == unit


def test_imagej_says_how_far_planes_are_apart(tmp_path: Path) -> None:
    metadata = {"spacing": 3.0, "unit": "um", "axes": "ZYX"}
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, resolution=(2.0, 4.0), metadata=metadata)
    found = coords(tmp_path / "a.tif")
    assert found["z"] == ([0, 3, 6], "micrometer")
    assert found["y"][0] == pytest.approx([0, 0.25, 0.5])
    assert found["x"][0] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("name", ["a.svs", "a.scn"])
def test_a_level_of_a_slide_is_chosen_by_its_number_and_has_the_right_coordinates(name: str, tmp_path: Path) -> None:
    (svs if name.endswith("svs") else pyramidal_tiff)(tmp_path / name)
    volume = oocpatch.Volume(f"{tmp_path / name}::level=1")
    np.testing.assert_array_equal(volume.read(Box((0, 0), (150, 210))), SLIDE[::2, ::2].transpose(2, 0, 1))
    size = 0.25 if name.endswith("svs") else 0.5
    # A voxel of level 1 is two of level 0, whose centres lie at 0 and `size`.
    assert coords(f"{tmp_path / name}::level=1")["x"][0] == pytest.approx([size / 2, 2.5 * size, 4.5 * size])
    with pytest.raises(ValueError, match=r"level must be one of those of .*150.*got 7"):
        oocpatch.Volume(f"{tmp_path / name}::level=7")


def test_a_tiff_can_be_read_as_a_slide(tmp_path: Path) -> None:
    pyramidal_tiff(tmp_path / "a.tif")
    volume = oocpatch.Volume(f"{tmp_path / 'a.tif'}::format=slide,level=1")
    assert volume.source.attrs["vendor"] == "generic-tiff"
    np.testing.assert_array_equal(volume.read(Box((0, 0), (150, 210))), SLIDE[::2, ::2].transpose(2, 0, 1))


def test_a_level_of_a_long_slide_has_its_voxels_at_their_places(tmp_path: Path) -> None:
    """129 rows become 32, and not a quarter: OpenSlide has one factor for both axes, 4.016."""
    ramp = np.abs((np.arange(1024) + 128) % 256 - 128).astype(np.uint8)  # a step of one per voxel, up and down
    level = np.broadcast_to(ramp[:, None], (32, 1024, 3)).copy()
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        options: dict[str, Any] = {"tile": (128, 128), "photometric": "rgb", "metadata": None}
        file.write(np.zeros((129, 4096, 3), np.uint8), **options)
        file.write(level, subfiletype=1, **options)
    volume = oocpatch.Volume(f"{tmp_path / 'a.tif'}::format=slide,level=1")
    found = volume.read(Box((0, 0), (32, 1024))).transpose(1, 2, 0).astype(int)
    assert np.abs(found - level).max() <= 1


def test_series_of_a_tiff_are_chosen_by_number(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(STACK, metadata={"axes": "ZYX"})
        file.write(STACK[:5, :7] + 1, metadata={"axes": "ZYX"})
    second = oocpatch.Volume(f"{tmp_path / 'a.tif'}::series=1")
    np.testing.assert_array_equal(second.read(Box((0, 0, 0), (5, 7, 50)))[0], STACK[:5, :7] + 1)


def test_precomputed_is_read_behind_a_url(tmp_path: Path) -> None:
    precomputed(tmp_path / "segments")

    with web_server(tmp_path) as url:
        volume = oocpatch.Volume(f"precomputed://{url}/segments")
        np.testing.assert_array_equal(volume.read(Box((0, 0, 0), STACK.shape))[0], STACK)


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("a.tif", "tifffile", "tiff"),
        ("a.scn", "openslide", "slide"),
        ("a.nii.gz", "nibabel", "nifti"),
        ("a.h5", "h5py", "hdf5"),
        ("a.n5", "tensorstore", "tensorstore"),
        ("a.dcm", "pydicom", "dicom"),
        ("a.czi", "pylibCZIrw.czi", "microscopy"),
        ("a.nd2", "nd2", "microscopy"),
        ("a.lif", "liffile", "microscopy"),
        ("a.ims", "h5py", "hdf5"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_has_it(
    name: str, library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)  # as Python does for what must not be imported
    with pytest.raises(
        ValueError, match=rf"needs {library}, which is not installed; pip install 'oocpatch\[{extra}\]'"
    ):
        oocpatch.Volume(tmp_path / name)


def test_a_missing_or_ambiguous_array_is_refused_with_a_list(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one"], file["deep/two"] = STACK, STACK
    with pytest.raises(ValueError, match=r"holds 2 datasets; it has .*a\.h5::/deep/two \(12, 40, 50\), .*::/one"):
        oocpatch.Volume(tmp_path / "a.h5")
    with pytest.raises(ValueError, match=r"has no dataset '/three'; it has"):
        oocpatch.Volume(f"{tmp_path}/a.h5::/three")
    n5(tmp_path / "a.n5")
    with pytest.raises(ValueError, match=r"cannot be read: .*; it has .*a\.n5::s0"):
        oocpatch.Volume(tmp_path / "a.n5")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("missing.nii", "volume not found: missing.nii does not exist"),
        ("broken.tif", r"volume cannot be read: broken.tif \(TiffFileError: not a TIFF file"),
        ("broken.h5", r"volume cannot be read: broken.h5 \(OSError"),
        ("broken.nii.gz", r"volume cannot be read: broken.nii.gz \("),
        ("broken.tif::lvl=2", r"must be the path of a dataset, level=NUMBER.*got 'lvl=2'"),
        ("volume.zarr::level=2", r"what follows '::' is for files that end in .tif"),
        ("text.txt", r"must be a Zarr array or group.*or a file that ends in .tif"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_message(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("broken.tif", "broken.h5", "broken.nii.gz", "text.txt"):
        (tmp_path / name).write_text("neither this nor that")
    with pytest.raises(ValueError, match=message):
        oocpatch.Volume(address)


@pytest.mark.parametrize(
    ("address", "spec"),
    [
        ("a.ome.tif::series=1,level=2", FileSpec("a.ome.tif", "tiff", level=2, series=1)),
        ("A.NII.GZ", FileSpec("A.NII.GZ", "nifti")),
        ("a.n5::c0/s1", FileSpec("a.n5", "n5", part="c0/s1")),
        ("n5://https://host/a::c0", FileSpec("https://host/a", "n5", part="c0")),
        ("precomputed://gs://bucket/a", FileSpec("gs://bucket/a", "precomputed")),
        ("s3://bucket/a.zarr", None),
    ],
)
def test_addresses_are_understood(address: str, spec: FileSpec | None) -> None:
    assert parse_address(address) == spec


@given(st.data())
def test_any_box_of_a_raw_file_is_read_as_a_memory_map_has_it(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    shape = (*shape[:-1], shape[-1] * data.draw(st.sampled_from([1, 9000])))  # rows that are read whole, and long ones
    spans = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    selection = tuple(slice(a, b) for a, b in spans)
    with RAW.open("rb") as file:
        found = read_box(file.fileno(), 16, shape, ">u4", selection)
    whole = np.memmap(RAW, ">u4", "r", 16, shape)
    np.testing.assert_array_equal(found, whole[selection])


@pytest.fixture(scope="module", autouse=True)
def raw(tmp_path_factory: pytest.TempPathFactory) -> None:
    global RAW  # noqa: PLW0603 (Hypothesis takes no fixture of a function)
    RAW = tmp_path_factory.mktemp("raw") / "raw"
    RAW.write_bytes(bytes(16) + np.arange(6**3 * 6 * 9000, dtype=">u4").tobytes())


RAW = Path()


def test_a_raw_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii")
    volume = oocpatch.Volume(tmp_path / "a.nii")
    with (tmp_path / "a.nii").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"ends too early: it must have \d+ bytes, got 5000"):
        volume.read(Box((0, 0, 0), (50, 40, 12)))


def test_the_command_line_takes_a_scan_as_it_is(children: Children, tmp_path: Path) -> None:
    expected = nifti(tmp_path / "scan.nii.gz")
    arguments = ["predict", "scan.nii.gz", "out.zarr", "--model", "identity", "--patch-size", "16", "--json"]
    code, stdout, stderr = children.call("tests.support.command_child", *arguments, folder=tmp_path)
    assert code == 0, stderr
    assert json.loads(stdout)["complete"]
    found = xr.open_zarr(tmp_path / "out.zarr").prediction
    assert found.dims == ("x", "y", "z")
    assert found.z.values[:3].tolist() == [0, 2, 4]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("stored", "slope", "intercept", "dtype"),
    [
        ("int16", 0.5, -3, "float32"),
        ("uint8", 2, 1, "float32"),
        ("float32", 2, 0, "float32"),
        ("int32", 1, -5, "float64"),
        ("uint32", 1, 0.5, "float64"),
        ("int64", 2, 0, "float64"),
        ("float64", 2, 0, "float64"),
        ("int32", 1, 0, "int32"),
        ("float64", 1, 0, "float64"),
        ("int16", 0, 7, "int16"),  # no scaling, as the format says
        (">i4", 1, -5, "float64"),
    ],
)
def test_a_scaled_nifti_has_the_values_that_nibabel_gives(
    stored: str, slope: float, intercept: float, dtype: str, tmp_path: Path
) -> None:
    """32-bit labels with an intercept stay whole numbers, and large float64 values finite."""
    kind = np.dtype(stored)
    values = np.random.default_rng(0).integers(0, np.iinfo("u1").max, (6, 5, 4)).astype(kind)
    values[0, 0, :2] = [2**31 - 1, 2**24 + 1] if kind.itemsize > 2 and kind.kind in "iu" else values[0, 0, :2]
    values[0, 0, 2] = 1e300 if stored == "float64" else values[0, 0, 2]
    header = nibabel.Nifti1Header(endianness=">" if stored.startswith(">") else "<")
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4), header, dtype=kind.newbyteorder("=")), tmp_path / "a.nii")
    with (tmp_path / "a.nii").open("r+b") as file:
        file.seek(112)
        file.write(np.array([slope, intercept], ">f4" if stored.startswith(">") else "<f4").tobytes())
    volume = oocpatch.Volume(tmp_path / "a.nii")
    expected = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj, np.float64)
    assert volume.dtype == dtype
    assert expected.max() > 100
    np.testing.assert_array_equal(volume.read(Box.of_shape(volume.shape))[0], expected)
