"""A pattern in the place of a volume: a run for each volume that it matches, with the model loaded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result

from oocpatch.cli import main as cli

NET = """
with open("loaded", "a") as file:
    file.write("x")


def double(patches):
    if patches.max() > 100:
        raise RuntimeError("too bright")
    return patches * 2
"""


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray[Any, Any]]:
    """Volumes of different shapes in the folder `scans`, and net.py, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    volumes = {name: np.random.default_rng(n).random((12, 9 + n), np.float32) for n, name in enumerate("abc")}
    for name, values in volumes.items():
        zarr.create_array(f"scans/{name}.ome.zarr", data=values, chunks=(8, 8), dimension_names=("y", "x"))
    return volumes


def predict(*arguments: str) -> Result:
    """Run the command in this process."""
    settings = ("--model", "net.py:double", "--patch-size", "8", "--patch-overlap", "4")
    return CliRunner().invoke(cli.main, ["predict", *arguments, *settings])


def test_each_volume_is_a_run_and_the_model_is_loaded_once(scans: dict[str, np.ndarray[Any, Any]]) -> None:
    done = predict("scans/*.zarr", "out", "--json")
    assert done.exit_code == 0, done.stderr
    reports = json.loads(done.stdout)
    assert [(r["volume"], r["output"], r["complete"]) for r in reports] == [
        (f"scans/{name}.ome.zarr", f"out/{name}.zarr", True) for name in scans
    ]
    assert "2 of 3: scans/b.ome.zarr -> out/b.zarr" in done.stderr
    assert Path("loaded").read_text() == "x"
    for name, values in scans.items():
        np.testing.assert_allclose(zarr.open_group(f"out/{name}.zarr")["prediction"][:], values * 2, rtol=1e-6)
        assert predict(f"scans/{name}.ome.zarr", f"out/{name}.zarr").exit_code == 0, "the same run as one of its own"


def test_each_result_is_exported_under_its_own_name(scans: dict[str, np.ndarray[Any, Any]]) -> None:
    done = predict("scans/*.zarr", "out", "--export", ".tif", "--json")
    assert [r["export"] for r in json.loads(done.stdout)] == [f"out/{name}.tif" for name in scans]
    assert all(Path(f"out/{name}.tif").is_file() for name in scans)


@pytest.mark.usefixtures("scans")
def test_the_plan_of_a_pattern_is_that_of_its_first_volume() -> None:
    settings = ("--model", "net.py:double", "--patch-size", "8", "--export", ".tif")
    done = CliRunner().invoke(cli.main, ["plan", "scans/*.zarr", "out", *settings])
    assert done.exit_code == 0, done.stderr
    assert "1 of 3: scans/a.ome.zarr -> out/a.zarr" in done.stderr
    assert "volume   12 x 9 yx" in done.stdout


@pytest.mark.usefixtures("scans")
def test_a_volume_that_fails_stops_no_other_and_the_same_command_tries_it_again() -> None:
    bright = zarr.open_array("scans/b.ome.zarr", mode="a")
    bright[:] = np.asarray(bright[:]) + 200
    Path("scans/0.zarr").mkdir()
    done = predict("scans/*.zarr", "out", "--json")
    assert done.exit_code == 1
    reports = json.loads(done.stdout)
    assert [report["complete"] for report in reports] == [False, True, False, True]
    assert "volume cannot be read" in reports[0]["error"]
    assert "too bright" in reports[2]["failed"]["0"]
    assert "2 of 4 volumes failed" in done.stderr
    Path("scans/0.zarr").rmdir()
    assert predict("scans/*.zarr", "out").exit_code == 1
    Path("net.py").write_text(NET.replace("> 100", "> 1000"))
    one = predict("scans/b.ome.zarr", "out/b.zarr")
    assert one.exit_code == 3, "another model"
    assert predict("scans/*.zarr", "out", "--overwrite").stdout == "out: 3 of 3 volumes are complete\n"


@pytest.mark.usefixtures("scans")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scans/*.nii", "out"), "'scans/*.nii' matches none"),
        (("scans/**/*.ome.zarr", "out"), "results of scans/a.ome.zarr and scans/again/a.ome.zarr would both be"),
        (("scans/a*", "scans/b.ome.zarr"), "OUT must be a folder for the results"),
        (("scans/a*", "net.py"), "OUT must be a folder for the results"),
        (("scans/*.zarr", "out", "--export", "labels.nii.gz"), "--export must be an ending"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(arguments: tuple[str, ...], message: str) -> None:
    zarr.create_array("scans/again/a.ome.zarr", data=np.zeros((8, 8), np.float32), dimension_names=("y", "x"))
    done = predict(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not Path("out").exists()


def test_results_in_the_folder_of_the_scans_are_no_scans(scans: dict[str, np.ndarray[Any, Any]]) -> None:
    for _ in range(2):
        done = predict("scans/**/*.zarr", "scans/out")
        assert done.stdout == f"scans/out: {len(scans)} of {len(scans)} volumes are complete\n"


def test_a_path_with_brackets_that_exists_is_a_volume(scans: dict[str, np.ndarray[Any, Any]]) -> None:
    Path("scans/a.ome.zarr").rename("scans/a[1].zarr")
    assert predict("scans/a[1].zarr", "one.zarr").exit_code == 0
    np.testing.assert_allclose(zarr.open_group("one.zarr")["prediction"][:], scans["a"] * 2, rtol=1e-6)
