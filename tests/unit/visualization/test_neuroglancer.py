"""Promises on `view --serve`: a browser of this machine gets the viewer and the files of the layers, nothing else."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner

import oocpatch
from oocpatch.cli.main import main
from oocpatch.visualization.neuroglancer import layers_of, state_of
from tests.support.ome_runs import RUNS


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


def test_the_input_and_the_result_are_layers_whose_files_are_served(served: Served, folder: Path) -> None:
    assert [(layer["name"], layer["type"]) for layer in served.state["layers"]] == [
        ("input", "image"),
        ("prediction", "segmentation"),
    ]
    assert served.state["dimensions"]["x"] == [pytest.approx(0.5e-6), "m"]
    for layer, name in enumerate(("scan.zarr", "out.zarr")):
        status, _, metadata = served.fetch(f"{served.source(layer)}zarr.json")
        assert status == 200
        assert json.loads(metadata)["attributes"]["ome"]["multiscales"][0]["datasets"][0]["path"] == "scale0/image"
        chunk = next((folder / name / "scale0/image/c").rglob("0"))
        while chunk.is_dir():
            chunk = chunk / "0"
        key = chunk.relative_to(folder / name).as_posix()
        data = chunk.read_bytes()
        assert served.fetch(f"{served.source(layer)}{key}")[2] == data
        status, headers, part = served.fetch(f"{served.source(layer)}{key}", Range="bytes=3-9")
        assert (status, part) == (206, data[3:10])
        assert headers["Content-Range"] == f"bytes 3-9/{len(data)}"
        assert served.fetch(f"{served.source(layer)}{key}", Range="bytes=-5")[2] == data[-5:]  # the index of a shard
        assert served.fetch(f"{served.source(layer)}{key}", Range=f"bytes={len(data)}-")[0] == 416
        status, headers, body = served.fetch(f"{served.source(layer)}{key}", method="HEAD")
        assert (status, int(headers["Content-Length"]), body) == (200, len(data), b"")
    assert served.fetch(f"{served.source(0)}no/such/file")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.txt", "%2e%2e/secret.txt", "scale0/../../secret.txt", "scale0/%2e%2e%2f..%2fsecret.txt"),
        *("link", ".", "", "/secret.txt", "//etc/passwd", "%00", "..%5csecret.txt", "scale0"),
    ],
)
def test_nothing_but_files_of_the_layers_is_served(path: str, served: Served) -> None:
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
    layers, refused = layers_of(tmp_path / "out.zarr")
    assert refused == []
    state = state_of(layers, ["http://127.0.0.1/|zarr3:"])
    assert [layer["localPosition"] for layer in state["layers"]] == [[0], [1], [2]]
    assert [layer["blend"] for layer in state["layers"]] == ["default", "additive", "additive"]
    assert len({layer["shaderControls"]["colour"] for layer in state["layers"]}) == 3
    assert state["displayDimensions"] == ["x", "y"]
    transform = state["layers"][0]["source"]["transform"]
    assert list(transform["outputDimensions"]) == ["c'", "y", "x"]
    assert transform["outputDimensions"]["x"] == [pytest.approx(1e-7), "m"]
    assert transform["matrix"] == [[1, 0, 0, 0], [0, 1, 0, -0.5], [0, 0, 1, -0.5]]


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


def test_outputs_that_the_viewer_cannot_read_are_reported(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "wide.zarr", data=np.zeros((8, 8)))
    done = CliRunner().invoke(main, ["view", str(tmp_path / "wide.zarr"), "--serve"])
    assert done.exit_code == 2
    assert "the viewer reads float32, int16, int32, int8, uint16" in done.stderr
    assert done.stderr.endswith("got float64\n")
    zarr.create_array(tmp_path / "good.zarr", data=np.zeros((8, 8), "u1"))
    done = CliRunner().invoke(main, ["view", str(tmp_path / "good.zarr"), "a.png", "--serve"])
    assert done.exit_code == 2
    assert "--serve draws no PNG" in done.stderr
