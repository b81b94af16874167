"""Settings from a file and the environment, progress for programs, and what the doctor finds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result

import oocpatch
from oocpatch.cli import main as cli
from oocpatch.progress import ProgressCounter, show_progress
from tests.support.children import Children

CONFIG = """
volume = "in.zarr"
output = "out.zarr"
model = "net.py:scaled"
patch_size = [8, 4]
patch_overlap = 2
overlap_mode = "crop"
padding_mode = "reflect"
preprocess = { name = "scale", divide = 0.5 }
resume = true
skip_empty = false
progress = "none"

[model_args]
by = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = np.arange(1, 32 * 40 + 1, dtype=np.float32).reshape(32, 40)
    zarr.create_array("in.zarr", data=values, chunks=(8, 8), dimension_names=("y", "x"))
    Path("net.py").write_text("def scaled(by=1):\n    return lambda x: x * by\n")
    return tmp_path


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli.main, arguments)


def planned(*arguments: str, **environment: str) -> dict[str, Any]:
    result = run("plan", *arguments, "--json", **environment)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_a_file_of_settings_is_what_typing_them_is() -> None:
    Path("run.toml").write_text(CONFIG)
    typed = planned(
        *("in.zarr", "out.zarr", "--model", "net.py:scaled", "--model-args", "by=3", "--patch-size", "8,4"),
        *("--patch-overlap", "2", "--overlap-mode", "crop", "--padding-mode", "reflect"),
        *("--preprocess", '{"name": "scale", "divide": 0.5}'),
    )
    assert planned("--config", "run.toml") == typed
    assert typed["patch_size"] == [8, 4]
    result = run("predict", "--config", "run.toml")
    assert result.exit_code == 0, result.output
    found = zarr.open_array("out.zarr/prediction", mode="r")[:]
    assert found[0, :3].tolist() == [6, 12, 18]


def test_what_is_typed_goes_before_the_file_and_the_file_before_what_is_built_in() -> None:
    Path("run.toml").write_text(CONFIG)
    found = planned("in.zarr", "other.zarr", "--config", "run.toml", "--patch-size", "16")
    assert found["patch_size"] == [16, 16]
    assert found["patch_overlap"] == [2, 2]


def test_the_environment_gives_options() -> None:
    arguments = ("in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8")
    assert planned(*arguments, OOCPATCH_PLAN_BATCH_SIZE="3")["batch_size"] == 3
    assert planned(*arguments, "--batch-size", "2", OOCPATCH_PLAN_BATCH_SIZE="3")["batch_size"] == 2
    assert planned(*arguments, OOCPATCH_BATCH_SIZE="4")["batch_size"] == 4
    assert planned(*arguments, OOCPATCH_BATCH_SIZE="4", OOCPATCH_PLAN_BATCH_SIZE="3")["batch_size"] == 3


def test_a_refusal_names_the_variable_that_an_option_came_from() -> None:
    arguments = ["plan", "in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8"]
    small = run(*arguments, OOCPATCH_PLAN_MAX_MEMORY="1KiB")
    assert small.exit_code == 3
    assert "max_memory is from the variable OOCPATCH_PLAN_MAX_MEMORY" in small.output
    typed = run(*arguments, "--max-memory", "1KiB", OOCPATCH_MAX_MEMORY="1GiB")
    assert typed.exit_code == 3
    assert "OOCPATCH_MAX_MEMORY" not in typed.output
    wrong = run(*arguments, OOCPATCH_WORKERS="many")
    assert wrong.exit_code == 2
    assert "workers is from the variable OOCPATCH_WORKERS" in wrong.output


def test_the_environment_gives_an_option_to_every_command_that_has_it() -> None:
    wrong = {"OOCPATCH_PROGRESS": "loud", "OOCPATCH_MAX_MEMORY": "much"}
    predict = ("predict", "in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8")
    for command in (predict, ("convert", "in.zarr", "out.zarr"), ("demo", "here")):
        result = run(*command, **wrong)
        assert result.exit_code == 2
        assert "Invalid value for '--progress': 'loud'" in result.stderr, command
        if command[0] == "demo":
            continue  # it reads its limit when the volume is made
        result = run(*command, OOCPATCH_MAX_MEMORY="much")
        assert result.exit_code == 2
        assert "'much'" in result.stderr, command
    assert "Invalid value" not in run("status", "out.zarr", **wrong).stderr, "status has neither option"


def test_pyramids_have_a_progress_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    volume = zarr.open_array("in.zarr", mode="r")[...]
    settings = {"patch_size": 8, "output_chunks": 4, "output_format": "ome-zarr", "progress": "json"}
    oocpatch.predict(volume, "identity", "pyramid.zarr", **settings)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["verb"] for line in lines] == ["predict"] * 2 + ["pyramid"] * 2
    assert (lines[2]["done"], lines[3]["done"]) == (0, lines[3]["total"])
    levels = len(list(Path("pyramid.zarr").glob("scale*")))
    assert lines[3]["total"] >= levels - 1 > 0
    oocpatch.predict(volume, "identity", "plain.zarr", **{**settings, "output_format": "zarr"})
    assert "pyramid" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patch-size = 8", "run.toml must hold parameters of plan, got patch-size; did you mean patch_size"),
        ("[predict]", "run.toml must hold parameters of plan, got predict; these are allow_nonfinite, .*, workspace"),
        ("patch_size = ", "run.toml must be TOML"),
        ("patch_size = 'large'", "sizes are whole numbers of voxels"),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_message(text: str, message: str) -> None:
    Path("run.toml").write_text(text)
    result = run("plan", "in.zarr", "out.zarr", "--model", "identity", "--config", "run.toml")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert re.search(message, " ".join(result.stderr.split()))


def test_progress_for_programs_is_an_object_per_line_and_ends_with_all(children: Children) -> None:
    command = ["predict", "in.zarr", "out.zarr", "--model", "identity", "--patch-size", "8", "--progress", "json"]
    code, _, stderr = children.call("tests.support.command_child", *command, folder=Path.cwd())
    assert code == 0, stderr
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    assert (lines[0]["done"], lines[0]["total"]) == (0, 20)
    assert lines[-1]["done"] == 20
    assert lines[-1]["verb"] == "predict"
    assert lines[-1]["per_second"] > 0
    assert lines[-1]["megabytes_per_second"] >= 0


def test_blocks_done_before_are_reported_and_do_not_count_as_speed() -> None:
    ticks = iter([0.0, 10.0])
    tally = ProgressCounter("predict", "patches", 1000, resumed=500, bytes_each=1e6, clock=lambda: next(ticks))
    tally.add(100)
    assert tally.line() == "predict: 600 of 1,000 patches (60%, 50% from before), 10.0 patches/s, 10.0 MB/s, 0:40 left"


def test_lines_where_there_is_no_terminal_and_silence_about_what_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("plain", "convert", "voxels", 10) as tell:
        tell(10)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "convert: 0 of 10 voxels (0%)"
    assert last.startswith("convert: 10 of 10 voxels (100%)")
    for silent in ("auto", "none", False):
        with show_progress(silent, "convert", "voxels", 10) as tell:
            tell(10)
        assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="progress must be one of 'auto', 'bar', 'plain', 'json', 'none', got 'loud'"):
        show_progress("loud", "convert", "voxels", 10).__enter__()


def test_the_logger_tells_when_a_run_starts_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "oocpatch")
    oocpatch.predict("in.zarr", "identity", "out.zarr", patch_size=8, progress=False)
    first, last = (record.getMessage() for record in caplog.records)
    assert first == f"{Path('out.zarr').absolute()} starts: 20 patches in 1 blocks"
    assert last.startswith(f"{Path('out.zarr').absolute()} is complete after ")


def test_the_doctor_says_what_is_there_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["versions"]["numpy"] == np.__version__
    assert found["extras"]["tiff"] == []
    assert found["memory"]["auto"] <= found["memory"]["total"]
    monkeypatch.setattr("oocpatch.cli.doctor.EXTRAS", {"tiff": ("no_such_library",), "view": ("PIL",)})
    lines = run("doctor").stdout.splitlines()
    assert "extra tiff         needs no_such_library: pip install 'oocpatch[tiff]'" in lines
    assert "extra view         there" in lines
