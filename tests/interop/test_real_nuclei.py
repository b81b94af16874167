"""Published nuclei with their masks, in the format they came in and in others: values, labels, masks and samples."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorstore
import tifffile
import torch
import xarray as xr

import oocpatch
from oocpatch.planning.box import Box
from tests.support.ome_runs import coarser
from tests.support.real_data import Nuclei, fetch_nuclei, had

pytestmark = pytest.mark.real_data

Array = np.ndarray[Any, Any]

NAMES = ("flat", "flat_mask", "stack", "stack_mask")
BRIGHT = 40
"""Of `flat`: what is brighter than this is mostly nucleus, and the other way round."""


@pytest.fixture(scope="module")
def nuclei() -> Nuclei:
    return had(fetch_nuclei)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_tiff_has_the_values_that_tifffile_reads(name: str, nuclei: Nuclei) -> None:
    path: Path = getattr(nuclei, name)
    expected = tifffile.imread(path)
    volume = oocpatch.Volume(path)
    assert volume.names == tuple("zyx"[-expected.ndim :])
    assert (volume.shape, volume.dtype) == (expected.shape, expected.dtype)
    assert volume.chunks == ((512, 512) if expected.ndim == 2 else (1, 61, 57))  # a strip is as large as a plane
    np.testing.assert_array_equal(volume.read(Box.of_shape(volume.shape))[0], expected)
    start, stop = tuple(n // 4 for n in volume.shape), tuple(n // 2 for n in volume.shape)
    part = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(volume.read(Box(start, stop))[0], expected[part])


def as_it_is(path: Path, tiff: Path) -> str:
    del path
    return str(tiff)


def tiled(path: Path, tiff: Path) -> str:
    tifffile.imwrite(path.with_suffix(".ome.tif"), tifffile.imread(tiff), tile=(16, 16), metadata={"axes": "ZYX"})
    return str(path.with_suffix(".ome.tif"))


def hdf5(path: Path, tiff: Path) -> str:
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("plate/well", data=tifffile.imread(tiff), chunks=(8, 16, 16), compression="gzip")
    return f"{path.with_suffix('.h5')}::/plate/well"


def n5(path: Path, tiff: Path) -> str:
    data = tifffile.imread(tiff)
    metadata = {"dimensions": data.shape[::-1], "blockSize": [16, 16, 8], "dataType": "uint16", "axes": list("xyz")}
    where = {"driver": "file", "path": str(path.with_suffix(".n5"))}
    store = tensorstore.open({"driver": "n5", "kvstore": where, "metadata": metadata}, create=True).result()
    store.write(data.T).result()
    return str(path.with_suffix(".n5"))


@pytest.mark.parametrize("make", [as_it_is, tiled, hdf5, n5])
@pytest.mark.parametrize("name", ["stack", "stack_mask"])
def test_nuclei_and_their_labels_come_back_from_each_format(
    name: str, make: Any, nuclei: Nuclei, tmp_path: Path
) -> None:
    expected = tifffile.imread(getattr(nuclei, name))
    address = make(tmp_path / "made", getattr(nuclei, name))
    made = oocpatch.convert(address, tmp_path / "a.zarr", axes="zyx", chunks=16, shards=32, progress=False)
    np.testing.assert_array_equal(made, expected)
    assert made.dtype == expected.dtype
    predicted = oocpatch.predict(
        address, torch.nn.Identity(), tmp_path / "b.zarr",
        axes="zyx", patch_size=16, patch_overlap=8, overlap_mode="crop", progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(predicted, expected)
    assert predicted.dtype == expected.dtype


def test_nuclei_are_found_by_their_brightness_as_without_patches(nuclei: Nuclei, tmp_path: Path) -> None:
    image, mask = tifffile.imread(nuclei.flat), tifffile.imread(nuclei.flat_mask)

    def bright(patches: torch.Tensor) -> torch.Tensor:
        return (patches.to(torch.int32) > BRIGHT).to(torch.uint8)

    found = oocpatch.predict(
        nuclei.flat, bright, tmp_path / "out.zarr",
        patch_size=96, patch_overlap=32, overlap_mode="crop", progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(found, image > BRIGHT)
    both = np.count_nonzero(found.values & (mask > 0))
    dice = 2 * both / (np.count_nonzero(found) + np.count_nonzero(mask))
    assert dice > 0.85  # 0.860: it is the nuclei that are found


def test_a_mask_of_nuclei_leaves_out_the_patches_without_one(nuclei: Nuclei, tmp_path: Path) -> None:
    image, mask = tifffile.imread(nuclei.flat), tifffile.imread(nuclei.flat_mask)
    edge, called = 16, []

    def again(patches: torch.Tensor) -> torch.Tensor:
        called.append(len(patches))
        return patches

    found = oocpatch.predict(
        nuclei.flat, again, tmp_path / "out.zarr",
        mask=nuclei.flat_mask, patch_size=edge, overlap_mode="crop", output_fill=7, progress=False,
    )  # fmt: skip
    patches = (mask > 0).reshape(512 // edge, edge, 512 // edge, edge).any(axis=(1, 3))
    assert 0.2 < patches.mean() < 0.8
    wanted = patches.repeat(edge, 0).repeat(edge, 1)
    np.testing.assert_array_equal(found, np.where(wanted, image, 7))
    assert found.attrs["uncovered_voxels"] == np.count_nonzero(~wanted)
    assert sum(called) <= patches.sum() + 2  # two more to ask what the model gives


def test_a_label_is_sampled_where_it_lies(nuclei: Nuclei) -> None:
    mask = tifffile.imread(nuclei.stack_mask)
    subject = oocpatch.Subject(image=nuclei.stack, mask=nuclei.stack_mask)
    # A centre that a patch of 8 fits around: the middle of the largest nucleus that has one.
    inside = mask[4:-3, 4:-3, 4:-3]
    label = int(np.bincount(inside[inside > 0]).argmax())
    sampler = oocpatch.LabelSampler(subject, 8, "mask", {label: 1.0}, num_patches=20, seed=1)
    for patch in sampler:
        assert int(patch.mask.data[0, 4, 4, 4]) == label
        box = patch.patch_location.to_slices()
        np.testing.assert_array_equal(patch.image.data[0], tifffile.imread(nuclei.stack)[box])


def test_labels_of_nuclei_keep_their_values_in_a_pyramid(nuclei: Nuclei, tmp_path: Path) -> None:
    oocpatch.predict(
        nuclei.stack_mask, torch.nn.Identity(), tmp_path / "out.zarr",
        patch_size=16, patch_overlap=4, overlap_mode="crop", output_chunks=16, output_format="ome-zarr", progress=False,
    )  # fmt: skip
    tree = xr.open_datatree(tmp_path / "out.zarr", engine="zarr")
    levels = [np.asarray(tree[f"scale{k}/image"]) for k in range(len(tree.children))]
    assert [level.shape for level in levels] == [(31, 61, 57), (16, 31, 29), (8, 16, 15)]
    np.testing.assert_array_equal(levels[0], tifffile.imread(nuclei.stack_mask))
    for above, level in itertools.pairwise(levels):
        np.testing.assert_array_equal(level, coarser(above, (2, 2, 2), labels=True))
