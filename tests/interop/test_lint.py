"""Promises on lint: each rule finds the fault that it is for, and names its place.

That all that oocpatch writes has no faults is a promise of `test_ome_output`.
"""

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
from click.testing import CliRunner

import oocpatch
from oocpatch.cli.main import main
from tests.support.ome_runs import RUNS


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def ome(group: Path) -> Any:
    return json.loads((group / "zarr.json").read_text())["attributes"]["ome"]


def image(change: Callable[[Any], None], group: str = "") -> Callable[[Path], None]:
    """A change of the multiscale of a group, and of its copy in consolidated metadata if it has one."""

    def apply(path: Path) -> None:
        edit(path / group / "zarr.json", lambda m: change(m["attributes"]["ome"]["multiscales"][0]))
        if group:
            edit(path / "zarr.json", lambda m: change(_said(m, group)["attributes"]["ome"]["multiscales"][0]))

    return apply


def _said(metadata: Any, node: str) -> Any:
    return metadata["consolidated_metadata"]["metadata"][node]


def array(node: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """A change of the metadata of an array, and of its copy."""

    def apply(path: Path) -> None:
        edit(path / node / "zarr.json", change)
        edit(path / "zarr.json", lambda m: change(_said(m, node)))

    return apply


def set_transform(level: int, kind: int, values: list[float]) -> Callable[[Any], None]:
    name = ("scale", "translation")[kind]

    def change(multiscale: Any) -> None:
        multiscale["datasets"][level]["coordinateTransformations"][kind][name] = values

    return change


def unlist_labels(path: Path) -> None:
    def change(metadata: Any) -> None:
        metadata["attributes"]["ome"]["labels"] = ["nuclei"]

    array("labels", change)(path)


def no_image_label(path: Path) -> None:
    def change(metadata: Any) -> None:
        del metadata["attributes"]["ome"]["image-label"]

    array("labels/cells", change)(path)


def wrong_source(path: Path) -> None:
    array("labels/cells", lambda m: m["attributes"]["ome"]["image-label"].update(source={"image": "../"}))(path)


def twice_coloured(path: Path) -> None:
    colors = [{"label-value": 1, "rgba": [0, 0, 0, 255]}] * 2
    array("labels/cells", lambda m: m["attributes"]["ome"]["image-label"].update(colors=colors))(path)


def channels_described(count: int, **more: Any) -> Callable[[Path], None]:
    channels = [{"color": "00FF00", "label": "a", **more} for _ in range(count)]

    def apply(path: Path) -> None:
        edit(path / "zarr.json", lambda m: m["attributes"]["ome"].update(omero={"channels": channels}))

    return apply


def other_array(node: str, values: Any, chunks: Any = None) -> Callable[[Path], None]:
    """Another array in place of one, and consolidated metadata without both."""

    def apply(path: Path) -> None:
        old = json.loads((path / node / "zarr.json").read_text())
        shutil.rmtree(path / node)
        names = old.get("dimension_names")
        zarr.create_array(path / node, data=values, chunks=chunks or "auto", dimension_names=names)
        edit(path / "zarr.json", lambda m: m.pop("consolidated_metadata"))

    return apply


def gone(node: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        shutil.rmtree(path / node)
        edit(path / "zarr.json", lambda m: m.pop("consolidated_metadata"))

    return apply


def channel_last(multiscale: Any) -> None:
    multiscale["axes"].append({"name": "c", "type": "channel"})
    for dataset in multiscale["datasets"]:
        for transform in dataset["coordinateTransformations"]:
            transform[transform["type"]].append(1.0)


def tiny_chunks(metadata: Any) -> None:
    metadata["shape"] = [3300, 2800]
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [4, 4]


def stale(path: Path) -> None:
    edit(path / "zarr.json", lambda m: _said(m, "scale1/image").update(shape=[1, 1]))


def listed_by_nobody(path: Path) -> None:
    edit(path / "zarr.json", lambda m: m["consolidated_metadata"]["metadata"].pop("scale1/image"))


def nothing_there(path: Path) -> None:
    def change(metadata: Any) -> None:
        metadata["consolidated_metadata"]["metadata"]["old"] = _said(metadata, "scale0")

    edit(path / "zarr.json", change)


HALF = [0.5, 0.5]
TABLE: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "unit": (image(lambda m: m["axes"][0].update(unit="um")), "", "units", "got 'um' of y; write micrometer"),
    "unknown unit": (image(lambda m: m["axes"][0].update(unit="pixel")), "", "units", "such as micrometer"),
    "no type": (image(lambda m: m["axes"][0].pop("type")), "", "axes", "each axis must have a type"),
    "order of axes": (image(lambda m: m["axes"].reverse()), "", "axes", "must come as z, y, x, got x, y"),
    "kinds of axes": (image(lambda m: m["axes"][0].update(type="time")), "", "axes", "two or three axes in space"),
    "channel last": (
        image(channel_last),
        "",
        "axes",
        "time, then channel, then space",
    ),
    "scale": (image(set_transform(1, 0, [1.0, 3.0])), "scale1/image", "shape", r"got x 14 for 4.66667"),
    "negative scale": (image(set_transform(1, 0, [1.0, -1.0])), "scale1/image", "scale", r"got \[1.0, -1.0\]"),
    "translation": (
        image(set_transform(2, 1, [0.25, 0.25])),
        "scale2/image",
        "place",
        r"\(ratio - 1\) / 2 = 1.5 voxels of the finest level along y, got 0.5; correct",
    ),
    "no translation": (
        image(lambda m: (m.pop("type"), m["datasets"][1]["coordinateTransformations"].pop())),
        "scale1/image",
        "place",
        "got 0; correct the translation, or give the multiscale the type 'nearest'",
    ),
    "sampled": (
        image(lambda m: (m.update(type="nearest"), set_transform(1, 1, [0.0, 0.75])(m))),
        "scale1/image",
        "place",
        "0 to 1 voxels of the finest level along x.*, got 1.5",
    ),
    "order of levels": (
        image(lambda m: m["datasets"].insert(0, m["datasets"].pop(1))),
        "scale0/image",
        "order",
        r"got \(33, 28\) after \(17, 14\)",
    ),
    "no such level": (gone("scale2/image"), "scale2/image", "level", "remove it from datasets"),
    "one axis": (
        image(lambda m: m["axes"].insert(0, {"name": "z", "type": "space"})),
        "",
        "metadata",
        "scale must have one value per axis",
    ),
    "names": (
        array("scale1/image", lambda m: m.update(dimension_names=["x", "y"])),
        "scale1/image",
        "names",
        r"names of the axes \(y, x\), got x, y",
    ),
    "no names": (
        array("scale1/image", lambda m: m.pop("dimension_names")),
        "scale1/image",
        "names",
        "got none",
    ),
    "dtype": (
        other_array("scale1/image", np.zeros((17, 14), "f8")),
        "scale1/image",
        "dtype",
        "got float64 below float32",
    ),
    "large chunk": (
        array("scale0/image", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1 << 15, 1 << 13])),
        "scale0/image",
        "chunks",
        "256.0 MiB, got 1.0 GiB",
    ),
    "many files": (array("scale0/image", tiny_chunks), "scale0/image", "chunks", r"got 577,500 of 64 B \(\(4, 4\)\)"),
    "coordinate": (
        other_array("scale1/y", np.arange(17) * 1.0),
        "scale1/y",
        "coordinates",
        "17 evenly spaced values from 0.25 on by 1, .*, got 0 to 16; correct",
    ),
    "uneven": (
        other_array("scale1/y", np.array([0.25, *np.arange(1, 16) * 1.0, 16.25])),
        "scale1/y",
        "coordinates",
        "not evenly spaced; no viewer sees such places",
    ),
    "short coordinate": (other_array("scale1/y", np.arange(3) * 1.0), "scale1/y", "coordinates", "got 3 values"),
    "unlisted": (unlist_labels, "labels", "labels", "cells is not listed"),
    "listed and gone": (gone("labels/cells"), "labels", "labels", "cells is none; remove it from the list"),
    "no image-label": (no_image_label, "labels/cells", "labels", "napari shows it as an image"),
    "source": (wrong_source, "labels/cells", "labels", r"got '../'; write '../../'"),
    "colours": (twice_coloured, "labels/cells", "labels", "colors must name each label once"),
    "label of another shape": (
        image(lambda m: m["datasets"].pop(0), "labels/cells"),
        "labels/cells",
        "labels",
        "got y 17 for 33, x 14 for 28",
    ),
    "label elsewhere": (
        image(lambda m: [set_transform(n, 1, [9.0, 9.0])(m) for n in (0,)], "labels/cells"),
        "labels/cells",
        "labels",
        "lie where their image lies, got scale 0.5 and translation 9 along y for 0.5 and 0",
    ),
    "label of fewer levels": (
        image(lambda m: m["datasets"].pop(), "labels/cells"),
        "labels/cells",
        "labels",
        "got 4 for 5",
    ),
    "label of floats": (
        other_array("labels/cells/scale0/image", np.zeros((33, 28), "f4")),
        "labels/cells/scale0/image",
        "labels",
        "must be integers, got float32",
    ),
    "channels": (channels_described(2), "", "omero", "each of the 1 channels, got 2"),
    "colour": (channels_described(1, color="green"), "", "omero", "six hexadecimal digits, got 'green'"),
    "window": (
        channels_described(1, window={"min": 0, "max": 1, "start": 5, "end": 2}),
        "",
        "omero",
        "min 0, start 5, end 2, max 1 of channel 0",
    ),
    "omero": (
        lambda p: edit(p / "zarr.json", lambda m: m["attributes"]["ome"].update(omero=[])),
        "",
        "omero",
        "must have a list of channels",
    ),
    "version": (
        lambda p: edit(p / "zarr.json", lambda m: m["attributes"]["ome"].update(version="0.4")),
        "",
        "version",
        "OME-Zarr 0.4 must be Zarr 2, got Zarr 3",
    ),
    "stale": (stale, "scale1/image", "consolidated", "must be what the node itself says"),
    "not consolidated": (listed_by_nobody, "scale1/image", "consolidated", "xarray does not see it"),
    "consolidated and gone": (nothing_there, "old", "consolidated", "there is nothing"),
    "no metadata": (
        image(lambda m: m["axes"].append({"type": "space"})),
        "",
        "metadata",
        "OME-Zarr metadata of the container cannot be read: KeyError: 'name'",
    ),
    "nonsense": (
        lambda p: edit(p / "labels/zarr.json", lambda m: m["attributes"]["ome"].update(labels=[None])),
        "labels",
        "labels",
        "None is none",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lint") / "out.zarr"
    RUNS["labels beside an image"].predict(path)
    for voxels in path.rglob("image/c"):  # nobody reads them
        shutil.rmtree(voxels)
    return path


@pytest.mark.parametrize("name", TABLE, ids=lambda name: name.replace(" ", "-"))
def test_each_fault_is_found_and_its_place_named(name: str, written: Path, tmp_path: Path) -> None:
    change, place, rule, message = TABLE[name]
    path = tmp_path / "broken.zarr"
    shutil.copytree(written, path)
    change(path)
    found = oocpatch.lint(path).findings
    assert any(f.place == place and f.rule == rule for f in found), found
    told = " | ".join(f.message for f in found if (f.place, f.rule) == (place, rule))
    assert re.search(message, told), told


def test_a_fault_is_told_once_and_nothing_else_is(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.zarr"
    shutil.copytree(written, path)
    for name in ("unit", "colour", "not consolidated"):
        TABLE[name][0](path)
    assert [(f.place, f.rule) for f in oocpatch.lint(path).findings] == [
        ("", "units"),
        ("", "omero"),
        ("scale1/image", "consolidated"),
    ]


def test_plates_wells_and_lists_of_labels_are_walked_through(written: Path, tmp_path: Path) -> None:
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}, {"path": "A/2", "rowIndex": 0, "columnIndex": 1}]
    zarr.create_group(tmp_path / "plate", attributes={"ome": {"version": "0.5", "plate": {"wells": wells}}})
    zarr.create_group(tmp_path / "plate/A")
    well = {"images": [{"path": "0"}, {"path": "1"}]}
    zarr.create_group(tmp_path / "plate/A/1", attributes={"ome": {"version": "0.5", "well": well}})
    shutil.copytree(written, tmp_path / "plate/A/1/0")
    report = oocpatch.lint(tmp_path / "plate")
    assert report.images == 3
    assert [(f.place, f.rule) for f in report.findings] == [("A/2", "listed"), ("A/1/1", "listed")]
    assert oocpatch.lint(tmp_path / "plate/A/1/0/labels").images == 2


def test_levels_whose_halves_are_rounded_either_way_have_no_faults(tmp_path: Path) -> None:
    axes = [{"name": n, "type": "space"} for n in "yx"]
    shapes = [(101, 57), (50, 29), (25, 14), (13, 7)]
    datasets = [
        {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": [2**k, 2**k]}]} for k in range(4)
    ]
    ome = {"version": "0.5", "multiscales": [{"type": "nearest", "axes": axes, "datasets": datasets}]}
    group = zarr.create_group(tmp_path / "flat.zarr", attributes={"ome": ome})
    for k, shape in enumerate(shapes):
        group.create_array(str(k), shape=shape, dtype="u2", dimension_names=("y", "x"))
    assert oocpatch.lint(tmp_path / "flat.zarr").findings == ()


def test_the_command_prints_findings_and_ends_with_one(written: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["lint", str(written), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "passed": True,
        "path": str(written),
        "images": 3,
        "levels": 15,
        "findings": [],
    }
    path = tmp_path / "broken.zarr"
    shutil.copytree(written, path)
    TABLE["unit"][0](path)
    done = CliRunner().invoke(main, ["lint", str(path)])
    assert done.exit_code == 1
    assert done.stdout == (
        f"{path}: 3 images, 15 levels, 1 finding\n"
        "  .: units must have the long names of the format, got 'um' of y; write micrometer [units]\n"
    )
    zarr.create_group(tmp_path / "plain.zarr")
    for missing, told in (("plain.zarr", "must be an OME-Zarr, got "), ("nowhere.zarr", "not found: ")):
        done = CliRunner().invoke(main, ["lint", str(tmp_path / missing)])
        assert done.exit_code == 2
        assert done.stderr.startswith(f"oocpatch: path {told}")
        assert len(done.stderr.splitlines()) == 1
