"""Promises on `view --serve`: a browser of this machine gets the viewer and the voxels of the layers, nothing else."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nibabel
import numpy as np
import pytest
import torch
import xarray
import yaozarrs
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli.main import main
from oocpatch.planning.box import Box
from oocpatch.visualization.layers import layers_of
from oocpatch.visualization.neuroglancer import state_of
from oocpatch.visualization.virtual_zarr import VirtualZarr
from tests.support.ome_runs import RUNS
from tests.unit.volumes.test_formats import KINDS


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str

    @property
    def state(self) -> Any:
        return json.loads(unquote(urlsplit(self.url).fragment.removeprefix("!")))

    def fetch(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Ask for a path as it stands: no library may tidy it up."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(place.hostname), place.port or 0, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def source(self, layer: int) -> str:
        source = self.state["layers"][layer]["source"]
        return urlsplit(source if isinstance(source, str) else source["url"]).path.split("|")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    RUNS["3-D"].predict(folder / "scan.zarr")
    settings = {"patch_size": 8, "output_chunks": 4, "output_shards": 8, "postprocess": "threshold:3"}
    oocpatch.predict(folder / "scan.zarr", torch.nn.Identity(), folder / "out.zarr", **settings)
    (folder / "secret.txt").write_text("not for you")
    (folder / "out.zarr" / "link").symlink_to(folder / "secret.txt")
    return folder


@contextlib.contextmanager
def serving(folder: Path, *words: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "oocpatch", "view", *words, "--serve", "--no-browser", "--json"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Served(process, json.loads(process.stdout.readline())["url"])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder, "out.zarr") as served:
        yield served


def test_the_page_and_its_scripts_come_from_this_machine(served: Served) -> None:
    place = urlsplit(served.url)
    assert place.hostname == "127.0.0.1"
    status, headers, page = served.fetch(place.path)
    assert status == 200
    assert headers["Content-Type"] == "text/html"
    assert b"<title>neuroglancer</title>" in page
    scripts = [part.split(b'"')[0].decode() for part in page.split(b'src="')[1:]]
    assert scripts
    for script in scripts:
        assert ":" not in script
        status, headers, body = served.fetch(f"{place.path}{script}")
        assert status == 200
        assert headers["Content-Type"] == "application/javascript"
        assert len(body) == int(headers["Content-Length"]) > 1000


def stored(get: Callable[[str], bytes | None], path: Path) -> zarr.Group:
    """What is served, as a directory that zarr reads: all metadata, and all chunks of all levels."""
    image = json.loads(get("zarr.json") or b"")
    paths = [level["path"] for level in image["attributes"]["ome"]["multiscales"][0]["datasets"]]
    keys = ["zarr.json"]
    for name in paths:
        array = json.loads(get(f"{name}/zarr.json") or b"")
        chunks = array["chunk_grid"]["configuration"]["chunk_shape"]
        counts = [range(-(-n // c)) for n, c in zip(array["shape"], chunks, strict=True)]
        keys += [f"{name}/zarr.json", *(f"{name}/c/{'/'.join(map(str, p))}" for p in itertools.product(*counts))]
    for key in keys:
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(get(key) or b"")
    return zarr.open_group(path, mode="r")


def test_the_input_and_the_result_are_layers_with_all_their_levels(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    assert [(layer["name"], layer["type"]) for layer in served.state["layers"]] == [
        ("input", "image"),
        ("prediction", "segmentation"),
    ]
    assert served.state["dimensions"]["x"] == [pytest.approx(0.5e-6), "m"]
    for layer, name in enumerate(("scan.zarr", "out.zarr")):
        group = stored(lambda key, layer=layer: served.fetch(served.source(layer) + key)[2], tmp_path / name)
        yaozarrs.validate_zarr_store(tmp_path / name)
        levels = group.attrs.asdict()["ome"]["multiscales"][0]["datasets"]
        expected = zarr.open_group(folder / name, mode="r").attrs.asdict()["ome"]["multiscales"][0]["datasets"]
        assert len(levels) == len(expected) > 1
        for own, level in zip(levels, expected, strict=True):
            np.testing.assert_array_equal(group[own["path"]], zarr.open_array(folder / name / level["path"], mode="r"))
            for (kind, values), (_, wanted) in zip(
                *([list(t.items())[::-1][0] for t in x["coordinateTransformations"]] for x in (own, level)), strict=True
            ):
                np.testing.assert_allclose(values, np.multiply(wanted, 1e-6), err_msg=kind)  # meters, micrometers
    assert served.fetch(f"{served.source(0)}0/c/99/0/0")[0] == 404


@pytest.mark.parametrize("kind", ["slide", "nifti.gz", "hdf5", "int64", "float64", "bool"])
def test_every_volume_that_can_be_read_is_served_with_its_voxels(kind: str, tmp_path: Path) -> None:
    volume: Any = tmp_path / "a"
    if kind in KINDS:
        make, name, part, _, _ = KINDS[kind]
        make(tmp_path / name)
        volume = f"{tmp_path / name}{part}"
    else:
        data = np.random.default_rng(0).integers(0, 99, (70, 90)).astype(kind)
        zarr.create_array(volume, data=data, dimension_names=("y", "x"))
    (layer,) = layers_of(volume)
    group = stored(VirtualZarr(layer).get, tmp_path / "served")
    assert len(layer.levels) == (2 if kind == "slide" else 1)
    for number, level in enumerate(layer.levels):
        found = np.asarray(group[str(number)])
        assert str(found.dtype) in {"uint8", "int16", "uint16", "uint32", "int32", "uint64", "float32"}
        values = level.read(Box.of_shape(level.shape))
        np.testing.assert_array_equal(found.reshape(values.shape), values)


def test_a_converted_volume_lies_where_its_coordinates_say_at_every_level(tmp_path: Path) -> None:
    coords = {"y": ("y", np.arange(40) * 0.5 + 3, {"units": "micrometer"})}
    data = xarray.DataArray(np.zeros((40, 50), np.uint8), dims=("y", "x"), coords=coords)
    oocpatch.convert(data, tmp_path / "a.zarr", chunks=16, progress=False)
    (layer,) = layers_of(tmp_path / "a.zarr")
    image = json.loads(VirtualZarr(layer).get("zarr.json") or b"")["attributes"]["ome"]["multiscales"][0]
    assert len(image["datasets"]) > 1
    for number, level in enumerate(image["datasets"]):
        scale, start = (transformation.popitem()[1] for transformation in level["coordinateTransformations"])
        np.testing.assert_allclose(scale[0], 0.5e-6 * 2**number)
        np.testing.assert_allclose(start[0], (3 + 0.25 * (2**number - 1)) * 1e-6)


def test_a_scan_lies_where_its_affine_says_and_has_radiological_slices(tmp_path: Path) -> None:
    affine = np.array([[0, -2, 0, 9], [0, 0, 3, 8], [1, 0, 0, 7], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine), tmp_path / "a.nii")
    state = state_of(layers_of(tmp_path / "a.nii"), ["http://127.0.0.1/|zarr3:"])
    transform = state["layers"][0]["source"]["transform"]
    assert transform["outputDimensions"] == {name: [1e-3, "m"] for name in "xyz"}
    assert transform["inputDimensions"] == {name: [1, ""] for name in "xyz"}
    matrix = np.array(transform["matrix"])
    np.testing.assert_allclose(matrix[:, :3] * 1e3, affine[:3, :3])  # the viewer's are meters
    np.testing.assert_allclose(matrix[:, 3], affine[:3, 3])
    shown = [panel for row in state["layout"]["children"] for panel in row["children"]]
    sides = []
    for panel in shown[:3]:
        x, y, z, w = panel["crossSectionOrientation"]["value"]
        turn = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z)],
                [2 * (x * z - w * y), 2 * (y * z + w * x)],
            ]
        )
        sides.append([tuple(np.rint(turn[:, 0]).astype(int)), tuple(np.rint(turn[:, 1]).astype(int))])
    left, back, feet = (-1, 0, 0), (0, -1, 0), (0, 0, -1)
    assert sides == [[left, back], [left, feet], [back, feet]]  # across and down: axial, coronal, sagittal


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.txt", "%2e%2e/secret.txt", "0/../../secret.txt", "0/%2e%2e%2f..%2fsecret.txt", "link", ".", ""),
        *("/secret.txt", "//etc/passwd", "%00", "..%5csecret.txt", "scale0", "0", "9/zarr.json", "0/c/0", "0/c/0/0/-1"),
    ],
)
def test_nothing_but_the_layers_is_served(path: str, served: Served) -> None:
    status, _, body = served.fetch(served.source(1) + path)
    assert status == 404
    assert body == b""


def test_pages_from_elsewhere_and_who_does_not_know_the_token_get_nothing(served: Served) -> None:
    source = f"{served.source(1)}zarr.json"
    status, headers, _ = served.fetch(source, Origin="http://elsewhere.example")
    assert "Access-Control-Allow-Origin" not in headers  # so a browser hands it to no other page
    assert status == 200
    port = urlsplit(served.url).port
    assert served.fetch(source, Host=f"elsewhere.example:{port}")[0] == 404
    assert served.fetch(source, Host=f"localhost:{port}")[0] == 200
    parts = source.split("/")
    assert served.fetch("/".join([*parts[:2], "another-token", *parts[3:]]))[0] == 404
    assert served.fetch("/")[0] == 404


def test_ctrl_c_ends_it_with_0_while_a_browser_is_connected(served: Served) -> None:
    place = urlsplit(served.url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port or 0, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", place.path.replace("/v/", "/events/").rstrip("/") + "?c=1&gc=")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.readline().startswith(b"data: ")
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 0


def test_channels_are_layers_that_are_added_up(tmp_path: Path) -> None:
    oocpatch.predict(RUNS["channels"].volume(), torch.nn.Identity(), tmp_path / "out.zarr", patch_size=8)
    state = state_of(layers_of(tmp_path / "out.zarr"), ["http://127.0.0.1/|zarr3:"])
    assert [layer["localPosition"] for layer in state["layers"]] == [[0], [1], [2]]
    assert [layer["blend"] for layer in state["layers"]] == ["default", "additive", "additive"]
    assert len({layer["shaderControls"]["colour"] for layer in state["layers"]}) == 3
    assert state["displayDimensions"] == ["x", "y"]
    assert state["dimensions"]["x"] == [pytest.approx(1e-7), "m"]


def test_labels_have_the_rows_of_a_table_as_properties_of_their_segments(tmp_path: Path) -> None:
    labels = np.zeros((16, 16), np.uint32)
    labels[2:4, 2:8], labels[9:12, 9:12] = 7, 4_000_000_000
    zarr.create_array(tmp_path / "cells.zarr", data=labels, dimension_names=("y", "x"))
    image = np.where(labels == 7, 2.5, np.nan).astype(np.float32)
    frame = oocpatch.objects(labels, intensity=image, axes="yx", progress=False)
    frame.assign(kind=["round", "flat"]).to_parquet(tmp_path / "cells.parquet")
    with serving(tmp_path, "cells.zarr", "--table", "cells.parquet") as served:
        (layer,) = served.state["layers"]
        assert layer["type"] == "segmentation"
        assert layer["segmentQuery"] == "|area |mean |min |max |std |kind"
        assert served.state["selectedLayer"]["layer"] == layer["name"]
        place, driver = layer["source"][1].split("|")
        assert driver == "neuroglancer-precomputed:"
        status, headers, body = served.fetch(f"{urlsplit(place).path}info")
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    table = json.loads(body)
    assert table["@type"] == "neuroglancer_segment_properties"
    assert table["inline"]["ids"] == ["7", "4000000000"]
    columns = {column.pop("id"): column for column in table["inline"]["properties"]}
    assert columns["area"] == {"type": "number", "data_type": "int32", "values": [12, 9]}
    assert columns["centroid_x"] == {"type": "number", "data_type": "float32", "values": [4.5, 10.0]}
    assert columns["mean"]["values"] == [2.5, "nan"]
    assert columns["kind"] == {"type": "string", "values": ["round", "flat"]}


def test_a_table_that_fits_no_labels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zarr.create_array("good.zarr", data=np.zeros((8, 8), "f4"))
    (tmp_path / "a.csv").write_text("label,area\n1,2\n")
    (tmp_path / "twice.csv").write_text("label,t,area\n1,0,2\n1,1,3\n")
    for words, reason in (
        (["--table", "a.csv"], "--table needs --serve"),
        (["--table", "a.csv", "--serve"], "a table needs labels, but"),
        (["--table", "twice.csv", "--serve"], "one row per label"),
    ):
        done = CliRunner().invoke(main, ["view", "good.zarr", *words])
        assert (done.exit_code, reason in done.stderr) == (2, True), done.stderr


def test_a_picture_and_a_viewer_at_a_time_are_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "good.zarr", data=np.zeros((8, 8), "u1"))
    done = CliRunner().invoke(main, ["view", str(tmp_path / "good.zarr"), "a.png", "--serve"])
    assert done.exit_code == 2
    assert "--serve draws no PNG" in done.stderr
