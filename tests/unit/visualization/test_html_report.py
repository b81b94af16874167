"""Reports and drawings: self-contained, true to the run, and a command that repeats it."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from PIL import Image

import oocpatch
from oocpatch.cli import main as cli
from oocpatch.planning.grid import PatchGrid
from oocpatch.planning.plan import Plan

SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """What is in a page: pictures, text, and whatever it would fetch from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[bytes] = []
        self.words: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if tag == "img" and name == "src" and (value or "").startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode((value or "").partition(",")[2]))
            elif name in ("src", "href", "data") or tag in ("script", "link", "iframe"):
                self.fetched.append(f"{tag} {name} {value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "rect"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).random((24, 32, 32), dtype=np.float32)
    zarr.create_array(tmp_path / "in.zarr", data=values, chunks=(8, 8, 8), dimension_names=("z", "y", "x"))
    return tmp_path


def test_a_report_holds_everything_itself_and_tells_the_run_as_it_was(scan: Path) -> None:
    command = [
        "predict",
        "in.zarr",
        "out.zarr",
        "--model",
        "identity",
        "--patch-size",
        "8,16,16",
        "--patch-overlap",
        "4",
    ]
    assert CliRunner().invoke(cli.main, command).exit_code == 0
    result = CliRunner().invoke(cli.main, ["report", "out.zarr", "--json"])
    assert result.exit_code == 0, result.output
    made = Path(json.loads(result.stdout)["report"])
    assert made.name == "out.zarr.report.html"
    page = Page(made.read_text())
    assert page.open == []
    assert page.fetched == []
    assert "url(" not in made.read_text()
    (picture,) = page.pictures
    assert Image.open(io.BytesIO(picture)).size[0] > 400
    plan = oocpatch.plan("in.zarr", "identity", "out.zarr", patch_size=(8, 16, 16), patch_overlap=4)
    assert f"{plan.patches:,} of 8 x 16 x 16, overlap 4 x 4 x 4" in page.text
    assert f"complete: {scan / 'out.zarr'}" in page.text
    assert torch.__version__.split("+")[0] in page.text
    assert "voxels that no patch covers" in page.text


def test_the_command_of_a_report_gives_the_same_bytes(scan: Path) -> None:
    (scan / "net.py").write_text("def scaled(by=1):\n    return lambda x: x * by\n")
    command = [
        *("predict", "in.zarr", "out.zarr", "--model", "net.py:scaled", "--model-args", "by=3", "--patch-size", "8"),
        *(
            "--patch-overlap",
            "4",
            "--overlap-mode",
            "gaussian",
            "--padding-mode",
            "reflect",
            "--output-dtype",
            "float64",
        ),
        *("--preprocess", '{"name": "percentile", "low": 1, "high": 99}', "--augment", '["z"]', "--batch-size", "2"),
    ]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 0, result.output
    page = Page(oocpatch.report("out.zarr").read_text())
    (told,) = re.findall(r"oocpatch predict [^\n]*?(?= \s*Settings)", page.text)
    words = shlex.split(told)[1:]
    before = zarr.open_array("out.zarr/prediction", mode="r")[:]
    again = [word if word != str(scan / "out.zarr") else "again.zarr" for word in words]
    result = CliRunner().invoke(cli.main, again)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(zarr.open_array("again.zarr/prediction", mode="r")[:], before)
    # and the very same call finds the run complete
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output


def test_a_run_notes_its_settings_versions_and_plan(scan: Path) -> None:
    oocpatch.predict("in.zarr", torch.nn.Identity(), scan / "out.zarr", patch_size=8, progress=False, max_memory="1GiB")
    details = zarr.open_group("out.zarr", mode="r").attrs["oocpatch"]["details"]  # type: ignore[index,call-overload]
    assert details["settings"]["volume"] == str(scan / "in.zarr")
    assert details["settings"]["max_memory"] == "1GiB"
    assert details["settings"]["model"] == "<Identity>"
    assert details["versions"]["numpy"] == np.__version__
    assert details["process_peak_memory"] > 50 << 20
    plan = Plan.from_json(json.dumps(details["plan"]))
    assert plan.patches == 3 * 4 * 4
    page = Page(oocpatch.report("out.zarr").read_text())
    assert "# model: <Identity> oocpatch.predict( volume=" in " ".join(page.text.split())


def test_a_report_of_objects_has_a_histogram_of_their_areas(scan: Path) -> None:
    sides = (2, 3, 4, 5, 8)  # squares, whose areas are 4 to 64
    image = np.zeros((32, 96), np.float32)
    for n, side in enumerate(sides * 2):
        image[8 : 8 + side, 9 * n : 9 * n + side] = 1
    oocpatch.label(image, "cells.zarr", threshold=0.5, progress=False)
    page = Page(oocpatch.report("cells.zarr").read_text())
    assert page.open == []
    assert "10 in number; smallest 4, median 16, mean 23.6, largest 64 voxels; at most 2 in a bin" in page.text
    frame = oocpatch.objects("cells.zarr", spacing=0.5, progress=False)
    frame[frame["area"] > 2].to_csv("large.csv", index=False)
    page = Page(oocpatch.report("cells.zarr", table="large.csv").read_text())
    assert "8 in number; smallest 2.25, median 5.125, mean 7.125, largest 16; at most 2 in a bin" in page.text
    for table, reason in (
        ("cells.zarr", "must end in .parquet or .csv"),
        ("none.csv", "must be a file"),
        ("a.csv", "`area`"),
    ):
        (scan / "a.csv").write_text("label,area\n1,large\n")
        done = CliRunner().invoke(cli.main, ["report", "cells.zarr", "--table", table])
        assert (done.exit_code, reason in done.stderr) == (2, True), done.stderr


def test_a_report_without_objects_has_no_histogram(scan: Path) -> None:
    oocpatch.label(np.zeros((8, 8), np.uint8), "none.zarr", progress=False)
    assert "Areas" not in Page(oocpatch.report("none.zarr").read_text()).text
    (scan / "zero.csv").write_text("label,area\n1,0\n")
    assert "Areas" not in Page(oocpatch.report("none.zarr", table="zero.csv").read_text()).text


def test_a_report_of_several_heads_has_the_areas_of_those_with_objects(scan: Path) -> None:
    cells = np.zeros((24, 24), np.int32)
    cells[2:6, 2:6], cells[10:20, 10:20] = 3, 5

    def model(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cells": x, "half": (x == 3).to(torch.int32), "prob": x.to(torch.float32)}

    modes = {"cells": "instances", "half": "instances", "prob": "hann"}
    oocpatch.predict(
        cells, model, "out.zarr", overlap_mode=modes, patch_size=16, patch_overlap=8, work="light", progress=False
    )
    text = Page(oocpatch.report("out.zarr").read_text()).text
    assert "2 cells; 1 half" in text
    assert "Areas of the objects of cells" in text
    assert "2 in number; smallest 16, median 58" in text
    assert "1 in number; smallest 16, median 16" in text
    assert "Areas of the objects of prob" not in text


def test_a_run_that_failed_has_a_report_that_names_the_blocks(scan: Path) -> None:
    def fragile(x: torch.Tensor) -> torch.Tensor:
        if x.any():
            raise RuntimeError("fell off the <bus>")
        return x

    with pytest.raises(oocpatch.BlockFailed):
        oocpatch.predict("in.zarr", fragile, "out.zarr", patch_size=8, progress=False)
    page = Page(oocpatch.report("out.zarr").read_text())
    assert "incomplete, 0 of" in page.text
    assert "fell off the <bus>" in page.text


def test_what_is_no_output_has_no_report(scan: Path) -> None:
    with pytest.raises(ValueError, match=r"a report needs the output of a run, got in\.zarr"):
        oocpatch.report("in.zarr")


def rects(svg: str, kind: str) -> list[tuple[float, ...]]:
    """Left, top, width and height of the rectangles of a class, section by section."""
    found = [e for e in ET.fromstring(svg).iter(f"{SVG}rect") if e.get("class") == kind]  # noqa: S314 (ours)
    return [tuple(float(e.get(k, "nan")) for k in ("x", "y", "width", "height")) for e in found]


def test_a_drawing_has_the_blocks_the_seams_and_the_patches_where_they_are(scan: Path) -> None:
    data = zarr.create_array("flat.zarr", shape=(60, 120), chunks=(10, 10), dtype="float32", dimension_names=("y", "x"))
    sizes = {"patch_size": 20, "patch_overlap": 10, "block_shape": (30, 40), "output_chunks": 10}
    plan = oocpatch.plan(data, "identity", "out.zarr", **sizes)
    svg = plan.draw()
    per_voxel = 300 / 120
    cores = sorted((round(y / per_voxel), round(x / per_voxel), round(h / per_voxel), round(w / per_voxel))
                   for x, y, w, h in rects(svg, "core even") + rects(svg, "core odd"))  # fmt: skip
    blocks = [plan.block_grid[i] for i in range(plan.blocks)]
    assert cores == sorted((*b.core.start, *b.core.shape) for b in blocks)
    area = sum(round(w / per_voxel) * round(h / per_voxel) for _, _, w, h in rects(svg, "seam"))
    assert area == sum(b.reach.size - b.core.size for b in blocks) > 0
    first = rects(svg, "patch first")
    assert [(round(w / per_voxel), round(h / per_voxel)) for _, _, w, h in first] == [(20, 20)]
    drawn = Path("plan.svg")
    result = CliRunner().invoke(
        cli.main, ["plan", "flat.zarr", "out.zarr", "--model", "identity", "--patch-size", "20", "--draw", "plan.svg"]
    )
    assert result.exit_code == 0, result.output
    assert ET.fromstring(drawn.read_text()).tag == f"{SVG}svg"  # noqa: S314 (ours)


def test_a_drawing_of_a_million_blocks_is_small(scan: Path) -> None:
    grid = PatchGrid.of((1 << 20,) * 3, (64,) * 3, (32,) * 3)
    assert len(grid._repr_html_()) < 200_000
    data = zarr.create_array("big.zarr", shape=(1 << 16,) * 3, chunks=(64,) * 3, dtype="uint8")
    plan = oocpatch.plan(data, "identity", "out.zarr", patch_size=64, patch_overlap=32, block_shape=256)
    assert plan.blocks > 10**6
    html = plan._repr_html_()
    assert len(html) < 400_000
    assert "256x256 blocks, the first 16x16 drawn" in plan.draw()


def test_a_notebook_shows_the_rows_of_a_plan_and_its_drawing_as_an_image(scan: Path) -> None:
    plan = oocpatch.plan("in.zarr", "identity", "out.zarr", patch_size=16, workers=1, processes=True)
    html = plan._repr_html_()
    table, _, image = html.partition("</table>")
    cells = [text.split(">")[-1] for text in table.split("</td>")[:-1]]
    printed = [line.split(maxsplit=1) for line in str(plan).splitlines()]
    assert [[name, unescape(text)] for name, text in zip(cells[::2], cells[1::2], strict=True)] == printed
    assert printed[-1][0] == "workers"  # which the plan of a run has, and not the plan itself
    # The styles of a drawing within the page would apply to all of it.
    assert base64.b64decode(image.partition("base64,")[2].rstrip('">')).decode() == plan.draw()
    assert "<style" not in html
