"""Stained tissue as a slide: levels of a tiled pyramid, voxel sizes, and one command from the slide to labels."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import openslide
import pytest
import tifffile
import xarray as xr
from PIL import Image

import oocpatch
from oocpatch.planning.box import Box
from tests.support.real_data import fetch_nuclei, had

pytestmark = pytest.mark.real_data

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).parents[2]
MICROMETERS = 0.5
"""Edge of a pixel of the largest level."""
MIB = 1 << 20


@pytest.fixture(scope="module")
def tissue() -> Array:
    """`(300, 500, 3)`."""
    return np.asarray(Image.open(had(fetch_nuclei).stained))


def mirrored(tissue: Array, height: int, width: int) -> Array:
    """Tissue without end."""
    return np.pad(tissue, ((0, height - tissue.shape[0]), (0, width - tissue.shape[1]), (0, 0)), "symmetric")


def halved(image: Array) -> Array:
    height, width, _ = image.shape
    total = image.reshape(height // 2, 2, width // 2, 2, 3).sum(axis=(1, 3), dtype=np.uint16)
    return (total // 4).astype(np.uint8)


def write_slide(path: Path, image: Array, count: int, *, inside: bool = False, **options: Any) -> list[Array]:
    """A tiled pyramid; its smaller levels inside the first page (as SubIFDs) or as pages of their own."""
    levels = list(itertools.accumulate(range(count - 1), lambda above, _: halved(above), initial=image))
    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            per_centimeter = 1e4 / MICROMETERS / 2**number
            file.write(
                level, photometric="rgb", subfiletype=min(number, 1), metadata=None,
                subifds=count - 1 if inside and not number else None,
                resolution=(per_centimeter, per_centimeter), resolutionunit="CENTIMETER", **options,
            )  # fmt: skip
    return levels


@pytest.mark.parametrize(("kind", "inside"), [("tiff", False), ("tiff", True), ("slide", False)])
@pytest.mark.parametrize(
    "coding", [{"compression": "deflate"}, {"compression": "jpeg", "compressionargs": {"level": 95}}]
)
def test_levels_of_stained_tissue_are_what_the_format_s_library_reads(
    coding: dict[str, Any], kind: str, inside: bool, tissue: Array, tmp_path: Path
) -> None:
    path = tmp_path / "slide.tif"
    levels = write_slide(path, mirrored(tissue, 700, 1204), 3, inside=inside, tile=(128, 128), **coding)
    for number, level in enumerate(levels):
        volume = oocpatch.Volume(f"{path}::format={kind},level={number}")
        found = volume.read(Box.of_shape(volume.shape)).transpose(1, 2, 0)
        if kind == "slide":
            with openslide.OpenSlide(str(path)) as slide:
                whole = slide.read_region((0, 0), number, slide.level_dimensions[number])
            np.testing.assert_array_equal(found, np.asarray(whole)[..., :3])
        else:
            np.testing.assert_array_equal(found, tifffile.imread(path, level=number))
        if coding["compression"] == "deflate":
            np.testing.assert_array_equal(found, level)
        # JPEG loses some; nothing is elsewhere, not even by one pixel, or of another hue.
        lost, moved = (np.abs(other.astype(int) - level).mean() for other in (found, np.roll(level, 1, axis=1)))
        assert lost < moved / 2
        assert (volume.source.names, volume.source.chunks) == (("y", "x", "c"), (128, 128, 3))
        for axis, n in zip("yx", level.shape, strict=False):
            # A pixel of a level lies at the centre of those that it stands for.
            places = MICROMETERS * (2**number * np.arange(n) + (2**number - 1) / 2)
            np.testing.assert_allclose(volume.source.coords[axis], places, rtol=1e-9)
            assert volume.source.coords[axis].attrs["units"] == "micrometer"


def test_stained_tissue_comes_back_from_hdf5_and_from_a_slide_that_is_converted(tissue: Array, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("image", data=tissue, chunks=(64, 64, 3), compression="gzip")
    write_slide(tmp_path / "a.tif", tissue, 2, tile=(64, 64), compression="deflate")
    from_hdf5 = oocpatch.convert(tmp_path / "a.h5", tmp_path / "a.zarr", axes="yxc", chunks=64, progress=False)
    from_tiff = oocpatch.convert(tmp_path / "a.tif", tmp_path / "b.zarr", chunks=64, shards=128, progress=False)
    for made in (from_hdf5, from_tiff):
        assert made.dims == ("c", "y", "x")
        np.testing.assert_array_equal(made.transpose("y", "x", "c"), tissue)
    assert from_tiff.x.values[:3].tolist() == [0, 0.5, 1]


STAINS = np.array([[192, 138, 178], [153, 99, 145], [95, 55, 106]], np.float32)
"""Three shades of the tissue: pale, pink, and the violet of nuclei."""

NETWORK = f"""
import torch

STAINS = torch.tensor({STAINS.tolist()})


class Stains(torch.nn.Module):
    '''The stain that is nearest to the mean over 5 x 5 pixels: |x - s|^2 is least where 2 s x - |s|^2 is largest.'''

    def forward(self, patches):
        mean = torch.nn.functional.avg_pool2d(patches.float(), 5, 1, 2, count_include_pad=False)
        scores = torch.tensordot(2 * STAINS, mean[0], 1)
        return scores.sub_((STAINS**2).sum(1)[:, None, None])[None]
"""


def stains(image: Array) -> Array:
    """What the network gives for the whole image, by running sums of numpy."""
    height, width, _ = image.shape

    def summed(values: Array) -> Array:
        padded = np.pad(values, ((2, 2), (2, 2), (0, 0)))
        rows = sum(padded[i : i + height] for i in range(5))
        return sum(rows[:, i : i + width] for i in range(5))

    mean = summed(image.astype(np.float32)) / summed(np.ones((height, width, 1), np.float32))
    best, found = np.full((height, width), -np.inf, np.float32), np.zeros((height, width), np.uint8)
    for label, stain in enumerate(STAINS):
        score = mean @ (2 * stain) - (stain**2).sum()
        found[score > best] = label
        best = np.maximum(best, score)
    return found


def modes(labels: Array) -> Array:
    """The most frequent of 2 x 2 labels, the smallest of equals."""
    height, width = labels.shape
    parts = labels.reshape(height // 2, 2, width // 2, 2)
    return np.stack([(parts == label).sum(axis=(1, 3), dtype=np.uint8) for label in range(3)]).argmax(0)


def test_one_command_makes_labels_with_a_pyramid_of_a_slide_within_its_memory(tissue: Array, tmp_path: Path) -> None:
    """48 MiB of pixels in tiles of JPEG, under 44 MiB."""
    shape, limit = (4096, 4096), 44 * MIB
    write_slide(
        tmp_path / "slide.tif", mirrored(tissue, *shape), 3,
        tile=(256, 256), compression="jpeg", compressionargs={"level": 90},
    )  # fmt: skip
    (tmp_path / "net.py").write_text(NETWORK)
    command = [
        "predict", "slide.tif", "labels.zarr", "--model", "net.py:Stains", "--patch-size", "512",
        "--patch-overlap", "64", "--postprocess", "argmax", "--output-format", "ome-zarr", "--max-memory", str(limit),
        "--progress", "none",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    child = [sys.executable, "-m", "tests.support.slide_child", "added.json", *command]
    done = subprocess.run(child, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "added.json").read_text())["added"] <= limit

    tree = xr.open_datatree(tmp_path / "labels.zarr", engine="zarr")
    levels = [np.asarray(tree[f"scale{k}/image"]) for k in range(len(tree.children))]
    levels = [level.reshape(level.shape[-2:]) for level in levels]
    assert [level.shape for level in levels] == [(4096 >> k, 4096 >> k) for k in range(len(levels))]
    assert max(levels[-1].shape) <= 512
    image = tifffile.imread(tmp_path / "slide.tif", level=0)
    expected = stains(image[1022:3074])[2:-2]  # the rows in the middle, across all blocks
    for label in range(3):
        found, wanted = levels[0][1024:3072] == label, expected == label
        assert wanted.mean() > 0.2
        dice = 2 * np.count_nonzero(found & wanted) / (np.count_nonzero(found) + np.count_nonzero(wanted))
        assert dice > 0.9999  # what is not equal lies where two stains are equally near
    for above, level in itertools.pairwise(levels):
        np.testing.assert_array_equal(level, modes(above))
    np.testing.assert_allclose(tree["scale1/x"].values[:3], [0.25, 1.25, 2.25])
    assert tree["scale1/x"].attrs["units"] == "micrometer"
