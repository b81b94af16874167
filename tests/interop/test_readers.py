"""Other programs read what is written: ome-zarr, ome-zarr-models, bioio, tensorstore, napari, geopandas, s3fs.

They need versions of libraries that oocpatch's own environment does not have, so they run in one of their own, which
`.ci/readers.txt` pins: `python3.11 -m venv readers && readers/bin/pip install --no-deps -r .ci/readers.txt`, and then
`OOCPATCH_READERS=readers/bin/python pytest -m readers`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr

import oocpatch
from tests.faults.test_stores_output import assert_same, files
from tests.support.ome_runs import RUNS, Run, coarser, image_groups
from tests.support.stores import BUCKET, served


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all readers say of the images of all runs."""
    folder = tmp_path_factory.mktemp("readers") / "runs"  # napari makes a group of what is two folders above labels
    for number, (name, run) in enumerate(RUNS.items()):
        output = folder / f"{number}.zarr"
        run.predict(output)
        for head, group in image_groups(name, output).items():
            key = f"{name.replace(' ', '_')}-{head}"
            (folder / f"{key}.txt").write_text(str(group))
            (folder / "expected" / key).mkdir(parents=True)
            levels = len(list(group.glob("scale*")))
            values = zarr.open_array(group / "scale0" / "image", mode="r")[...]
            for level in range(levels):
                if level:  # by the oracle, not from the file
                    shape = zarr.open_array(group / f"scale{level}" / "image", mode="r").shape
                    step = tuple(1 if m == n else 2 for n, m in zip(values.shape, shape, strict=True))
                    values = coarser(values, step, labels=values.dtype.kind in "iu")
                np.save(folder / "expected" / key / f"{level}.npy", values)
    child = Path(__file__).parents[1] / "support" / "reader_child.py"
    command = [os.environ["OOCPATCH_READERS"], str(child), str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.readers
def test_other_programs_see_the_same_axes_scales_and_voxels(answers: dict[str, Any]) -> None:
    assert len(answers) >= 6 * len(RUNS)
    for key, seen in answers.items():
        name, head = key.partition(" ")[0].replace("_", " ").rsplit("-", 1)
        run = RUNS[name]
        assert all(seen["same"]), key
        assert len(seen["same"]) > 1, key
        factor = {"half": 2.0, "double": 0.5}.get(head, 1.0)
        sizes = [1.0 if a == "c" else run.sizes[a] * (factor if a in "yx" else 1) for a in run.axes]
        kinds = {"t": ["time", "second"], "c": ["channel", None]}
        if "axes" in seen:
            assert seen["axes"] == [[a, *kinds.get(a, ["space", "micrometer"])] for a in run.axes], key
            assert np.allclose(seen["scales"][0], sizes), key
        elif "scales" in seen:  # bioio: always t, c, z, y, x
            of_axes = dict(zip(run.axes, sizes, strict=True))
            assert [s for s, a in zip(seen["scales"][0], "tczyx", strict=True) if a in of_axes and a in "zyx"] == (
                pytest.approx([of_axes[a] for a in "zyx" if a in of_axes])
            ), key
        if "labelled" in seen:
            assert_layer(run, name, head, sizes, seen)
        if "channels" in seen and "c" in run.axes:
            assert seen["channels"] == [f"stain {n}" for n in range(run.shape[run.axes.index("c")])], key
        if "dims" in seen:
            assert seen["dims"] == [list(run.axes)] * len(seen["same"]), key


def assert_layer(run: Run, name: str, head: str, sizes: list[float], seen: dict[str, Any]) -> None:
    """What napari shows is labels or an image, of the right channels, with the right names, units and scales."""
    labels = name == "labels" or head in {"nuclei", "cells"}
    assert seen["kind"] == ("labels" if labels else "image"), (name, head)
    channel = run.axes.find("c")
    assert seen["channel_axis"] == (None if channel < 0 else channel), (name, head)
    others = [(a, size) for a, size in zip(run.axes, sizes, strict=True) if a != "c"]
    assert seen["labelled"] == [a for a, _ in others], (name, head)
    assert seen["spacing"] == pytest.approx([size for _, size in others]), (name, head)
    assert seen["units"] == ["second" if a == "t" else "micrometer" for a, _ in others], (name, head)
    if not labels:  # omero: names, and the contrast
        names = [f"stain {n}" for n in range(run.shape[channel])] if channel >= 0 else [head]
        found = [seen["names"]] if channel < 0 else seen["names"]
        assert [n.rpartition(": ")[2] for n in found] == names, (name, head)
        contrast = [seen["contrast"]] if channel < 0 else seen["contrast"]
        assert len(contrast) == len(names)
        assert all(0 <= low < high <= 6 for low, high in contrast), (name, head)
    if name == "labels beside an image":
        assert seen["others"] == ["labels/labels/cells", "labels/labels/nuclei"]


POLYGONS = """
import geopandas, json, numpy as np, shapely, sys
folder = sys.argv[1]
labels = np.load(f"{folder}/labels.npy")
shapes = geopandas.read_file(f"{folder}/cells.geojson")
y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
burnt = np.zeros(labels.shape, labels.dtype)
for label, shape in zip(shapes["label"], shapes.geometry, strict=True):
    burnt[shapely.contains_xy(shape, x, y)] = label
valid, same = bool(shapes.geometry.is_valid.all()), bool((burnt == labels).all())
print(json.dumps({"valid": valid, "same": same}))
"""


@pytest.mark.readers
def test_geopandas_reads_polygons_that_are_the_objects(tmp_path: Path) -> None:
    place = np.stack(np.mgrid[:40, :50]) // 10  # touching cells, one with a hole, and one in two pieces
    labels = (1 + place[0] * 5 + place[1]).astype(np.uint32)
    labels[13:16, 14:17] = 0
    labels[34:36, :] = 99
    np.save(tmp_path / "labels.npy", labels)
    oocpatch.objects(labels, tmp_path / "cells.geojson", axes="yx", progress=False)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["OOCPATCH_READERS"], "-c", POLYGONS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"valid": True, "same": True}


S3FS = """
import json, os, s3fs, sys
fs = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
root = sys.argv[1]
print(json.dumps({name.removeprefix(root + "/"): fs.cat_file(name).hex() for name in fs.find(root)}))
"""


@pytest.mark.readers
def test_another_client_of_object_stores_reads_the_bytes_of_a_local_run(tmp_path: Path) -> None:
    """That client also parses strictly what the server of the tests answers."""
    data = np.arange(1, 24 * 32 + 1, dtype=np.float32).reshape(24, 32)
    settings: dict[str, Any] = {
        "axes": "yx",
        "patch_size": 8,
        "patch_overlap": 4,
        "output_chunks": 8,
        "progress": False,
    }
    with served(tmp_path / "server") as bucket:
        oocpatch.predict(data, torch.nn.Identity(), bucket.url("out.zarr"), **settings)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [os.environ["OOCPATCH_READERS"], "-c", S3FS, f"{BUCKET}/out.zarr"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    oocpatch.predict(data, torch.nn.Identity(), tmp_path / "out", **settings)
    assert_same({name: bytes.fromhex(text) for name, text in json.loads(done.stdout).items()}, files(tmp_path / "out"))


RASTERIO = """
import json, pathlib, sys, numpy as np, rasterio
folder = pathlib.Path(sys.argv[1])
if not (folder / "in.tif").exists():
    pixels, place = np.load(folder / "pixels.npy"), rasterio.Affine(10, 0, 400000.5, 0, -20, 5800000)
    shape = dict(count=3, height=300, width=200, dtype=pixels.dtype)
    with rasterio.open(folder / "in.tif", "w", "GTiff", crs="EPSG:32633", transform=place, tiled=True, **shape) as file:
        file.write(pixels)
else:
    with rasterio.open(folder / "in.tif") as a, rasterio.open(folder / "out.tif") as b:
        same = bool((a.read() == b.read()).all())
        print(json.dumps([same, a.crs == b.crs, a.transform == b.transform, b.descriptions, b.overviews(1)]))
"""


@pytest.mark.readers
def test_rasterio_finds_bands_place_and_coordinate_system_of_its_geotiff_in_the_result(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["OOCPATCH_READERS"], "-c", RASTERIO, str(tmp_path)]
    np.save(tmp_path / "pixels.npy", np.arange(3 * 300 * 200, dtype=np.uint16).reshape(3, 300, 200))
    subprocess.run(command, env=environment, check=True)
    options: dict[str, Any] = {"patch_size": 64, "overlap_mode": "crop", "progress": False}
    scores = oocpatch.predict(tmp_path / "in.tif", torch.nn.Identity(), tmp_path / "out.zarr", **options)
    assert isinstance(scores, xarray.DataArray)
    scores = scores.assign_coords(c=["water", "wood", "Stein & Bö"])
    oocpatch.export(scores, tmp_path / "out.tif", progress=False)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [True, True, True, ["water", "wood", "Stein & Bö"], [2]]
