"""Promises on the checks of our OME-Zarr: yaozarrs or `ome_faults` finds each fault, and a right output has none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.support.ome_checks import ome_faults, ome_image_paths
from tests.support.ome_runs import RUNS

Change = Callable[[Any], object]


def edit(node: str, change: Change) -> Callable[[Path], None]:
    """A change of the metadata of a node, and of its copy in consolidated metadata."""

    def apply(path: Path) -> None:
        content = json.loads((path / node / "zarr.json").read_text())
        change(content)
        (path / node / "zarr.json").write_text(json.dumps(content))
        if node:
            edit("", lambda m: m["consolidated_metadata"]["metadata"].update({node: content}))(path)

    return apply


def image(change: Change, node: str = "") -> Callable[[Path], None]:
    """A change of the OME metadata of a group."""
    return edit(node, lambda m: change(m["attributes"]["ome"]))


def transform(level: int, kind: int, values: list[float], node: str = "") -> Callable[[Path], None]:
    name = ("scale", "translation")[kind]

    def change(ome: Any) -> None:
        ome["multiscales"][0]["datasets"][level]["coordinateTransformations"][kind][name] = values

    return image(change, node)


def array(node: str, values: Any) -> Callable[[Path], None]:
    """Another array in place of one, and no consolidated metadata."""

    def apply(path: Path) -> None:
        names = zarr.open_array(path / node, mode="r").metadata.dimension_names  # type: ignore[union-attr]
        shutil.rmtree(path / node)
        zarr.create_array(path / node, data=values, dimension_names=names)
        edit("", lambda m: m.pop("consolidated_metadata"))(path)

    return apply


def stale(change: Change) -> Callable[[Path], None]:
    """A change of consolidated metadata alone."""
    return edit("", lambda m: change(m["consolidated_metadata"]["metadata"]))


WINDOW = {"min": 0, "max": 1, "start": 5, "end": 2}
TABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "scale": (transform(1, 0, [1.0, 3.0]), r"\.: scale1/image of shape \(17, 14\) does not fit its scale"),
    "translation": (transform(2, 1, [0.25, 0.25]), "scale2/image lies at .* not at the centre"),
    "order of levels": (
        image(lambda o: o["multiscales"][0]["datasets"].reverse()),
        "not ordered from highest to lowest",
    ),
    "level": (lambda p: shutil.rmtree(p / "scale2/image"), "scale2/image"),
    "names": (edit("scale1/image", lambda m: m.update(dimension_names=["x", "y"])), "dimension_names"),
    "no names": (edit("scale1/image", lambda m: m.pop("dimension_names")), "dimension_names"),
    "unit": (image(lambda o: o["multiscales"][0]["axes"][0].update(unit="um")), "unit 'um'"),
    "dtype": (array("scale1/image", np.zeros((17, 14))), "dtype float64, not float32"),
    "chunks": (
        edit("scale0/image", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1 << 15, 1 << 13])),
        "scale0/image has chunks of more than",
    ),
    "coordinate": (array("scale1/y", np.arange(17.0)), "scale1/y is not 17 values from 0.25 by 1"),
    "short coordinate": (array("scale1/y", np.arange(3.0)), "scale1/y is not 17 values"),
    "unlisted": (image(lambda o: o.update(labels=["nuclei"]), "labels"), r"labels lists \['nuclei'\]"),
    "label gone": (lambda p: shutil.rmtree(p / "labels/cells"), "cells"),
    "no image-label": (image(lambda o: o.pop("image-label"), "labels/cells"), "image-label"),
    "label elsewhere": (transform(0, 1, [9.0, 9.0], "labels/cells"), "labels/cells has the starts"),
    "label of fewer levels": (image(lambda o: o["multiscales"][0]["datasets"].pop(), "labels/cells"), "4 datasets"),
    "label of floats": (array("labels/cells/scale0/image", np.zeros((33, 28), "f4")), "integer"),
    "channels": (image(lambda o: o["omero"]["channels"].append(o["omero"]["channels"][0])), "omero describes 2 of 1"),
    "colour": (image(lambda o: o["omero"]["channels"][0].update(color="green")), "hex color"),
    "window": (image(lambda o: o["omero"]["channels"][0].update(window=WINDOW)), "omero has the window 0, 5, 2, 1"),
    "stale": (stale(lambda nodes: nodes["scale1/image"].update(shape=[1, 1])), "consolidated"),
    "not consolidated": (stale(lambda nodes: nodes.pop("scale1/image")), "consolidated"),
    "consolidated and gone": (stale(lambda nodes: nodes.update(old=nodes["scale0"])), "consolidated"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checks") / "out.zarr"
    RUNS["labels beside an image"].predict(path)
    for voxels in path.rglob("image/c"):  # no check reads them
        shutil.rmtree(voxels)
    return path


@pytest.mark.parametrize("name", TABLE, ids=lambda name: name.replace(" ", "-"))
def test_each_fault_is_found(name: str, written: Path, tmp_path: Path) -> None:
    change, message = TABLE[name]
    path = tmp_path / "broken.zarr"
    shutil.copytree(written, path)
    change(path)
    try:
        faults = "; ".join(ome_faults(path))
    except (ValueError, KeyError, Warning) as error:  # of yaozarrs
        faults = str(error)
    assert re.search(message, faults), faults


def test_a_right_output_has_no_faults(written: Path) -> None:
    assert ome_faults(written) == []
    assert ome_image_paths(written) == ["", "labels/cells", "labels/nuclei"]
