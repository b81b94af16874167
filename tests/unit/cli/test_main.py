"""The command line: data on stdout, the rest on stderr, telling exit codes, no traceback for a mistake."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner, Result

import oocpatch
from oocpatch import errors
from oocpatch.cli import main as cli
from oocpatch.cli import types

ROOT = Path(__file__).parents[3]
PATCHES = ["--patch-size", "8", "--patch-overlap", "4"]
IDENTITY = ["--model", "identity", *PATCHES]

MODELS = '''
import os
import time


def double(x):
    return x * 2


def fail_on_request(x):
    # The probe is all zeros; the volume has no zeros.
    if os.path.exists("broken") and x.any():
        raise RuntimeError("the network is broken")
    return x * 2


def slow(x):
    if x.any():
        with open("started", "w"):
            pass
        time.sleep(0.02)
    return x * 2


class Drifting:
    """Another answer at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x + self.calls
'''


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """A volume in.zarr and models.py in the current directory; the volume's voxels."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODELS)
    voxels = np.arange(1, 24 * 20 * 20 + 1, dtype=np.float32).reshape(24, 20, 20)
    zarr.create_array(tmp_path / "in.zarr", data=voxels, chunks=(8, 8, 8), dimension_names=("z", "y", "x"))
    return voxels


def run(*arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli.main, arguments)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Run a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "oocpatch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def prediction(path: str = "out.zarr") -> np.ndarray[Any, Any]:
    with xr.open_zarr(path, consolidated=False) as dataset:
        return np.asarray(dataset["prediction"].values)


def one_line(result: Result) -> str:
    """The last line of stderr, which must be the only one that complains."""
    assert "Traceback" not in result.stderr
    complaints = [line for line in result.stderr.splitlines() if line.startswith(("oocpatch: ", "Error: "))]
    assert len(complaints) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == complaints[0]
    return complaints[0]


@pytest.mark.parametrize("command", [[], ["plan"], ["predict"], ["status"], ["demo"], ["check"]], ids=" ".join)
def test_help_imports_no_heavy_library(command: list[str]) -> None:
    code = (
        "import sys; from oocpatch.cli.main import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'zarr', 'dask', 'xarray', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_predict_writes_the_output_and_prints_one_line_of_data(data: np.ndarray[Any, Any]) -> None:
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(prediction(), data, rtol=1e-6)
    line = result.stdout.strip()
    assert "\n" not in line
    assert line.startswith("out.zarr: ")
    assert line.endswith(" s, 80 patches, 0 uncovered voxels")
    assert "patches" in result.stderr  # the plan
    again = run("predict", "in.zarr", "out.zarr", *IDENTITY)
    assert again.stdout == "out.zarr: was complete, 80 patches, 0 uncovered voxels\n"
    anew = run("predict", "in.zarr", "out.zarr", *IDENTITY, "--overwrite")
    assert anew.stdout.endswith(" s, 80 patches, 0 uncovered voxels\n")


def test_a_box_is_all_that_is_computed_and_the_rest_is_reported(data: np.ndarray[Any, Any]) -> None:
    box = ["--box", "0:8,:,12:", "--overlap-mode", "crop", "--patch-overlap", "0"]
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY, *box, "--json", "--output-fill", "-1")
    assert result.exit_code == 0, result.output
    expected = np.full_like(data, -1)
    # Patches start at 0, 8 and 12: that at 8 has the voxels up to 12, that at 12 the rest.
    expected[:8, :, 8:] = data[:8, :, 8:]
    np.testing.assert_array_equal(prediction(), expected)
    assert json.loads(result.stdout)["uncovered_voxels"] == (expected == -1).sum()
    refused = run("predict", "in.zarr", "other.zarr", *IDENTITY, "--box", "0:8,:,x")
    assert refused.exit_code == 2
    assert "START:STOP" in one_line(refused)


def test_predict_as_json_says_what_was_done(data: np.ndarray[Any, Any]) -> None:
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY, "--json", "--overlap-mode", "crop")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report.pop("seconds") > 0
    assert report.pop("blocks") >= 1
    assert report == {
        "output": "out.zarr",
        "complete": True,
        "patches": 80,
        "uncovered_voxels": 0,
        "nonfinite_voxels": 0,
    }
    np.testing.assert_array_equal(prediction(), data)


def test_options_reach_predict(data: np.ndarray[Any, Any]) -> None:
    options = ["--patch-size", "8,10,12", "--patch-overlap", "2,4,6", "--overlap-mode", "average", "--batch-size", "3"]
    options += ["--padding-mode", "constant", "--fill", "2.5", "--axes", "tyx", "--output-dtype", "int32"]
    options += ["--output-chunks", "10", "--max-memory", "64MiB", "--workers", "1", "--progress", "none"]
    # With axes tyx, the first axis is looped over, and the sizes are for the two others.
    options[1], options[3] = "10,12", "4,6"
    assert run("predict", "in.zarr", "out.zarr", "--model", "models.py:double", *options).exit_code == 0
    with xr.open_zarr("out.zarr", consolidated=False) as dataset:
        array = dataset["prediction"]
        assert array.dims == ("z", "y", "x")  # the volume's own names stay; `axes` told their roles
        assert array.dtype == np.int32
        assert array.encoding["chunks"][1:] == (10, 10)
        np.testing.assert_array_equal(array.values, data.astype(np.int32) * 2)


def test_plan_as_json_has_the_numbers_and_writes_nothing(data: np.ndarray[Any, Any]) -> None:
    before = sorted(Path().iterdir())
    result = run("plan", "in.zarr", "out.zarr", *IDENTITY, "--block-shape", "8", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    # Starts 0, 4, ... per axis: 5 along 24 voxels, 4 along 20.
    assert plan["patches"] == 5 * 4 * 4
    numbers = {
        "blocks",
        "block_shape",
        "patches_per_block",
        "projected_memory",
        "projected_disk",
        "bytes_read",
        "bytes_written",
        "concurrency",
    }
    assert numbers <= plan.keys()
    assert plan["projected_memory"] > 0
    assert sorted(Path().iterdir()) == before


def test_plan_for_people_is_what_predict_announces(data: np.ndarray[Any, Any]) -> None:
    planned = run("plan", "in.zarr", "out.zarr", *IDENTITY)
    assert planned.exit_code == 0
    assert "80 of 8 x 8 x 8" in planned.stdout
    assert run("predict", "in.zarr", "out.zarr", *IDENTITY, "--progress", "none").stderr.startswith(planned.stdout)


BAD_INPUT = {
    "no-volume": (["missing.zarr", "out.zarr", *IDENTITY], "missing.zarr"),
    "no-such-module": (["in.zarr", "out.zarr", "--model", "no_such:Net", *PATCHES], "no module 'no_such'"),
    "no-such-name": (["in.zarr", "out.zarr", "--model", "models.py:Net", *PATCHES], "choose from Drifting, double"),
    "overlap": (["in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8", "--patch-overlap", "8"], "smaller"),
    "size": (["in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8,x"], "'8,x'"),
    "sizes": (["in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8,8"], "patch_size"),
    "axes": (["in.zarr", "out.zarr", *IDENTITY, "--axes", "zyxq"], "axes"),
    "memory": (["in.zarr", "out.zarr", *IDENTITY, "--max-memory", "many"], "many"),
    "mode": (["in.zarr", "out.zarr", *IDENTITY, "--overlap-mode", "median"], "median"),
    "dtype": (["in.zarr", "out.zarr", *IDENTITY, "--output-dtype", "float33"], "float33"),
    "device": (["in.zarr", "out.zarr", *IDENTITY, "--device", "abacus"], "abacus"),
    "weights": (["in.zarr", "out.zarr", *IDENTITY, "--weights", "w.pth"], "weights need a module that has parameters"),
    "no-model": (["in.zarr", "out.zarr", *PATCHES], "--model"),
    "no-output": (["in.zarr", *IDENTITY], "OUT"),
    "unknown-option": (["in.zarr", "out.zarr", *IDENTITY, "--patchsize", "3"], "--patchsize"),
    "below-a-file": (["in.zarr", "models.py/out.zarr", *IDENTITY], "models.py"),
    "into-itself": (["in.zarr", "in.zarr", *IDENTITY], "in.zarr"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
@pytest.mark.usefixtures("data")
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(arguments: list[str], named: str) -> None:
    before = sorted(Path().rglob("*"))
    result = run("predict", *arguments)
    assert named in one_line(result)
    assert result.exit_code == 2
    assert result.stdout == ""
    after = [path for path in sorted(Path().rglob("*")) if "__pycache__" not in path.parts]
    assert after == before


def test_a_plan_that_is_too_large_is_refused_with_exit_code_3(data: np.ndarray[Any, Any]) -> None:
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY, "--max-memory", "4KiB")
    assert "max_memory" in one_line(result)
    assert result.exit_code == 3
    assert not Path("out.zarr").exists()


def test_another_run_on_the_same_output_is_refused_with_exit_code_3(data: np.ndarray[Any, Any]) -> None:
    assert run("predict", "in.zarr", "out.zarr", *IDENTITY).exit_code == 0
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY, "--overlap-mode", "gaussian")
    assert "overlap_mode" in one_line(result)
    assert result.exit_code == 3
    assert run("predict", "in.zarr", "out.zarr", *IDENTITY, "--overlap-mode", "gaussian", "--overwrite").exit_code == 0


def test_foreign_data_is_refused_with_exit_code_3_and_left_alone(data: np.ndarray[Any, Any]) -> None:
    zarr.create_array("out.zarr", data=np.ones(3))
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY, "--overwrite")
    assert "out.zarr" in one_line(result)
    assert result.exit_code == 3
    assert np.asarray(zarr.open_array("out.zarr")[:]).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.PlanTooLarge("x"), 3),
        (errors.RunMismatch("x"), 3),
        (errors.OutputExists("x"), 3),
        (errors.OutputBusy("x"), 3),
        (errors.BlockFailed("x", {}), 1),
        (errors.CorruptData("x"), 1),
        (ValueError("x"), 2),
        (TypeError("x"), 2),
        (FileNotFoundError("x"), 2),
        (PermissionError("x"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.usefixtures("data")
def test_every_expected_error_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(oocpatch, "plan", refuse)
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY)
    assert result.exit_code == code
    assert one_line(result)


@pytest.mark.usefixtures("data")
def test_a_full_disk_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(oocpatch, "plan", refuse)
    assert "make room, and the same command continues" in one_line(run("predict", "in.zarr", "out.zarr", *IDENTITY))


@pytest.mark.usefixtures("data")
def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(oocpatch, "plan", stumble)
    assert isinstance(run("predict", "in.zarr", "out.zarr", *IDENTITY).exception, KeyError)


def test_failed_blocks_are_exit_code_1_and_the_same_command_retries_them(data: np.ndarray[Any, Any]) -> None:
    command = ["predict", "in.zarr", "out.zarr", "--model", "models.py:fail_on_request", *PATCHES, "--json"]
    Path("broken").touch()
    result = run(*command)
    assert result.exit_code == 1
    assert "the network is broken" in one_line(result)
    report = json.loads(result.stdout)
    assert report["complete"] is False
    assert "the network is broken" in report["failed"]["0"]
    status = json.loads(run("status", "out.zarr", "--json").stdout)
    assert status["state"] == "incomplete"
    Path("broken").unlink()
    assert run(*command).exit_code == 0
    np.testing.assert_allclose(prediction(), data * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGINT, ["--workers", "1"]),
        (signal.SIGTERM, ["--workers", "1"]),
        (signal.SIGTERM, ["--processes", "--workers", "2"]),
    ],
    ids=["ctrl-c", "sigterm", "processes"],
)
def test_interrupt_ends_with_130_and_the_same_command_continues(
    number: int, workers: list[str], data: np.ndarray[Any, Any]
) -> None:
    command = ["predict", "in.zarr", "out.zarr", "--model", "models.py:slow", *PATCHES, "--block-shape", "8"]
    command += ["--output-chunks", "8"]
    child = start(*command, *workers)
    deadline = time.monotonic() + 120
    while not Path("started").exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "interrupted; finished blocks are kept, and the same command continues" in stderr.splitlines()[-1]
    assert ("dashboard: http" in stderr) == ("--processes" in workers)
    status = run("status", "out.zarr")
    assert status.exit_code == 0
    assert status.stdout.splitlines()[0].endswith("out.zarr: incomplete")
    assert run(*command, "--workers", "1").exit_code == 0
    np.testing.assert_allclose(prediction(), data * 2, rtol=1e-6)


def test_parts_are_commands_of_an_array_job(data: np.ndarray[Any, Any]) -> None:
    command = ["predict", "in.zarr", "out.zarr", *IDENTITY, "--block-shape", "8", "--output-chunks", "8", "--json"]
    for number in (2, 1, 3):
        result = run(*command, "--part", f"{number}/3")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["complete"] is (number == 3)
    np.testing.assert_allclose(prediction(), data, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--processes"], "give --workers N"),
        (["--processes", "--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "give one of them"),
        (["--part", "1/2", "--scheduler", "tcp://127.0.0.1:1"], "give one of the two"),
        (["--part", "third"], "parts are I/N, such as 3/16"),
        (["--part", "4/3"], "i from 1 to n"),
        (["--scheduler", "htcondor"], "tcp://host:port, file:scheduler.json or slurm, got 'htcondor'"),
        (["--scheduler", "slurm"], "give --workers N"),
        (["--scheduler", "file:nothing.json"], "no scheduler"),
    ],
    ids=" ".join,
)
def test_ways_to_compute_that_do_not_go_together_are_refused(
    options: list[str], words: str, data: np.ndarray[Any, Any]
) -> None:
    result = run("predict", "in.zarr", "out.zarr", *IDENTITY, *options)
    assert result.exit_code == 2
    assert words in one_line(result)
    assert not Path("out.zarr").exists()


def test_status_of_nothing_is_absent_and_of_a_finished_run_complete(data: np.ndarray[Any, Any]) -> None:
    absent = run("status", "out.zarr", "--json")
    assert absent.exit_code == 2
    assert json.loads(absent.stdout)["state"] == "absent"
    assert run("predict", "in.zarr", "out.zarr", *IDENTITY).exit_code == 0
    result = run("status", "out.zarr", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["state"] == "complete"
    assert run("status", "out.zarr").stdout.splitlines()[0].endswith("out.zarr: complete")


@pytest.mark.usefixtures("data")
def test_check_passes_for_an_honest_model_and_fails_for_one_that_drifts() -> None:
    passed = run("check", "in.zarr", "--model", "models.py:double", *PATCHES, "--boxes", "2", "--json")
    assert passed.exit_code == 0, passed.output
    report = json.loads(passed.stdout)
    assert report["passed"] is True
    assert len(report["boxes"]) == 2
    failed = run("check", "in.zarr", "--model", "models.py:Drifting", *PATCHES, "--boxes", "1")
    assert failed.exit_code == 1
    assert failed.stdout.splitlines()[-1] == "FAIL"


@pytest.mark.parametrize("text", ["96", "32,96,96"])
def test_sizes_are_read_as_voxels_per_axis(text: str) -> None:
    assert types.size(text) == (96 if text == "96" else (32, 96, 96))


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("9007199254740993", 9007199254740993), ("0.5", 0.5)])
def test_numbers_that_are_whole_stay_exact(text: str, value: float) -> None:
    assert types.number(text) == value
    assert type(types.number(text)) is type(value)
