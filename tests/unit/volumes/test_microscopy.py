"""Files of microscopes: scenes, positions and images by number, levels, names of channels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oocpatch
from oocpatch.planning.box import Box
from tests.support.microscopy import write_czi, write_czi_pyramid, write_ims, write_lif, write_nd2

CELLS = np.random.default_rng(0).integers(0, 60_000, (2, 3, 20, 30)).astype(np.uint16)
"""`(c, z, y, x)`."""
PLANE = np.random.default_rng(1).integers(1, 255, (67, 90)).astype(np.uint8)


def values(address: Any) -> Any:
    source = oocpatch.Volume(address).source
    return source.load(tuple(slice(0, n) for n in source.shape))


def names(address: Any) -> list[str]:
    return list(oocpatch.Volume(address).source.coords["c"].values)


def test_scenes_of_a_czi_are_chosen_by_number_and_channels_have_their_names(tmp_path: Path) -> None:
    file = tmp_path / "a.czi"
    write_czi(file, [CELLS, CELLS[:, :, :9, :13] + 7])
    np.testing.assert_array_equal(values(file), CELLS)
    np.testing.assert_array_equal(values(f"{file}::series=1"), CELLS[:, :, :9, :13] + 7)
    assert names(file) == ["DAPI", "GFP"]
    with pytest.raises(ValueError, match=r"series must be one of those of .*a.czi \(0: 20 x 30; 1: 9 x 13\), got 2"):
        oocpatch.Volume(f"{file}::series=2")


def test_a_level_of_a_czi_is_read_from_its_own_tiles_in_every_box(tmp_path: Path) -> None:
    levels = [PLANE[:64, :88], 255 - PLANE[:32, :44], PLANE[16:32, :22]]  # none of them follows from another
    write_czi_pyramid(tmp_path / "a.czi", levels)
    for number, level in enumerate(levels):
        volume = oocpatch.Volume(f"{tmp_path / 'a.czi'}::level={number}")
        np.testing.assert_array_equal(volume.source.load((slice(0, 64), slice(0, 88))), level)
        assert volume.source.chunks == level.shape
        box = volume.read(Box((3, 5), (11, 18)))[0]
        np.testing.assert_array_equal(box, level[3:11, 5:18])
        size = 0.5 * 2**number
        np.testing.assert_allclose(volume.source.coords["x"].values[:2], [(size - 0.5) / 2, (3 * size - 0.5) / 2])
    with pytest.raises(ValueError, match=r"level must be one of .*\(0: 64 x 88; 1: 32 x 44; 2: 16 x 22\), got 3"):
        oocpatch.Volume(tmp_path / "a.czi", level=3)


def test_gaps_between_the_tiles_of_a_czi_are_zero(tmp_path: Path) -> None:
    czi = pytest.importorskip("pylibCZIrw.czi")
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        file.write(PLANE[:10, :10], location=(0, 0))
        file.write(PLANE[:10, :10], location=(12, 5))
    expected = np.zeros((15, 22), np.uint8)
    expected[:10, :10] = expected[5:, 12:] = PLANE[:10, :10]
    np.testing.assert_array_equal(values(tmp_path / "a.czi"), expected)


def test_positions_of_an_nd2_are_chosen_by_number_and_times_are_seconds(tmp_path: Path) -> None:
    pytest.importorskip("nd2")
    first = np.stack([CELLS.swapaxes(0, 1) + n for n in range(4)]).astype(np.uint16)  # t, z, c, y, x
    write_nd2(tmp_path / "a.nd2", [first, first[:, ::-1] // 2], period=250.0)
    volume = oocpatch.Volume(tmp_path / "a.nd2")
    assert volume.axes.names == ("t", "z", "c", "y", "x")
    np.testing.assert_array_equal(values(tmp_path / "a.nd2"), first)
    np.testing.assert_array_equal(values(f"{tmp_path / 'a.nd2'}::series=1"), first[:, ::-1] // 2)
    times = volume.source.coords["t"]
    assert (times.values.tolist(), times.attrs) == ([0, 0.25, 0.5, 0.75], {"units": "second"})
    assert names(tmp_path / "a.nd2") == ["DAPI", "GFP"]
    with pytest.raises(ValueError, match=r"series must be one of those of .*, got 2"):
        oocpatch.Volume(f"{tmp_path / 'a.nd2'}::series=2")


def test_images_of_a_lif_are_chosen_by_number_or_by_name(tmp_path: Path) -> None:
    pytest.importorskip("liffile")
    cells = CELLS.swapaxes(0, 1)
    picture = np.stack([PLANE, 255 - PLANE, PLANE // 2], -1)
    file = tmp_path / "a.lif"
    write_lif(file, {"cells": cells, "picture": picture, "part": cells[:2, :, :9, :13]})
    np.testing.assert_array_equal(values(file), cells)
    assert names(file) == ["Cyan", "Magenta"]
    for address in ("series=1", "picture"):
        volume = oocpatch.Volume(f"{file}::{address}")
        assert volume.source.names == ("y", "x", "c")
        np.testing.assert_array_equal(values(f"{file}::{address}"), picture)
    np.testing.assert_array_equal(values(f"{file}::part"), cells[:2, :, :9, :13])
    with pytest.raises(ValueError, match=r"a.lif has 0 of the name other; it has series=0: cells .*; series=1: pict"):
        oocpatch.Volume(f"{file}::other")
    with pytest.raises(ValueError, match=r"series must be one of those of .*, got 3"):
        oocpatch.Volume(f"{file}::series=3")


def test_levels_and_times_of_an_ims_are_read_without_what_fills_up_their_chunks(tmp_path: Path) -> None:
    half = CELLS[:, :, ::2, 1::2]
    write_ims(tmp_path / "a.ims", [CELLS, half], times=2)
    volume = oocpatch.Volume(tmp_path / "a.ims", level=1)
    assert volume.source.names == ("t", "c", "z", "y", "x")
    np.testing.assert_array_equal(values(f"{tmp_path / 'a.ims'}::level=1"), [half, half + np.uint16(1)])
    np.testing.assert_allclose(volume.source.coords["x"].values[:2], [10.5, 11.5])  # centres, of voxels of 1 um
    np.testing.assert_allclose(volume.source.coords["z"].values, [11, 13, 15])
    assert names(tmp_path / "a.ims") == ["DAPI", "GFP"]
    write_ims(tmp_path / "flat.ims", [CELLS[:1, :1]])
    assert oocpatch.Volume(tmp_path / "flat.ims").source.names == ("y", "x")
    np.testing.assert_array_equal(values(tmp_path / "flat.ims"), CELLS[0, 0])
    with pytest.raises(ValueError, match=r"level must be one of .*\(0: 3 x 20 x 30; 1: 3 x 10 x 15\), got 2"):
        oocpatch.Volume(tmp_path / "a.ims", level=2)


@pytest.mark.parametrize(
    ("name", "library"), [("a.czi", "pylibCZIrw"), ("a.nd2", "nd2"), ("a.lif", "liffile"), ("a.ims", "h5py")]
)
def test_a_file_that_is_cut_short_is_refused_by_name(name: str, library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    write: dict[str, Any] = {
        "a.czi": lambda p: write_czi(p, [CELLS]),
        "a.nd2": lambda p: write_nd2(p, [CELLS.swapaxes(0, 1)[None]]),
        "a.lif": lambda p: write_lif(p, {"a": CELLS.swapaxes(0, 1)}),
        "a.ims": lambda p: write_ims(p, [CELLS]),
    }
    write[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match=f"cannot be read: .*{name}"):
        values(tmp_path / name)
