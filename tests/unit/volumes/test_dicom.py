"""Series of DICOM: values, order, affine and scale of the slices, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.uid import RLELossless

import oocpatch
from oocpatch.volumes.volume import Volume
from tests.support.dicom import write_series, write_slide

STACK = np.arange(6 * 10 * 14, dtype=np.int16).reshape(6, 10, 14)

AXIAL = np.array([[-0.5, 0, 0, 90], [0, -0.75, 0, 60], [0, 0, 2.5, -40], [0, 0, 0, 1.0]])

_TURN = np.array([[0.8, 0, 0.6], [0, 1, 0], [-0.6, 0, 0.8]])
OBLIQUE = np.block(
    [[_TURN @ np.diag([0.5, 0.75, 2.5]), np.array([[3.0], [4], [5]])], [np.zeros((1, 3)), np.ones((1, 1))]]
)
"""An affine of positive determinant like those of scanners: slices follow the normal of rows and columns."""

TILTED = AXIAL + np.array([[0, 0, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
"""Each slice is half a millimetre beside the one below, as with a tilted gantry."""


def read(volume: Volume) -> np.ndarray:
    return volume.source.load(tuple(slice(0, n) for n in volume.source.shape))


@pytest.mark.parametrize("affine", [AXIAL, OBLIQUE, TILTED], ids=["axial", "oblique", "tilted"])
def test_slices_are_in_the_order_of_their_places_and_results_have_their_affine(affine: Any, tmp_path: Path) -> None:
    names = ["IM5", "IM1", "IM3", "IM0", "IM4", "IM2"]  # neither their names nor their numbers tell the order
    write_series(tmp_path / "ct", STACK, affine, names=names, InstanceNumber=[3, 1, 2, 9, 8, 7])
    (tmp_path / "ct" / "README").write_text("not an image")
    volume = Volume(tmp_path / "ct")
    assert volume.source.names == ("z", "y", "x")
    assert volume.source.chunks == (1, 10, 14)
    np.testing.assert_array_equal(read(volume), STACK)
    np.testing.assert_array_equal(volume.source.load((slice(1, 5), slice(3, 4), slice(2, 9))), STACK[1:5, 3:4, 2:9])
    np.testing.assert_allclose(volume.affine, affine[:, [2, 1, 0, 3]], atol=1e-6)
    oocpatch.predict(
        tmp_path / "ct", torch.nn.Identity(), tmp_path / "out.zarr",
        patch_size=4, overlap_mode="crop", progress=False, export=tmp_path / "out.nii",
    )  # fmt: skip
    image = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(image.dataobj), STACK.T)


def test_coordinates_of_an_axial_scan_are_places_in_the_world(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", STACK, AXIAL)
    coords = Volume(tmp_path / "ct").source.coords
    assert {n: (c.values[:2].tolist(), c.attrs["units"]) for n, c in coords.items()} == {
        "z": ([-40, -37.5], "millimeter"),
        "y": ([60, 59.25], "millimeter"),
        "x": ([90, 89.5], "millimeter"),
    }


def test_each_slice_has_its_own_scale(tmp_path: Path) -> None:
    slopes = [1.0, 2.0, 0.5, 1.0, 3.0, 1.5]
    write_series(tmp_path / "pet", STACK, AXIAL, RescaleSlope=slopes, RescaleIntercept=-1024)
    volume = Volume(tmp_path / "pet")
    assert volume.dtype == np.float32
    np.testing.assert_array_equal(read(volume), STACK * np.float32(slopes)[:, None, None] - 1024)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_are_the_last_axis_and_one_file_is_a_picture(dtype: Any, tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 250, (2, 10, 14, 3)).astype(dtype)
    first, _ = write_series(tmp_path / "photos", stack)
    assert Volume(tmp_path / "photos").source.names == ("z", "y", "x", "c")
    np.testing.assert_array_equal(read(Volume(tmp_path / "photos")), stack)
    assert Volume(first).source.names == ("y", "x", "c")
    np.testing.assert_array_equal(read(Volume(first)), stack[0])


def test_compressed_slices_have_the_values_that_were_compressed(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "ct", STACK, AXIAL):
        image = pydicom.dcmread(path)
        image.compress(RLELossless, generate_instance_uid=False)
        image.save_as(path)
    np.testing.assert_array_equal(read(Volume(tmp_path / "ct")), STACK)


def test_one_of_several_series_is_chosen_by_its_uid(tmp_path: Path) -> None:
    write_series(tmp_path / "ct", STACK, AXIAL, "1.2.3", SeriesDescription="plain")
    write_series(tmp_path / "ct", STACK[:2] + 5, AXIAL, "1.2.4", SeriesDescription="contrast")
    np.testing.assert_array_equal(read(Volume(f"{tmp_path / 'ct'}::1.2.4")), STACK[:2] + 5)
    with pytest.raises(
        ValueError, match=r"holds 2; it has .*ct::1\.2\.3 \(6 x CT plain\); .*1\.2\.4 \(2 x CT contrast\)"
    ):
        Volume(tmp_path / "ct")
    with pytest.raises(ValueError, match=r"none of them is 1\.2\.5"):
        Volume(f"{tmp_path / 'ct'}::1.2.5")


def missing(paths: list[Path]) -> None:
    paths[2].unlink()


def doubled(paths: list[Path]) -> None:
    image = pydicom.dcmread(paths[3])
    image.save_as(paths[3].with_name("again.dcm"))


def changed(paths: list[Path], **attributes: Any) -> None:
    image = pydicom.dcmread(paths[3])
    for name, value in attributes.items():
        setattr(image, name, value)
    image.save_as(paths[3])


FAULTS: dict[str, tuple[Callable[[list[Path]], None], str]] = {
    "a missing slice": (missing, r"got 5 mm between .*001.dcm and .*003.dcm, and 2.5 mm between most"),
    "two at one place": (doubled, "003.dcm and .*at one; put those of one time"),
    "another size": (lambda p: changed(p, Rows=5, Columns=28), "one Rows, got 10 in .*000.dcm and 5 in .*003.dcm"),
    "another plane": (lambda p: changed(p, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "one ImageOrientationPatient"),
    "no place": (lambda p: changed(p, ImagePositionPatient=None), "ImagePositionPatient, got none in .*003.dcm"),
    "frames": (lambda p: changed(p, NumberOfFrames=7), "003.dcm cannot be read: NumberOfFrames is 7"),
    "palette": (lambda p: changed(p, PhotometricInterpretation="PALETTE COLOR"), "003.dcm .*palette"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_up_no_volume_is_refused_by_the_names_of_files(fault: str, tmp_path: Path) -> None:
    break_it, message = FAULTS[fault]
    break_it(write_series(tmp_path / "ct", STACK, AXIAL))
    with pytest.raises(ValueError, match=message):
        Volume(tmp_path / "ct")


def test_a_slice_that_was_cut_short_fails_with_its_name(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "ct", STACK, AXIAL)
    paths[4].write_bytes(paths[4].read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"004.dcm \("):
        read(Volume(tmp_path / "ct"))


def test_slices_without_places_follow_their_numbers(tmp_path: Path) -> None:
    write_series(tmp_path / "film", STACK, InstanceNumber=[6, 5, 4, 3, 2, 1], PixelSpacing=[0.2, 0.1])
    volume = Volume(tmp_path / "film")
    np.testing.assert_array_equal(read(volume), STACK[::-1])
    assert {name: float(c.values[1]) for name, c in volume.source.coords.items()} == {"y": 0.2, "x": 0.1}


def test_a_directory_or_a_file_of_a_slide_is_its_pyramid_and_several_are_told_apart_by_their_series(
    tmp_path: Path,
) -> None:
    slide = np.random.default_rng(0).integers(1, 255, (150, 200, 3), dtype=np.uint8)
    levels = [slide, slide[::2, 1::2].copy()]
    paths = write_slide(tmp_path / "a", levels)
    for address in (tmp_path / "a", paths[0], paths[1]):
        for number, level in enumerate(levels):
            volume = oocpatch.Volume(f"{address}::level={number}")
            assert volume.source.names == ("y", "x", "c")
            np.testing.assert_array_equal(volume.source.load((slice(0, 150), slice(0, 200), slice(0, 3))), level)
            size = 0.25 * 2**number
            np.testing.assert_allclose(volume.source.coords["y"].values[:2], [(size - 0.25) / 2, (3 * size - 0.25) / 2])
        with pytest.raises(ValueError, match=r"level must be one of .*\(0: 150 x 200; 1: 75 x 100\), got 2"):
            oocpatch.Volume(f"{address}::level=2")
    before = oocpatch.Volume(paths[0]).source.fingerprint
    paths[1].touch()  # another file, which holds another level
    assert oocpatch.Volume(paths[0]).source.fingerprint != before
    write_slide(tmp_path / "a", [255 - slide], series="1.2.10")
    with pytest.raises(ValueError, match=r"holds 2; it has .*::1.2.10 \(1 x SM\); .*::1.2.9 \(2 x SM\)"):
        oocpatch.Volume(tmp_path / "a")
    chosen = oocpatch.Volume(f"{tmp_path / 'a'}::1.2.10").source
    np.testing.assert_array_equal(chosen.load((slice(0, 150), slice(0, 200), slice(0, 3))), 255 - slide)
