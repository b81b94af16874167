"""Promises on files that other programs misread: tiles left out, many axes, other byte orders, resized arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from torch.utils.data import DataLoader

import oocpatch
from oocpatch.planning.box import Box
from tests.without_linux import needs_fork

STACK = np.random.default_rng(0).integers(1, 1000, (2, 3, 4, 16, 24)).astype(np.uint16)  # t, z, c, y, x
PLANE = STACK[0, 0, 0]


def read(source: Any) -> Any:
    volume = oocpatch.Volume(source)
    return volume.read(Box.of_shape(volume.shape))


@pytest.mark.parametrize(("nodata", "value"), [(None, 0), ("7", 7)])
def test_tiles_that_a_tiff_leaves_out_have_its_value_for_no_data(
    nodata: str | None, value: int, tmp_path: Path
) -> None:
    tags = [] if nodata is None else [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(tmp_path / "a.tif", PLANE, tile=(16, 16), extratags=tags)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            tag.overwrite([0, *tag.value[1:]])
    expected = PLANE.copy()
    expected[:, :16] = value
    np.testing.assert_array_equal(read(tmp_path / "a.tif")[0], expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.tif", {"imagej": True}), ("a.ome.tif", {"ome": True}), ("b.ome.tif", {"ome": True, "tile": (16, 16)})],
)
def test_each_plane_of_a_stack_is_in_its_place(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / name, STACK, metadata={"axes": "TZCYX"}, **options)
    np.testing.assert_array_equal(read(tmp_path / name), np.moveaxis(STACK, 2, 0))


@pytest.mark.parametrize("kind", ["numpy", "zarr 2", "zarr 3", "tiff", "hdf5"])
def test_numbers_of_the_other_byte_order_are_read(kind: str, tmp_path: Path) -> None:
    source: Any = PLANE.astype(">u2")
    path = tmp_path / f"a.{kind}"
    if kind == "zarr 2":
        zarr.create_array(path, shape=PLANE.shape, dtype=">u2", chunks=(8, 8), zarr_format=2)[:] = PLANE
    elif kind == "zarr 3":
        big = zarr.codecs.BytesCodec(endian="big")
        zarr.create_array(path, shape=PLANE.shape, dtype="u2", chunks=(8, 8), serializer=big)[:] = PLANE
    elif kind == "tiff":
        tifffile.imwrite(path, PLANE, byteorder=">")
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["data"] = source
    values = read(source if kind == "numpy" else path)
    assert values.dtype == "u2"
    np.testing.assert_array_equal(values[0], PLANE)


@pytest.mark.parametrize("options", [{"zarr_format": 2, "separator": "/"}, {"zarr_format": 2}, {"zarr_format": 3}])
def test_an_array_that_was_shrunk_and_grown_is_read_as_zarr_reads_it(options: dict[str, Any], tmp_path: Path) -> None:
    separator = options.pop("separator", None)
    encoding = {"chunk_key_encoding": {"name": "v2", "separator": separator}} if separator else {}
    array = zarr.create_array(tmp_path / "a.zarr", data=PLANE, chunks=(8, 8), **options, **encoding)
    array.resize((9, 9))
    array.resize(PLANE.shape)
    expected = zarr.open_array(tmp_path / "a.zarr", mode="r")[:]
    assert not np.array_equal(expected, PLANE)
    np.testing.assert_array_equal(read(tmp_path / "a.zarr")[0], expected)


@needs_fork
def test_forked_workers_each_read_an_hdf5_file_for_themselves(tmp_path: Path) -> None:
    """They would share the position in the file that their parent has opened."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", data=PLANE, chunks=(8, 8), compression="gzip")
    grid = oocpatch.GridSampler(oocpatch.Subject(t1=tmp_path / "a.h5"), 8)
    assert grid[0].t1.data.shape == (1, 8, 8)  # opens it
    result = np.zeros_like(PLANE)
    for batch in DataLoader(grid, batch_size=1, num_workers=2, multiprocessing_context="fork"):
        for location, data in zip(batch.patch_location, batch.t1.data, strict=True):
            result[location.to_slices()] = data[0]
    np.testing.assert_array_equal(result, PLANE)
