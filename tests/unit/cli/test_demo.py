"""The demo tells the truth: about the nuclei, about the score, and about what it writes and leaves alone."""

from __future__ import annotations

import inspect
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from oocpatch.cli import demo
from oocpatch.cli.demo import DemoReport, NucleusNet, Specimen, dice, make_volume, peak_memory, run_demo
from oocpatch.errors import OutputExists
from oocpatch.planning.box import Box
from oocpatch.visualization.canvas import CAPTION, GAP, TOP
from tests.support import oracle

Array = np.ndarray[Any, Any]
SIZE = 160


@dataclass(frozen=True, slots=True)
class Shown:
    """One demo that ran: its report, what it said, and its arrays."""

    report: DemoReport
    said: str
    folder: Path
    volume: Array
    truth: Array
    prediction: Array


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder, said = tmp_path_factory.mktemp("demo"), []
    report = run_demo(folder, size=SIZE, max_memory="96MiB", progress="none", log=said.append)
    group = zarr.open_group(folder / f"nuclei-{SIZE}.zarr", mode="r")
    volume, truth = (np.asarray(group[name][:]) for name in ("volume", "truth"))
    prediction = np.asarray(zarr.open_array(report.output / "prediction", mode="r")[:])
    return Shown(report, "\n".join(said), folder, volume, truth, prediction)


def overlap(a: Array, b: Array) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def times(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_network_finds_the_nuclei_and_the_score_is_the_dice_coefficient(shown: Shown) -> None:
    assert shown.report.score == pytest.approx(overlap(shown.prediction > 0.5, shown.truth > 0), abs=1e-12)
    assert shown.report.score >= 0.9
    assert f"{shown.report.score:.3f}" in shown.said


def test_a_single_threshold_does_not_find_the_nuclei(shown: Shown) -> None:
    counts = torch.from_numpy(shown.volume.astype(np.float32))[None]
    smooth = torch.nn.functional.avg_pool3d(counts, 3, stride=1, padding=1, count_include_pad=False)[0].numpy()
    levels = np.percentile(smooth, np.arange(50, 100))
    assert max(overlap(smooth > level, shown.truth > 0) for level in levels) < shown.report.score - 0.05


def test_the_prediction_is_the_network_blended(shown: Shown) -> None:
    network = NucleusNet()

    def model(patch: Array) -> Array:
        with torch.inference_mode():
            return network(torch.from_numpy(patch.astype(np.float32))[None])[0].numpy()

    patch, shared = (demo.PATCH,) * 3, (demo.OVERLAP,) * 3
    expected = oracle.predict(shown.volume[None], model, patch=patch, overlap=shared, mode="hann")[0]
    np.testing.assert_allclose(shown.prediction, expected, rtol=0, atol=1e-4)


def test_the_report_and_the_story_tell_the_plan(shown: Shown) -> None:
    assert shown.report.plan["patches"] == 27
    assert "27 of 80 x 80 x 80, overlap 16 x 16 x 16, hann" in shown.said
    assert shown.said.index("patches") < shown.said.index("predicted")  # the plan comes first
    assert shown.report.limit == 96 << 20
    assert shown.report.seconds > 0


def test_the_snippet_opens_the_prediction(shown: Shown) -> None:
    lines = shown.said.splitlines()
    at = next(k for k, line in enumerate(lines) if line.strip() == "import xarray as xr")
    names: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in lines[at : at + 3]), names)  # noqa: S102 (it is what users will type)
    np.testing.assert_array_equal(names["nuclei"].values, shown.prediction[SIZE // 2] > 0.5)


def test_a_second_call_writes_no_voxel_and_finds_the_same(shown: Shown) -> None:
    before, said = times(shown.folder), []
    again = run_demo(shown.folder, size=SIZE, max_memory="96MiB", progress="none", log=said.append)
    after = times(shown.folder)
    assert again.score == shown.report.score
    assert {path for path in before if before[path] != after[path]} <= {shown.report.picture}
    assert before.keys() == after.keys()
    assert not any(line.startswith("made") for line in said)


def test_the_default_volume_is_four_times_its_limit() -> None:
    defaults = inspect.signature(run_demo).parameters
    assert 2 * defaults["size"].default ** 3 >= 4 * demo.memory_limit(defaults["max_memory"].default)


def test_any_split_of_the_specimen_holds_the_same_nuclei() -> None:
    specimen, whole = Specimen(90), Box.of_shape((90, 90, 90))
    _, expected = specimen.render(whole)
    assert expected.any()
    for step in ((64, 64, 64), (17, 90, 33)):
        found = np.zeros_like(expected)
        for box in whole.split(step):
            found[box.slices()] = specimen.render(box)[1]
        np.testing.assert_array_equal(found, expected)


def test_the_same_box_holds_the_same_counts_and_another_seed_others() -> None:
    box = Box((20, 20, 20), (60, 60, 60))
    first, again, other = (Specimen(90, seed).render(box) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != other[0]).mean() > 0.9
    assert (first[1] != other[1]).any()


def test_a_volume_whose_making_was_cut_short_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render, calls = Specimen.render, itertools.count()

    def cut_short(self: Specimen, box: Box) -> tuple[Array, Array]:
        if next(calls) >= 3:
            raise KeyboardInterrupt
        return render(self, box)

    specimen, path = Specimen(80), tmp_path / "volume.zarr"
    monkeypatch.setattr(Specimen, "render", cut_short)
    with pytest.raises(KeyboardInterrupt):
        make_volume(specimen, path, print)
    monkeypatch.setattr(Specimen, "render", render)
    make_volume(specimen, path, print)
    group = zarr.open_group(path, mode="r")
    for box in Box.of_shape((80, 80, 80)).split((64, 64, 64)):
        for name, values in zip(("volume", "truth"), specimen.render(box), strict=True):
            np.testing.assert_array_equal(group[name][box.slices()], values)


@pytest.mark.parametrize(
    "attributes", [{}, {demo.MARK: {"size": 96, "seed": 1, "complete": True}}], ids=["foreign", "seed"]
)
def test_what_the_demo_did_not_make_is_refused_and_left_alone(tmp_path: Path, attributes: dict[str, Any]) -> None:
    zarr.create_group(tmp_path / "nuclei-96.zarr", attributes=attributes).create_array("volume", data=np.arange(5))
    before = times(tmp_path)
    with pytest.raises(OutputExists, match=r"nuclei-96\.zarr, which holds something else"):
        run_demo(tmp_path, size=96, keep=False, progress="none", log=print)
    assert times(tmp_path) == before


def test_without_keep_only_the_picture_stays(tmp_path: Path) -> None:
    report = run_demo(tmp_path, size=64, max_memory="96MiB", keep=False, progress="none", log=print)
    assert list(tmp_path.iterdir()) == [report.picture]


def test_without_pillow_there_is_a_line_instead_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    report = run_demo(tmp_path, size=64, max_memory="96MiB", progress="none", log=said.append)
    assert report.picture is None
    assert not list(tmp_path.glob("*.png"))
    assert "pip install 'oocpatch[demo]'" in "\n".join(said)


def test_the_picture_shows_volume_prediction_and_verdict_side_by_side(shown: Shown) -> None:
    assert shown.report.picture is not None
    edge, gap, top, middle = 480, GAP, TOP + CAPTION, SIZE // 2
    with Image.open(shown.report.picture) as picture:
        panels = [
            np.asarray(picture.crop((at, top, at + edge, top + edge)).resize((SIZE, SIZE), Image.Resampling.BOX), float)
            for at in (gap + k * (edge + gap) for k in range(3))
        ]
    inner = np.s_[8:-8, 8:-8]  # resampling bends the border
    for panel, values in zip(panels, (shown.volume[middle], shown.prediction[middle]), strict=False):
        brightness = panel.sum(axis=-1)[inner].ravel()
        assert np.corrcoef(brightness, values[inner].ravel().astype(float))[0, 1] > 0.9
    green = (panels[2][..., 1] > 1.3 * panels[2][..., 0])[inner]
    found = ((shown.prediction[middle] > 0.5) & (shown.truth[middle] > 0))[inner]
    assert overlap(green, found) > 0.9


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ([0.9, 0.9, 0.1, 0.1, 0.1], [1, 1, 0, 0, 0], 1.0),
        ([0.9, 0.9, 0.1, 0.1, 0.1], [0, 0, 1, 1, 0], 0.0),
        ([0.9, 0.9, 0.1, 0.1, 0.9], [0, 1, 0, 0, 1], 0.8),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0, 0], 1.0),
    ],
    ids=["all", "none", "two of three", "empty"],
)
def test_dice_is_twice_the_common_over_the_sum(prediction: list[float], truth: list[int], expected: float) -> None:
    stored = zarr.array(np.array(prediction), chunks=(3,)), zarr.array(np.array(truth), chunks=(2,))
    assert dice(*stored) == pytest.approx(expected)


def test_peak_memory_sees_what_is_already_freed_again() -> None:
    with peak_memory() as added:
        held = np.ones(64 << 20, np.uint8)
        time.sleep(0.1)
        del held
        time.sleep(0.05)
    assert added() >= 60 << 20
