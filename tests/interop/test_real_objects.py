"""Published nuclei and stained tissue as objects: a known number in many tiles, and polygons that are the objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from scipy import ndimage
from skimage import color, draw, segmentation

import oocpatch
from tests.support.instance_models import Renumber
from tests.support.real_data import Nuclei, fetch_nuclei, had

pytestmark = pytest.mark.real_data

Array = np.ndarray[Any, Any]

NUCLEI = 51
"""In the mask of the stack, each in one piece; the longest has 23 voxels along an axis."""


@pytest.fixture(scope="module")
def nuclei() -> Nuclei:
    return had(fetch_nuclei)


def tiled(mask: Array, shape: tuple[int, ...], place: Path) -> int:
    """Store as many copies of a mask as fit side by side, with numbers of their own, and return how many nuclei."""
    counts = tuple(n // m for n, m in zip(shape, mask.shape, strict=True))
    volume = zarr.create_array(place, shape=shape, chunks=(64,) * 3, dtype="uint32", dimension_names=("z", "y", "x"))
    for z in range(counts[0]):
        slab = np.zeros((mask.shape[0], *shape[1:]), np.uint32)
        for y, x in np.ndindex(counts[1:]):
            number = np.ravel_multi_index((z, y, x), counts)
            part = np.s_[:, y * mask.shape[1] : (y + 1) * mask.shape[1], x * mask.shape[2] : (x + 1) * mask.shape[2]]
            slab[part] = np.where(mask, mask + number * 200, 0)
        volume[z * mask.shape[0] : (z + 1) * mask.shape[0]] = slab
    return int(np.prod(counts)) * NUCLEI


def check_tiles(mask: Array, shape: tuple[int, ...], folder: Path) -> int:
    """Label, join and measure tiles of a mask; each nucleus must be there once, with its size. Return their number."""
    count = tiled(mask, shape, folder / "tiles.zarr")
    sizes = np.sort(np.bincount(mask.ravel())[1:])
    expected = np.repeat(sizes[sizes > 0], count // NUCLEI)
    components = oocpatch.label(folder / "tiles.zarr", folder / "components.zarr", per_class=True, progress=False)
    joined = oocpatch.predict(
        folder / "tiles.zarr", Renumber(), folder / "joined.zarr",
        patch_size=64, patch_overlap=28, overlap_mode="instances", work="light", progress=False,
    )  # fmt: skip
    for result in (components, joined):
        assert result.attrs["objects"] == count
        table = oocpatch.objects(result, properties=("area",), progress=False)
        np.testing.assert_array_equal(table["label"], np.arange(1, count + 1))
        np.testing.assert_array_equal(np.sort(table["area"]), expected)
    return count


def test_nuclei_of_many_tiles_are_counted_and_measured(nuclei: Nuclei, tmp_path: Path) -> None:
    assert check_tiles(tifffile.imread(nuclei.stack_mask), (64, 128, 128), tmp_path) == 2 * 2 * 2 * NUCLEI


def dark_nuclei(picture: Array) -> Array:
    """The nuclei of stained tissue `(y, x, 3)`: a watershed of what haematoxylin stains."""
    stain = ndimage.gaussian_filter(color.rgb2hed(picture)[..., 0], 1)
    dark = stain > 0.07
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(dark), 1.5)
    seeds, _ = ndimage.label(dark & (depth == ndimage.maximum_filter(depth, 9)))
    return np.asarray(segmentation.watershed(-depth, seeds, mask=dark), np.int32)


def burnt(features: list[dict[str, Any]], shape: tuple[int, int]) -> Array:
    """Labels of the pixels whose centres lie in polygons, by scikit-image."""
    labels = np.zeros(shape, np.uint32)
    for one in features:
        shapes = one["geometry"]["coordinates"]
        inside = np.zeros(shape, np.bool_)
        for ring in [r for polygon in ([shapes] if one["geometry"]["type"] == "Polygon" else shapes) for r in polygon]:
            x, y = np.array(ring).T - 0.5
            inside[draw.polygon(y, x, shape)] ^= True
        assert not labels[inside].any()
        labels[inside] = one["properties"]["label"]
    return labels


def test_polygons_of_the_nuclei_of_stained_tissue_are_these_nuclei(nuclei: Nuclei, tmp_path: Path) -> None:
    picture = np.asarray(Image.open(nuclei.stained))
    zarr.create_array(tmp_path / "slide.zarr", data=picture, chunks=(128, 128, 3), dimension_names=("y", "x", "c"))

    def model(patches: Array) -> Array:
        return np.stack([dark_nuclei(patch.transpose(1, 2, 0))[None] for patch in patches])

    cells = oocpatch.predict(
        tmp_path / "slide.zarr", oocpatch.NumpyModel(model), tmp_path / "cells.zarr",
        patch_size=160, patch_overlap=80, overlap_mode="instances", progress=False,
    )  # fmt: skip
    labels = np.asarray(cells).reshape(picture.shape[:2])
    count = cells.attrs["objects"]
    assert count == labels.max() == pytest.approx(dark_nuclei(picture).max(), rel=0.03)  # 320 in one piece
    oocpatch.objects(cells, tmp_path / "cells.geojson", progress=False)
    features = json.loads((tmp_path / "cells.geojson").read_text())["features"]
    assert [one["properties"]["label"] for one in features] == list(range(1, count + 1))
    np.testing.assert_array_equal(burnt(features, picture.shape[:2]), labels)
